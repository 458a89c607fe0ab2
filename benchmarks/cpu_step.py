"""Does the layer cost anything? `train()` against a plain transformers + PEFT + bitsandbytes loop on the CPU.

    python benchmarks/cpu_step.py [--steps 12] [--rounds 3]

Same model (the embedded demo), same NF4 weights, same rows in the same order, same AdamW, same process, turn by turn;
the ratio of the medians is printed. `train()` counts everything between its steps: metrics, console, hooks, windows.
The plain loop is what a careful user writes by hand: `prepare_model_for_kbit_training`, all-linear LoRA, one backward
for each micro-batch, clipping, AdamW, and bitsandbytes' repacking switched off (it would give wrong gradients after an
evaluation).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from qlora_hal import train
from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.config.schema import DataConfig
from qlora_hal.contract.values import AdapterConfig, Batch
from qlora_hal.data import ChatTokenizer, WindowSampler, prepare
from qlora_hal.demo import data_path, model_path
from qlora_hal.model.facts import read_facts
from qlora_hal.report.console import RunConsole

RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-3
Step = Callable[[list[Batch]], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-on", choices=("assistant", "all"), default="all")
    arguments = parser.parse_args()
    windows = demo_windows(arguments.steps, arguments.train_on)
    speeds: dict[str, list[float]] = {"plain loop": [], "qlora_hal": []}
    losses: dict[str, list[float]] = {}
    for round_number in range(arguments.rounds + 1):  # the first warms both up
        results = {"plain loop": plain_run(windows), "qlora_hal": our_run(arguments.steps, arguments.train_on)}
        for name, (speed, found) in results.items():
            losses[name] = found
            if round_number:
                speeds[name].append(speed)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    print(
        json.dumps(
            {
                "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
                "ratio": round(medians["qlora_hal"] / medians["plain loop"], 3),
                "ratio_by_round": [
                    round(ours / plain, 3)
                    for ours, plain in zip(speeds["qlora_hal"], speeds["plain loop"], strict=True)
                ],
                "first_losses": {name: [round(loss, 5) for loss in found[:4]] for name, found in losses.items()},
                "train_on": arguments.train_on,
                "threads": torch.get_num_threads(),
            },
            indent=2,
        )
    )


def demo_windows(count: int, train_on: str) -> list[list[Batch]]:
    with TemporaryDirectory() as cache:
        tokenizer = ChatTokenizer.from_folder(model_path())
        config = DataConfig(path=str(data_path("train")), max_seq_length=256, train_on=train_on)  # type: ignore[arg-type]
        data = prepare(config, tokenizer, cache_dir=Path(cache), seed=0)
        sampler = WindowSampler(
            data.train,
            batch_size=16,
            accumulation=1,
            seed=0,
            shuffle=True,
            group_by_length=True,
            packing=False,
            max_seq_length=256,
            pad_id=tokenizer.pad_id,
        )
        return [sampler.window(step) for step in range(count)]


def plain_run(windows: list[list[Batch]]) -> tuple[float, list[float]]:
    """(tokens per second, losses) of the plain loop over the windows; the model's load is not counted."""
    step = plain_loop()
    started = time.perf_counter()
    losses = [step(window) for window in windows]
    seconds = time.perf_counter() - started
    return sum(b.real_tokens for window in windows for b in window) / seconds, losses


def our_run(steps: int, train_on: str) -> tuple[float, list[float]]:
    """The same of `train()`, by its own figure: from the first step queued to the last one read."""
    with TemporaryDirectory() as folder:
        settings = {
            "output_dir": str(Path(folder) / "run"),
            "model": {"name_or_path": str(model_path())},
            "quantization": {"weight_format": "nf4"},
            "lora": {"r": RANK, "alpha": ALPHA},
            "data": {"path": str(data_path("train")), "max_seq_length": 256, "train_on": train_on},
            "training": {
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "max_steps": steps,
                "per_device_train_batch_size": 16,
                "seed": 0,
            },
            "backend": {"name": "cpu_torch"},
        }
        result = train(settings, console=RunConsole(quiet=True))
    assert result.tokens_per_second is not None
    return result.tokens_per_second, [loss for _, loss in result.losses]


def start_adapter(modules: Any) -> Any:
    return initial_adapter(AdapterConfig(RANK, ALPHA, 0.0, False, tuple(sorted(modules))), modules, 0)


def plain_loop() -> Step:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(model_path(), quantization_config=settings, dtype=torch.float32)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0))
    copy_start(model)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step(window: list[Batch]) -> float:
        optimizer.zero_grad(set_to_none=True)
        total, count = 0.0, sum(batch.counted_tokens for batch in window)
        for batch in window:
            ids, labels = (torch.from_numpy(array).long() for array in (batch.input_ids, batch.labels))
            mask = torch.from_numpy((batch.segment_ids > 0).astype(np.int64))
            loss = model(ids, attention_mask=mask, labels=labels).loss * (batch.counted_tokens / count)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return total

    return step


def copy_start(model: Any) -> None:
    """The same A and B as ours, so that the losses can be compared."""
    modules = read_facts(model_path()).linear_modules
    tensors = start_adapter(modules).tensors
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.from_numpy(tensors[name.replace(".default", "")]))


if __name__ == "__main__":
    main()
