"""How many micro-batches each rank has, so that a step stays the same."""

from __future__ import annotations

import pytest

from qlora_hal.config.schema import TrainingConfig
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError
from qlora_hal.ranks.window_share import accumulation_of, sequences_of_one_rank


def test_without_a_global_batch_each_rank_has_what_the_settings_say() -> None:
    training = TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert accumulation_of(training, World(0, 4)) == 3
    assert sequences_of_one_rank(training) == 6


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_a_global_batch_is_dealt_out(ranks: int, accumulation: int) -> None:
    training = TrainingConfig(per_device_train_batch_size=2, global_batch_size=24)
    assert accumulation_of(training, World(0, ranks)) == accumulation


def test_a_run_that_goes_on_keeps_its_step_whatever_the_settings_say() -> None:
    training = TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert accumulation_of(training, World(0, 1), sequences_per_step=24) == 12


@pytest.mark.fault("R05")
@pytest.mark.parametrize(("wanted", "ranks"), [(24, 5), (24, 24), (2, 2), (7, 1)])
def test_a_global_batch_that_does_not_divide_is_refused_with_the_numbers(wanted: int, ranks: int) -> None:
    training = TrainingConfig(per_device_train_batch_size=2, global_batch_size=wanted)
    with pytest.raises(
        ConfigError, match=rf"{wanted} sequences a step cannot be dealt out to {ranks} device"
    ) as caught:
        accumulation_of(training, World(0, ranks))
    assert caught.value.code == "QH-R05"
    assert caught.value.context == {
        "sequences_per_step": wanted,
        "devices": ranks,
        "per_device_train_batch_size": 2,
    }


@pytest.mark.fault("R05")
def test_a_run_that_goes_on_is_told_which_numbers_of_devices_would_do() -> None:
    training = TrainingConfig(per_device_train_batch_size=2)
    with pytest.raises(ConfigError) as caught:
        accumulation_of(training, World(0, 5), sequences_per_step=24)
    assert caught.value.fix == "Use a number of devices that divides 12."
