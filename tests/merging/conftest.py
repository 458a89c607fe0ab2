"""Tiny models with the demo's tokenizer, adapters in mid-training on them, rows to compare on: all real, on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_model
from trainers import moved_adapter, source_of

from qlora_hal import MergeResult, merge
from qlora_hal.adapter import write_adapter
from qlora_hal.contract.values import Adapter, AdapterConfig
from qlora_hal.demo import data_path, model_path
from qlora_hal.model.facts import read_facts

FOUR_BIT = ("nf4", "fp4")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Trained:
    """A base with an adapter beside it, as a run would leave them."""

    model: Path
    folder: Path
    adapter: Adapter
    rows: Path
    backend: str

    def merge(self, out: Path, **choices: Any) -> MergeResult:
        return merge(self.folder, out, **{"rows": self.rows, "backend": self.backend, "row_limit": 8, **choices})


MakeTrained = Callable[..., Trained]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "held_out.jsonl"
    path.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:8]))
    return path


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of a family with a tokenizer, written once for each kind."""
    written: dict[str, Path] = {}

    def write(family: str = "llama", dtype: str = "float32") -> Path:
        key = f"{family}-{dtype}"
        if key not in written:
            folder = tmp_path_factory.mktemp(key)
            vocabulary = read_facts(model_path()).vocabulary_size
            write_model(folder, family, dtype=dtype, vocab_size=vocabulary, max_position_embeddings=1024)
            for name in TOKENIZER_FILES:
                shutil.copyfile(model_path() / name, folder / name)
            written[key] = folder
        return written[key]

    return write


@pytest.fixture
def trained(tmp_path: Path, rows: Path, base_model: Callable[..., Path]) -> MakeTrained:
    """An adapter whose provenance says how its base was stored."""

    def make(
        weight_format: str = "nf4",
        *,
        family: str = "llama",
        dtype: str = "float32",
        double_quant: bool | None = None,
        targets: Sequence[str] | None = None,
        use_rslora: bool = False,
        compute_dtype: str = "float32",
        strength: float = 1.0,
        backend: str = "cpu_torch",
        **provenance: object,
    ) -> Trained:
        model = base_model(family, dtype)
        source = source_of(model)
        names = tuple(sorted(targets or source.facts.linear_modules))
        start = moved_adapter(AdapterConfig(4, 12.0, 0.0, use_rslora, names), dict(source.facts.linear_modules))
        tensors = {n: (strength * t if "lora_B" in n else t).astype(np.float32) for n, t in start.tensors.items()}
        adapter = Adapter(tensors, start.config)
        four_bit = weight_format in FOUR_BIT
        recorded: dict[str, object] = {
            "base_fingerprint": source.facts.fingerprint,
            "weight_format": weight_format,
            "block_size": 64 if four_bit or weight_format.endswith("affine") else None,
            "double_quant": four_bit if double_quant is None else double_quant,
            "compute_dtype": compute_dtype,
            "backend": backend,
        }
        folder = tmp_path / f"adapter-{weight_format}"
        write_adapter(folder, adapter, base_name=str(model), base_revision=None, provenance={**recorded, **provenance})
        return Trained(model, folder, adapter, rows, backend)

    return make
