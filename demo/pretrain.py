"""Pretrain the demo model on the tokenized corpus, and write its weights and the log of its losses.

The real run needs one GPU. ``--smoke`` takes a few small steps on the CPU, to see whether everything fits together;
``--compare-rates 0.01 0.02 --steps 400`` makes a short run for each learning rate, to choose one.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from llama import Llama, Shape
from optimizer import Optimizer
from safetensors.torch import load, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What decides the run, written to the log as it is."""

    steps: int
    rows: int
    matrix_rate: float
    other_rate: float
    warmup_steps: int
    stable_share: float
    validate_every: int
    seed: int


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant, then linear down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    stable = recipe.stable_share * recipe.steps
    return 1.0 if step < stable else (recipe.steps - step) / (recipe.steps - stable)


def read_tokens(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The token arrays ``train`` and ``validation``, as 32-bit integers on the device."""
    tensors = load(lzma.decompress(path.read_bytes()))
    return {name: tensor.to(torch.int32).to(device) for name, tensor in tensors.items()}


def batches(tokens: Tensor, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of ``length + 1`` tokens; each epoch cuts the stream at another offset and shuffles anew."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (tokens.numel() - offset - 1) // length
        starts = torch.randperm(count, generator=generator) * length + offset
        for first in range(0, count - count % rows, rows):
            chosen = starts[first : first + rows].to(tokens.device)
            yield tokens[chosen[:, None] + positions].long()


@torch.no_grad()
def validation_loss(loss: Loss, tokens: Tensor, rows: int, length: int) -> float:
    """The mean loss over consecutive windows of the validation tokens; a remainder short of a batch is left out."""
    count = (tokens.numel() - 1) // length // rows * rows
    windows = tokens[: count * length + 1].long()
    inputs, targets = windows[:-1].view(count, length), windows[1:].view(count, length)
    parts = [loss(inputs[i : i + rows], targets[i : i + rows]) for i in range(0, count, rows)]
    return float(torch.stack(parts).mean())


def train(model: Llama, loss: Loss, tokens: dict[str, Tensor], recipe: Recipe, length: int) -> list[dict[str, Any]]:
    """Train in place; returns one log entry for every validation."""
    optimizer = Optimizer(model, recipe.matrix_rate, recipe.other_rate)
    stream = batches(tokens["train"], recipe.rows, length, recipe.seed)
    recent: list[Tensor] = []
    log: list[dict[str, Any]] = []
    start = time.perf_counter()
    for step in range(recipe.steps):
        batch = next(stream)
        value = loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        torch.autograd.backward(value)
        optimizer.step(learning_rate_factor(step, recipe))
        recent.append(value.detach())
        if (step + 1) % recipe.validate_every == 0 or step + 1 == recipe.steps:
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * recipe.rows * length,
                "train_loss": round(float(torch.stack(recent).mean()), 5),
                "validation_loss": round(validation_loss(loss, tokens["validation"], 16, length), 5),
                "seconds": round(time.perf_counter() - start, 2),
            }
            print(json.dumps(entry), flush=True)
            log.append(entry)
            recent.clear()
            if not math.isfinite(entry["train_loss"]):
                raise SystemExit("the loss is not finite")
    return log


def make_loss(model: Llama, device: torch.device) -> Loss:
    """The training loss in bfloat16 autocast; compiled on a GPU."""
    forward: Loss = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(tokens, targets)

    return loss


def round_to_bfloat16(model: Llama) -> dict[str, Tensor]:
    """Round the weights in place to what the published file can hold, and return them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return {name: parameter.detach().bfloat16().cpu() for name, parameter in model.named_parameters()}


def description(device: torch.device) -> dict[str, str]:
    """Where the run happened, for the log."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "precision": "bfloat16 autocast, float32 weights"}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, default=HERE / "build" / "tokens.safetensors.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=128, help="sequences in a batch")
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--other-rate", type=float, default=0.004)
    parser.add_argument("--compare-rates", type=float, nargs="+", help="matrix rates, each tried on a fresh model")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def run(arguments: argparse.Namespace, matrix_rate: float) -> tuple[Llama, dict[str, Any]]:
    """One whole training run."""
    smoke = arguments.smoke
    device = torch.device("cpu" if smoke else "cuda")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    shape = Shape()
    length = 128 if smoke else shape.context
    steps = 12 if smoke else arguments.steps
    recipe = Recipe(
        steps=steps,
        rows=4 if smoke else arguments.rows,
        matrix_rate=matrix_rate,
        other_rate=arguments.other_rate,
        warmup_steps=min(100, steps // 4),
        stable_share=0.4,
        validate_every=4 if smoke else max(steps // 40, 100),
        seed=0,
    )
    tokens = read_tokens(arguments.tokens, device)
    if smoke:
        tokens["validation"] = tokens["validation"][:4096]
    model = Llama(shape, device)
    loss = make_loss(model, device)
    log = train(model, loss, tokens, recipe, length)
    head: dict[str, Any] = {"run": description(device), "shape": asdict(shape), "recipe": asdict(recipe)}
    head["tokens"] = {name: tensor.numel() for name, tensor in tokens.items()}
    head["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    weights = round_to_bfloat16(model)
    final = validation_loss(loss, tokens["validation"], 16, length)
    head["validation_loss_of_bfloat16_weights"] = round(final, 5)
    save_file(weights, arguments.out / "weights.safetensors", metadata={"format": "pt"})
    return model, head | {"log": log}


def main() -> None:
    """Train once, or once for each rate that is to be compared."""
    arguments = options()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for rate in arguments.compare_rates or [arguments.matrix_rate]:
        print(f"matrix rate {rate}", flush=True)
        _, record = run(arguments, rate)
        print("validation loss of the bfloat16 weights:", record["validation_loss_of_bfloat16_weights"], flush=True)
    (arguments.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
