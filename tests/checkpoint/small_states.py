"""A training state of a few kilobytes, a pure function of step and variant, and its exact comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_hal.adapter import lora_a_key, lora_b_key
from qlora_hal.checkpoint import TrainingState
from qlora_hal.contract.values import Adapter, AdapterConfig, LinearShape, OptimizerSnapshot

MODULES = {
    f"model.layers.{layer}.self_attn.{name}": LinearShape(24, 16) for layer in range(2) for name in ("q_proj", "v_proj")
}


def small_state(step: int, variant: int = 0, *, width: int = 1) -> TrainingState:
    """`width` multiplies the input size of every module, and so the bytes of the state."""
    random = np.random.default_rng([step, variant])
    config = AdapterConfig(r=4, alpha=8.0, dropout=0.05, target_modules=tuple(sorted(MODULES)))
    tensors: dict[str, npt.NDArray[Any]] = {}
    for module, shape in MODULES.items():
        fan_in, fan_out = shape.inputs, shape.outputs
        tensors[lora_a_key(module)] = random.standard_normal((4, fan_in * width), dtype=np.float32)
        tensors[lora_b_key(module)] = random.standard_normal((fan_out, 4), dtype=np.float32)
    moments = {
        f"{key}.{moment}": random.standard_normal(tensor.shape, dtype=np.float32)
        for key, tensor in tensors.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    native: dict[str, npt.NDArray[Any]] = {
        "codes": random.integers(0, 256, size=(7, 3), dtype=np.uint8),
        "absmax": random.standard_normal(5, dtype=np.float32),
        "count": np.array(step, dtype=np.int64),
    }
    return TrainingState(
        step=step,
        epoch=step / 7,
        tokens_seen=step * 1000,
        adapter=Adapter(tensors, config),
        optimizer=OptimizerSnapshot(step, moments, exact=False, native_kind="bnb8bit", native=native),
        loop={"best_eval": 1 / 3, "losses": [[1, 2.5], [step, float(np.float32(0.1))]], "variant": variant},
        provenance={"base_name": "org/base", "base_revision": None, "base_fingerprint": "ab" * 32, "block_size": 64},
    )


def assert_same_state(found: TrainingState, expected: TrainingState) -> None:
    """Every bit: names, dtypes, shapes, bytes, and the JSON half."""
    assert (found.step, found.epoch, found.tokens_seen) == (expected.step, expected.epoch, expected.tokens_seen)
    assert found.loop == expected.loop
    assert found.provenance == expected.provenance
    assert found.adapter.config == expected.adapter.config
    assert_same_arrays(found.adapter.tensors, expected.adapter.tensors)
    assert_same_arrays(found.optimizer.moments, expected.optimizer.moments)
    assert_same_arrays(found.optimizer.native, expected.optimizer.native)
    for name in ("step", "exact", "native_kind"):
        assert getattr(found.optimizer, name) == getattr(expected.optimizer, name)


def assert_same_arrays(found: Mapping[str, npt.NDArray[Any]], expected: Mapping[str, npt.NDArray[Any]]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name
