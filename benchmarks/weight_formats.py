"""What each weight format costs on a really pretrained model: the embedded demo.

    python benchmarks/weight_formats.py [--backend cpu_torch] [--steps 200] [--out docs/runs/weight_formats.json]

Before tuning: loss per token on held-out running text (`test_text.txt`) and on the answers of the test rows. After
tuning: the same answers, with the same rows in the same order and the same start for every format.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qlora_hal import train
from qlora_hal.config.demo import demo_settings
from qlora_hal.config.resolve import nest
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch
from qlora_hal.data import ChatTokenizer
from qlora_hal.demo import data_path, model_path
from qlora_hal.detect.discovery import find, listed, load_spec, open_trainer
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource

FORMATS = {"none": "none", "8bit": "int8", "nf4": "nf4", "fp4": "fp4"}
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu_torch")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [measured(name, arguments.backend, arguments.steps) for name in FORMATS]
    table = {"backend": arguments.backend, "steps": arguments.steps, "device": rows[0].pop("device"), "formats": rows}
    for row in rows:
        row.pop("device", None)
    print(json.dumps(table, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(table, indent=2) + "\n")
    print(markdown(rows))


def measured(name: str, backend: str, steps: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        settings = {
            **demo_settings(),
            "output_dir": str(Path(folder) / "run"),
            "data.validation_path": str(data_path("test")),
            "quantization.weight_format": name,
            "training.max_steps": steps,
            "training.eval_steps": None,
            "training.seed": 0,
            "training.sample_prompts": (),
            "backend.name": backend,
        }
        result = train(nest(settings))
    text = text_loss(FORMATS[name], backend)
    return {
        "format": name,
        "text_loss": round(text, 4),
        "text_perplexity": round(float(np.exp(text)), 3),
        "answers_before": round(float(result.eval_loss_before or np.nan), 4),
        "answers_after": round(float(result.eval_loss_after or np.nan), 4),
        "device": result.device,
    }


def text_loss(weight_format: str, backend: str) -> float:
    """Nats per token over consecutive windows of the held-out text."""
    spec = load_spec(find(backend, listed()))
    four_bit = weight_format in ("nf4", "fp4")
    with open_trainer(spec) as trainer:
        quantization = Quantization(WeightFormat(weight_format), 64 if four_bit else None, four_bit)
        source = ModelSource("demo", model_path(), read_facts(model_path()))
        trainer.load(source, quantization, Compute(trainer.proved_compute_dtypes()[0]))  # type: ignore[arg-type]
        return trainer.evaluate(text_windows()).loss


def text_windows() -> list[Batch]:
    tokenizer = ChatTokenizer.from_folder(model_path())
    ids = np.asarray(tokenizer.encode(data_path("test_text").read_text()), np.int32)
    rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    positions = np.tile(np.arange(WINDOW, dtype=np.int32), (8, 1))
    return [
        Batch(part, part, positions[: len(part)], np.ones_like(part))
        for part in np.array_split(rows, -(-len(rows) // 8))
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| format | text loss | perplexity | answers before | answers after |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append("| " + " | ".join(str(value) for value in row.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
