"""From a model and a data file to an adapter, with one call; what the run folder holds and what opens it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL, merged
from trainers import random_batch

from qlora_hal import TrainResult, train
from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE
from qlora_hal.demo import model_path
from qlora_hal.errors import ConfigError, ModelError, UnsupportedFeatureError
from qlora_hal.hooks import hookimpl
from qlora_hal_conformance.reference_backend import SPEC as REFERENCE

Trained = Callable[..., TrainResult]


def test_loss_falls_on_rows_that_were_not_trained_on(demo_run: TrainResult) -> None:
    assert demo_run.eval_loss_before is not None
    assert demo_run.eval_loss_after is not None
    assert demo_run.eval_loss_after < demo_run.eval_loss_before - 0.5
    assert demo_run.steps == 12
    assert [step for step, _ in demo_run.losses] == list(range(1, 13))


def test_run_folder_holds_what_the_run_resolved_to(demo_run: TrainResult) -> None:
    run = json.loads((demo_run.run_dir / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["resolved"]["backend"] == "cpu_torch"
    assert run["resolved"]["weight_format"] == "nf4"
    assert run["resolved"]["block_size"] == 64
    assert run["resolved"]["double_quant"] is True
    assert run["resolved"]["compute_dtype"] == "float32"
    assert run["resolved"]["seed"] == 7
    assert run["resolved"]["device"]
    assert run["eval_loss_before"] == demo_run.eval_loss_before
    assert run["eval_loss_after"] == demo_run.eval_loss_after
    assert run["samples"][0]["before"] != run["samples"][0]["after"]
    lines = [json.loads(line) for line in (demo_run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["label"] for line in lines if "eval_loss" in line] == ["before", "during", "during", "after"]
    for name in ("report.html", "loss.svg", "adapter/adapter_model.safetensors", "checkpoints/step-00000012"):
        assert (demo_run.run_dir / name).exists(), name


def test_adapter_opens_in_plain_peft_with_equal_logits(demo_run: TrainResult) -> None:
    """PEFT on the base with the very weights that were trained on (dequantized NF4)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qlora_hal.inference.generate import open_generation

    pair = open_generation(run_dir=demo_run.run_dir)
    inner = pair.trainer._trainer
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    with torch.no_grad():
        for module in inner.linear_modules():
            base.get_submodule(module).weight.copy_(torch.from_numpy(inner.dequantized_weight(module)))
    model = PeftModel.from_pretrained(base, demo_run.adapter_dir).eval()
    batch = random_batch(0, vocabulary=4000)
    with torch.no_grad():
        expected = model(torch.from_numpy(batch.input_ids).long()).logits.numpy()
    found = inner.logits(batch)
    pair.close()
    # Float32 products of up to 768 terms through 6 layers, in another order: 8 sqrt(768 * 6) 2^-24 of the largest.
    assert np.abs(found - expected).max() <= 8 * (768 * 6) ** 0.5 * 2**-24 * np.abs(expected).max()


def test_same_seed_gives_the_same_adapter_bit_for_bit(trained: Trained) -> None:
    first, second = (trained(name).adapter_dir / "adapter_model.safetensors" for name in ("a", "b"))
    other = trained("c", training__seed=8).adapter_dir / "adapter_model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("weight_format", ["none", "8bit", "fp4"])
def test_every_level_trains_and_is_written_down_as_resolved(weight_format: str, trained: Trained) -> None:
    result = trained(quantization__weight_format=weight_format, training__max_steps=2)
    assert result.weight_format == {"none": "none", "8bit": "int8", "fp4": "fp4"}[weight_format]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("quantization__double_quant", False),
        ("quantization__block_size", 128),
        ("quantization__compute_dtype", "bfloat16"),
        ("lora__r", 4),
        ("lora__alpha", 64.0),
        ("lora__dropout", 0.3),
        ("lora__use_rslora", True),
        ("lora__target_modules", ["q_proj", "v_proj"]),
        ("data__train_on", "all"),
        ("data__max_seq_length", 48),
        ("data__packing", True),
        ("data__group_by_length", False),
        ("data__shuffle", False),
        ("data__chat_template", "chatml"),
        ("training__learning_rate", 1e-4),
        ("training__per_device_train_batch_size", 2),
        ("training__gradient_accumulation_steps", 3),
        ("training__lr_scheduler_type", "cosine"),
        ("training__warmup_steps", 3),
        ("training__warmup_ratio", 0.9),
        ("training__optim", "adamw_8bit"),
        ("training__weight_decay", 0.5),
        ("training__max_grad_norm", 0.1),
        ("training__adam_beta1", 0.5),
        ("training__adam_beta2", 0.5),
        ("training__adam_epsilon", 1e-2),
        ("training__seed", 8),
        ("backend__options", {"attention": "eager"}),
    ],
)
def test_option_is_honoured(setting: str, value: object, trained: Trained, plain_losses: list[float]) -> None:
    """Whatever changes training must change its losses; an option that is read by nothing would not."""
    losses = [loss for _, loss in trained(training__max_steps=4, **{setting: value}).losses]
    if setting == "backend__options":  # another kernel for the same numbers
        assert losses == pytest.approx(plain_losses, rel=1e-4)
    else:
        assert losses != plain_losses


@pytest.mark.slow
def test_an_epsilon_from_noise_is_honoured(trained: Trained) -> None:
    """In float32 the noise lies below the usual epsilon; against a smaller one it counts."""
    settings = {"training__max_steps": 4, "training__adam_epsilon": 1e-15}
    fixed, measured = (
        [loss for _, loss in trained(name, training__adam_epsilon_from_noise=value, **settings).losses]
        for name, value in (("fixed", False), ("measured", True))
    )
    assert measured != fixed


@pytest.fixture(scope="session")
def plain_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    from small_runs import small_run

    return [loss for _, loss in small_run(tmp_path_factory.mktemp("plain") / "run", {"training.max_steps": 4}).losses]


@pytest.mark.slow
def test_checkpointing_and_paging_change_memory_and_not_numbers(trained: Trained, plain_losses: list[float]) -> None:
    for name, setting in {
        "checkpointing": {"training__gradient_checkpointing": True},
        "selective": {"training__recompute": "selective"},
        "offload": {"training__recompute": "offload", "training__base_offload": ["embeddings", "layers"]},
        "auto": {"training__recompute": "auto", "training__base_offload": "auto"},
        "paged": {"training__optim": "paged_adamw"},
    }.items():
        assert [loss for _, loss in trained(name, training__max_steps=4, **setting).losses] == plain_losses


def test_every_optimizer_of_the_schema_is_offered_or_refused() -> None:
    from qlora_hal.config.schema import TrainingConfig

    allowed = TrainingConfig.model_json_schema()["properties"]["optim"]["enum"]
    assert set(allowed) == set(OPTIMIZER_FEATURE)


@pytest.mark.parametrize("weight_format", ["int4_gptq", "int4_affine"])
def test_format_of_another_backend_is_refused_before_the_model_loads(weight_format: str, trained: Trained) -> None:
    with pytest.raises(UnsupportedFeatureError, match=weight_format):
        trained(quantization__weight_format=weight_format)


@pytest.mark.fault("N10")
def test_compute_dtype_that_the_device_lacks_is_refused(trained: Trained) -> None:
    with pytest.raises(UnsupportedFeatureError, match="compute dtype float16"):
        trained(quantization__compute_dtype="float16")


@pytest.mark.fault("N10")
def test_dtype_that_computing_disproves_is_refused_and_auto_takes_the_next() -> None:
    """What a T4 answers: no bfloat16. The words name the fix."""
    from qlora_hal.run.prepare import chosen_dtype

    assert chosen_dtype("auto", ("float16", "float32"), "cuda_bnb") == "float16"
    with pytest.raises(ConfigError) as refusal:
        chosen_dtype("bfloat16", ("float16", "float32"), "cuda_bnb")
    assert refusal.value.code == "QH-N10"
    assert "float16 and float32 only" in refusal.value.message
    assert "loss scaling" in refusal.value.fix


@pytest.mark.fault("N10")
def test_fp8_products_are_refused_by_name_where_a_backend_has_none(trained: Trained) -> None:
    with pytest.raises(UnsupportedFeatureError, match="feature fp8_products") as refusal:
        trained(quantization__compute_dtype="fp8")
    assert refusal.value.code == "QH-B01"


class Offering:
    """Offers the suite's reference backend, which has products in 8-bit floats on any machine."""

    @hookimpl
    def qlora_hal_backends(self) -> list[BackendSpec]:
        return [REFERENCE]


def test_fp8_products_reach_the_backend_and_what_a_run_leaves(tmp_path: Path) -> None:
    asked = {
        "backend.name": REFERENCE.name,
        "quantization.compute_dtype": "fp8",
        "data.max_seq_length": 64,
        "training.max_steps": 1,
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }
    result = train(merged(SMALL, asked), observers=[Offering()])
    resolved = json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]
    assert (resolved["compute_dtype"], resolved["fp8_products"]) == ("bfloat16", True)
    provenance = json.loads((result.adapter_dir / "qlora_hal.json").read_text())
    assert (provenance["compute_dtype"], provenance["fp8_products"]) == ("bfloat16", True)


@pytest.mark.fault("C07")
def test_target_that_no_module_has_is_refused_with_the_close_names(trained: Trained) -> None:
    with pytest.raises(ModelError, match="q_prj") as refusal:
        trained(lora__target_modules=["q_prj"])
    assert refusal.value.code == "QH-C07"
    assert "q_proj" in str(refusal.value)


def test_unknown_backend_option_is_refused(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="speed"):
        trained(backend__options={"speed": "max"})


def test_settings_a_run_cannot_do_without_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"model\.name_or_path, output_dir, data\.path are not set"):
        train({})


def test_rows_may_be_given_in_memory_and_the_run_can_go_on(tmp_path: Path) -> None:
    from qlora_hal import resume

    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is four."}]
    rows = [{"messages": turns}] * 8
    config = {"training": {"max_steps": 2, "seed": 1}, "backend": {"name": "cpu_torch"}}
    result = train(config, model=model_path(), data=rows, output_dir=tmp_path / "run")
    assert result.steps == 2
    assert resume(result.run_dir).steps == 2


def test_keywords_win_over_the_configuration(tmp_path: Path) -> None:
    from small_runs import SMALL, merged

    config = merged(SMALL, {"output_dir": str(tmp_path / "no"), "training.max_steps": 1})
    assert train(config, output_dir=tmp_path / "yes").run_dir == tmp_path / "yes"


def test_observer_sees_the_run_and_one_that_raises_is_left_out(tmp_path: Path) -> None:
    from small_runs import SMALL, merged

    from qlora_hal.hooks import hookimpl

    class Watching:
        def __init__(self) -> None:
            self.steps: list[int] = []

        @hookimpl
        def qlora_hal_step_finished(self, step: int) -> None:
            self.steps.append(step)

    class Failing:
        calls = 0

        @hookimpl
        def qlora_hal_step_finished(self, step: int) -> None:
            Failing.calls += 1
            raise RuntimeError("tracker is down")

    watching = Watching()
    config = merged(SMALL, {"output_dir": str(tmp_path / "run"), "training.max_steps": 3})
    train(config, observers=[Failing(), watching])
    assert watching.steps == [1, 2, 3]
    assert Failing.calls == 1
