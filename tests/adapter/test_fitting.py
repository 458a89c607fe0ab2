"""An adapter goes onto a model only when every tensor fits, and onto another base only on request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qlora_hal.adapter import (
    check_base,
    check_changed,
    check_fits,
    check_same_settings,
    initial_adapter,
    lora_a_key,
    lora_b_key,
)
from qlora_hal.contract.values import Adapter, AdapterConfig, LinearShape
from qlora_hal.errors import AdapterError, NumericsError
from qlora_hal.model.facts import ModelFacts

MODULES = {
    f"model.layers.{n}.self_attn.{leaf}": LinearShape(32, 16) for n in range(28) for leaf in ("q", "k", "v", "o")
}
CONFIG = AdapterConfig(4, 8.0, target_modules=tuple(sorted(MODULES)))
ADAPTER = initial_adapter(CONFIG, MODULES, seed=0)
FIRST, SECOND, THIRD = sorted(MODULES)[:3]


def changed(**tensors: npt.NDArray[Any] | None) -> Adapter:
    """The adapter with `A0`, `B1`, ... replaced, or removed where None."""
    result = dict(ADAPTER.tensors)
    for name, tensor in tensors.items():
        key = (lora_a_key if name[0] == "A" else lora_b_key)(sorted(MODULES)[int(name[1:])])
        result.pop(key)
        if tensor is not None:
            result[key] = tensor
    return Adapter(result, CONFIG)


def test_a_fitting_adapter_passes() -> None:
    check_fits(ADAPTER, MODULES, where="here")


@pytest.mark.fault("C08")
@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.language_model."])
def test_names_of_another_tool_match_nothing(prefix: str) -> None:
    renamed = {key.replace("base_model.model.", prefix): tensor for key, tensor in ADAPTER.tensors.items()}
    with pytest.raises(AdapterError, match="0 of 224 tensors matched") as refused:
        check_fits(Adapter(renamed, CONFIG), MODULES, where="adapter folder")
    assert (refused.value.code, refused.value.exit_status, refused.value.where) == ("QH-C08", 5, "adapter folder")
    assert len(refused.value.context["tensors"]) == 224  # type: ignore[arg-type]


@pytest.mark.fault("C08")
def test_an_empty_adapter_matches_nothing() -> None:
    with pytest.raises(AdapterError, match="0 of 0"):
        check_fits(Adapter({}, CONFIG), MODULES, where="")


@pytest.mark.fault("C09")
def test_all_wrong_tensors_are_counted_five_are_shown_and_all_are_in_the_context() -> None:
    wrong = changed(
        A0=None,
        B0=None,
        A1=np.zeros((4, 31), np.float32),
        B1=np.zeros((16, 4), np.float16),
        A2=np.full((4, 32), np.nan, np.float32),
    )
    wrong = Adapter({**wrong.tensors, "base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)}, CONFIG)
    with pytest.raises(
        AdapterError, match="2 missing, 1 unexpected, 2 of the wrong shape or dtype, 1 not finite"
    ) as refused:
        check_fits(wrong, MODULES, where="here")
    assert (refused.value.code, refused.value.exit_status) == ("QH-C09", 5)
    assert refused.value.message.count("base_model.model.") == 5
    assert "float32[4, 31], expected float32[4, 32]" in refused.value.message
    context = refused.value.context
    assert context["missing"] == [lora_a_key(FIRST), lora_b_key(FIRST)]
    assert context["unexpected"] == ["base_model.model.lm_head.lora_A.weight"]
    assert context["not finite"] == [lora_a_key(THIRD)]


@pytest.mark.fault("C10")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    tensor = np.zeros((16, 4), np.float32)
    tensor[3, 2] = value
    with pytest.raises(AdapterError, match="1 not finite") as refused:
        check_fits(changed(B1=tensor), MODULES, where="here")
    assert (refused.value.code, refused.value.exit_status) == ("QH-C10", 5)
    assert lora_b_key(SECOND) in refused.value.message


FACTS = ModelFacts("LlamaForCausalLM", "llama", {}, {}, {}, 0, fingerprint="f" * 64)


def test_the_same_base_needs_no_word() -> None:
    assert check_base({"base_fingerprint": "f" * 64}, FACTS, allow_mismatch=False) is None


@pytest.mark.fault("C05")
def test_another_base_of_the_same_shape_is_refused_with_both_names() -> None:
    provenance = {"base_name": "org/first", "base_revision": "abc", "base_fingerprint": "e" * 64}
    with pytest.raises(AdapterError) as refused:
        check_base(provenance, FACTS, allow_mismatch=False, name="org/second")
    assert (refused.value.code, refused.value.exit_status) == ("QH-C05", 5)
    for part in ("org/first at revision abc", "e" * 16, "org/second", "f" * 16):
        assert part in refused.value.message
    assert "--allow-base-mismatch" in refused.value.fix
    note = check_base(provenance, FACTS, allow_mismatch=True, name="org/second")
    assert note is not None
    assert "org/first" in note


@pytest.mark.fault("C05")
def test_an_adapter_that_records_no_base_is_taken_with_a_note() -> None:
    note = check_base({"base_name": "org/first", "base_revision": None}, FACTS, allow_mismatch=False)
    assert note is not None
    assert "not checked" in note


@pytest.mark.fault("C06")
def test_other_settings_on_resume_are_refused_old_against_new() -> None:
    other = replace(CONFIG, r=8, alpha=32.0, target_modules=CONFIG.target_modules[1:])
    with pytest.raises(AdapterError, match=r"r: saved 4, configured 8; alpha: saved 8\.0, configured 32\.0") as refused:
        check_same_settings(CONFIG, other, where="step-00000001")
    assert (refused.value.code, refused.value.exit_status) == ("QH-C06", 5)
    assert f"1 gone ['{FIRST}'], 0 added" in refused.value.message
    check_same_settings(CONFIG, replace(CONFIG, target_modules=CONFIG.target_modules[::-1]), where="")


@pytest.mark.fault("C18")
def test_an_adapter_that_never_changed_is_a_failure_with_status_6() -> None:
    moved = {k: t + np.float32(0.1) if "lora_A" in k else t for k, t in ADAPTER.tensors.items()}
    trained = Adapter({k: t + np.float32(0.1) for k, t in ADAPTER.tensors.items()}, CONFIG)
    for unlearned in (ADAPTER, Adapter(moved, CONFIG)):  # nothing moved; only A moved, by decay say
        with pytest.raises(NumericsError, match="did not change in 7 steps: gradients never reached it") as refused:
            check_changed(ADAPTER, unlearned, steps=7)
        assert (refused.value.code, refused.value.exit_status) == ("QH-C18", 6)
    with pytest.raises(NumericsError, match="0 of 112 modules"):
        check_changed(trained, trained, steps=7)
    assert check_changed(ADAPTER, trained, steps=7) == ()


@pytest.mark.fault("C18")
def test_single_modules_without_gradient_are_named() -> None:
    trained = {k: t + np.float32(0.1) for k, t in ADAPTER.tensors.items()}
    trained[lora_b_key(FIRST)] = ADAPTER.tensors[lora_b_key(FIRST)]
    assert check_changed(ADAPTER, Adapter(trained, CONFIG), steps=7) == (FIRST,)
