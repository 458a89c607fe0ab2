"""Cards by the names that people write, with what a run on them computes in."""

from __future__ import annotations

import pytest

from qlora_hal.errors import ConfigError
from qlora_hal.memory.gpus import GIB, KNOWN_GPUS, known_gpu


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 4090", "NVIDIA RTX 4090"),
        ("rtx4090", "NVIDIA RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA RTX 4090"),
        ("3060 12GB", "NVIDIA RTX 3060 12 GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA RTX 4090 Laptop"),
        ("rtx 3080 mobile 16GB", "NVIDIA RTX 3080 Laptop 16 GB"),
        ("5070 ti laptop", "NVIDIA RTX 5070 Ti Laptop"),
        ("RTX 4070 SUPER", "NVIDIA RTX 4070 SUPER"),
        ("3090", "NVIDIA RTX 3090"),
        ("9070", "AMD Radeon RX 9070"),
        ("RX 9070 XT", "AMD Radeon RX 9070 XT"),
        ("4070 Ti", "NVIDIA RTX 4070 Ti"),
        ("A100 80GB", "NVIDIA A100 80 GB"),
        ("A100-SXM-40GB", "NVIDIA A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80 GB"),
        ("H100", "NVIDIA H100 80 GB"),
        ("L40", "NVIDIA L40"),
        ("A6000", "NVIDIA RTX A6000"),
        ("Tesla V100 32GB", "NVIDIA V100 32 GB"),
        ("7900xtx", "AMD Radeon RX 7900 XTX"),
        ("MI300X", "AMD Instinct MI300X"),
        ("Apple 64GB", "Apple M-series, 64 GB"),
    ],
)
def test_a_card_is_known_by_the_words_of_its_name(written: str, name: str) -> None:
    assert known_gpu(written).name == name


def test_each_card_is_known_by_its_own_name() -> None:
    assert [known_gpu(card.name) for card in KNOWN_GPUS] == list(KNOWN_GPUS)


@pytest.mark.fault("U80")
@pytest.mark.parametrize(
    ("written", "close"),
    [
        ("RTX 4900", "NVIDIA RTX 4090"),
        ("A100", "NVIDIA A100 40 GB"),
        ("4060 Ti", "NVIDIA RTX 4060 Ti 16 GB"),
        ("MI300", "AMD Instinct MI300X"),
        ("RTX 3060", "NVIDIA RTX 3060 8 GB"),
        ("3080 laptop", "NVIDIA RTX 3080 Laptop 8 GB"),
        ("RTX 4060 SUPER", "NVIDIA RTX 4060"),
        ("RTX 6000", "NVIDIA RTX A6000"),
    ],
)
def test_an_unknown_card_is_refused_with_the_closest_names(written: str, close: str) -> None:
    with pytest.raises(ConfigError) as refused:
        known_gpu(written)
    assert refused.value.code == "QH-U80"
    assert close in refused.value.cause
    assert len(refused.value.context["close"]) <= 4  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["", "   ", "frobnicator"])
def test_a_name_that_is_close_to_none_is_told_what_to_give_instead(written: str) -> None:
    with pytest.raises(ConfigError) as refused:
        known_gpu(written)
    assert "--training.memory_limit 24GB" in refused.value.fix


@pytest.mark.parametrize("number", [*range(3050, 3100, 10), *range(4050, 4100, 10), *range(5050, 5100, 10)])
def test_desktops_and_laptops_of_one_number_are_other_cards(number: int) -> None:
    names = [card.name for card in KNOWN_GPUS if str(number) in card.name.split()]
    laptops = [name for name in names if "Laptop" in name]
    assert names
    assert bool(laptops) == (number != 3090)
    assert len(laptops) < len(names) or number == 4050, "NVIDIA sold no 4050 but for laptops"


def test_a_laptop_often_has_less_memory() -> None:
    for number in ("3060 8GB", "3070", "4080", "4090", "5070", "5090"):
        assert known_gpu(f"{number.split()[0]} laptop").memory_bytes <= known_gpu(number).memory_bytes
    assert known_gpu("RTX 4090 Laptop").memory_bytes == 16376 * 2**20


def test_cards_without_bfloat16_compute_in_float16() -> None:
    assert {card.name for card in KNOWN_GPUS if card.compute_dtype == "float16"} == {
        "NVIDIA T4",
        "NVIDIA V100 16 GB",
        "NVIDIA V100 32 GB",
    }


def test_every_card_says_whose_word_its_facts_are() -> None:
    assert all(card.source for card in KNOWN_GPUS)
    assert len({card.name for card in KNOWN_GPUS}) == len(KNOWN_GPUS)
    [dual] = [card for card in KNOWN_GPUS if card.devices > 1]
    assert (dual.name, dual.devices, dual.memory_bytes) == ("AMD Instinct MI250X", 2, 64 * GIB)
