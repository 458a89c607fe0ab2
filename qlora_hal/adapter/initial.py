"""The adapter before the first step, drawn on the host so that every backend starts from the same bits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.adapter.targets import require_modules
from qlora_hal.contract.values import Adapter, AdapterConfig, Float32, LinearShape


def initial_adapter(config: AdapterConfig, linear_modules: Mapping[str, LinearShape], seed: int) -> Adapter:
    """A uniform in +-1/sqrt(in) `[r, in]`, B zero `[out, r]`, float32, for every path in `config.target_modules`; of a
    stack `[experts, r, in]` and `[experts, out, r]`.

    The bound is what PEFT's `kaiming_uniform_(a=sqrt(5))` (He et al. 2015) and mlx-lm both come to. Each tensor has a
    Philox stream of its own, keyed by seed and name: another set of modules never changes a tensor.
    Raises ConfigError QH-N13 without targets, ModelError QH-C07 for a path the model does not have.
    """
    tensors: dict[str, Float32] = {}
    for module in require_modules(config.target_modules, linear_modules):
        shape = linear_modules[module]
        key = lora_a_key(module)
        tensors[key] = _uniform(seed, key, shape.lora_a(config.r), bound=shape.inputs**-0.5)
        tensors[lora_b_key(module)] = np.zeros(shape.lora_b(config.r), dtype=np.float32)
    return Adapter(tensors, config)


def _uniform(seed: int, name: str, shape: tuple[int, ...], *, bound: float) -> Float32:
    # Raw generator output, because NumPy freezes the bit streams but not the distributions built on them (NEP 19).
    name_hash = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")
    stream = np.random.Philox(key=np.array([seed, name_hash], dtype=np.uint64))
    count = math.prod(shape)
    unit = (stream.random_raw(count) >> np.uint64(40)).astype(np.float64) * 2.0**-24  # 24 bits in [0, 1)
    return ((2.0 * unit - 1.0) * bound).astype(np.float32).reshape(shape)
