"""What an architecture asks of its forward pass is what is computed: beside transformers and PEFT on the same folder,
in float32 and not quantized. `benchmarks/architectures.py` does this for every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_transformers import compare, reference_of
from drawn_models import write_drawn_model
from tiny_models import write_model
from trainers import OpenTrainer, open_cpu_trainer, packed, random_batch, source_of

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, LinearShape
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.model.facts import read_facts
from qlora_hal.model.own_dropout import own_dropout
from qlora_hal_backends.torch_family.architecture import build
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear
from qlora_hal_backends.torch_family.outline import outline

LOGITS = {
    "falcon_h1": {"lm_head_multiplier": 0.1, "num_hidden_layers": 1},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 5.0, "residual_multiplier": 0.3},
    "cohere": {"logit_scale": 4.0},
    "gemma2": {"final_logit_softcapping": 5.0},
    "recurrent_gemma": {},
    "modernbert-decoder": {},
    "electra": {"is_decoder": True},
}
"""Multipliers, divisors, caps, caps of another name, another layer and norm before the head."""

IN_PLACE = {"olmo": {"clip_qkv": 0.5}, "mpt": {"attn_config": {"clip_qkv": 0.5}}}
READ_BY_THE_SCAN = {
    "mamba": {},
    "falcon_mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "expert_layer_period": 9},
}
TWO_DIMENSIONS = {
    "cohere": {"use_qk_norm": True},
    "falcon": {},
    "falcon ": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_bigcode": {},
    "stablelm": {"qk_layernorm": True},
}
"""Norms of heads, a linear class of its own, fused projections, tables of positions."""
OTHER_NAMES = {"gpt_neox": {}, "gemma3": {}}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [(name.strip(), changes) for cases in (LOGITS, IN_PLACE, READ_BY_THE_SCAN, TWO_DIMENSIONS, OTHER_NAMES)
     for name, changes in cases.items()],
)  # fmt: skip
def test_logits_loss_and_gradients_are_those_of_transformers_and_peft(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    write_drawn_model(tmp_path, model_type, changes)
    found = compare(tmp_path, reference_of(tmp_path))
    assert found["result"] == "equal", found


@pytest.mark.parametrize("model_type", TWO_DIMENSIONS)
def test_headers_alone_name_the_linear_layers_that_the_loaded_model_has(model_type: str, tmp_path: Path) -> None:
    write_drawn_model(tmp_path, model_type.strip(), TWO_DIMENSIONS[model_type])
    assert set(read_facts(tmp_path).linear_modules) == set(outline(source_of(tmp_path), {}).linear_modules)


@pytest.mark.parametrize("change", ["clamp_", "mul_", "add_"])
def test_a_projection_may_be_changed_in_place(change: str) -> None:
    """`y.clamp_(...)` on the output of an adapted layer has the gradient of `y.clamp(...)`."""
    config = AdapterConfig(2, 4.0, 0.0, False, ("layer",))
    adapter = initial_adapter(config, {"layer": LinearShape(6, 5)}, 0)
    for tensor in adapter.tensors.values():
        tensor[:] = np.linspace(-1, 1, tensor.size, dtype=np.float32).reshape(tensor.shape)
    arguments = {"clamp_": (-0.5, 0.5), "mul_": (3.0,), "add_": (torch.ones(5),)}[change]
    gradients = []
    for name in (change, change.removesuffix("_")):
        linear = FrozenLinear(6, 5)
        linear.base = quantize(torch.linspace(-1, 1, 30).view(5, 6), Quantization(WeightFormat.NONE), torch.float32)
        flat = FlatAdapter.place(adapter, {"layer": linear}, torch.float32, torch.device("cpu"))
        y = getattr(linear(torch.linspace(-1, 1, 24).view(2, 2, 6)), name)(*arguments)
        (y**2).sum().backward()
        gradients.append(flat.gradients.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_layers_that_a_scan_reads_itself_carry_no_adapter(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "mamba")
    told = outline(source_of(tmp_path), {})
    assert {path.rpartition(".")[2] for path in told.linear_modules} == {"in_proj"}
    assert any("6 projections of state-space mixers (dt_proj, out_proj, x_proj) carry no LoRA" in n for n in told.notes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nemotron_h": ({}, "the experts of its mixture"),
    "bert": ({}, "is_decoder: false"),
    "roberta": ({}, "is_decoder: false"),
    "gpt2": ({}, "Conv1D"),
    "cpmant": ({}, "lets every token of a prompt see the whole prompt"),
    "reformer": ({}, "pass no gradient"),
}


@pytest.mark.fault("M51")
@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_trained_is_refused_by_name_before_weights_are_read(model_type: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[model_type]
    model = write_drawn_model(tmp_path, model_type, changes)
    with pytest.raises(ModelError, match=type(model).__name__) as refusal:
        outline(source_of(tmp_path), {})
    assert refusal.value.code == "QH-M51"
    assert reason in refusal.value.cause


@pytest.mark.fault("M51")
@pytest.mark.parametrize("model_type", ["t5", "clip", "no_such_type"])
def test_a_model_of_another_kind_is_refused_by_name(model_type: str, llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path, model_type=model_type, architectures=["SomeOtherModel"])
    with pytest.raises(ModelError, match="SomeOtherModel") as refusal:
        outline(source_of(folder), {})
    assert refusal.value.code == "QH-M51"


@pytest.mark.fault("M51")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": "64"}, "Validation error for field 'hidden_size': TypeError"),
        ({"hidden_act": "no_such"}, "no_such"),
        ({"rms_norm_eps": None}, "Validation error for field 'rms_norm_eps': TypeError"),
    ],
    ids=["no heads", "a width in text", "another activation", "no epsilon"],
)
def test_of_a_family_that_is_known_config_json_is_to_be_corrected(
    changes: dict[str, object], words: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="cannot build LlamaForCausalLM") as refusal:
        outline(source_of(copied(llama, tmp_path, **changes)), {})
    assert refusal.value.code == "QH-M51"
    assert words in refusal.value.cause
    assert refusal.value.fix.startswith("Correct config.json")
    with pytest.raises(ModelError) as unknown:
        outline(source_of(copied(llama, tmp_path / "other", model_type="no_such_type")), {})
    assert unknown.value.fix == "Choose a decoder-only causal language model, or update transformers."


@pytest.mark.fault("M50")
def test_a_head_that_scores_is_named_in_the_place_of_one_that_predicts(tmp_path: Path) -> None:
    from drawn_models import small_config
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_config(small_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight.*score\.weight") as refusal:
        outline(source_of(tmp_path), {})
    assert refusal.value.code == "QH-M50"
    assert "LlamaForSequenceClassification; a LlamaForCausalLM was expected" in refusal.value.cause


@pytest.mark.fault("M51")
@pytest.mark.parametrize("model_type", ["nemotron_h", "bert"])
def test_a_dry_run_refuses_before_it_reads_data(model_type: str, tmp_path: Path) -> None:
    from qlora_hal import train

    write_drawn_model(tmp_path / "model", model_type)
    (tmp_path / "rows.jsonl").write_text("nothing that could be read")
    settings = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "backend": {"name": "cpu_torch"},
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(ModelError) as refusal:
        train(settings, dry_run=True)
    assert refusal.value.code == "QH-M51"


def test_a_folder_of_the_bare_base_model_is_loaded_under_its_prefix(tmp_path: Path) -> None:
    model = write_drawn_model(tmp_path / "whole", "qwen2", {"tie_word_embeddings": True})
    model.model.save_pretrained(tmp_path / "bare")
    expected = reference_of(tmp_path / "whole")
    found = compare(tmp_path / "bare", expected)
    assert found["result"] == "equal", found


@pytest.mark.fault("M51")
def test_scores_are_capped_whatever_attention_transformers_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 gives Gemma 2 torch's fused attention, which leaves the cap of the scores out."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    write_drawn_model(tmp_path / "capped", "gemma2", {"attn_logit_softcapping": 3.0})
    write_drawn_model(tmp_path / "free", "gemma2", {"attn_logit_softcapping": None})
    source, free = source_of(tmp_path / "capped"), source_of(tmp_path / "free")
    assert build(source, "auto", torch.float32).causal.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="caps its attention scores") as caught:
        build(source, "sdpa", torch.float32)
    assert caught.value.where == "backend.options.attention"
    assert build(free, "auto", torch.float32).causal.config._attn_implementation == "sdpa"


def test_a_package_that_transformers_misses_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files import what they need when a model is built."""

    def build(*_: object, **__: object) -> None:
        import no_such_package.part  # type: ignore[import-not-found]  # noqa: F401

    monkeypatch.setattr("qlora_hal_backends.torch_family.architecture.build_causal", build)
    with pytest.raises(ModelError) as caught:
        outline(source_of(llama), {})
    assert caught.value.code == "QH-M51"
    assert caught.value.fix == "Install the package no_such_package, which it needs."


def test_an_encoder_that_does_not_say_so_is_found_out_when_it_is_loaded(llama: Path, monkeypatch: Any) -> None:
    """Every position sees the whole row: nothing would be learned from predicting what is seen."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: torch.zeros(1, 1, 1, 1))
    with pytest.raises(ModelError, match="a token changes what is computed for those before it") as refusal:
        open_cpu_trainer(llama)
    assert refusal.value.code == "QH-M51"


@pytest.mark.fault("B60")
@pytest.mark.parametrize("model_type", ["mamba", "bloom", "mpt"])
def test_samples_that_an_architecture_would_mix_cannot_share_a_row(
    model_type: str, tmp_path: Path, opened: Callable[..., OpenTrainer]
) -> None:
    write_drawn_model(tmp_path, model_type)
    trainer = opened(tmp_path)
    with pytest.raises(UnsupportedFeatureError, match="cannot train on packed rows") as refusal:
        trainer.step([packed([random_batch(0)])])
    assert refusal.value.code == "QH-B60"
    assert trainer.step([random_batch(0)]).applied


def test_dropout_of_the_base_is_said_to_be_off(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "opt", {"dropout": 0.1, "attention_dropout": 0.2})
    notes = outline(source_of(tmp_path), {}).notes
    assert [note for note in notes if "own dropout is off (dropout 0.1, attention_dropout 0.2" in note]


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        ({"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0}, {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
        ({"hidden_dropout_prob": 0.1, "classifier_dropout": 0.3}, {"hidden_dropout_prob": 0.1}),
        ({"text_config": {"attention_dropout": 0.05}}, {"text_config.attention_dropout": 0.05}),
        ({"layerdrop": 0.1, "router_jitter_noise": 0.01}, {"layerdrop": 0.1, "router_jitter_noise": 0.01}),
        ({"attention_dropout": 0, "dropout": None, "summary_first_dropout": 0.1}, {}),
    ],
)
def test_every_spelling_of_dropout_is_known(config: dict[str, object], rates: dict[str, float]) -> None:
    assert own_dropout(config) == rates


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    import shutil

    shutil.copytree(folder, to / "model")
    path = to / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to / "model"


@pytest.mark.fault("M51")
def test_python_without_docstrings_is_told_as_what_it_is(tmp_path: Path) -> None:
    """Where transformers fails without them, config.json is not at fault."""
    folder = write_model(tmp_path / "model")
    program = (
        "import sys; from pathlib import Path\n"
        "from qlora_hal.errors import QloraHalError\n"
        "from qlora_hal.model.facts import read_facts\n"
        "from qlora_hal.model.source import ModelSource\n"
        "from qlora_hal_backends.torch_family.outline import outline\n"
        "folder = Path(sys.argv[1])\n"
        "try: outline(ModelSource('model', folder, read_facts(folder)), {})\n"
        "except QloraHalError as error: print(error.fix)\n"
    )
    said = subprocess.run([sys.executable, "-OO", "-c", program, folder], capture_output=True, text=True, check=True)
    # Versions of transformers that need no docstrings say nothing.
    assert "Run Python without -OO" in said.stdout or not said.stdout
