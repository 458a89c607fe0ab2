"""Training speed on rows of real lengths, packed and padded, beside full rows: tokens that are not padding, per second.

    PYTHONPATH=.:backends:benchmarks python benchmarks/packed_step.py --shape 8b --json result.json

Needs a CUDA device. The checkpoint and the adapter are those of random_model.py: random weights in NF4 with
double quantization, LoRA r = 16 on all seven projections, AdamW with float32 moments, clipping at 1.0; the wall clock
of whole optimizer steps, the device synchronised on both sides. Figures count real tokens of all steps after the third.

Sample lengths are lognormal (median 270, mean 385) and cut at `--longest`. Work, each from the same first adapter:

    full rows              4 x 2048, one sample a row
    packed                 the samples in 4 rows of 2048, best fit decreasing
    packed, dense mask     the same batches with a mask of time x time and repeated keys and values: how it was before
    padded                 the same samples, 8 to a batch, not packed
    padded, as given       the same batches with their padding: how it was before

Before them the attention of one layer alone: forward, and forward with backward.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_model import (
    CLIP,
    QUANTIZATION,
    SHAPES,
    WARM_UP_STEPS,
    allocated_gb,
    as_batch,
    empty_memory,
    first_adapter,
    open_trainer,
    synchronize,
    token_batches,
    write_checkpoint,
)
from real_lengths import batch_of, drawn_samples, packed_rows, padded_rows, sample_lengths
from torch import Tensor

from qlora_hal.contract.backend import Compute
from qlora_hal.contract.values import Batch, StepSettings
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family import fused
from qlora_hal_backends.torch_family.attention.causal import (
    CausalAttention,
    FlashVarlen,
    Mixed,
    SampleBySample,
    Samples,
    Softmax,
    _Rectangle,
    _torch_attention,
)
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer


# how it was before ----------------------------------------------------------------------------------------------------
class DenseMask:
    """Attention with a mask of time x time for each row of the batch, and with keys and values for each query head."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._mask: tuple[Samples, Tensor] | None = None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, samples: Samples, softmax: Softmax, *, with_graph: bool
    ) -> Mixed:
        assert softmax.sinks is None, "no model of this benchmark has sinks"
        shape = (self._rows, query.shape[0] // self._rows)
        leaves = [part.unflatten(0, shape).transpose(1, 2).detach().requires_grad_() for part in (query, key, value)]
        with torch.set_grad_enabled(with_graph):
            mixed = _torch_attention(*leaves, mask=self._of(samples, *shape), scale=softmax.scale)
        return _Rectangle(leaves, mixed)

    def _of(self, samples: Samples, rows: int, time: int) -> Tensor:
        if self._mask is None or self._mask[0] is not samples:
            device = samples.offsets.device
            numbers = torch.arange(len(samples.lengths), device=device)
            sample = torch.repeat_interleave(numbers, samples.offsets.diff().long(), output_size=rows * time)
            sample = sample.view(rows, time)
            causal = torch.ones(time, time, dtype=torch.bool, device=device).tril()
            self._mask = samples, ((sample[:, :, None] == sample[:, None, :]) & causal)[:, None]
        return self._mask[1]


@contextlib.contextmanager
def as_given(trainer: TorchLoRATrainer, rows: int) -> Iterator[None]:
    """Batches keep their padding, and packed ones get a dense mask."""
    body = trainer._fused
    assert isinstance(body, fused.FusedBody), body
    schedule = body.schedule
    body.schedule = replace(schedule, attention=CausalAttention(DenseMask(rows)))
    with mock.patch("qlora_hal_backends.torch_family.fused.body.without_padding", lambda batch: batch):
        yield
    body.schedule = schedule


# measuring ------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Result:
    work: str
    real_tokens_per_second: float
    median_step_ms: float
    real_tokens_a_step: float
    padding_share: float
    samples_a_step: float
    peak_allocated_gb: float
    peak_reserved_gb: float
    losses: list[float]


def measure(trainer: TorchLoRATrainer, work: str, batches: Sequence[Batch], options: argparse.Namespace) -> Result:
    device = trainer._device
    empty_memory(device)
    seconds, losses = [], []
    for batch in batches:
        settings = StepSettings(options.learning_rate, batch.counted_tokens, max_grad_norm=CLIP)
        synchronize(device)
        start = time.perf_counter()
        losses.append(trainer.train_step([batch], settings).resolve().loss)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    steady = slice(min(WARM_UP_STEPS, len(batches) - 1), None)
    tokens = [batch.real_tokens for batch in batches]
    cells = sum(batch.segment_ids.size for batch in batches)
    return Result(
        work,
        round(sum(tokens[steady]) / sum(seconds[steady]), 1),
        round(statistics.median(seconds[steady]) * 1e3, 2),
        round(statistics.mean(tokens), 1),
        round(1 - sum(tokens) / cells, 4),
        round(statistics.mean(int(batch.segment_ids.max(axis=1).sum()) for batch in batches), 1),
        round(allocated_gb(device, "max_memory_allocated"), 2),
        round(allocated_gb(device, "max_memory_reserved"), 2),
        [round(float(loss), 4) for loss in losses],
    )


def run(options: argparse.Namespace, folder: Path, device: torch.device) -> tuple[list[Result], str]:
    shape = SHAPES[options.shape]
    vocabulary, steps = shape["vocab_size"], options.steps
    lengths = sample_lengths(steps * options.rows * options.length // 300, options.longest)
    packed, padded = (
        [batch_of(drawn_samples(rows, vocabulary, seed)) for seed, rows in enumerate(batches)]
        for batches in (packed_rows(lengths, options.length, options.rows), padded_rows(lengths, 2 * options.rows))
    )
    full = [as_batch(tokens) for tokens in token_batches(shape, options.rows, options.length)] * steps
    work: dict[str, tuple[Sequence[Batch], Callable[[], Any] | None]] = {
        "full rows": (full, None),
        "packed": (packed, None),
        "packed, dense mask": (packed, lambda: as_given(trainer, options.rows)),
        "padded": (padded, None),
        "padded, as given": (padded, lambda: as_given(trainer, 2 * options.rows)),
    }
    results = []
    with open_trainer() as trainer:
        source = ModelSource(folder.name, folder, read_facts(folder))
        trainer.load(source, QUANTIZATION, Compute("bfloat16", options.checkpointing))
        for name, (batches, context) in work.items():
            if options.work and name not in options.work:
                continue
            trainer.attach(first_adapter(shape), "adamw")
            with contextlib.nullcontext() if context is None else context():
                results.append(measure(trainer, name, batches[:steps], options))
            print(f"# {json.dumps(asdict(results[-1]))}", flush=True)
        return results, trainer.device_facts().kernel_path


# one layer's attention ------------------------------------------------------------------------------------------------
def attention_alone(options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds, and how far outputs and gradients are from float32, for the first packed batch. CUDA only."""
    shape = SHAPES[options.shape]
    heads, keys, size = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    lengths = sample_lengths(options.steps * options.rows * options.length // 300, options.longest)
    rows = packed_rows(lengths, options.length, options.rows)[0]
    flat = [length for row in rows for length in row]
    fill = [[*row, *([options.length - sum(row)] if sum(row) < options.length else [])] for row in rows]
    grid = [length for row in fill for length in row]
    cells = options.rows * options.length
    generator = torch.Generator(device=device).manual_seed(0)
    buffer = torch.randn(cells, (heads + 2 * keys) * size, device=device, generator=generator).bfloat16()
    upstream = torch.randn(cells, heads * size, device=device, generator=generator).bfloat16()
    found: dict[str, dict[str, float]] = {}
    for name, attention, of in (
        ("rectangle, one sample a row", CausalAttention(SampleBySample()), [options.length] * options.rows),
        ("flash over lengths", FlashVarlen(), flat),
        ("flash over lengths, one sample a row", FlashVarlen(), [options.length] * options.rows),
        ("sample by sample", SampleBySample(), flat),
        ("dense mask", DenseMask(options.rows), grid),
    ):
        samples = Samples.of(of, device)
        count = sum(of)
        parts = buffer[:count].split((heads * size, keys * size, keys * size), dim=1)
        views = [part.unflatten(1, (-1, size)) for part in parts]

        def forward(attention: Any = attention, views: Any = views, samples: Samples = samples) -> Mixed:
            return attention(*views, samples, Softmax(size**-0.5), with_graph=True)

        def both(forward: Any = forward, count: int = count) -> None:
            forward().backward(upstream[:count])

        found[name] = {"forward_ms": timed(forward), "forward_and_backward_ms": timed(both), "tokens": count}
        print(f"# {name}: {found[name]}", flush=True)
    return found


def timed(call: Callable[[], Any], times: int = 20) -> float:
    for _ in range(3):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) / times, 3)


# the command ----------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--rows", type=int, default=4, help="of a packed batch; padded batches hold twice as many")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--longest", type=int, default=2040, help="at which sample lengths are cut")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--work", type=lambda text: text.split(";"), default=None, help="some of it, separated by ;")
    parser.add_argument("--checkpoint", type=Path, default=None, help="where the random weights are written")
    parser.add_argument("--json", default="", help="file that receives the results")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = options.checkpoint or Path(f"/tmp/qlora-hal-bench-{options.shape}")
    started = time.perf_counter()
    write_checkpoint(folder, SHAPES[options.shape], device)
    empty_memory(device)
    print(f"# checkpoint ready in {time.perf_counter() - started:.1f} s", flush=True)
    alone = attention_alone(options, device) if device.type == "cuda" else {}
    results, kernel_path = run(options, folder, device)
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": options.shape,
        "kernel_path": kernel_path,
        "attention_of_one_layer": alone,
        "results": [asdict(result) for result in results],
    }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    for result in results:
        print(
            f"{result.work:22} {result.real_tokens_per_second:9.1f} tok/s {result.median_step_ms:8.1f} ms "
            f"{result.peak_allocated_gb:6.2f} GB  " + " ".join(f"{loss:.3f}" for loss in result.losses[:6])
        )


if __name__ == "__main__":
    main()
