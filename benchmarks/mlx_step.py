"""Does our step cost anything? `mlx_lora` against mlx-lm's own LoRA trainer, on MLX's default device.

    python benchmarks/mlx_step.py [--steps 6] [--rounds 3]

Same generated Llama in float32, packed in 4 bits with groups of 64, the same first adapter, the same tokens, AdamW with
bias correction; turn by turn in one process. Prints one line of JSON: the ratio of the medians of tokens per
second, by the clock and (which a busy machine disturbs less) by this process's CPU time, and of the peaks of memory
that MLX itself reports. mlx-lm counts one padding token of each row as a target, so its losses differ in the third
digit; the positions computed are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from real_lengths import batch_of

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.adapter.naming import lora_a_key
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter, AdapterConfig, Batch, LinearShape, StepSettings
from qlora_hal.files.safetensors_file import file_chunks
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource

RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-3
GROUP_SIZE, WARM_STEPS = 64, 2
PLACES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@dataclass(frozen=True)
class Sizes:
    hidden: int = 256
    inner: int = 704
    layers: int = 4
    heads: int = 4
    vocabulary: int = 2048
    rows: int = 4
    time: int = 128


@dataclass(frozen=True)
class Measured:
    tokens_per_second: float
    tokens_per_cpu_second: float
    peak_bytes: int
    losses: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = vars(parser.parse_args())
    steps, rounds = given.pop("steps"), given.pop("rounds")
    sizes = Sizes(**given)
    with TemporaryDirectory() as scratch:
        folder = write_llama(Path(scratch) / "model", sizes)
        tokens = np.random.default_rng(1).integers(3, sizes.vocabulary, (sizes.rows, sizes.time)).astype(np.int32)
        batch = batch_of([[row] for row in tokens])
        runs: dict[str, list[Measured]] = {"mlx-lm": [], "qlora_hal": []}
        for _ in range(rounds):
            runs["mlx-lm"].append(mlx_lm_run(folder, Path(scratch), tokens, steps, batch_size=sizes.rows))
            runs["qlora_hal"].append(our_run(folder, [batch], steps))
    print(json.dumps(summary(runs) | {"device": str(mx.default_device()), **asdict(sizes)}))


def summary(runs: Mapping[str, Sequence[Measured]]) -> dict[str, object]:
    speed = {name: statistics.median(run.tokens_per_second for run in found) for name, found in runs.items()}
    peak = {name: statistics.median(run.peak_bytes for run in found) for name, found in runs.items()}
    pairs = zip(runs["qlora_hal"], runs["mlx-lm"], strict=True)
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(speed["qlora_hal"] / speed["mlx-lm"], 3),
        "cpu_time_ratio": round(
            statistics.median(run.tokens_per_cpu_second for run in runs["qlora_hal"])
            / statistics.median(run.tokens_per_cpu_second for run in runs["mlx-lm"]),
            3,
        ),
        "ratio_by_round": [round(ours.tokens_per_second / theirs.tokens_per_second, 3) for ours, theirs in pairs],
        "peak_bytes": peak,
        "peak_ratio": round(peak["qlora_hal"] / peak["mlx-lm"], 3),
        "losses": {name: [round(loss, 4) for loss in found[-1].losses[:4]] for name, found in runs.items()},
    }


def write_llama(folder: Path, sizes: Sizes) -> Path:
    random = np.random.default_rng(0)

    def normal(*sides: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (random.normal(size=sides) / sides[-1] ** 0.5).astype(np.float32)

    tensors = {"model.norm.weight": np.ones(sizes.hidden, np.float32)}
    tensors |= {
        name: normal(sizes.vocabulary, sizes.hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = np.ones(sizes.hidden, np.float32)
        for place in PLACES:
            inputs = sizes.inner if "down" in place else sizes.hidden
            outputs = sizes.inner if "gate" in place or "up" in place else sizes.hidden
            tensors[f"{prefix}.{place}.weight"] = normal(outputs, inputs)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.writelines(file_chunks(tensors, {"format": "pt"}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": max(512, sizes.time),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Clock:
    """Ticks at the end of each pass over the batches; the first `warm` of them are not counted."""

    def __init__(self, warm: int) -> None:
        self._warm = warm
        self._wall, self._cpu = [time.perf_counter()], [time.process_time()]

    def tick(self) -> None:
        self._wall.append(time.perf_counter())
        self._cpu.append(time.process_time())

    def measured(self, tokens: int, peak: int, losses: Sequence[float]) -> Measured:
        wall, cpu = (statistics.median(np.diff(ticks)[self._warm :].tolist()) for ticks in (self._wall, self._cpu))
        return Measured(tokens / wall, tokens / cpu, peak, tuple(losses))


def our_run(
    folder: Path, batches: Sequence[Batch], passes: int, *, warm: int = WARM_STEPS, recompute: bool = False
) -> Measured:
    """`passes` over the batches after `warm` ones, a step for each batch; a loss is the mean of a pass."""
    from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

    with MLXLoRATrainer() as trainer:
        source = ModelSource("generated", folder, read_facts(folder))
        trainer.load(source, Quantization(WeightFormat.INT4_AFFINE, GROUP_SIZE), Compute("float32", recompute))
        trainer.attach(first_adapter(trainer.linear_modules()))
        gc.collect()
        mx.reset_peak_memory()
        losses, clock = [], Clock(warm)
        for _ in range(passes + warm):
            steps = [StepSettings(LEARNING_RATE, batch.counted_tokens, weight_decay=0.0) for batch in batches]
            found = [
                trainer.train_step([batch], step).resolve().loss for batch, step in zip(batches, steps, strict=True)
            ]
            losses.append(statistics.mean(found))
            clock.tick()
        tokens = sum(batch.real_tokens for batch in batches)
        return clock.measured(tokens, trainer.peak_memory_bytes(), losses)


def first_adapter(modules: Mapping[str, LinearShape]) -> Adapter:
    return initial_adapter(AdapterConfig(RANK, ALPHA, 0.0, False, tuple(sorted(modules))), modules, 0)


def mlx_lm_run(
    folder: Path,
    scratch: Path,
    rows: Sequence[np.ndarray[Any, np.dtype[np.int32]]],
    passes: int,
    *,
    batch_size: int,
    warm: int = WARM_STEPS,
    recompute: bool = False,
) -> Measured:
    """The same on rows of tokens, which mlx-lm sorts by length, puts `batch_size` together and pads."""
    from mlx.optimizers import AdamW
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, quantize_model

    losses, clock = [], Clock(warm)

    class Listener(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            losses.append(train_info["train_loss"])
            clock.tick()

    model, config = load_model(folder)
    mlp_and_attention = lambda path, module: hasattr(module, "to_quantized") and "layers" in path  # noqa: E731
    model, _ = quantize_model(model, config, GROUP_SIZE, 4, quant_predicate=mlp_and_attention)
    model.freeze()
    settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": PLACES}
    linear_to_lora_layers(model, len(model.layers), settings)
    first = first_adapter(read_facts(folder).linear_modules)
    for name, module in model.named_modules():
        if hasattr(module, "lora_a"):
            module.lora_a = mx.array(first.tensors[lora_a_key(name)].T)
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    steps = len(rows) // batch_size
    arguments = TrainingArgs(
        batch_size=batch_size,
        iters=steps * (passes + warm),
        steps_per_report=steps,
        steps_per_save=10**9,
        max_seq_length=max(map(len, rows)) + 1,
        adapter_file=str(scratch / "adapters.safetensors"),
        grad_checkpoint=recompute,
    )
    optimizer = AdamW(learning_rate=LEARNING_RATE, weight_decay=0.0, bias_correction=True)
    layer = type(model.layers[0])
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(layer, "__call__", layer.__call__),  # with recomputation mlx-lm leaves another one there
    ):
        train(model, optimizer, [(row.tolist(), 0) for row in rows], args=arguments, training_callback=Listener())
    peak = mx.get_peak_memory()
    del model, optimizer
    gc.collect()
    mx.clear_cache()
    return clock.measured(sum(map(len, rows)), peak, losses)


if __name__ == "__main__":
    main()
