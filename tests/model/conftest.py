"""Small model folders, written on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_hal.export.requantizing import write_packed
from qlora_hal.formats.nf4 import WRITER
from qlora_hal.model.source import ModelSource
from tests.model.hub_client import Client

HIDDEN, FEED_FORWARD, VOCABULARY, LAYERS, KEY_VALUE = 32, 48, 96, 2, 16

LLAMA_CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a two-layer Llama, float16."""
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
            f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{at}.mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
        }
    return {name: generator.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


WriteModel = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write a model folder: `write_model(name, tensors=..., config=..., shards=...)`."""

    def write(
        name: str = "tiny-llama",
        *,
        tensors: Mapping[str, np.ndarray] | None = None,
        config: Mapping[str, object] | None = None,
        shards: int = 1,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        stored = dict(llama_tensors() if tensors is None else tensors)
        (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG if config is None else config))
        if shards == 1:
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: stored[key] for key in sorted(stored)[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return write


@pytest.fixture
def llama_weights() -> Callable[..., dict[str, np.ndarray]]:
    return llama_tensors


@pytest.fixture
def client(tmp_path: Path) -> Client:
    folder = tmp_path / "work"
    folder.mkdir()
    return Client(folder)


@pytest.fixture
def files(write_model: WriteModel) -> dict[str, bytes]:
    """What a small repository holds, with files beside the model that are not to be fetched."""
    folder = write_model("served")
    served = {path.name: path.read_bytes() for path in folder.iterdir()}
    return served | {
        "tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}", "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit", "README.md": b"# tiny",
        "LICENSE": b"terms", "NOTICE.txt": b"names", "USE_POLICY.md": b"uses",
    }  # fmt: skip


@pytest.fixture
def nf4_files(write_model: WriteModel, tmp_path: Path) -> dict[str, bytes]:
    """The same model in NF4, as bitsandbytes stores it."""
    base = ModelSource.in_folder(write_model("base", config={**LLAMA_CONFIG, "torch_dtype": "float16"}))
    write_packed(base, tmp_path / "packed", WRITER)
    return {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
