"""`train()` itself on a Llama-3.1-8B-shaped model: random weights in NF4, real rows of 2048 tokens, 50 steps.

    PYTHONPATH=.:backends:benchmarks python benchmarks/train_8b_shape.py --out docs/runs/h200_8b [--shape 8b]

It shows the whole way (headers, tokens, loading, steps, checkpoint, adapter, report) at the size users have, on a CUDA
device. The model learns nothing worth having: its weights are random. Kept: run.json and metrics.jsonl.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from random_model import SHAPES, write_checkpoint

from qlora_hal import train
from qlora_hal.data import ChatTokenizer
from qlora_hal.demo import data_path, model_path

TIME = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        write_checkpoint(model, SHAPES[arguments.shape], torch.device("cuda"))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_path() / name, model / name)
        settings = {
            "output_dir": str(folder / "run"),
            "model": {"name_or_path": str(model)},
            "lora": {"r": 16, "alpha": 16.0},
            "data": {"path": str(long_rows(folder)), "max_seq_length": TIME, "format": "text"},
            "training": {
                "learning_rate": 1e-4,
                "max_steps": arguments.steps,
                "per_device_train_batch_size": arguments.micro_batch,
                "gradient_checkpointing": arguments.checkpointing,
                "seed": 0,
            },
        }
        result = train(settings)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in ("run.json", "metrics.jsonl"):
            shutil.copy(result.run_dir / name, arguments.out / name)
    print(f"{result.steps} steps, {result.tokens_per_second:.0f} tokens/s, {result.losses[0]} -> {result.losses[-1]}")


def long_rows(folder: Path) -> Path:
    """The held-out text of the demo in rows of just over 2048 tokens, so that every row is cut to exactly 2048."""
    import json

    tokenizer = ChatTokenizer.from_folder(model_path())
    ids = tokenizer.encode(data_path("test_text").read_text())
    texts = [tokenizer.decode(ids[start : start + TIME + 64]) for start in range(0, len(ids) - TIME, TIME // 4)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


if __name__ == "__main__":
    main()
