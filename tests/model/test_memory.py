"""The estimate is arithmetic: checked by hand, against real quantized bytes, and against peaks measured on an H200."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.adapter import resolve_targets
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.memory_constants import MemoryConstants, MemoryQuery
from qlora_hal.contract.values import LinearShape, MemoryEstimate
from qlora_hal.memory.estimate import (
    adapter_parameters,
    estimate,
    linear_bytes,
    optimizer_bytes,
    spread_over,
    weight_bytes,
)
from qlora_hal.memory.gpus import GIB, KNOWN_GPUS, apple_working_set
from qlora_hal.memory.placement import with_base_offloaded
from qlora_hal.model.described_weights import described_header
from qlora_hal.model.facts import ModelFacts, TensorFacts, read_facts
from qlora_hal.model.shape import weights_to_each
from qlora_hal_backends.torch_family import platform
from qlora_hal_backends.torch_family.platform import MEMORY, fused_memory, memory_of, plain_memory


def llama_facts(layers: int, hidden: int, feed_forward: int, vocabulary: int, heads: int, kv_heads: int) -> ModelFacts:
    """Facts of a Llama of that shape, as bf16 headers would give them."""
    kv = hidden // heads * kv_heads
    linear: dict[str, LinearShape] = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        linear |= {
            f"{at}.self_attn.q_proj": LinearShape(hidden, hidden), f"{at}.self_attn.k_proj": LinearShape(hidden, kv),
            f"{at}.self_attn.v_proj": LinearShape(hidden, kv), f"{at}.self_attn.o_proj": LinearShape(hidden, hidden),
            f"{at}.mlp.gate_proj": LinearShape(hidden, feed_forward),
            f"{at}.mlp.up_proj": LinearShape(hidden, feed_forward),
            f"{at}.mlp.down_proj": LinearShape(feed_forward, hidden),
        }  # fmt: skip
    others = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape.weight for name, shape in linear.items()}
    shapes |= {f"{module}.weight": shape for module, shape in others.items()}
    shapes |= {f"model.layers.{layer}.norms.weight": (2 * hidden,) for layer in range(layers)}
    count = sum(s[0] * (s[1] if len(s) == 2 else 1) for s in shapes.values())
    config = {
        "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
    }  # fmt: skip
    tensors = {name: TensorFacts("BF16", shape, 0, "model.safetensors") for name, shape in shapes.items()}
    return ModelFacts("LlamaForCausalLM", "llama", config, tensors, linear, count, "", vocabulary_size=vocabulary)


LLAMA_8B = llama_facts(32, 4096, 14336, 128256, 32, 8)
LLAMA_7B = llama_facts(32, 4096, 11008, 32000, 32, 32)
LLAMA_33B = llama_facts(60, 6656, 17920, 32000, 52, 52)
LLAMA_65B = llama_facts(80, 8192, 22016, 32000, 64, 64)


def qlora(facts: ModelFacts, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "weight_format": "nf4", "block_size": 64, "double_quant": True, "compute_dtype": "bfloat16", "r": 16,
        "targets": facts.linear_modules, "optimizer": "adamw_8bit", "batch_size": 4, "sequence_length": 2048,
        "gradient_checkpointing": True,
    }  # fmt: skip
    return estimate(facts, **{**settings, **changes})


# by hand ------------------------------------------------------------------------------------------------------------
def test_nf4_with_double_quantization_takes_4_127_bits_a_weight() -> None:
    # 4 + 8/64 + 32/(64*256) = 4.126953 bits; 4096 x 4096 has whole blocks of both sizes.
    assert linear_bytes(4096, 4096, WeightFormat.NF4, 64, True) * 8 / 4096**2 == 4 + 8 / 64 + 32 / (64 * 256)
    # Without: 4 + 32/64 = 4.5 bits.
    assert linear_bytes(4096, 4096, WeightFormat.NF4, 64, False) * 8 / 4096**2 == 4.5


def test_double_quantization_saves_3_gigabytes_on_65b() -> None:
    single = weight_bytes(LLAMA_65B, WeightFormat.NF4, 64, False, "bfloat16")
    double = weight_bytes(LLAMA_65B, WeightFormat.NF4, 64, True, "bfloat16")
    # QLoRA section 3 counts 0.373 bits a weight, 3 GB on 65B: (0.5 - 0.126953) bits x 64.76e9 linear weights.
    assert (single - double) / 1e9 == pytest.approx(3.02, abs=0.01)


def test_32b_in_16_bits_takes_64_gigabytes() -> None:
    facts = llama_facts(64, 5120, 27648, 152064, 40, 8)
    assert facts.parameter_count / 1e9 == pytest.approx(32.76, abs=0.01)
    assert weight_bytes(facts, WeightFormat.NONE, None, False, "bfloat16") == 2 * facts.parameter_count
    assert weight_bytes(facts, WeightFormat.NONE, None, False, "float32") == 4 * facts.parameter_count


def test_other_formats_by_hand() -> None:
    # 128 inputs, 64 outputs, 8192 weights.
    assert linear_bytes(128, 64, WeightFormat.INT8) == 8192 + 64 * 4
    # GPTQ group 32: 4 groups x 64 columns x (2 + 0.5) bytes, 128 indices x 4.
    assert linear_bytes(128, 64, WeightFormat.INT4_GPTQ, 32) == 4096 + 640 + 512
    # MLX group 64, 16-bit scale and bias: 2 groups x 64 rows x 4 bytes; float32 doubles them.
    assert linear_bytes(128, 64, WeightFormat.INT4_AFFINE, 64) == 4096 + 512
    assert linear_bytes(128, 64, WeightFormat.INT4_AFFINE, 64, compute_bytes=4) == 4096 + 1024
    assert linear_bytes(128, 64, WeightFormat.INT8_AFFINE, 64) == 8192 + 512
    assert linear_bytes(128, 64, WeightFormat.INT3_AFFINE, 64) == 3072 + 512
    # A byte of scale to 32 or 16 weights.
    assert linear_bytes(128, 64, WeightFormat.MXFP4) == 4096 + 256
    assert linear_bytes(128, 64, WeightFormat.NVFP4) == 4096 + 512
    assert linear_bytes(128, 64, WeightFormat.MXFP8) == 8192 + 256


def test_a_tied_head_that_is_stored_counts_once() -> None:
    tied = llama_facts(1, 64, 128, 100, 4, 4)
    tied.config["tie_word_embeddings"] = True  # type: ignore[index]
    untied = llama_facts(1, 64, 128, 100, 4, 4)
    saved = weight_bytes(untied, WeightFormat.NONE, None, False, "bfloat16") - weight_bytes(
        tied, WeightFormat.NONE, None, False, "bfloat16"
    )
    assert saved == 100 * 64 * 2


def test_adapter_gradients_and_moments_by_hand() -> None:
    targets = {"a": LinearShape(1024, 2048), "b": LinearShape(64, 64)}
    # r = 16: a has 16384 and 32768 weights, b twice 1024.
    assert adapter_parameters(targets, 16) == 16384 + 32768 + 2048
    needed = qlora(LLAMA_8B, targets=targets, optimizer="adamw")
    assert (needed.adapter, needed.gradients, needed.optimizer) == (4 * 51200, 4 * 51200, 8 * 51200)
    # 8 bits: two bytes a weight and two float32 to 256 of them; b stays in float32, below 4096 weights a tensor.
    assert optimizer_bytes(targets, 16, "paged_adamw_8bit") == 2 * 49152 + 8 * (64 + 128) + 8 * 2048


def test_logits_by_hand_and_in_chunks() -> None:
    # bf16 logits, float32 copy, float32 gradient: 10 bytes; so at a vocabulary of 152k 4096 tokens take 6.2 GB.
    assert qlora(LLAMA_8B, batch_size=2).logits == 4096 * 128256 * 10
    assert qlora(LLAMA_8B, batch_size=2, compute_dtype="float32").logits == 4096 * 128256 * 8
    chunked = MemoryConstants(cross_entropy_rows=512)
    assert qlora(LLAMA_8B, batch_size=2, constants=chunked).logits == 512 * 128256 * 10
    assert qlora(LLAMA_8B, batch_size=1, sequence_length=100, constants=chunked).logits == 100 * 128256 * 10


def test_checkpointing_keeps_layer_inputs_and_one_layer() -> None:
    plain = MemoryConstants(hidden_copies=1.0, feed_forward_copies=0.0, cross_entropy_rows=1)
    recomputed = qlora(LLAMA_7B, constants=plain, targets={}, gradient_checkpointing=True)
    kept = recomputed.activations + recomputed.logits  # the logits are gone when a layer is computed again
    everything = qlora(LLAMA_7B, constants=plain, targets={}, gradient_checkpointing=False).activations
    # 8192 tokens x 4096 x 2 bytes = 67.1 MB a width; a layer keeps one hidden width, keys and values: 3 widths.
    width = 8192 * 4096 * 2
    assert kept == 32 * width + 3 * width
    assert everything == 32 * 3 * width


def test_scores_are_quadratic_in_length_only_where_they_are_kept() -> None:
    kept = MemoryConstants(attention_scores_kept=1.0)
    short, long = (qlora(LLAMA_7B, constants=kept, sequence_length=s).activations for s in (1024, 2048))
    linear_short, linear_long = (qlora(LLAMA_7B, sequence_length=s).activations for s in (1024, 2048))
    assert linear_long == pytest.approx(2 * linear_short)
    assert long - linear_long == pytest.approx(4 * (short - linear_short))


# against real bytes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "weight_format", "double_quant"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4", True),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", False),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"}, "nf4", False),
        ({"load_in_8bit": True}, "int8", False),
    ],
)
def test_weights_agree_with_bitsandbytes_within_one_percent(
    tmp_path: Path, settings: dict[str, Any], weight_format: str, double_quant: bool
) -> None:
    """One percent leaves room for the two codebooks (64 and 1024 bytes) of each of the 14 layers, which the formula
    leaves out: 14 x 1088 = 15 kB of 2.6 MB. Codes may lie under the name of a float, of whatever size."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.bfloat16
    )
    real = model.get_memory_footprint() + sum(_state_bytes(module.weight) for module in _quantized(model))
    model.save_pretrained(tmp_path / "quantized")
    plain, stored = read_facts(tmp_path / "plain"), read_facts(tmp_path / "quantized")
    form = WeightFormat(weight_format)
    assert weight_bytes(plain, form, None, double_quant, "bfloat16") == pytest.approx(real, rel=0.01)
    assert weight_bytes(stored, form, None, double_quant, "bfloat16") == pytest.approx(real, rel=0.01)


def _quantized(model: Any) -> list[Any]:
    import bitsandbytes

    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)]


def _state_bytes(weight: Any) -> int:
    """The scales and codebooks, which `get_memory_footprint` leaves out: they are neither parameters nor buffers."""
    if getattr(weight, "SCB", None) is not None:
        return int(weight.SCB.nbytes)
    state = weight.quant_state
    nested = state.state2.absmax.nbytes + state.state2.code.nbytes if state.nested else 0
    return int(state.absmax.nbytes + state.code.nbytes + nested)


TORCH = MEMORY
OURS = fused_memory(TORCH)
LIGER = MemoryConstants(hidden_copies=6.0, feed_forward_copies=3.0, cross_entropy_rows=256)
"""Fused norm and SwiGLU kernels that keep only their inputs, and a cross-entropy in chunks of 256 tokens."""


# against measured peaks ---------------------------------------------------------------------------------------------
# One NVIDIA H200, torch 2.11, bitsandbytes 0.50.2 NF4 with double quantization, LoRA r=16 on all linear layers,
# AdamW8bit, sequence 2048; peak allocated in GB, so without the CUDA context. Rows: bf16 without upcast; the same
# with fused kernels; fused without checkpointing; the large shapes of the QLoRA paper, micro-batch 1, fused.
MEASURED: dict[str, tuple[ModelFacts, dict[str, Any], MemoryConstants, float]] = {
    "8B, plain modules, checkpointing": (LLAMA_8B, {}, MemoryConstants(runtime_bytes=0), 20.9),
    "8B, fused, checkpointing": (LLAMA_8B, {}, LIGER, 9.8),
    "8B, fused, no checkpointing": (LLAMA_8B, {"gradient_checkpointing": False}, LIGER, 43.3),
    "8B, fused, micro-batch 1": (LLAMA_8B, {"batch_size": 1}, LIGER, 7.1),
    "65B, fused, micro-batch 1": (LLAMA_65B, {"batch_size": 1}, LIGER, 39.5),
    # Our own layers, docs/runs/h200_step_8b.json.
    "8B, our plain layers": (LLAMA_8B, {"gradient_checkpointing": False}, TORCH, 57.77),
    "8B, our plain layers, micro-batch 1": (LLAMA_8B, {"gradient_checkpointing": False, "batch_size": 1}, TORCH, 20.78),
    "8B, our fused layers": (LLAMA_8B, {"gradient_checkpointing": False}, OURS, 32.84),
    "8B, our fused layers, micro-batch 1": (LLAMA_8B, {"gradient_checkpointing": False, "batch_size": 1}, OURS, 13.76),
    "8B, our fused layers, checkpointing": (LLAMA_8B, {}, OURS, 10.9),
}


@pytest.mark.parametrize("run", MEASURED)
def test_estimate_is_within_its_stated_error_of_a_measured_peak(run: str) -> None:
    facts, changes, constants, measured = MEASURED[run]
    needed = qlora(facts, constants=constants, **changes)
    allocated = (needed.total - needed.runtime) / 1e9
    assert allocated == pytest.approx(measured, rel=needed.relative_error)


QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "vocab_size": 151936, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "hidden", "query", "key_value", "experts", "inner", "beside"),
    [
        ("qwen3_moe", 2048, 4096, 512, 128, 768, 0),  # Qwen3-30B-A3B
        ("olmoe", 2048, 2048, 2048, 64, 1024, 0),  # OLMoE-1B-7B
        ("qwen2_moe", 2048, 2048, 2048, 60, 1408, 5632),  # Qwen1.5-MoE-A2.7B
        ("qwen2_moe", 3584, 3584, 512, 64, 2560, 20480),  # Qwen2-57B-A14B
        ("glm4_moe", 4096, 12288, 1024, 128, 1408, 1408 + 10944),  # GLM-4.5-Air, a dense layer among the others
        ("glm4_moe", 5120, 12288, 1024, 160, 1536, 1536 + 12288),  # GLM-4.5
    ],
)
def test_what_stands_decoded_of_a_fused_mixture_is_counted(
    family: str,
    hidden: int,
    query: int,
    key_value: int,
    experts: int,
    inner: int,
    beside: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A room for each group of projections that any layer has, beside that of a layer's experts."""
    monkeypatch.setattr(platform, "find_spec", lambda name: object())
    stack = experts * hidden * inner
    decoded = 3 * stack + 2 * hidden * (query + key_value) + 3 * hidden * beside
    counted = memory_of(TORCH, fused=True)(MemoryQuery(family, "bfloat16")).dequantized_copies * stack
    assert decoded <= counted <= 1.1 * decoded


@pytest.mark.parametrize(
    ("experts", "recompute", "optimizer", "measured"),
    [
        ("all", "none", "adamw", 58.35),
        ("none", "none", "adamw", 43.04),
        ("all", "full", "adamw", 36.0),
        ("all", "full", "adamw_8bit", 31.0),
        ("none", "full", "adamw_8bit", 20.7),
    ],
)
def test_estimate_of_a_fused_mixture_is_that_near_a_measured_peak(
    experts: str, recompute: str, optimizer: str, measured: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-30B-A3B's shape, 4 x 2048 tokens, NF4, r = 16: `benchmarks/moe_step.py` on an NVIDIA H200."""
    monkeypatch.setattr(platform, "find_spec", lambda name: object())
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    facts = read_facts(tmp_path, [described_header(QWEN3_30B, tmp_path)])
    targets = resolve_targets("all-linear", facts.linear_modules, experts)
    constants = memory_of(TORCH, fused=True)(MemoryQuery("qwen3_moe", "bfloat16", recompute=recompute))
    needed = qlora(
        facts,
        targets={name: facts.linear_modules[name] for name in targets},
        optimizer=optimizer,
        gradient_checkpointing=recompute != "none",
        constants=constants,
    )
    assert (needed.total - needed.runtime) / 1e9 == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["resident", "streamed", "streamed, 512 tokens"])
def test_estimate_of_a_streamed_mixture_is_that_near_a_measured_peak(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`benchmarks/moe_step.py` on an NVIDIA H200."""
    record = Path(__file__).parents[2] / "docs" / "runs" / "h200_moe_streamed.json"
    measured = json.loads(record.read_text())["results"][place]
    monkeypatch.setattr(platform, "find_spec", lambda name: object())
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    facts = read_facts(tmp_path, [described_header(QWEN3_30B, tmp_path)])
    targets = resolve_targets("all-linear", facts.linear_modules, "none")
    needed = qlora(
        facts,
        targets={name: facts.linear_modules[name] for name in targets},
        optimizer="adamw_8bit",
        batch_size=measured["rows"],
        sequence_length=measured["length"],
        gradient_checkpointing=True,
        constants=memory_of(TORCH, fused=True)(MemoryQuery("qwen3_moe", "bfloat16", recompute="full")),
    )
    if place:
        needed = with_base_offloaded(needed, facts, "bfloat16", ("embeddings", "layers"))
    # Parts are added that are not all there at one moment.
    assert -0.05 < (needed.total - needed.runtime) / 1e9 / measured["peak_allocated_gb"] - 1 < 0.09


def test_all_experts_cross_for_the_few_that_a_token_meets(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    facts = read_facts(tmp_path, [described_header(QWEN3_30B, tmp_path)])
    attention, experts = 2 * 2048 * (4096 + 512), 3 * 128 * 2048 * 768
    assert weights_to_each(facts) == pytest.approx((attention + experts) / (attention + experts / 16))
    assert weights_to_each(LLAMA_7B) == 1.0


def test_two_layers_on_a_device_are_of_the_largest_size_there_is() -> None:
    """Of DeepSeek-V3's layers the first three have no experts."""
    dense, sparse = LinearShape(100, 50), LinearShape(100, 50, 16)
    modules = {f"model.layers.{layer}.mlp.up_proj": dense if layer < 3 else sparse for layer in range(61)}
    numbers = 5000 * (3 + 58 * 16)
    facts = replace(LLAMA_7B, linear_modules=modules, parameter_count=numbers + 1000)
    weights = MemoryEstimate(numbers // 2 + 2000, 0, 0, 0, 0, 0, 0, 0)
    slots = 2 * 16 * 5000 // 2
    for found in (
        with_base_offloaded(weights, facts, "bfloat16", ("layers",)),
        spread_over(weights, facts, "bfloat16", 10**9),
    ):
        assert found.weights == 2000 + slots


def test_a_linear_layer_in_no_decoder_layer_stays_on_the_device() -> None:
    """A projection behind the embeddings is no layer, however large it is."""
    modules = {f"model.layers.{layer}.mlp.up_proj": LinearShape(100, 50) for layer in range(4)}
    modules["model.project_in"] = LinearShape(400, 100)
    facts = replace(LLAMA_7B, linear_modules=modules, parameter_count=60_000 + 1000)
    weights = MemoryEstimate(60_000 // 2 + 2000, 0, 0, 0, 0, 0, 0, 0)
    for found in (
        with_base_offloaded(weights, facts, "bfloat16", ("layers",)),
        spread_over(weights, facts, "bfloat16", 10**9),
    ):
        assert found.weights == 2000 + 40_000 // 2 + 2 * 5000 // 2


def test_rows_of_experts_are_counted_for_each_of_a_tokens_experts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    facts = read_facts(tmp_path, [described_header(QWEN3_30B, tmp_path)])
    constants = MemoryConstants(cross_entropy_rows=1)
    fewer, more = (
        qlora(facts, constants=replace(constants, working_routed_hidden_copies=copies)).activations
        for copies in (20.0, 21.0)
    )
    assert more - fewer == 4 * 2048 * 8 * 2048 * 2  # tokens, experts of each, hidden, bytes


@pytest.mark.parametrize(("experts", "decoded"), [(32, 32), (128, 32), (2, 2)])
def test_no_more_experts_of_a_stack_stand_decoded_than_a_backend_decodes_at_once(
    experts: int, decoded: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_30B, "num_experts": experts, "num_experts_per_tok": 2}))
    facts = read_facts(tmp_path, [described_header(json.loads((tmp_path / "config.json").read_text()), tmp_path)])
    one = 2048 * 768
    bounded, whole = (
        qlora(facts, constants=MemoryConstants(dequantized_of_a_stack=most)).workspace for most in (32 * one, None)
    )
    assert whole - bounded == 2 * one * (experts - decoded)


def test_a_chunk_of_logits_is_bounded_whatever_the_vocabulary() -> None:
    bounded = MemoryConstants(cross_entropy_rows=2048, cross_entropy_logits=2**20)
    assert qlora(LLAMA_8B, constants=bounded).logits == 2**20 // 128256 * 128256 * (2 + 4 + 4)
    assert qlora(LLAMA_8B, constants=replace(bounded, cross_entropy_logits=2**40)).logits == 2048 * 128256 * 10


@pytest.mark.parametrize(("facts", "measured"), [(LLAMA_7B, 3.90), (LLAMA_33B, 17.45), (LLAMA_65B, 34.49)])
def test_base_weights_agree_with_what_was_measured_on_a_device(facts: ModelFacts, measured: float) -> None:
    assert weight_bytes(facts, WeightFormat.NF4, 64, True, "bfloat16") / 1e9 == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "fast"),
    [
        ({}, True),
        ({"architecture": "olmo2"}, False),
        ({"compute_dtype": "float16"}, False),
        ({"dropout": 0.1}, True),
        ({"options": {"layers": "plain"}}, False),
        ({"options": {"attention": "sdpa", "layers": "auto"}}, True),
        ({"device_kind": "cuda"}, True),
        ({"device_kind": "rocm"}, False),
        ({"device_kind": "cpu"}, False),
    ],
)
def test_the_fast_path_counts_only_where_it_serves(
    settings: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "find_spec", lambda name: object())
    asked = {"architecture": "llama", "compute_dtype": "bfloat16", **settings}
    constants = memory_of(TORCH, fused=True)(MemoryQuery(**asked))
    plain = plain_memory(TORCH, MemoryQuery(**asked))
    expected = fused_memory(TORCH) if fast else plain
    assert constants == expected != (plain if fast else fused_memory(TORCH))
    assert memory_of(TORCH, fused=False)(MemoryQuery(**asked)) == plain


def test_eager_attention_is_not_served_by_the_fast_path_and_keeps_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "find_spec", lambda name: object())
    eager = {"options": {"attention": "eager"}}
    for in_half, kept in (("bfloat16", 3.0), ("float32", 1.8)):
        asked = MemoryQuery("llama", in_half, **eager)
        with_scores = replace(TORCH, attention_scores_kept=kept, master_bytes=6 if in_half == "bfloat16" else 4)
        assert memory_of(TORCH, fused=True)(asked) == with_scores
    assert memory_of(TORCH, fused=True)(MemoryQuery("llama", "float32")).attention_scores_kept == 0.0


def test_masks_of_dropout_are_counted_where_the_plain_layers_keep_them() -> None:
    """Per token and layer, in hidden widths: what a Llama with dropout took beyond one without."""
    plain = memory_of(TORCH, fused=False)
    kept = [plain(MemoryQuery("llama", "bfloat16", dropout)).hidden_copies for dropout in (0.0, 0.1)]
    assert kept == [TORCH.hidden_copies, TORCH.hidden_copies + 3.5]


@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
def test_tiles_of_recomputed_layers_are_those_that_are_computed(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "find_spec", lambda name: object())
    fused = memory_of(TORCH, fused=True)
    tiles = [
        fused(MemoryQuery(family, "bfloat16", recompute=recompute)).feed_forward_tile
        for family in ("qwen3", "qwen3_moe")
    ]
    assert tiles == [platform.TILE_ROWS, platform.MIXTURE_TILE_ROWS]


@pytest.mark.parametrize(("recompute", "copies"), [("offload", 2), ("full", 0)])
def test_what_attention_gave_over_long_rows_is_counted_where_it_comes_back_from_the_host(
    recompute: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers at a time, 32 heads of 128 to a token in bfloat16."""
    monkeypatch.setattr(platform, "find_spec", lambda name: object())
    constants = memory_of(TORCH, fused=True)(MemoryQuery("llama", "bfloat16", recompute=recompute))

    def more_than_without(tokens: int) -> int:
        sized = {"batch_size": 1, "sequence_length": tokens}
        with_it, without = (
            qlora(LLAMA_8B, constants=each, **sized) for each in (constants, replace(constants, attended_copies=0.0))
        )
        return with_it.total - without.total

    assert more_than_without(platform.LONG_SAMPLE) == copies * platform.LONG_SAMPLE * 32 * 128 * 2
    assert more_than_without(platform.LONG_SAMPLE - 1) == 0


def test_what_a_family_keeps_beyond_a_llama_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "find_spec", lambda name: None)
    peaks = {
        family: qlora(
            LLAMA_8B,
            gradient_checkpointing=False,
            constants=memory_of(TORCH, fused=True)(MemoryQuery(family, "bfloat16")),
        ).total
        for family in ("llama", "gemma3_text", "gemma2")
    }
    assert peaks["llama"] < peaks["gemma3_text"] < peaks["gemma2"]


def test_logits_and_a_layers_work_are_not_counted_at_once() -> None:
    """The head is done before the first layer is differentiated; the larger of the two counts."""
    still = MemoryConstants(cross_entropy_rows=512)
    little, much = replace(still, working_layers=0.01), replace(still, working_layers=100.0)
    keeping = {"gradient_checkpointing": False}
    assert qlora(LLAMA_8B, constants=little, **keeping).total == qlora(LLAMA_8B, constants=still, **keeping).total
    both, kept = (qlora(LLAMA_8B, constants=constants, **keeping) for constants in (much, still))
    assert both.activations + both.logits == pytest.approx(kept.activations + 100 * kept.activations / 32, rel=1e-6)
    # Recomputed, a layer is alive as a whole while it is differentiated, beside the 32 inputs that were kept.
    inputs = 32 * 8192 * 4096 * 2
    again = qlora(LLAMA_8B, constants=still)
    assert again.activations + again.logits == pytest.approx(inputs + kept.activations / 32, rel=1e-6)


def test_holes_of_the_heap_are_counted_where_tensors_are_small() -> None:
    solid, holed = MemoryConstants(), MemoryConstants(heap_holes=0.25)
    few, many = {"batch_size": 1, "sequence_length": 512}, {"batch_size": 1, "sequence_length": 2048}
    small, with_holes = (qlora(LLAMA_8B, constants=constants, **few) for constants in (solid, holed))
    # 512 x 14336 x 2 bytes = 14 MiB, below glibc's 32; 2048 of them are above. Of 32 layers eight leave holes.
    kept = qlora(LLAMA_8B, constants=solid, **few, gradient_checkpointing=False).activations
    assert with_holes.workspace - small.workspace == pytest.approx((kept / 4 + small.logits) / 4, rel=1e-6)
    assert qlora(LLAMA_8B, constants=holed, **many) == qlora(LLAMA_8B, constants=solid, **many)


# cards ----------------------------------------------------------------------------------------------------------------
def test_65b_fits_a_48_gigabyte_card_and_not_a_24_gigabyte_card() -> None:
    needed = qlora(LLAMA_65B, batch_size=1, sequence_length=512, constants=LIGER)
    memory = {card.name: card.memory_bytes for card in KNOWN_GPUS}
    assert memory["NVIDIA RTX 3090"] < needed.high <= memory["NVIDIA L40S"]


def test_apple_working_set_is_below_the_memory() -> None:
    assert apple_working_set(16 * GIB) == 16 * GIB * 2 // 3
    assert apple_working_set(64 * GIB) == 48 * GIB


def test_adapter_has_the_parameters_that_other_tools_print() -> None:
    """Llama-7B, r=16, all linear layers."""
    assert adapter_parameters(LLAMA_7B.linear_modules, 16) == 39_976_960
