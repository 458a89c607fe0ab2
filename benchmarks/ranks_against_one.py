"""How far the losses of several ranks are from those of one, step by step, on the embedded demo.

    python benchmarks/ranks_against_one.py --backend mlx_lora --ranks 2 --out docs/runs/ranks_mlx_lora.json

Every run has the same rows in the same steps, so what differs is the shape of the micro-batches and the order of
float32 sums. Validation and samples are left out: they have no effect on a step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_hal import train
from qlora_hal.config.demo import demo_settings
from qlora_hal.config.resolve import nest

LEFT_OUT = ("data.validation_path", "training.eval_steps", "training.sample_prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu_torch")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4, help="of one step, on all ranks together")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = [trained(ranks, arguments) for ranks in (1, arguments.ranks)]
    one, several = (run["losses"] for run in runs)
    table = {
        "backend": arguments.backend,
        "device": runs[0].pop("device"),
        "versions": runs[0].pop("versions"),
        "sequences_in_a_step": arguments.sequences,
        "steps": arguments.steps,
        "largest_difference": max(abs(a - b) for a, b in zip(one, several, strict=True)),
        "largest_relative_difference": max(abs(a - b) / a for a, b in zip(one, several, strict=True)),
        "runs": [{name: run[name] for name in ("ranks", "losses")} for run in runs],
    }
    print(json.dumps({name: value for name, value in table.items() if name != "runs"}, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def trained(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        settings = {
            **{name: value for name, value in demo_settings().items() if name not in LEFT_OUT},
            "output_dir": str(Path(folder) / "run"),
            "training.max_steps": arguments.steps,
            "training.per_device_train_batch_size": arguments.sequences // ranks,
            "training.seed": 3,
            "backend.name": arguments.backend,
        }
        result = train(nest(settings), devices=ranks)
        resolved = json.loads((Path(folder) / "run" / "run.json").read_text(encoding="utf-8"))["resolved"]
        return {
            "ranks": ranks,
            "losses": [loss for _, loss in result.losses],
            "device": result.device,
            "versions": resolved["versions"],
        }


if __name__ == "__main__":
    main()
