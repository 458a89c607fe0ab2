"""Dropout masks are the same bits on every backend, however a window is cut."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.dropout import channel_words, drop_below, kept, mix, rows_of, token_words
from qlora_hal.contract.values import Batch
from qlora_hal.errors import BackendContractError

MODULE, ROWS = "model.layers.0.self_attn.q_proj", np.array([0, 1, 5], np.int32)
KEYS = (0, 1, 2**31, 2**32, 2**62 + 11, 2**63 - 1)


def test_mix_is_the_finalizer_of_murmurhash3() -> None:
    """Values of Appleby's `fmix32`."""
    assert mix(np.array([0, 1, 2, 0xFFFFFFFF], np.uint32)).tolist() == [0, 0x514E28B7, 0x30F4C306, 0x81F16F39]


def test_a_mask_does_not_move_between_releases() -> None:
    """A run that is resumed by a later release draws the masks of the earlier one."""
    found = kept(123456789012345, MODULE, np.arange(4, dtype=np.int32), 6, 24, 0.3)
    assert "".join("01"[int(bit)] for bit in found[2, 5]) == "110111111110111001011101"


@pytest.mark.parametrize("key", KEYS)
def test_rows_of_a_window_have_their_masks_in_any_micro_batch(key: int) -> None:
    whole = kept(key, MODULE, ROWS, 9, 16, 0.3)
    for line, row in enumerate(ROWS):
        assert np.array_equal(kept(key, MODULE, np.array([row], np.int32), 12, 16, 0.3)[:, :9], whole[line : line + 1])


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_share_that_is_kept(rate: float) -> None:
    """Within six standard deviations of 1 - rate, over all, and at each place and each channel."""
    found = kept(77, MODULE, np.arange(64, dtype=np.int32), 64, 256, rate)
    spread = (rate * (1 - rate)) ** 0.5
    for axes, count in ((None, found.size), (2, 256), ((0, 1), 64 * 64)):
        assert np.abs(found.mean(axis=axes) - (1 - rate)).max() < 6 * spread / count**0.5


def test_nothing_that_differs_shares_its_mask() -> None:
    """Keys that differ in any one bit, modules, rows, positions: two masks agree as often as chance has it."""
    rate, chance = 0.5, 0.5
    base = kept(2**40, MODULE, np.arange(2, dtype=np.int32), 8, 1024, rate)
    others = [kept(2**40 ^ (1 << bit), MODULE, np.arange(2, dtype=np.int32), 8, 1024, rate) for bit in range(63)]
    others += [
        kept(2**40, f"model.layers.{n}.mlp.up_proj", np.arange(2, dtype=np.int32), 8, 1024, rate) for n in range(9)
    ]
    others += [base[::-1], np.roll(base, 1, axis=1), np.roll(base, 1, axis=2)]
    for other in others:
        assert abs((base == other).mean() - chance) < 6 * 0.5 / base.size**0.5


def test_words_of_tokens_and_channels_are_all_different() -> None:
    tokens = token_words(5, np.arange(128, dtype=np.int32), 2048)
    # Of 2^18 words of 32 bits about 8 pairs are the same by chance.
    assert tokens.size - len(np.unique(tokens)) < 32
    channels = channel_words(MODULE, 2**15)
    assert channels.size - len(np.unique(channels)) < 4


def test_torch_and_mlx_compute_the_same_bits() -> None:
    import mlx.core as mx
    import torch

    from qlora_hal_backends.mlx_lora import lora_linear as mlx
    from qlora_hal_backends.torch_family import lora_linear as torch_family

    for key in KEYS:
        for rate in (1e-4, 0.05, 0.5, 0.999):
            tokens, channels = token_words(key, ROWS, 33).reshape(-1), channel_words(MODULE, 70)
            expected = kept(key, MODULE, ROWS, 33, 70, rate).reshape(-1, 70)
            device = torch.device("cpu")
            found = torch_family.kept_inputs(
                torch_family.words_on(tokens, device), torch_family.words_on(channels, device), rate
            )
            assert np.array_equal(found.numpy(), expected)
            assert np.array_equal(np.array(mlx.kept_inputs(mx.array(tokens), mx.array(channels), rate)), expected)


def test_rates_are_told_apart_down_to_the_31st_bit() -> None:
    assert (drop_below(0.0), drop_below(0.5), drop_below(2.0**-31)) == (0, 2**30, 1)


def test_a_batch_that_does_not_know_its_rows_is_refused() -> None:
    ids = np.zeros((1, 2), np.int32)
    with pytest.raises(BackendContractError, match="QH-B02"):
        rows_of(Batch(ids, ids, ids, ids))


@pytest.mark.parametrize("rate", [1 - 2**-32, 1 - 1e-10, 1 - 2**-53])
def test_the_bound_of_a_rate_next_to_one_fits_a_signed_integer(rate: float) -> None:
    """One more, and torch's 32-bit comparison kept everything, multiplied by 1 / (1 - rate)."""
    assert drop_below(rate) == 2**31 - 1
