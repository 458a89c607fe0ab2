"""A field that came later never reaches a backend that does not know it."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from qlora_hal.contract.backend import Compute
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.gates import FIRST_FIELDS, GATES, check_gates
from qlora_hal.contract.values import AdapterConfig, Batch, StepSettings
from qlora_hal.contract.world import World
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_conformance.reference_backend import SPEC

IDS = np.ones((1, 3), np.int32)
BATCH = Batch(IDS, IDS, IDS, IDS)
ASKED = {
    Feature.GRADIENT_CHECKPOINTING: Compute(gradient_checkpointing=True),
    Feature.DATA_PARALLEL: Compute(world=World(1, 2)),
    Feature.SHARDED_BASE: Compute(shard_base=True),
    Feature.RECOMPUTATION_CHOICE: Compute(gradient_checkpointing=True, recompute="offload"),
    Feature.BASE_OFFLOAD: Compute(base_offload=("layers",)),
    Feature.FP8_PRODUCTS: Compute("bfloat16", fp8_products=True),
    Feature.LORA_DROPOUT: AdapterConfig(2, 2.0, dropout=0.1),
    Feature.TOKEN_WEIGHTS: replace(BATCH, weights=np.zeros((1, 3), np.float32)),
}


@pytest.mark.parametrize("kind", GATES)
def test_every_field_is_of_the_first_set_or_names_its_feature(kind: type) -> None:
    assert {field.name for field in fields(kind)} == FIRST_FIELDS[kind] | set(GATES[kind])
    assert not FIRST_FIELDS[kind] & set(GATES[kind])


def test_every_gate_has_a_value_that_asks_for_it() -> None:
    assert set(ASKED) == {feature for gates in GATES.values() for feature in gates.values()}


@pytest.mark.parametrize("feature", ASKED)
def test_a_value_is_refused_where_its_feature_is_not_declared(feature: Feature) -> None:
    features = SPEC.capabilities.features
    without = replace(SPEC, capabilities=replace(SPEC.capabilities, features=features - {feature}))
    declared = replace(SPEC, capabilities=replace(SPEC.capabilities, features=features | {feature}))
    with pytest.raises(UnsupportedFeatureError, match=feature.value) as refusal:
        check_gates(without, ASKED[feature])
    assert (refusal.value.code, refusal.value.context["lacks"]) == ("QH-B01", [feature.value])
    check_gates(declared, ASKED[feature])


@pytest.mark.parametrize("value", [Compute(), AdapterConfig(2, 2.0), StepSettings(1.0, 1.0), BATCH])
def test_defaults_ask_for_nothing(value: Compute | AdapterConfig | StepSettings | Batch) -> None:
    check_gates(replace(SPEC, capabilities=replace(SPEC.capabilities, features=frozenset())), value)
