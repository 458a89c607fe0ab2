"""The estimate calibrated here: a few of the model's layers, trained for two steps by the code that will run.

A child process trains a model with the same widths, vocabulary, batch and settings, and few layers. What the others
add follows: on a device with memory of its own the peak grows by the same for each layer, so two depths tell. Memory of
the host is counted in resident pages, between which glibc's heap keeps holes, and two depths would measure their
difference; there the arithmetic of the other layers is added, scaled to what was measured.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.errors import BackendError, ModelError
from qlora_hal.memory.drawn_model import drawn_text, first_layers, layers_of, write_drawn_model
from qlora_hal.processes.subprocess_call import SubprocessCallError, ask

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.values import MemoryEstimate
    from qlora_hal.model.facts import ModelFacts

DEPTHS = (2, 4)
"""Layers that are measured, on the host the second alone. A model that has no more is measured whole."""
HOST_SPREAD = 0.02
"""Added to what is foreseen of the host: two runs of one configuration differed by up to 1.8 %."""
STEPS = 2
"""The second step meets everything that the first one made and kept."""
CHILD_SECONDS = 1800.0
PROBED_ERROR = 0.05

EstimateOf = Callable[["ModelFacts"], "MemoryEstimate"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One child: bytes at the peak from the first step on. Where the device is the host: the peak while loading, and
    what was resident after it."""

    layers: int
    peak: int
    loading: int | None = None
    resident: int | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, and the peak of the whole model that follows from it, in bytes; `runtime` is what a device
    needs beside what its allocator counts."""

    measured: tuple[Measured, ...]
    peak: int
    runtime: int

    @property
    def total(self) -> int:
        return self.peak + self.runtime

    @property
    def high(self) -> int:
        return int(self.total * (1 + PROBED_ERROR))

    def as_json(self) -> dict[str, object]:
        return {
            "measured": [asdict(one) for one in self.measured],
            "total": self.total,
            "high": self.high,
        }


def probed(
    config: RunConfig, facts: ModelFacts, estimate_of: EstimateOf, *, model: Path | None, on_host: bool
) -> Calibration:
    """Measure. `estimate_of` gives the arithmetic of a model; `model` is the folder of the real one, for its tokenizer;
    `on_host` says that the device's memory is this process's own.

    Raises ModelError QH-M60 for a model whose layers cannot be cut or drawn, BackendError QH-M61 where a child fails.
    """
    layers = layers_of(facts)
    if facts.prequantized is not None or not layers:
        reason = "is stored quantized" if layers else "has no numbered decoder layers"
        raise ModelError(
            "QH-M60",
            f"--probe cannot draw a model like this one: it {reason}.",
            where=config.model.name_or_path,
            cause="It trains a model of random weights with the same widths and a few layers.",
            fix="Leave --probe out; the estimate by arithmetic stands.",
        )
    depths = (layers,) if layers <= DEPTHS[-1] else DEPTHS[1:] if on_host else DEPTHS
    measured = tuple(measured_peak(config, facts, depth, model=model, on_host=on_host) for depth in depths)
    return calibrated(measured, facts, estimate_of, on_host=on_host)


def calibrated(
    measured: Sequence[Measured], facts: ModelFacts, estimate_of: EstimateOf, *, on_host: bool
) -> Calibration:
    """The whole model's peak, from what some of its layers took."""
    last, layers, whole = measured[-1], layers_of(facts), estimate_of(facts)
    if last.layers == layers:
        peak = max(last.peak, last.loading or 0)
    elif on_host and last.resident is not None:
        peak = _on_host(last, estimate_of(first_layers(facts, last.layers)), whole)
    else:
        peak = _on_a_line(measured, layers)
    return Calibration(tuple(measured), peak, 0 if on_host else whole.runtime)


def corrected(other: MemoryEstimate, foreseen: MemoryEstimate, found: Calibration) -> int:
    """The peak of other settings with its margin: what was `found` beyond what was `foreseen` of the settings that were
    measured grows with what comes and goes; what was found below it does not."""
    apart, ratio = found.total - foreseen.total, _working(other) / max(_working(foreseen), 1)
    return int((other.total + apart * (ratio if apart > 0 else min(ratio, 1))) * (1 + PROBED_ERROR))


def _on_a_line(measured: Sequence[Measured], layers: int) -> int:
    (few, low), (more, high) = ((one.layers, one.peak) for one in measured[-2:])
    return high + (high - low) * (layers - more) // (more - few)


def _on_host(last: Measured, foreseen: MemoryEstimate, whole: MemoryEstimate) -> int:
    """`last` and what the other layers add: what stays by arithmetic, what comes and goes scaled to what it took."""
    assert last.resident is not None
    scale = (last.peak - last.resident) / _working(foreseen)
    stays, works = _staying(whole) - _staying(foreseen), _working(whole) - _working(foreseen)
    loading = (last.loading or 0) + stays + whole.loading - foreseen.loading
    return int((1 + HOST_SPREAD) * max(loading, last.peak + stays + scale * works))


def _working(memory: MemoryEstimate) -> int:
    return memory.activations + memory.logits + memory.workspace


def _staying(memory: MemoryEstimate) -> int:
    return memory.weights + memory.adapter + memory.gradients + memory.optimizer


def measured_peak(config: RunConfig, facts: ModelFacts, layers: int, *, model: Path | None, on_host: bool) -> Measured:
    """What two steps take with the first `layers` layers. Raises BackendError QH-M61."""
    with tempfile.TemporaryDirectory(prefix="qlora-hal-probe-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        write_drawn_model(facts, layers, folder, model)
        return _measured(config, Path(scratch), layers, on_host=on_host)


def probe_settings(config: RunConfig, folder: Path) -> RunConfig:
    """The run's settings with the drawn model, and rows as long as the settings allow: what decides about memory stays
    as it is."""
    data, training = config.data, config.training
    return config.model_copy(
        update={
            "output_dir": str(folder / "run"),
            "model": type(config.model)(name_or_path=str(folder / "model")),
            "data": type(data)(max_seq_length=data.max_seq_length, packing=data.packing, format="text"),
            "training": training.model_copy(
                update={
                    "max_steps": STEPS,
                    "warmup_steps": None,
                    "per_device_train_batch_size": config.full_batch_rows,
                    "tokens_per_batch": None,
                    "gradient_accumulation_steps": 1,
                    "global_batch_size": None,
                    "eval_steps": None,
                    "early_stopping_patience": None,
                    "report_to": (),
                    "tracker_project": None,
                    "sample_prompts": (),
                    "seed": 0,
                    "memory_limit": None,
                }
            ),
            "checkpoint": type(config.checkpoint)(),
            "parallel": type(config.parallel)(),
        }
    )


def _measured(config: RunConfig, folder: Path, layers: int, *, on_host: bool) -> Measured:
    settings = probe_settings(config, folder)
    rows = settings.training.per_device_train_batch_size * STEPS
    request = {
        "config": settings.model_dump(mode="json"),
        "rows": rows,
        "text": drawn_text(settings.data.max_seq_length),
        "on_host": on_host,
    }
    path = folder / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    try:
        found = ask("qlora_hal.run.memory_probe_child", str(path), seconds=CHILD_SECONDS)
    except SubprocessCallError as silence:
        raise _failed(layers, f"its process {silence}") from silence
    if "error" in found:
        raise _failed(layers, str(found["error"]))
    return Measured(layers, int(found["peak"]), found.get("loading"), found.get("resident"))


def _failed(layers: int, reason: str) -> BackendError:
    return BackendError(
        "QH-M61",
        f"--probe could not train {layers} layers of this model's widths here: {reason}",
        fix="Make the batch or data.max_seq_length smaller, or leave --probe out; the estimate by arithmetic stands.",
    )
