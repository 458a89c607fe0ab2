"""Dropout masks that are right for few layers, few rows, ordinary rates or small keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qlora_hal.contract.values import AdapterConfig, Int32, LinearShape
from qlora_hal_conformance.reference_backend.dropout import draw_masks
from qlora_hal_oracle import DropoutMasks

from .registry import Mutant, with_rooms

Modules = Mapping[str, LinearShape]


def _masks_of_namesakes(
    config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int, namesake: Mapping[str, str]
) -> DropoutMasks:
    """Each module has the mask of its namesake, where that is as wide."""
    masks = {}
    for module in config.target_modules:
        name = namesake[module]
        same_width = name in modules and modules[name].inputs == modules[module].inputs
        drawn_as = name if same_width else module
        masks[module] = draw_masks(replace(config, target_modules=(drawn_as,)), modules, rows, time, key)[drawn_as]
    return masks


def masks_of_two_layers(config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int) -> DropoutMasks:
    names = {m: re.sub(r"layers\.(\d+)", lambda at: f"layers.{int(at[1]) % 2}", m) for m in config.target_modules}
    return _masks_of_namesakes(config, modules, rows, time, key, names)


def masks_of_four_layers(config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int) -> DropoutMasks:
    names = {m: re.sub(r"layers\.(\d+)", lambda at: f"layers.{int(at[1]) % 4}", m) for m in config.target_modules}
    return _masks_of_namesakes(config, modules, rows, time, key, names)


def one_mask_to_queries_and_values(
    config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int
) -> DropoutMasks:
    names = {m: m.replace("v_proj", "q_proj") for m in config.target_modules}
    return _masks_of_namesakes(config, modules, rows, time, key, names)


def one_mask_to_gate_and_up(config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int) -> DropoutMasks:
    names = {m: m.replace("up_proj", "gate_proj") for m in config.target_modules}
    return _masks_of_namesakes(config, modules, rows, time, key, names)


def masks_by_48_bits_of_the_key(
    config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int
) -> DropoutMasks:
    return draw_masks(config, modules, rows, time, key & (2**48 - 1))


def masks_by_a_float_key(config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int) -> DropoutMasks:
    """A key that went through a float64: 53 bits are left of it."""
    return draw_masks(config, modules, rows, time, int(float(key)))


def masks_of_eight_rows(config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int) -> DropoutMasks:
    return draw_masks(config, modules, (rows % 8).astype(np.int32), time, key)


def rates_in_64ths(config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int) -> DropoutMasks:
    drawn = draw_masks(replace(config, dropout=round(config.dropout * 64) / 64), modules, rows, time, key)
    kept_scale = np.float64(1.0 / (1.0 - config.dropout))
    return {module: np.where(mask > 0.0, kept_scale, 0.0) for module, mask in drawn.items()}


def no_masks_below_a_fiftieth(
    config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int
) -> DropoutMasks:
    return draw_masks(config, modules, rows, time, key) if config.dropout >= 0.02 else {}


def rates_up_to_a_half(config: AdapterConfig, modules: Modules, rows: Int32, time: int, key: int) -> DropoutMasks:
    return draw_masks(replace(config, dropout=min(config.dropout, 0.5)), modules, rows, time, key)


_ROOM = ("48",)
MUTANTS = (
    Mutant(
        "masks_of_two_layers",
        "Gives a layer the masks of the layer two before.",
        _ROOM,
        with_rooms(masks=masks_of_two_layers),
    ),
    Mutant(
        "masks_of_four_layers",
        "Gives a layer the masks of the layer four before.",
        _ROOM,
        with_rooms(masks=masks_of_four_layers),
    ),
    Mutant(
        "one_mask_to_queries_and_values",
        "Gives v_proj the mask of q_proj.",
        ("43", "48"),
        with_rooms(masks=one_mask_to_queries_and_values),
        may_fail=("31",),
    ),
    Mutant(
        "one_mask_to_gate_and_up",
        "Gives up_proj the mask of gate_proj.",
        ("43", "48"),
        with_rooms(masks=one_mask_to_gate_and_up),
        may_fail=("31",),
    ),
    Mutant(
        "dropout_by_48_bits_of_the_key",
        "Takes the lower 48 bits of the step's dropout key.",
        _ROOM,
        with_rooms(masks=masks_by_48_bits_of_the_key),
    ),
    Mutant(
        "dropout_by_a_float_key",
        "Takes the step's dropout key through a float64.",
        _ROOM,
        with_rooms(masks=masks_by_a_float_key),
    ),
    Mutant(
        "masks_of_eight_rows",
        "Repeats the masks of the first eight rows of a window.",
        _ROOM,
        with_rooms(masks=masks_of_eight_rows),
    ),
    Mutant(
        "dropout_rate_in_64ths",
        "Rounds the rate to a multiple of 1/64.",
        ("43", "48"),
        with_rooms(masks=rates_in_64ths),
        may_fail=("31",),
    ),
    Mutant(
        "no_dropout_below_a_fiftieth",
        "Drops nothing at rates below 0.02.",
        _ROOM,
        with_rooms(masks=no_masks_below_a_fiftieth),
    ),
    Mutant(
        "dropout_of_a_half_at_most",
        "Drops a half where more is asked for.",
        _ROOM,
        with_rooms(masks=rates_up_to_a_half),
    ),
)
