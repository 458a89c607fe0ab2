"""Which backend a run gets, and what it says of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qlora_hal.contract.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Capabilities, Feature, Requirements, WeightFormat
from qlora_hal.detect.discovery import BackendEntry, reports
from qlora_hal.detect.selection import Choice, backend_to_name, choose, refuse_unready
from qlora_hal.errors import (
    BackendNotFoundError,
    BackendUnavailableError,
    QloraHalError,
    UnsupportedFeatureError,
)

FOUR_BIT = Requirements(level="4bit")


def spec(
    name: str, priority: int = 1, *, ready: bool = True, accelerator: bool = True, **changes: object
) -> BackendSpec:
    capabilities = Capabilities(
        weight_formats=frozenset({WeightFormat.NONE, WeightFormat.NF4}),
        compute_dtypes=frozenset({"float32"}),
        features=frozenset({Feature.LORA_DROPOUT}),
        block_sizes={WeightFormat.NF4: (64,)},
        levels={"none": WeightFormat.NONE, "4bit": WeightFormat.NF4},
    )

    def probe() -> ProbeReport:
        if ready:
            return ProbeReport(name, Availability.READY, "found")
        return ProbeReport(name, Availability.NO_DEVICE, f"no device for {name}", f"buy a device for {name}")

    made = BackendSpec(name, name, priority, capabilities, probe, "nowhere:Nothing", 2, uses_accelerator=accelerator)
    return replace(made, **changes)  # type: ignore[arg-type]


def chosen(name: str, needs: Requirements, *specs: BackendSpec, allow_cpu: bool = False, **more: object) -> Choice:
    entries = [BackendEntry(s.name, "this process", spec=s) for s in specs]
    return choose(name, needs, entries, reports(entries), allow_cpu=allow_cpu, **more)  # type: ignore[arg-type]


@pytest.mark.fault("E06")
def test_auto_takes_the_highest_priority_and_says_why_not_the_others() -> None:
    choice = chosen("auto", FOUR_BIT, spec("slow", 1), spec("fast", 9), spec("absent", 99, ready=False))
    assert choice.spec.name == "fast"
    assert "highest priority" in choice.reason
    assert choice.rejections["slow"] == "ready, but fast has the higher priority"
    assert choice.rejections["absent"] == "no device for absent"


@pytest.mark.fault("E01")
def test_auto_never_falls_to_the_cpu_silently() -> None:
    with pytest.raises(BackendUnavailableError) as refusal:
        chosen("auto", FOUR_BIT, spec("gpu", 9, ready=False), spec("cpu", 0, accelerator=False))
    error = refusal.value
    assert (error.code, error.exit_status) == ("QH-E01", 3)
    assert "no device for gpu" in error.message
    assert "allow_cpu" in error.message
    assert "--backend cpu" in error.fix


def test_where_ready_backends_lack_something_the_help_is_to_change_that() -> None:
    needs = replace(FOUR_BIT, features=frozenset({Feature.FP8_PRODUCTS}))
    with pytest.raises(BackendUnavailableError) as refusal:
        chosen("auto", needs, spec("gpu", 9, ready=False), spec("cpu", 0, accelerator=False), allow_cpu=True)
    assert "quantization.compute_dtype fp8" in refusal.value.message
    assert refusal.value.fix.startswith("Change what the ready ones do not support")
    with pytest.raises(BackendUnavailableError) as refusal:
        chosen("auto", needs, spec("gpu", 9, ready=False))
    assert refusal.value.fix.startswith("Run qlora-hal doctor")


def test_auto_takes_the_cpu_when_it_is_allowed() -> None:
    choice = chosen("auto", FOUR_BIT, spec("gpu", 9, ready=False), spec("cpu", 0, accelerator=False), allow_cpu=True)
    assert choice.spec.name == "cpu"
    assert "no accelerator" in choice.reason


def test_able_is_asked_before_fast() -> None:
    needs = replace(FOUR_BIT, features=frozenset({Feature.PACKING}))
    packing = spec("able", 1)
    packing = replace(packing, capabilities=replace(packing.capabilities, features=frozenset({Feature.PACKING})))
    choice = chosen("auto", needs, packing, spec("fast", 9))
    assert choice.spec.name == "able"
    assert choice.rejections["fast"] == "does not support feature packing (asked for by data.packing)"


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (Requirements(level="8bit"), "quantization level 8bit"),
        (Requirements(weight_format=WeightFormat.FP4), "weight format fp4"),
        (Requirements(weight_format=WeightFormat.NF4, block_size=96), "block size 96 for nf4 (has 64)"),
        (Requirements(level="4bit", compute_dtype="float16"), "compute dtype float16"),
        (Requirements(level="4bit", features=frozenset({Feature.PAGED_ADAMW})), "training.optim paged_adamw"),
        (Requirements(level="4bit", features=frozenset({Feature.FP8_PRODUCTS})), "quantization.compute_dtype fp8"),
        (Requirements(level="4bit", features=frozenset({Feature.EXPERTS})), "feature experts."),
    ],
)
def test_named_backend_is_refused_with_everything_it_lacks(needs: Requirements, said: str) -> None:
    with pytest.raises(UnsupportedFeatureError) as refusal:
        chosen("only", needs, spec("only"))
    assert said in refusal.value.message
    assert refusal.value.exit_status == 2


@pytest.mark.fault("B05")
def test_named_backend_that_cannot_run_is_refused_with_its_fix() -> None:
    with pytest.raises(BackendUnavailableError, match="no device for gpu") as refusal:
        chosen("gpu", FOUR_BIT, spec("gpu", ready=False), spec("cpu", accelerator=False), allow_cpu=True)
    assert refusal.value.fix == "buy a device for gpu"


@pytest.mark.fault("B03")
def test_misspelled_name_gets_the_close_one() -> None:
    with pytest.raises(BackendNotFoundError) as refusal:
        chosen("cuda_bnd", FOUR_BIT, spec("cuda_bnb"))
    assert "Did you mean --backend cuda_bnb?" in refusal.value.fix


def test_hook_overrides_auto_but_not_readiness() -> None:
    ask: Callable[[object, object], str] = lambda reports, needs: "slow"  # noqa: E731
    assert chosen("auto", FOUR_BIT, spec("slow", 1), spec("fast", 9), ask_hook=ask).spec.name == "slow"
    with pytest.raises(BackendUnavailableError):
        chosen("auto", FOUR_BIT, spec("slow", 1, ready=False), spec("fast", 9), ask_hook=ask)


def test_on_the_cpu_the_backend_named_is_one_that_can_serve_the_run() -> None:
    gptq = replace(FOUR_BIT, weight_format=WeightFormat.INT4_GPTQ, level="")
    reader = spec("reader", 1, accelerator=False)
    formats = reader.capabilities.weight_formats | {WeightFormat.INT4_GPTQ}
    reader = replace(reader, capabilities=replace(reader.capabilities, weight_formats=formats))
    with pytest.raises(BackendUnavailableError) as refusal:
        chosen("auto", gptq, spec("other", 9, accelerator=False), reader)
    assert "--backend reader" in refusal.value.fix
    assert "other" not in refusal.value.fix


def test_float16_on_a_device_without_an_accelerator_is_nobodys_advice() -> None:
    """A backend declares what its GPUs compute; on this CPU it would refuse float16 once it has tried."""
    half = replace(FOUR_BIT, compute_dtype="float16")
    declares = spec("declares", 5, accelerator=False)
    dtypes = declares.capabilities.compute_dtypes | {"float16"}
    declares = replace(declares, capabilities=replace(declares.capabilities, compute_dtypes=dtypes))
    with pytest.raises(UnsupportedFeatureError) as refusal:
        chosen("plain", half, spec("plain", accelerator=False), declares)
    assert "declares" not in refusal.value.fix
    with pytest.raises(UnsupportedFeatureError) as refusal:
        chosen("plain", half, spec("plain", accelerator=False), replace(declares, uses_accelerator=True))
    assert "--backend declares" in refusal.value.fix


def entries_of(*specs: BackendSpec) -> list[BackendEntry]:
    return [BackendEntry(s.name, "this process", spec=s) for s in specs]


@pytest.mark.fault("E01")
@pytest.mark.parametrize(
    ("name", "allow_cpu", "specs", "refused"),
    [
        ("auto", False, (spec("cpu", accelerator=False),), "QH-E01"),
        ("auto", True, (spec("gpu", ready=False),), "QH-E01"),
        ("gpu", True, (spec("gpu", ready=False), spec("cpu", accelerator=False)), "QH-B05"),
        ("npu", True, (spec("cpu", accelerator=False),), "QH-B03"),
    ],
)
def test_what_no_model_could_change_is_refused_before_one_is_looked_at(
    name: str, allow_cpu: bool, specs: tuple[BackendSpec, ...], refused: str
) -> None:
    entries = entries_of(*specs)
    with pytest.raises(QloraHalError) as refusal:
        refuse_unready(name, entries, reports(entries), allow_cpu=allow_cpu)
    assert refusal.value.code == refused


@pytest.mark.parametrize(
    ("name", "allow_cpu", "specs"),
    [
        ("auto", False, (spec("gpu"), spec("cpu", accelerator=False))),
        ("auto", True, (spec("cpu", accelerator=False),)),
        ("cpu", False, (spec("cpu", accelerator=False),)),
    ],
)
def test_what_a_model_may_still_decide_is_left_to_it(
    name: str, allow_cpu: bool, specs: tuple[BackendSpec, ...]
) -> None:
    entries = entries_of(*specs)
    refuse_unready(name, entries, reports(entries), allow_cpu=allow_cpu)


def test_a_backend_has_to_be_named_only_where_none_has_an_accelerator() -> None:
    alone = entries_of(spec("cpu", 1, accelerator=False), spec("older", 0, accelerator=False), spec("g", ready=False))
    beside = entries_of(spec("cpu", accelerator=False), spec("gpu"))
    assert backend_to_name(alone, reports(alone)) == "cpu"
    assert backend_to_name(beside, reports(beside)) is None
