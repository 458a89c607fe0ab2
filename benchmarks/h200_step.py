"""Training speed of one GPU: our step against a plain QLoRA loop, same packed weights, same data, same settings.

    PYTHONPATH=.:backends:benchmarks python benchmarks/h200_step.py --shape 8b --micro-batch 4,1 --json result.json
    PYTHONPATH=.:backends:benchmarks python benchmarks/h200_step.py --shape 8b --check

Needs a CUDA device, and `transformers`, `peft`, `accelerate` and `bitsandbytes` beside this project's torch family.

What is measured: the wall clock of a whole optimizer step (forward, backward, clipping at 1.0, AdamW with float32
moments), the device synchronised on both sides; the median of the steps after the third. Peak memory is torch's
allocator's, reset after loading. The weights are random, NF4 with double quantization in blocks of 64, written once as
a pre-quantized checkpoint that every system loads. LoRA r = 16, alpha = 16, no dropout, on all seven projections, with
the same first values everywhere. The data are two batches of random tokens that alternate; every position is a label.

The plain loop is what the packages' documentation shows: `AutoModelForCausalLM.from_pretrained` with sdpa attention,
`prepare_model_for_kbit_training`, `get_peft_model`, bfloat16 autocast. Two faster variants of it stand beside it:
without the float32 upcast that `prepare_model_for_kbit_training` does, and also without gradient checkpointing.

`unsloth` and `unsloth, no checkpointing` are Unsloth's `FastLanguageModel` as its documentation shows, on the same
packed weights; the package is not among this project's. It changes transformers for the whole process, so it runs in
one of its own (`--systems "unsloth;unsloth, no checkpointing"`), with `UNSLOTH_DISABLE_STATISTICS=1`.

`--check` compares all adapter gradients, at B != 0, with a float32 computation by transformers' layers on the same
bfloat16 weights; the signs of the first step, at B = 0; and ten losses of the fused layers with ten of the plain
layers, in bfloat16 and in float32. The systems in fp8 make products with the base in 8-bit floats, and need an NVIDIA
GPU that has them (Ada, Hopper or later).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import (
    ALPHA,
    CLIP,
    QUANTIZATION,
    RANK,
    SHAPES,
    WARM_UP_STEPS,
    allocated_gb,
    as_batch,
    empty_memory,
    first_adapter,
    open_trainer,
    projections,
    synchronize,
    token_batches,
    write_checkpoint,
)

from qlora_hal.contract.backend import Compute
from qlora_hal.contract.values import StepSettings
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer


@dataclass(slots=True)
class Result:
    """One system at one micro-batch."""

    system: str
    micro_batch: int
    tokens_per_second: float
    step_ms: float
    fastest_ms: float
    first_step_s: float
    peak_allocated_gb: float
    peak_reserved_gb: float
    loaded_gb: float
    losses: list[float]
    kernel_path: str = ""


@dataclass(slots=True)
class Bench:
    arguments: argparse.Namespace
    folder: Path
    device: torch.device
    shape: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)


# the systems ----------------------------------------------------------------------------------------------------------
Step = Callable[[np.ndarray[Any, Any]], float]


@contextlib.contextmanager
def plain_loop(bench: Bench, *, upcast: bool, checkpointing: bool) -> Iterator[tuple[Step, str]]:
    """transformers + PEFT + bitsandbytes, by hand."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        bench.folder, dtype=torch.bfloat16, device_map={"": bench.device}, attn_implementation="sdpa"
    )
    if upcast:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    else:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = [module.rpartition(".")[2] for module in projections(bench.shape)]
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=names)
    )
    model.config.use_cache = False
    model.train()
    yield trained_with_autocast(bench, model), "transformers + peft + bitsandbytes"


def trained_with_autocast(bench: Bench, model: Any) -> Step:
    """Steps of a PEFT model, its adapter in float32 with the first values that all systems have."""
    first = first_adapter(bench.shape)
    parameters = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
                parameter.copy_(torch.from_numpy(first.tensors[name.replace(".default.", ".")]))
                parameters.append(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=bench.arguments.learning_rate, weight_decay=0.0, fused=True)

    def step(tokens: np.ndarray[Any, Any]) -> float:
        ids = torch.from_numpy(tokens).long().to(bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@contextlib.contextmanager
def unsloth_loop(bench: Bench, *, checkpointing: Any) -> Iterator[tuple[Step, str]]:
    """Unsloth's model and kernels, stepped as the plain loop is."""
    from unsloth import FastLanguageModel  # before transformers, or it says that it is slower

    write_tokenizer(bench.folder)
    model, _ = FastLanguageModel.from_pretrained(
        str(bench.folder), max_seq_length=bench.arguments.length, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        bias="none",
        target_modules=[module.rpartition(".")[2] for module in projections(bench.shape)],
        use_gradient_checkpointing=checkpointing,
    )
    model.train()
    yield trained_with_autocast(bench, model), "unsloth"


def write_tokenizer(folder: Path) -> None:
    """Unsloth opens no folder without one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)


@contextlib.contextmanager
def our_trainer(
    bench: Bench,
    *,
    checkpointing: bool = False,
    layers: str = "auto",
    dtype: Any = "bfloat16",
    fp8: bool = False,
    random_b: float = 0.0,
) -> Iterator[tuple[TorchLoRATrainer, str]]:
    with open_trainer() as trainer:
        source = ModelSource(bench.folder.name, bench.folder, read_facts(bench.folder))
        trainer.load(source, QUANTIZATION, Compute(dtype, checkpointing, {"layers": layers}, fp8_products=fp8))
        trainer.attach(first_adapter(bench.shape, random_b, bench.arguments.dropout), "adamw")
        yield trainer, trainer.device_facts().kernel_path


@contextlib.contextmanager
def our_step(
    bench: Bench, *, checkpointing: bool, layers: str = "auto", fp8: bool = False
) -> Iterator[tuple[Step, str]]:
    with our_trainer(bench, checkpointing=checkpointing, layers=layers, fp8=fp8) as (trainer, kernel_path):

        def step(tokens: np.ndarray[Any, Any]) -> float:
            batch = replace(as_batch(tokens), rows=np.arange(len(tokens), dtype=np.int32))
            key = 1 if bench.arguments.dropout else None
            settings = StepSettings(
                bench.arguments.learning_rate, batch.counted_tokens, max_grad_norm=CLIP, dropout_key=key
            )
            return trainer.train_step([batch], settings).resolve().loss

        yield step, kernel_path


OTHERS: dict[str, Callable[[Bench], Any]] = {
    "unsloth": lambda bench: unsloth_loop(bench, checkpointing="unsloth"),
    "unsloth, no checkpointing": lambda bench: unsloth_loop(bench, checkpointing=False),
}
"""Run where they are named alone."""
SYSTEMS: dict[str, Callable[[Bench], Any]] = {
    "plain": lambda bench: plain_loop(bench, upcast=True, checkpointing=True),
    "plain, no upcast": lambda bench: plain_loop(bench, upcast=False, checkpointing=True),
    "plain, no upcast, no checkpointing": lambda bench: plain_loop(bench, upcast=False, checkpointing=False),
    "ours, plain layers": lambda bench: our_step(bench, checkpointing=False, layers="plain"),
    "ours, checkpointing": lambda bench: our_step(bench, checkpointing=True),
    "ours": lambda bench: our_step(bench, checkpointing=False),
    "ours, fp8": lambda bench: our_step(bench, checkpointing=False, fp8=True),
    "ours, fp8, checkpointing": lambda bench: our_step(bench, checkpointing=True, fp8=True),
}


# measuring ------------------------------------------------------------------------------------------------------------
def measure(bench: Bench, system: str, step: Step, micro_batch: int, kernel_path: str) -> Result:
    device, length = bench.device, bench.arguments.length
    batches = token_batches(bench.shape, micro_batch, length)
    empty_memory(device)
    loaded = allocated_gb(device, "memory_allocated")
    seconds, losses = [], []
    for index in range(bench.arguments.steps):
        synchronize(device)
        start = time.perf_counter()
        loss = step(batches[index % 2])
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    typical = statistics.median(seconds[WARM_UP_STEPS:] or seconds)
    return Result(
        system=system,
        micro_batch=micro_batch,
        tokens_per_second=round(micro_batch * length / typical, 1),
        step_ms=round(typical * 1e3, 2),
        fastest_ms=round(min(seconds) * 1e3, 2),
        first_step_s=round(seconds[0], 2),
        peak_allocated_gb=round(allocated_gb(device, "max_memory_allocated"), 2),
        peak_reserved_gb=round(allocated_gb(device, "max_memory_reserved"), 2),
        loaded_gb=round(loaded, 2),
        losses=[round(float(loss), 4) for loss in losses],
        kernel_path=kernel_path,
    )


def run_system(bench: Bench, system: str) -> None:
    started = time.perf_counter()
    with (SYSTEMS | OTHERS)[system](bench) as (step, kernel_path):
        print(f"# {system}: loaded in {time.perf_counter() - started:.1f} s; {kernel_path}", flush=True)
        for micro_batch in bench.arguments.micro_batch:
            try:
                result = measure(bench, system, step, micro_batch, kernel_path)
            except torch.OutOfMemoryError as error:
                print(f"# {system}, micro-batch {micro_batch}: {str(error).splitlines()[0]}", flush=True)
                continue
            bench.results.append(result)
            print(f"# {json.dumps(asdict(result))}", flush=True)
        if bench.arguments.profile and system.startswith("ours"):
            profile(bench, system, step)
    del step
    empty_memory(bench.device)


def profile(bench: Bench, system: str, step: Step) -> None:
    """Kernel times of one step; after the timings, because a profiled process runs slower."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for micro_batch in bench.arguments.micro_batch:
        tokens = token_batches(bench.shape, micro_batch, bench.arguments.length)[0]
        with record(activities=[ProfilerActivity.CUDA]) as found:
            step(tokens)
            synchronize(bench.device)
        rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows)
        lines = [f"{system}, micro-batch {micro_batch}: {total / 1e3:.1f} ms in {sum(r.count for r in rows)} launches"]
        lines += [f"{r.self_device_time_total / 1e3:9.2f} ms {r.count:6d}  {r.key[:120]}" for r in rows[:40]]
        with open(bench.arguments.profile, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")


# checking -------------------------------------------------------------------------------------------------------------
EIGHT_BIT = {"fp8, fused layers": {"fp8": True}}
"""Only where the device has E4M3."""


@dataclass(slots=True)
class Bfloat16Weight:
    """The weight that bfloat16 products see, in float32."""

    packed: BaseWeight

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    @property
    def stored_bytes(self) -> int:
        return self.packed.stored_bytes

    def dense(self) -> torch.Tensor:
        return self.packed.dense().bfloat16().float()


def gradient_of(
    bench: Bench, *, reference: bool = False, random_b: float = 0.01, **options: Any
) -> tuple[torch.Tensor, float, str]:
    """(all adapter gradients in one vector, evaluation loss, kernel path) on one row, with B != 0 or as it begins."""
    batch = as_batch(token_batches(bench.shape, 1, bench.arguments.length)[0])
    with our_trainer(bench, random_b=random_b, **options) as (trainer, kernel_path):
        if reference:
            assert trainer._base is not None
            for linear in trainer._base.linears.values():
                assert linear.base is not None
                linear.base = Bfloat16Weight(linear.base)
        named = trainer.gradients([batch])
        loss = trainer.evaluate([batch]).loss
    vector = torch.from_numpy(np.concatenate([named[name].ravel() for name in sorted(named)])).double()
    empty_memory(bench.device)
    return vector, loss, kernel_path


def check(bench: Bench) -> None:
    exact, exact_loss, _ = gradient_of(bench, reference=True, checkpointing=True, layers="plain", dtype="float32")
    bench.checks["gradients"] = {"float32, plain layers": {"loss": exact_loss, "norm": float(exact.norm())}}
    for name, options in {
        "bfloat16, plain layers": {"checkpointing": True, "layers": "plain"},
        "bfloat16, fused layers": {},
        "bfloat16, fused layers, checkpointing": {"checkpointing": True},
        **EIGHT_BIT,
    }.items():
        found, loss, kernel_path = gradient_of(bench, **options)
        bench.checks["gradients"][name] = {
            "loss": loss,
            "relative_error": float((found - exact).norm() / exact.norm()),
            "cosine": float(torch.dot(found, exact) / (found.norm() * exact.norm())),
            "kernel_path": kernel_path,
        }
        print(f"# {name}: {json.dumps(bench.checks['gradients'][name])}", flush=True)
    bench.checks["start signs"] = start_signs(bench)
    print(
        f"# first steps of B to the other side than in float32: {json.dumps(bench.checks['start signs'])}", flush=True
    )
    curves = bench.checks["losses"] = {}
    for name, options in {
        "float32, plain layers": {"checkpointing": True, "layers": "plain", "dtype": "float32"},
        "bfloat16, plain layers": {"layers": "plain"},
        "bfloat16, fused layers": {},
        "bfloat16, fused layers, checkpointing": {"checkpointing": True},
        **EIGHT_BIT,
    }.items():
        curves[name] = loss_curve(bench, **options)
        print(f"# {name}: {curves[name]}", flush=True)


def start_signs(bench: Bench) -> dict[str, float]:
    """The share of B's numbers whose first step, which is the sign of their gradient, goes elsewhere than in float32.
    (A's gradient is zero as long as B is.)"""
    exact = gradient_of(bench, reference=True, random_b=0.0, checkpointing=True, layers="plain", dtype="float32")[0]
    moved = exact != 0.0
    return {
        name: float((gradient_of(bench, random_b=0.0, **options)[0].sign() != exact.sign())[moved].double().mean())
        for name, options in {"bfloat16, fused layers": {}, **EIGHT_BIT}.items()
    }


def loss_curve(bench: Bench, **options: Any) -> list[float]:
    batches = [as_batch(tokens) for tokens in token_batches(bench.shape, 1, bench.arguments.length)]
    with our_trainer(bench, **options) as (trainer, _):
        losses = []
        for index in range(10):
            batch = batches[index % 2]
            settings = StepSettings(bench.arguments.learning_rate, batch.counted_tokens, max_grad_norm=CLIP)
            losses.append(round(trainer.train_step([batch], settings).resolve().loss, 4))
    empty_memory(bench.device)
    return losses


# the command ----------------------------------------------------------------------------------------------------------
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--micro-batch", type=lambda text: [int(part) for part in text.split(",")], default=[4, 1])
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout of our systems")
    parser.add_argument("--systems", type=lambda text: text.split(";"), default=list(SYSTEMS), help="separated by ;")
    parser.add_argument("--checkpoint", type=Path, default=None, help="where the random weights are written")
    parser.add_argument("--check", action="store_true", help="compare gradients and losses too")
    parser.add_argument("--profile", default="", help="file that receives kernel times")
    parser.add_argument("--json", default="", help="file that receives the results")
    return parser.parse_args()


def table(bench: Bench) -> str:
    lines = [f"{'system':36} {'mb':>3} {'tok/s':>9} {'x plain':>8} {'ms':>9} {'alloc GB':>9} {'reserved':>9}  losses"]
    for result in bench.results:
        plain = [r for r in bench.results if r.system == "plain" and r.micro_batch == result.micro_batch]
        ratio = f"{result.tokens_per_second / plain[0].tokens_per_second:.2f}" if plain else "-"
        lines.append(
            f"{result.system:36} {result.micro_batch:3d} {result.tokens_per_second:9.1f} {ratio:>8} "
            f"{result.step_ms:9.2f} {result.peak_allocated_gb:9.2f} {result.peak_reserved_gb:9.2f}  "
            + " ".join(f"{loss:.3f}" for loss in result.losses[:6])
        )
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = options.checkpoint or Path(f"/tmp/qlora-hal-bench-{options.shape}")
    bench = Bench(options, folder, device, SHAPES[options.shape])
    started = time.perf_counter()
    write_checkpoint(folder, bench.shape, device)
    empty_memory(device)
    print(f"# checkpoint ready in {time.perf_counter() - started:.1f} s", flush=True)
    if options.check:
        check(bench)
    for system in options.systems:
        if system:
            run_system(bench, system)
    facts = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__}
    report = {
        **facts,
        "shape": options.shape,
        "length": options.length,
        "results": [asdict(result) for result in bench.results],
        "checks": bench.checks,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    print(table(bench))


if __name__ == "__main__":
    main()
