"""Training speed and memory of a mixture of experts on one device: whole optimizer steps, experts adapted or not, with
and without recomputation, beside transformers + PEFT on the same weights.

    PYTHONPATH=.:backends python benchmarks/moe_step.py --shape qwen3-30b-a3b --json result.json
    PYTHONPATH=.:backends python benchmarks/moe_step.py --shape tiny --length 64 --steps 3
    PYTHONPATH=.:backends python benchmarks/moe_step.py --shape gpt-oss-20b --batches 1x512,1x2048 --json result.json

The weights of a Qwen3-MoE are random, drawn and packed as NF4 with double quantization one layer at a time while the
model is put together: no checkpoint is written but for embeddings, norms and routers. Those of a gpt-oss are drawn as
they are published, experts in MXFP4 and all else in bfloat16 (`drawn_gpt_oss.py`). LoRA r = 16 on every target module,
no dropout. A step is one micro-batch of `--rows` rows of `--length` random tokens, every position a label; the median
of the steps after the second counts, the device synchronised on both sides. Peak memory is torch's allocator's, that
of loading apart from that of steps. `foreseen` is what `estimate` says of the same run, from config.json, without what
no allocator hands out.

Layers are fused where the device has the kernels; `plain layers` are those of transformers with our linear layers and
experts, on the same device in the same run, and say what the schedule is worth. `kernel_path` says which ran. Where a
system is `streamed`, embeddings and packed layers are in the host's memory, and `notes` say how fast they cross.

The other side (`peft`) has the same decoded weights in bfloat16, which is how transformers 5 and bitsandbytes leave
experts: its memory is that of a 16-bit model, and its losses stand beside ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn_gpt_oss import GPT_OSS_SHAPES, load_drawn
from drawn_gpt_oss import drawn_source as published_source

from qlora_hal.adapter import initial_adapter, resolve_targets
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter, AdapterConfig, Batch, StepSettings
from qlora_hal.model import expert_stacks
from qlora_hal.model.facts import ModelFacts, TensorFacts
from qlora_hal.model.linear_shapes import linear_modules
from qlora_hal.model.source import ModelSource
from qlora_hal.run.planned_memory import PlannedModel
from qlora_hal_backends.torch_family.base_weights import BaseWeight, quantize
from qlora_hal_backends.torch_family.loading import BaseModel, load_with
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, vocab_size=512,
    ),
    "qwen3-30b-a3b": dict(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    ),
    **GPT_OSS_SHAPES,
}  # fmt: skip
RANK, ALPHA = 16, 16.0
WARM_UP_STEPS = 2
QUANTIZATION = Quantization(WeightFormat.NF4, 64, True)
PUBLISHED = Quantization(WeightFormat.MXFP4, 32)
SYSTEMS = (
    "all",
    "none",
    "all, plain layers",
    "none, plain layers",
    "all, recomputed",
    "all, recomputed, adamw_8bit",
    "none, recomputed, adamw_8bit",
    "all, recomputed, adamw_8bit, plain layers",
    "none, recomputed, adamw_8bit, plain layers",
    "none, recomputed, adamw_8bit, streamed",
    "peft",
)


@dataclass(slots=True)
class Result:
    """One system."""

    system: str
    rows: int
    length: int
    tokens_per_second: float
    step_ms: float
    first_step_s: float
    loaded_gb: float
    peak_allocated_gb: float
    peak_reserved_gb: float
    loading_peak_gb: float
    foreseen_gb: float
    adapter_numbers: int
    losses: list[float]
    kernel_path: str = ""
    notes: tuple[str, ...] = ()


# the model ------------------------------------------------------------------------------------------------------------
def layers_of(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Path -> (out, in) of every linear layer, each expert's among them."""
    hidden, inner, size = shape["hidden_size"], shape["moe_intermediate_size"], shape["head_dim"]
    query, key = shape["num_attention_heads"] * size, shape["num_key_value_heads"] * size
    found: dict[str, tuple[int, int]] = {}
    for layer in range(shape["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        found |= {
            f"{path}.self_attn.q_proj": (query, hidden),
            f"{path}.self_attn.k_proj": (key, hidden),
            f"{path}.self_attn.v_proj": (key, hidden),
            f"{path}.self_attn.o_proj": (hidden, query),
        }
        for number in range(shape["num_experts"]):
            expert = f"{path}.mlp.experts.{number}"
            found |= {
                f"{expert}.gate_proj": (inner, hidden),
                f"{expert}.up_proj": (inner, hidden),
                f"{expert}.down_proj": (hidden, inner),
            }
    return found


def write_rest(folder: Path, shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """config.json, and what is not packed: embeddings, head, norms, routers. Name -> dimensions."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(**shape, max_position_embeddings=8192, norm_topk_prob=True, tie_word_embeddings=False)
    config.architectures = ["Qwen3MoeForCausalLM"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    hidden, size = shape["hidden_size"], shape["head_dim"]

    def random(*sides: int) -> torch.Tensor:
        return torch.randn(*sides, generator=generator).mul_(0.02).bfloat16()

    tensors = {
        "model.embed_tokens.weight": random(shape["vocab_size"], hidden),
        "lm_head.weight": random(shape["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        tensors[f"{path}.mlp.gate.weight"] = random(shape["num_experts"], hidden)
        widths = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        widths |= {"self_attn.q_norm": size, "self_attn.k_norm": size}
        for norm, width in widths.items():
            tensors[f"{path}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    save_file(tensors, folder / "rest.safetensors", metadata={"format": "pt"})
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def drawn_source(folder: Path, shape: Mapping[str, Any]) -> ModelSource:
    """The folder with headers as if every layer were stored; no weight is read by its name."""
    dimensions = write_rest(folder, shape) | {f"{layer}.weight": sides for layer, sides in layers_of(shape).items()}
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        name: TensorFacts("BF16", sides, 2 * int(np.prod(sides)), "rest.safetensors")
        for name, sides in dimensions.items()
    }
    from qlora_hal.contract.values import LinearShape

    shapes = {
        name.removesuffix(".weight"): LinearShape(sides[1], sides[0])
        for name, sides in dimensions.items()
        if len(sides) == 2
    }
    stacks = expert_stacks.joined(shapes, config, str(folder))
    facts = ModelFacts(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        config=config,
        tensors=tensors,
        linear_modules=linear_modules(stacks, "qwen3_moe", shape["vocab_size"], tensors),
        parameter_count=sum(int(np.prod(sides)) for sides in dimensions.values()),
        fingerprint="drawn",
        vocabulary_size=shape["vocab_size"],
        max_position_embeddings=8192,
    )
    return ModelSource(folder.name, folder, facts)


def drawn_base(shape: Mapping[str, Any]) -> Callable[..., BaseModel]:
    """What the trainer loads: every layer N(0, 0.02), drawn on the device and packed as it would be read."""
    sides = layers_of(shape)

    def load(source: ModelSource, quantization: Quantization, compute: Compute, device: torch.device) -> BaseModel:
        generator = torch.Generator(device=device).manual_seed(1)

        def read(_: Any, name: str, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> BaseWeight:
            weight = torch.randn(sides[name], device=device, generator=generator).mul_(0.02)
            return quantize(weight, quantization, dtype)

        return load_with(source, quantization, compute, device, read)

    return load


def trainer_of(load: Callable[..., BaseModel]) -> TorchLoRATrainer:
    if torch.cuda.is_available():
        from qlora_hal_backends.cuda_bnb import SPEC
        from qlora_hal_backends.torch_family.platform import CUDA

        return TorchLoRATrainer(SPEC, CUDA, load)
    from qlora_hal_backends.cpu_torch import SPEC
    from qlora_hal_backends.torch_family.platform import CPU

    return TorchLoRATrainer(SPEC, CPU, load)


# measuring ------------------------------------------------------------------------------------------------------------
class Bench:
    """The model, two batches of the size that is measured, and what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape = SHAPES[options.shape]
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        folder = options.checkpoint or Path(f"/tmp/qlora-hal-moe-{options.shape}")
        self.is_published = options.shape in GPT_OSS_SHAPES
        self.source = (published_source if self.is_published else drawn_source)(folder, self.shape)
        self.trainer = trainer_of(load_drawn if self.is_published else drawn_base(self.shape))
        self.loaded_with: Compute | None = None
        self.results: list[Result] = []
        self.take(*options.batches[0])

    def take(self, rows: int, length: int) -> None:
        """Measure steps of this size from now on."""
        random = np.random.default_rng(1234)
        self.rows, self.length = rows, length
        self.tokens = [random.integers(10, self.shape["vocab_size"], (rows, length), dtype=np.int32) for _ in range(2)]

    def adapter(self, experts: str) -> Adapter:
        modules = self.source.facts.linear_modules
        targets = resolve_targets("all-linear", modules, experts)
        return initial_adapter(AdapterConfig(RANK, ALPHA, target_modules=targets), modules, seed=0)

    def load(self, compute: Compute) -> None:
        if self.loaded_with != compute:
            started = time.perf_counter()
            self.trainer.load(self.source, PUBLISHED if self.is_published else QUANTIZATION, compute)
            self.loaded_with = compute
            print(f"# loaded in {time.perf_counter() - started:.1f} s", flush=True)

    def memory(self, figure: str) -> float:
        return round(getattr(torch.cuda, figure)(self.device) / 1e9, 2) if self.device.type == "cuda" else 0.0

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def foreseen(self, experts: str, compute: Compute, optimizer: str) -> float:
        """Gigabytes of the same run by `estimate`, which reads config.json alone."""
        folder = self.source.path / "planned"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes((self.source.path / "config.json").read_bytes())
        settings = {
            "model": str(folder), "backend": self.trainer.spec.name, "backend.options": dict(compute.options),
            "lora.r": RANK, "lora.target_modules": "all-linear", "lora.experts": experts, "training.optim": optimizer,
            "training.recompute": "full" if compute.gradient_checkpointing else "none",
            "training.base_offload": list(compute.base_offload), "data.max_seq_length": self.length,
            "training.per_device_train_batch_size": self.rows,
        }  # fmt: skip
        memory = PlannedModel.of(resolve_settings(None, keywords=settings, environ={}).config).estimate()
        return round((memory.total - memory.runtime) / 1e9, 2)

    def measure(
        self,
        system: str,
        step: Callable[[int], float],
        numbers: int,
        *,
        kernel_path: str = "",
        notes: Sequence[str] = (),
        foreseen: float = 0.0,
    ) -> None:
        loading = self.memory("max_memory_allocated")
        self.forget()
        loaded, seconds, losses = self.memory("memory_allocated"), [], []
        for index in range(self.options.steps):
            started = time.perf_counter()
            losses.append(step(index % 2))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        typical = statistics.median(seconds[WARM_UP_STEPS:] or seconds)
        result = Result(
            system=system,
            rows=self.rows,
            length=self.length,
            tokens_per_second=round(self.rows * self.length / typical, 1),
            step_ms=round(typical * 1e3, 2),
            first_step_s=round(seconds[0], 2),
            loaded_gb=loaded,
            peak_allocated_gb=self.memory("max_memory_allocated"),
            peak_reserved_gb=self.memory("max_memory_reserved"),
            loading_peak_gb=loading,
            foreseen_gb=foreseen,
            adapter_numbers=numbers,
            losses=[round(loss, 4) for loss in losses],
            kernel_path=kernel_path,
            notes=tuple(notes),
        )
        self.results.append(result)
        print(f"# {json.dumps(asdict(result))}", flush=True)


def run_ours(bench: Bench, system: str, *, profiled: bool = False) -> None:
    experts, *words = system.split(", ")
    optimizer = "adamw_8bit" if "adamw_8bit" in words else "adamw"
    dtype: Any = "bfloat16" if bench.device.type == "cuda" else "float32"
    options = {"layers": "plain"} if "plain layers" in words else {}
    offload: Any = ("embeddings", "layers") if "streamed" in words else ()
    compute = Compute(dtype, "recomputed" in words, options, base_offload=offload)
    bench.load(compute)
    adapter = bench.adapter(experts)
    bench.trainer.attach(adapter, optimizer)
    numbers = sum(tensor.size for tensor in adapter.tensors.values())
    del adapter

    def step(index: int) -> float:
        tokens = bench.tokens[index]
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy()
        batch = Batch(tokens, tokens.copy(), positions, np.ones_like(tokens), np.arange(len(tokens), dtype=np.int32))
        settings = StepSettings(bench.options.learning_rate, batch.counted_tokens)
        return bench.trainer.train_step([batch], settings).resolve().loss

    blocks = bench.trainer._base.experts if bench.trainer._base is not None else ()
    products = type(blocks[0].products).__name__ if blocks else ""
    try:
        if profiled:
            profile(bench, system, step)
        else:
            path = f"{bench.trainer.device_facts().kernel_path}; {products}"
            bench.measure(
                f"ours, {system}",
                step,
                numbers,
                kernel_path=path,
                notes=bench.trainer.load_notes,
                foreseen=bench.foreseen(experts, compute, optimizer),
            )
    except Exception as error:
        print(f"# ours, {system}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


def profile(bench: Bench, system: str, step: Callable[[int], float]) -> None:
    """Kernel times of one step, and what the host called for it. Once a process was profiled, each launch takes it
    longer: all timings come before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for index in range(WARM_UP_STEPS):
        step(index % 2)
    kind = ProfilerActivity.CUDA if bench.device.type == "cuda" else ProfilerActivity.CPU
    with record(activities=[kind]) as found:
        step(0)
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    kernels = [row for row in rows if row.self_device_time_total > 0]
    total = sum(row.self_device_time_total for row in kernels)
    lines = [f"{system}: {total / 1e3:.1f} ms in {sum(row.count for row in kernels)} launches"]
    lines += [f"{row.self_device_time_total / 1e3:9.2f} ms {row.count:6d}  {row.key[:120]}" for row in kernels[:60]]
    calls = sorted((row for row in rows if row.self_cpu_time_total > 0), key=lambda row: -row.self_cpu_time_total)
    lines += ["on the host:"]
    lines += [f"{row.self_cpu_time_total / 1e3:9.2f} ms {row.count:6d}  {row.key[:120]}" for row in calls[:12]]
    with open(bench.options.profile, "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")


@contextmanager
def their_model(bench: Bench) -> Iterator[Any]:
    """transformers' model with our decoded weights, its experts in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    bench.load(Compute("bfloat16" if bench.device.type == "cuda" else "float32", gradient_checkpointing=True))
    base = bench.trainer._base
    assert base is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bench.source.path), dtype=torch.bfloat16)
    rotary = base.body.rotary_emb
    model = model.to_empty(device=bench.device)
    model.model.rotary_emb = rotary
    with torch.no_grad():
        held = dict(base.causal.named_parameters())
        for name, parameter in model.named_parameters():
            block, _, leaf = name.rpartition(".")
            if leaf == "gate_up_proj":
                halves = [base.linears[f"{block}.{half}"].base.dense() for half in ("gate_proj", "up_proj")]
                parameter.copy_(torch.cat(halves, dim=1))
            elif leaf == "down_proj":
                parameter.copy_(base.linears[name].base.dense())
            elif block in base.linears:
                parameter.copy_(base.linears[block].base.dense())
            else:
                parameter.copy_(held[name])
    yield model


def run_peft(bench: Bench) -> None:
    from peft import LoraConfig, get_peft_model

    with their_model(bench) as model:
        bench.trainer.close()
        bench.loaded_with = None
        model.requires_grad_(False)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                target_parameters=["experts.gate_up_proj", "experts.down_proj"],
                task_type="CAUSAL_LM",
            ),
        )
        wrapped.config.use_cache = False
        wrapped.train()
        parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(parameters, lr=bench.options.learning_rate, weight_decay=0.0)

        def step(index: int) -> float:
            ids = torch.from_numpy(bench.tokens[index]).long().to(bench.device)
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss = wrapped(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        try:
            bench.measure("transformers + peft, recomputed", step, sum(p.numel() for p in parameters))
        except Exception as error:
            print(f"# transformers + peft: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


# the command ----------------------------------------------------------------------------------------------------------
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--batches", type=_sizes, default=None, help="in place of both: 1x512,4x2048 and so on")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--systems", type=lambda text: text.split(";"), default=list(SYSTEMS), help="separated by ;")
    parser.add_argument("--checkpoint", type=Path, default=None, help="where the unpacked rest is written")
    parser.add_argument("--profile", default="", help="file that receives kernel times")
    parser.add_argument("--json", default="", help="file that receives the results")
    asked = parser.parse_args()
    asked.batches = asked.batches or [(asked.rows, asked.length)]
    return asked


def _sizes(text: str) -> list[tuple[int, int]]:
    """Rows and tokens of a row of each batch. Raises ValueError."""
    parts = (batch.partition("x") for batch in text.split(","))
    return [(int(rows), int(length)) for rows, _, length in parts]


def main() -> None:
    bench = Bench(arguments())
    for system, batch in product(bench.options.systems, bench.options.batches):
        bench.take(*batch)
        if system == "peft":
            run_peft(bench)
        elif system:
            run_ours(bench, system)
    for system in bench.options.systems if bench.options.profile else ():
        if system and system != "peft":
            run_ours(bench, system, profiled=True)
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    report = {"device": device, "torch": torch.__version__, "shape": bench.options.shape}
    report["results"] = [asdict(result) for result in bench.results]
    if bench.options.json:
        Path(bench.options.json).write_text(json.dumps(report, indent=1))
    for result in bench.results:
        print(
            f"{result.system:34} {result.rows} x {result.length} {result.tokens_per_second:9.1f} tok/s "
            f"{result.step_ms:9.2f} ms {result.peak_allocated_gb:7.2f} GB, {result.foreseen_gb:.2f} foreseen  "
            + " ".join(f"{loss:.4f}" for loss in result.losses)
        )


if __name__ == "__main__":
    main()
