"""A config.json without weights. Tests only."""

from __future__ import annotations

import json
from pathlib import Path


def write_config(
    folder: Path,
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocabulary: int,
    positions: int = 8192,
) -> dict[str, object]:
    """A Llama's, into `folder`."""
    config: dict[str, object] = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return config
