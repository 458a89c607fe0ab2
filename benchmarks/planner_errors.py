"""How far the estimate is from the peak of a run: by arithmetic, and calibrated by `--probe`.

    python benchmarks/planner_errors.py --out docs/runs/planner_errors_cpu.json
    python benchmarks/planner_errors.py --backend cuda_bnb --set gpu --out docs/runs/planner_errors_h200.json
    python benchmarks/planner_errors.py --backend cuda_bnb --set gpu --part 1/4 --out one.json    # beside 2/4 to 4/4
    python benchmarks/planner_errors.py --backend cuda_bnb --set gpu --again --earlier one.json --earlier two.json \
        --out docs/runs/planner_errors_h200.json

Each configuration is predicted from its config.json alone, then predicted with the probe, then trained whole for two
steps by `run_new` in a process of its own, whose peak is what `run.json` of such a run would hold. The weights are
drawn. The record is written after each configuration, and a run that was ended goes on with the next one. Peaks of an
allocator do not change with what runs beside them, so parts may be measured at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.detect.discovery import find, listed, load_spec, reports
from qlora_hal.detect.selection import has_accelerator
from qlora_hal.memory.drawn_model import layers_of
from qlora_hal.run.memory_probe import STEPS, Measured, calibrated, measured_peak, probed
from qlora_hal.run.planned_memory import PlannedModel

SHAPES: Mapping[str, Mapping[str, int]] = {
    # hidden, feed-forward, layers, heads, key heads, vocabulary
    "4M": {"h": 256, "f": 768, "l": 6, "n": 4, "k": 2, "v": 4096},
    "14M": {"h": 384, "f": 1024, "l": 6, "n": 6, "k": 2, "v": 8192},
    "34M": {"h": 512, "f": 1536, "l": 8, "n": 8, "k": 4, "v": 8192},
    "60M": {"h": 640, "f": 1792, "l": 8, "n": 10, "k": 5, "v": 16384},
    "1B": {"h": 2048, "f": 8192, "l": 16, "n": 32, "k": 8, "v": 128256},
    "3B": {"h": 3072, "f": 8192, "l": 28, "n": 24, "k": 8, "v": 128256},
    "7B": {"h": 4096, "f": 11008, "l": 32, "n": 32, "k": 32, "v": 32000},
    "8B": {"h": 4096, "f": 14336, "l": 32, "n": 32, "k": 8, "v": 128256},
}


def llama(name: str, family: str = "llama") -> dict[str, Any]:
    """config.json of a shape."""
    shape = SHAPES[name]
    return {
        "model_type": family, "hidden_size": shape["h"], "intermediate_size": shape["f"],
        "num_hidden_layers": shape["l"], "num_attention_heads": shape["n"], "num_key_value_heads": shape["k"],
        "head_dim": shape["h"] // shape["n"], "vocab_size": shape["v"], "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


Case = tuple[str, dict[str, Any]]
Line = dict[str, Any]


def cpu_cases() -> Iterator[Case]:
    """30 configurations: shapes, batches, recomputation, formats, ranks, optimizers and families."""
    sizes = {"14M": ((2, 128), (4, 256), (1, 1024)), "34M": ((2, 128), (4, 256))}
    for shape, of_shape in sizes.items():
        for (batch, length), again in product(of_shape, (False, True)):
            yield shape, _settings(batch, length, **{"training.gradient_checkpointing": again})
    yield "4M", _settings(8, 256)
    for weight_format in ("none", "8bit", "fp4"):
        yield "14M", _settings(4, 256, **{"quantization.weight_format": weight_format})
    yield "14M", _settings(4, 256, **{"lora.r": 64})
    yield "14M", _settings(4, 256, **{"lora.r": 64, "training.optim": "adamw_8bit"})
    yield "14M", _settings(4, 256, **{"lora.target_modules": ["q_proj", "v_proj"]})
    for family in ("qwen3", "mistral", "gemma2", "gemma3_text", "granite"):
        yield f"14M {family}", _settings(4, 256)
    for again in (False, True):
        yield "14M gemma2", _settings(1, 1024, **{"training.gradient_checkpointing": again})
    yield "14M gemma2", _settings(4, 256, **{"quantization.compute_dtype": "bfloat16"})
    for batch, length in ((4, 256), (1, 1024)):
        yield "14M", _settings(batch, length, **{"backend.options": {"attention": "eager"}})
    yield "14M", _settings(4, 256, **{"lora.dropout": 0.1})
    yield "14M", _settings(4, 256, **{"data.packing": True})
    yield "60M", _settings(2, 256)


def gpu_cases() -> Iterator[Case]:
    """64 configurations."""
    sizes = ((1, 512), (1, 2048), (4, 1024), (4, 2048))
    for shape, (batch, length), again in product(("1B", "3B", "7B", "8B"), sizes, (False, True)):
        yield shape, _settings(batch, length, **{"training.gradient_checkpointing": again})
    for weight_format, again in product(("none", "8bit", "fp4"), (False, True)):
        for shape in ("1B", "8B"):
            settings = {"quantization.weight_format": weight_format, "training.gradient_checkpointing": again}
            yield shape, _settings(2, 1024, **settings)
    for rank, optimizer in product((8, 64, 256), ("adamw", "adamw_8bit")):
        yield "8B", _settings(2, 1024, **{"lora.r": rank, "training.optim": optimizer})
    for length in (8192, 16384):
        yield "8B", _settings(1, length, **{"training.gradient_checkpointing": True})
    for changes in ({"backend.options": {"layers": "plain"}}, {"lora.dropout": 0.1}, {"data.packing": True}):
        yield "1B", _settings(4, 1024, **changes)
        yield "8B", _settings(2, 1024, **changes)
    for family in ("qwen3", "mistral", "gemma2", "gemma3_text", "granite"):
        yield f"1B {family}", _settings(4, 1024)
    yield "1B", _settings(16, 512)


def _settings(batch: int, length: int, **others: Any) -> dict[str, Any]:
    return {"training.per_device_train_batch_size": batch, "data.max_seq_length": length, **others}


@dataclass(frozen=True, slots=True)
class Bench:
    """The backend that is predicted and measured."""

    backend: str
    on_host: bool

    def line(self, shape: str, settings: Mapping[str, Any], *, with_probe: bool, known: Line | None = None) -> Line:
        """Predict, probe and train; what `known` holds of that is not measured again."""
        size, _, family = shape.partition(" ")
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "config.json").write_text(json.dumps(llama(size, family or "llama")))
            keywords = {"model": scratch, "backend": self.backend, **settings}
            config = resolve_settings(None, keywords=keywords, environ={}).config
            planned = PlannedModel.of(config)
            facts, estimate = planned.facts, planned.estimate()
            runtime = 0 if self.on_host else estimate.runtime
            line: Line = {"shape": shape, "settings": dict(settings), "predicted": estimate.total - runtime}
            if known is not None and "probes" in known:
                measured = [Measured(**one) for one in known["probes"]]
                found = calibrated(measured, facts, planned.estimate_of, on_host=self.on_host)
                line |= {"probed": found.peak, "probes": known["probes"]}
            elif with_probe:
                found = probed(config, facts, planned.estimate_of, model=None, on_host=self.on_host)
                line |= {"probed": found.peak, "probes": found.as_json()["measured"]}
            if known is not None:
                return {**line, "measured": known["measured"]}
            whole = measured_peak(config, facts, layers_of(facts), model=None, on_host=self.on_host)
            return {**line, "measured": max(whole.peak, whole.loading or 0)}


def _part(text: str) -> tuple[int, int]:
    """ "2/6" as (2, 6). Raises ValueError."""
    number, _, parts = text.partition("/")
    if not 1 <= int(number) <= int(parts):
        raise ValueError(text)
    return int(number), int(parts)


def _work(line: Line) -> tuple[str, dict[str, Any]]:
    return line["shape"], line["settings"]


def summary(lines: Sequence[Mapping[str, Any]], key: str) -> dict[str, object]:
    """Errors as shares of the measured peak."""
    errors = sorted(line[key] / line["measured"] - 1 for line in lines if key in line)
    if not errors:
        return {}
    size = sorted(abs(error) for error in errors)
    return {
        "configurations": len(errors),
        "lowest": round(errors[0], 4),
        "median": round(errors[len(errors) // 2], 4),
        "highest": round(errors[-1], 4),
        "within_5_percent": round(sum(error <= 0.05 for error in size) / len(size), 3),
        "within_12_percent": round(sum(error <= 0.12 for error in size) / len(size), 3),
        "more_than_3_percent_below": sum(error < -0.03 for error in errors),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu_torch")
    parser.add_argument("--set", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--first", type=int, default=None, help="only so many configurations")
    parser.add_argument("--without-probe", action="store_true")
    parser.add_argument("--again", action="store_true", help="predict again what was measured, and measure nothing")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="K/N", help="every N-th configuration, from K on")
    parser.add_argument("--earlier", type=Path, action="append", default=[], help="a record whose figures are taken")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    number, parts = asked.part
    cases = list(cpu_cases() if asked.set == "cpu" else gpu_cases())[: asked.first][number - 1 :: parts]
    kept = [
        json.loads(path.read_text()) for path in (asked.out, *asked.earlier) if path in asked.earlier or path.is_file()
    ]
    earlier: list[Line] = [line for record in kept for line in record["configurations"]]
    report = next(report for report in reports(listed()) if report.backend == asked.backend)
    bench = Bench(asked.backend, not has_accelerator(load_spec(find(asked.backend, listed())), [report]))
    measured_on = kept[0] if asked.again else {"devices": list(report.devices), "versions": dict(report.versions)}
    lines: list[Line] = []
    record: dict[str, object] = {}
    for shape, settings in cases:
        known = next((line for line in earlier if _work(line) == (shape, settings)), None)
        if known is None and asked.again:
            continue
        lines.append(bench.line(shape, settings, with_probe=not asked.without_probe, known=known))
        told = ", ".join(
            f"{key} {lines[-1][key] / 1e6:.0f}" for key in ("predicted", "probed", "measured") if key in lines[-1]
        )
        print(f"{shape} {settings}: {told} MB", flush=True)
        done = [_work(line) for line in lines]
        record = {
            "command": f"python benchmarks/planner_errors.py --backend {asked.backend} --set {asked.set}",
            "devices": measured_on["devices"],
            "machine": platform.machine(),
            "versions": measured_on["versions"],
            "python": platform.python_version(),
            "steps": STEPS,
            "without_probe": summary(lines, "predicted"),
            "with_probe": summary(lines, "probed"),
            "configurations": [*lines, *(line for line in earlier if _work(line) not in done)],
        }
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record.get(key) for key in ("without_probe", "with_probe")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
