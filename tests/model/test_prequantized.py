"""A quantized checkpoint shows its true shapes; bitsandbytes and MLX checkpoints here are made by those libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_hal.errors import ModelError, UnsafeInputError
from qlora_hal.files.safetensors_file import DTYPE_BITS
from qlora_hal.model.facts import read_facts

WriteModel = Callable[..., Path]
Tensors = dict[str, np.ndarray]


# bitsandbytes, written by transformers ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantized(plain: Path, target: Path, **settings: object) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map="cpu").save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("settings", "weight_format", "block_size", "double_quant"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4", 64, True),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4", 64, False),
        ({"load_in_8bit": True}, "int8", None, False),
    ],
)
def test_a_bitsandbytes_checkpoint_has_the_shapes_of_the_plain_model(
    plain_model: Path,
    tmp_path: Path,
    settings: dict[str, object],
    weight_format: str,
    block_size: int | None,
    double_quant: bool,
) -> None:
    plain = read_facts(plain_model)
    facts = read_facts(quantized(plain_model, tmp_path / "quantized", **settings))
    assert facts.linear_modules == plain.linear_modules
    assert facts.parameter_count == plain.parameter_count
    assert facts.prequantized is not None
    assert facts.prequantized.method == "bitsandbytes"
    assert facts.prequantized.weight_format == weight_format
    assert facts.prequantized.block_size == block_size
    assert facts.prequantized.double_quant is double_quant


@pytest.fixture(scope="module")
def nf4_model(plain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(
        plain_model, tmp_path_factory.mktemp("nf4") / "model", load_in_4bit=True, bnb_4bit_quant_type="nf4"
    )


STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [128, 128]}, "4 bits needs another number"),
        ({"shape": "os.system"}, "not \\[out, in\\]"),
        ({"shape": [-1, 5]}, "positive whole number"),
        ({"blocksize": 128}, "quantized in different ways"),
        ({"quant_type": "fp4"}, "quant_type = fp4"),
        ({"dtype": "float99"}, "dtype = float99"),
        ({"nested_blocksize": 256}, "up_proj: nf4, block 64, its scales quantized too"),
        ({"written_by": "someone"}, "written_by = someone"),
        (None, "not the JSON"),
    ],
)
def test_a_quantization_state_that_lies_is_refused(
    nf4_model: Path, tmp_path: Path, change: dict[str, object] | None, words: str
) -> None:
    tensors = _load(nf4_model)
    state = json.loads(tensors[STATE].tobytes())
    raw = b"\x80\x04." if change is None else json.dumps({**state, **change}).encode()
    tensors[STATE] = np.frombuffer(raw, np.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((nf4_model / "config.json").read_text())
    with pytest.raises(ModelError, match=words) as caught:
        read_facts(tmp_path)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C73", 5)


@pytest.fixture(scope="module")
def nested_model(plain_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested") / "model"
    return quantized(plain_model, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


PACKED = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("absmax", lambda found: found[:3], "has 3 entries in U8"),
        ("absmax", lambda found: found.astype(np.float32), "entries in F32; its shape and block size need 384 in U8"),
        ("absmax", None, "absmax is missing"),
        ("quant_map", lambda found: found[::-1].copy(), "not the table of nf4"),
        ("quant_map", lambda found: found[:4], "has 4 entries"),
        ("quant_map", None, "quant_map is missing"),
        ("nested_absmax", lambda found: found[:0], "has 0 entries"),
        ("nested_quant_map", lambda found: found[:255], "has 255 entries"),
        ("strange", lambda _: np.ones(3, np.float32), "is no part of a packed weight"),
    ],
)
def test_parts_of_a_packed_weight_that_a_decoder_would_not_look_at_are_checked(
    nested_model: Path, tmp_path: Path, part: str, change: Callable[..., np.ndarray] | None, words: str
) -> None:
    """bitsandbytes reads beyond the end of too few scales, and has a table of its own."""
    tensors = _load(nested_model)
    found = tensors.pop(f"{PACKED}.{part}", None)
    if change is not None:
        tensors[f"{PACKED}.{part}"] = change(found)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((nested_model / "config.json").read_text())
    with pytest.raises(ModelError, match=words) as caught:
        read_facts(tmp_path)
    assert caught.value.code == "QH-C73"


@pytest.mark.parametrize(
    ("part", "change", "code"),
    [
        ("weight", lambda found: found.astype(np.float16), "QH-C73"),
        ("weight", lambda found: found.view(np.uint8), "QH-C73"),
        ("SCB", lambda found: found.astype(np.int32), "QH-C73"),
        ("SCB", None, "QH-C73"),
        ("weight_format", lambda _: np.array(2, np.uint8), "QH-C72"),  # col_ampere
    ],
)
def test_parts_of_an_int8_weight_that_mean_something_else_are_refused(
    plain_model: Path, tmp_path: Path, part: str, change: Callable[..., np.ndarray] | None, code: str
) -> None:
    folder = quantized(plain_model, tmp_path / "model", load_in_8bit=True)
    tensors = _load(folder)
    found = tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
    if change is not None:
        tensors[f"model.layers.0.mlp.up_proj.{part}"] = change(found)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        read_facts(folder)
    assert caught.value.code == code


@pytest.mark.fault("C15")
def test_a_huge_quantization_state_is_not_read(nf4_model: Path, tmp_path: Path) -> None:
    tensors = _load(nf4_model)
    tensors[STATE] = np.zeros(70_000, np.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((nf4_model / "config.json").read_text())
    with pytest.raises(UnsafeInputError, match="70000 bytes"):
        read_facts(tmp_path)


def _load(folder: Path) -> Tensors:
    """All tensors as numpy; bfloat16, which numpy lacks, as float16 of the same size."""
    from safetensors.torch import load_file as load_torch_file

    tensors = load_torch_file(folder / "model.safetensors")
    return {k: (v.half() if v.dtype.is_floating_point and v.itemsize == 2 else v).numpy() for k, v in tensors.items()}


# MLX, quantized by MLX ----------------------------------------------------------------------------------------------
def mlx_packed(weight: np.ndarray, group_size: int, bits: int, mode: str) -> list[np.ndarray]:
    import mlx.core as mx

    return [np.array(part) for part in mx.quantize(mx.array(weight), group_size=group_size, bits=bits, mode=mode)]


def mlx_model(
    write_model: WriteModel, tensors: Tensors, quantization: dict[str, object], bits: int, mode: str = "affine"
) -> Path:
    stored: Tensors = {}
    for name, array in tensors.items():
        if array.ndim == 2:
            module = name.removesuffix(".weight")
            parts = mlx_packed(array, 16 if mode == "nvfp4" else 32, bits, mode)
            kinds = ("weight", "scales", "biases")[: len(parts)]
            stored |= {f"{module}.{kind}": part for kind, part in zip(kinds, parts, strict=True)}
        else:
            stored[name] = array
    config = {"model_type": "llama", "vocab_size": 96, "quantization": quantization}
    return write_model("mlx", tensors=stored, config=config)


def mlx_sized(weights: Tensors) -> Tensors:
    """The tiny Llama with every width a multiple of the smallest MLX group, 32."""
    return {
        name: np.resize(array, tuple(-(-side // 32) * 32 for side in array.shape)) for name, array in weights.items()
    }


@pytest.mark.parametrize(
    ("bits", "weight_format"), [(bits, f"int{bits}_affine") for bits in (2, 3, 4, 5, 6, 8)], ids=str
)
def test_an_mlx_checkpoint_has_true_shapes_and_quantized_embeddings_are_no_target(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], bits: int, weight_format: str
) -> None:
    weights = mlx_sized(llama_weights())
    plain = read_facts(write_model("plain", tensors=weights, config={"model_type": "llama", "vocab_size": 96}))
    facts = read_facts(mlx_model(write_model, weights, {"group_size": 32, "bits": bits, "mode": "affine"}, bits))
    assert facts.linear_modules == plain.linear_modules
    assert facts.parameter_count == plain.parameter_count
    assert facts.prequantized is not None
    assert (facts.prequantized.method, facts.prequantized.weight_format) == ("mlx", weight_format)
    assert facts.prequantized.block_size == 32


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_an_mlx_checkpoint_of_floats_has_true_shapes(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], mode: str, bits: int, group_size: int
) -> None:
    weights = mlx_sized(llama_weights())
    plain = read_facts(write_model("plain", tensors=weights, config={"model_type": "llama", "vocab_size": 96}))
    described: dict[str, object] = {"group_size": group_size, "bits": bits, "mode": mode}
    facts = read_facts(mlx_model(write_model, weights, described, bits, mode))
    assert facts.linear_modules == plain.linear_modules
    assert facts.prequantized is not None
    assert (facts.prequantized.weight_format, facts.prequantized.block_size) == (mode, group_size)


@pytest.mark.parametrize("described", [{"mode": "mxfp4", "group_size": 64, "bits": 4}, {"mode": "nf4", "bits": 4}])
def test_an_mlx_checkpoint_in_a_form_that_mlx_lacks_is_refused(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], described: dict[str, object]
) -> None:
    with pytest.raises(ModelError, match=r"MLX (mxfp4|nf4)") as caught:
        read_facts(mlx_model(write_model, mlx_sized(llama_weights()), {"group_size": 32, **described}, 4))
    assert caught.value.code == "QH-C72"


def test_an_mlx_checkpoint_with_another_group_size_than_it_says_is_refused(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    with pytest.raises(ModelError, match="groups of 64") as caught:
        read_facts(mlx_model(write_model, mlx_sized(llama_weights()), {"group_size": 64, "bits": 4}, 4))
    assert caught.value.code == "QH-C73"


UP = "model.layers.0.mlp.up_proj"
FOUR_BITS: dict[str, object] = {"group_size": 32, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("own", [True, FOUR_BITS, {"group_size": 32}, {"group_size": 32, "bits": 4}])
def test_what_mlx_says_of_one_module_may_be_what_it_says_of_all(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], own: object
) -> None:
    described = {**FOUR_BITS, UP: own, "model.layers.0.mlp.router": False, "vision.up": {"bits": 8}}
    facts = read_facts(mlx_model(write_model, mlx_sized(llama_weights()), described, 4))
    assert facts.prequantized is not None
    assert facts.prequantized.weight_format == "int4_affine"


@pytest.mark.parametrize(
    ("module", "own", "code", "words"),
    [
        (UP, False, "QH-C73", "up_proj has scales, quantization.* is False"),
        (UP, {"bits": 8, "group_size": 32}, "QH-C72", "several ways .*up_proj: affine in 8 bits and groups of 32"),
        (UP, {"bits": 4}, "QH-C72", "affine in 4 bits and groups of 64"),
        (UP, {}, "QH-C72", "affine in 4 bits and groups of 64"),
        (UP, {**FOUR_BITS, "mode": "mxfp4"}, "QH-C72", "up_proj: mxfp4 in 4 bits and groups of 32"),
        (UP, {**FOUR_BITS, "quantize_input": True}, "QH-C72", "groups of 32, with its inputs"),
        (UP, 4, "QH-C73", "up_proj holds 4"),
        (UP, None, "QH-C73", "up_proj holds None"),
        ("model.norm", True, "QH-C73", "model.norm has no scales"),
        ("model.embed_tokens", {"bits": 8}, "QH-C72", "embed_tokens: affine in 8 bits"),
    ],
)
def test_what_mlx_says_of_one_module_only_is_refused_with_its_name(
    write_model: WriteModel,
    llama_weights: Callable[..., Tensors],
    module: str,
    own: object,
    code: str,
    words: str,
) -> None:
    """A mode of one module is its own, and so are its defaults: nothing of it is inherited."""
    with pytest.raises(ModelError, match=words) as caught:
        read_facts(mlx_model(write_model, mlx_sized(llama_weights()), {**FOUR_BITS, module: own}, 4))
    assert caught.value.code == code


def test_a_module_of_a_microscaling_checkpoint_that_names_no_mode_is_affine(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    described: dict[str, object] = {"group_size": 32, "bits": 4, "mode": "mxfp4", UP: {"group_size": 32, "bits": 4}}
    with pytest.raises(ModelError, match="up_proj: affine in 4 bits and groups of 32"):
        read_facts(mlx_model(write_model, mlx_sized(llama_weights()), described, 4, "mxfp4"))


@pytest.mark.parametrize(
    ("mode", "part", "change", "words"),
    [
        ("affine", "weight", lambda found: found.view(np.int32), "up_proj.weight is stored as I32; .* in U32"),
        ("affine", "weight", lambda found: found.view(np.float32), "stored as F32"),
        ("affine", "scales", lambda found: found.astype(np.int32), "scales is stored as I32; .* F32 or F16 or BF16"),
        ("affine", "biases", lambda found: found.astype(np.int16), "biases is stored as I16"),
        ("affine", "biases", None, "biases is missing"),
        ("mxfp4", "weight", lambda found: found.view(np.int32), "stored as I32"),
        ("mxfp4", "scales", lambda found: found.astype(np.float32), "scales is stored as F32; .* in U8"),
        ("mxfp4", "biases", lambda _: np.ones((64, 1), np.float32), "has biases, which only the affine mode has"),
    ],
)
def test_a_part_of_a_weight_of_mlx_in_another_dtype_is_refused(
    write_model: WriteModel,
    llama_weights: Callable[..., Tensors],
    mode: str,
    part: str,
    change: Callable[..., np.ndarray] | None,
    words: str,
) -> None:
    folder = mlx_model(write_model, mlx_sized(llama_weights()), {**FOUR_BITS, "mode": mode}, 4, mode)
    tensors = _load(folder)
    found = tensors.pop(f"{UP}.{part}", None)
    if change is not None:
        tensors[f"{UP}.{part}"] = change(found)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=words) as caught:
        read_facts(folder)
    assert caught.value.code == "QH-C73"


# GPTQ, in the layout of auto-gptq -----------------------------------------------------------------------------------
def gptq_tensors(weights: Tensors, group_size: int, bits: int = 4) -> Tensors:
    stored: Tensors = {}
    for name, array in weights.items():
        if array.ndim == 2 and ".layers." in name:
            rows, columns = array.shape
            groups = -(-columns // group_size) if group_size > 0 else 1
            module = name.removesuffix(".weight")
            stored[f"{module}.qweight"] = np.zeros((columns * bits // 32, rows), np.int32)
            stored[f"{module}.qzeros"] = np.zeros((groups, rows * bits // 32), np.int32)
            stored[f"{module}.scales"] = np.ones((groups, rows), np.float16)
            stored[f"{module}.g_idx"] = np.zeros(columns, np.int32)
        else:
            stored[name] = array
    return stored


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("described_in", ["config.json", "quantize_config.json"])
def test_a_gptq_checkpoint_has_true_shapes(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], described_in: str, group_size: int
) -> None:
    description = {"bits": 4, "group_size": group_size, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    config: dict[str, object] = {"model_type": "llama", "vocab_size": 96}
    if described_in == "config.json":
        config["quantization_config"] = {"quant_method": "gptq", **description, "dataset": ["private text"]}
    folder = write_model("gptq", tensors=gptq_tensors(llama_weights(), group_size), config=config)
    if described_in == "quantize_config.json":
        (folder / described_in).write_text(json.dumps(description))
    facts, plain = read_facts(folder), read_facts(write_model("plain"))
    assert facts.linear_modules == plain.linear_modules
    assert facts.parameter_count == plain.parameter_count
    assert facts.prequantized is not None
    assert (facts.prequantized.method, facts.prequantized.weight_format) == ("gptq", "int4_gptq")
    assert facts.prequantized.block_size == (16 if group_size > 0 else None)
    assert dict(facts.prequantized.settings) == description


def test_a_gptq_checkpoint_whose_bits_do_not_fit_is_refused(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    folder = write_model(tensors=gptq_tensors(llama_weights(), 16, bits=8), config={"vocab_size": 96})
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16}))
    with pytest.raises(ModelError, match="4 bits give 96 inputs") as caught:
        read_facts(folder)
    assert caught.value.code == "QH-C73"


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"bits": 2, "group_size": 16, "quant_method": "gptq"}, "GPTQ in 2 bits"),
        ({"bits": 4, "group_size": 16, "quant_method": "awq"}, "quantized with awq"),
    ],
)
def test_a_method_or_width_that_no_backend_has_is_refused_with_the_readable_ones(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], description: dict[str, object], words: str
) -> None:
    bits = int(str(description["bits"]))
    config = {"vocab_size": 96, "quantization_config": description}
    folder = write_model(tensors=gptq_tensors(llama_weights(), 16, bits), config=config)
    with pytest.raises(ModelError, match=words) as caught:
        read_facts(folder)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C72", 5)
    assert "bitsandbytes" in caught.value.message


def test_the_first_checkpoints_of_awq_are_known_by_their_description(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    tensors = {name: array for name, array in gptq_tensors(llama_weights(), 16).items() if not name.endswith("g_idx")}
    folder = write_model(tensors=tensors, config={"vocab_size": 96})
    described = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="quantized with AWQ") as caught:
        read_facts(folder)
    assert caught.value.code == "QH-C72"
    assert "unquantized version" in caught.value.fix


def test_a_description_that_has_gptqs_words_beside_those_of_awq_is_gptqs(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    described = {"bits": 4, "group_size": 16, "desc_act": False, "sym": True, "quant_method": "gptq"}
    config = {"vocab_size": 96, "quantization_config": described}
    folder = write_model(tensors=gptq_tensors(llama_weights(), 16), config=config)
    (folder / "quant_config.json").write_text(json.dumps({**described, "w_bit": 4}))
    assert read_facts(folder).prequantized is not None


def test_plain_weights_under_another_method_are_refused(write_model: WriteModel) -> None:
    config = {"vocab_size": 96, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ModelError, match="quantized with fp8"):
        read_facts(write_model(config=config))


# a weight that is stored twice ----------------------------------------------------------------------------------------
DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("part", ["weight", "biases", "weight.absmax"])
def test_another_weight_beside_a_gptq_one_is_refused(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], part: str
) -> None:
    """It would go unused."""
    weights = llama_weights()
    tensors = {**gptq_tensors(weights, 16), f"{DOWN}.{part}": weights[f"{DOWN}.weight"]}
    folder = write_model(tensors=tensors, config={"vocab_size": 96})
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16}))
    with pytest.raises(ModelError, match=rf"{DOWN} is stored twice, as {DOWN}\.qweight .* as {DOWN}\.{part}") as caught:
        read_facts(folder)
    assert caught.value.code == "QH-C73"


@pytest.mark.parametrize("part", ["qweight", "qzeros", "weight.absmax"])
def test_another_weight_beside_one_of_mlx_is_refused(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], part: str
) -> None:
    weights = {**mlx_sized(llama_weights()), f"{DOWN}.{part}": np.ones(4, np.float32)}
    config: dict[str, object] = {"group_size": 32, "bits": 4}
    with pytest.raises(ModelError, match=rf"{DOWN} is stored twice|neither quantization_config nor") as caught:
        read_facts(mlx_model(write_model, weights, config, 4))
    assert caught.value.code == "QH-C73"


@pytest.mark.parametrize("part", ["qweight", "scales"])
def test_another_weight_beside_one_of_bitsandbytes_is_refused(nf4_model: Path, tmp_path: Path, part: str) -> None:
    tensors = {**_load(nf4_model), f"model.layers.0.mlp.up_proj.{part}": np.ones((4, 4), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((nf4_model / "config.json").read_text())
    with pytest.raises(ModelError, match="up_proj is stored twice") as caught:
        read_facts(tmp_path)
    assert caught.value.code == "QH-C73"


@pytest.mark.parametrize("part", ["scales", "qzeros", "g_idx"])
def test_a_part_of_gptq_beside_a_plain_weight_is_refused(
    write_model: WriteModel, llama_weights: Callable[..., Tensors], part: str
) -> None:
    packed = gptq_tensors(llama_weights(), 16)
    plain = {name: array for name, array in packed.items() if not name.startswith(DOWN)}
    plain |= {f"{DOWN}.weight": llama_weights()[f"{DOWN}.weight"], f"{DOWN}.{part}": packed[f"{DOWN}.{part}"]}
    folder = write_model(tensors=plain, config={"vocab_size": 96})
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16}))
    with pytest.raises(ModelError, match=rf"{DOWN}\.{part} describes a weight in int4_gptq") as caught:
        read_facts(folder)
    assert caught.value.code == "QH-C73"


def test_biases_of_mlx_without_scales_are_refused(
    write_model: WriteModel, llama_weights: Callable[..., Tensors]
) -> None:
    folder = mlx_model(write_model, mlx_sized(llama_weights()), FOUR_BITS, 4)
    tensors = {name: array for name, array in _load(folder).items() if name != f"{UP}.scales"}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj\.biases describes a weight in int4_affine"):
        read_facts(folder)


def test_an_absmax_without_a_state_is_refused(nf4_model: Path, tmp_path: Path) -> None:
    save_file(
        {name: array for name, array in _load(nf4_model).items() if name != STATE}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text((nf4_model / "config.json").read_text())
    with pytest.raises(ModelError, match=r"up_proj\.weight\.absmax describes a weight in nf4"):
        read_facts(tmp_path)


# dtypes that nobody decodes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4", "C64"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
@pytest.mark.parametrize("scale", ["", "_scale_inv"])
def test_a_tensor_in_a_dtype_that_nobody_decodes_is_refused_with_its_name(
    name: str, dtype: str, scale: str, tmp_path: Path
) -> None:
    """From the header, on every backend: MLX would read the codes of float8 as bytes."""
    tensors = {name: (dtype, [32, 32], bytes(32 * 32 * DTYPE_BITS[dtype] // 8))}
    if scale:
        tensors[f"{name}{scale}"] = ("F32", [1], bytes(4))
    write_raw(tmp_path, tensors)
    with pytest.raises(ModelError, match=rf"{name} is stored as {dtype}") as caught:
        read_facts(tmp_path)
    assert caught.value.code == "QH-C72"
    assert (f"{name}{scale}" in caught.value.cause) == bool(scale)


def test_a_description_of_float8_is_refused_by_its_name(tmp_path: Path) -> None:
    write_raw(tmp_path, {"w": ("F8_E4M3", [1], bytes(1))}, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match="quantized with fp8") as caught:
        read_facts(tmp_path)
    assert caught.value.code == "QH-C72"


def write_raw(folder: Path, tensors: dict[str, tuple[str, list[int], bytes]], **config: object) -> None:
    """A folder whose tensors are bytes under any dtype."""
    header, begin = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(content)]}
        begin += len(content)
    raw = json.dumps(header).encode()
    contents = b"".join(content for _, _, content in tensors.values())
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + contents)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
