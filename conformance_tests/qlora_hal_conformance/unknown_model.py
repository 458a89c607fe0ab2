"""A model folder that looks like a user's and that nobody has seen: shape, weights, tokenizer and settings drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qlora_hal_conformance.fixtures import Opener
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.random_models import FIRST_ORDINARY_TOKEN, TinyModel, draw_tensors

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<s>", "</s>")
HEAD_DIM = 64


def draw_shape(random: np.random.Generator) -> LlamaShape:
    """None of the suite's published shapes: other widths, groups, layers, vocabulary. All widths are multiples of 128,
    as every weight format has whole blocks of."""
    key_heads = int(random.choice([1, 2]))
    heads = key_heads * int(random.choice([2, 4, 6] if key_heads == 1 else [2, 3]))
    return LlamaShape(
        vocab_size=int(random.integers(500, 900)),
        hidden_size=256 if 256 % heads == 0 else 384,  # a Llama's heads divide it
        intermediate_size=128 * int(random.integers(3, 6)),
        num_hidden_layers=int(random.choice([1, 3])),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=HEAD_DIM,
        rope_theta=float(random.choice([3000.0, 20000.0, 250000.0])),
        rms_norm_eps=float(random.choice([1e-6, 3e-6, 1e-5])),
    )


def write_unknown_model(opened: Opener, folder: Path, random: np.random.Generator) -> TinyModel:
    """Weights in the way that the backend gets them, and all the small files that a hub's folder has."""
    shape = draw_shape(random)
    model = opened.written(folder, shape, draw_tensors(shape, random))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"max_position_embeddings": int(random.choice([2048, 4096, 8192])), "initializer_range": 0.02}
    files: dict[str, object] = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.7},
        "tokenizer.json": _tokenizer(shape.vocab_size, random),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIAL[0],
            "bos_token": SPECIAL[1],
            "eos_token": SPECIAL[2],
            "model_max_length": config["max_position_embeddings"],
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return model


def _tokenizer(size: int, random: np.random.Generator) -> dict[str, object]:
    """A word for each id, in the format of Hugging Face's tokenizers."""
    words = dict.fromkeys(SPECIAL)
    while len(words) < size:
        words["".join(random.choice(list(LETTERS), int(random.integers(2, 8))))] = None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": SPECIAL[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number in range(FIRST_ORDINARY_TOKEN)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": SPECIAL[0]},
    }
