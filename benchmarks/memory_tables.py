"""The tables of docs/memory.md, computed: no number in them is measured or typed.

python benchmarks/memory_tables.py --write docs/memory.md
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_hal.cli.estimate_text import advice_in_short
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import figures
from qlora_hal.memory.gpus import known_gpu
from qlora_hal.memory.inference import inference_memory
from qlora_hal.run.card_table import EIGHT_BIT, FOUR_BIT, FULL, LORA, card_rows, peaks_of
from qlora_hal.run.planned_memory import PlannedModel

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
CIRCULATING: Mapping[str, tuple[int, int, int]] = {"7B": (120, 36, 12), "65B": (780, 145, 48)}
"""Decimal GB of full tuning, LoRA and QLoRA, as a table has them that is passed on without batch, length or source."""
BEGIN, END = "<!-- {}: python benchmarks/memory_tables.py --write docs/memory.md -->", "<!-- end of {} -->"


def planned(shape: str, batch: int, length: int, **settings: object) -> PlannedModel:
    """A Llama of a shape, known from config.json alone, on the hardware that most have."""
    common = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 131072, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        described = {**common, **SHAPES[shape], "tie_word_embeddings": False}
        (Path(folder) / "config.json").write_text(json.dumps(described))
        keywords = {
            "model": folder,
            "training.per_device_train_batch_size": batch,
            "data.max_seq_length": length,
            "training.optim": "adamw",
            **settings,
        }
        config = resolve_settings(None, keywords=keywords, environ={}).config
        return PlannedModel.of(config, known_gpu("H200"))


def circulating() -> Iterator[str]:
    """What circulates beside what is computed, at the smallest batch and at one that people train with."""
    yield "| model | method | circulates | 1 x 512 | 4 x 2048 | 4 x 2048, recomputed |"
    yield "|---|---|---|---|---|---|"
    for shape, told in CIRCULATING.items():
        columns = [
            peaks_of(planned(shape, batch, length, **{"training.gradient_checkpointing": again}))
            for batch, length, again in ((1, 512, False), (4, 2048, False), (4, 2048, True))
        ]
        for method, figure in zip((FULL, LORA, FOUR_BIT), told, strict=True):
            found = " | ".join(f"{column[method].total / 1e9:.1f}" for column in columns)
            yield f"| {shape} | {method} | {figure} | {found} |"


def cards(shape: str, batch: int, length: int) -> Iterator[str]:
    """Every known card that can hold the model in 4 bits, whatever the settings."""
    methods = (FULL, LORA, EIGHT_BIT, FOUR_BIT)
    yield f"| card | memory | architecture | dtype | {' | '.join(methods)} | what makes 4-bit fit | source |"
    yield f"|{'---|' * (6 + len(methods))}"
    for row in card_rows(planned(shape, batch, length)):
        if row.advice is not None and not row.advice.fits:
            continue
        size = figures.size(row.card.memory_bytes)
        memory = f"{row.card.devices} x {size}" if row.card.devices > 1 else size
        classes = " | ".join(row.verdicts[method].value for method in methods)
        advice = advice_in_short(row, FOUR_BIT).removeprefix(f"{FOUR_BIT} ")
        what = f"{row.card.name} | {memory} | {row.card.architecture.rpartition(' ')[2]} | {row.compute_dtype}"
        yield f"| {what} | {classes} | {advice} | {row.card.source} |"


def answering() -> Iterator[str]:
    """Weights and cache of one answer."""
    yield "| model | weights in | weights | cache of 2,048 tokens | of 32,768 | of 131,072 |"
    yield "|---|---|---|---|---|---|"
    for shape in SHAPES:
        for level in ("none", "8bit", "4bit"):
            one = planned(shape, 1, 2048, **{"quantization.weight_format": level})
            found = [
                inference_memory(one.facts, one.quantization, one.compute_dtype, 1, length, 0)
                for length in (2048, 32768, 131072)
            ]
            caches = " | ".join(f"{each.cache / 1e9:.2f}" for each in found)
            yield f"| {shape} | {one.quantization.weight_format.value} | {found[0].weights / 1e9:.1f} | {caches} |"


TABLES = {
    "circulating": circulating,
    "cards of 8B": lambda: cards("8B", 1, 2048),
    "cards of 65B": lambda: cards("65B", 1, 512),
    "answering": answering,
}


def written(page: str) -> str:
    """The page with each table between its marks made again."""
    for name, rows in TABLES.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = "\n".join([before + begin, *rows(), end]) + after
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="the page whose tables are written")
    page = parser.parse_args().write
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
