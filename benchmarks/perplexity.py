"""What each 4-bit format costs the demo model before any tuning: perplexity on its held-out running text.

    python benchmarks/perplexity.py [--group-size 128] [--calibration FILE] [--out docs/runs/perplexity.json]

One row for each way to store the same weights: as they are, NF4, INT4 in GPTQ's layout rounded to nearest, INT4 chosen
by GPTQ with calibration rows, MLX's affine INT4. Each is evaluated in float32 by the backend that has the format; a
backend that cannot run here has no row, and is named.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.torch import load_file
from weight_formats import text_windows

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.cli.quantize import able_backend, calibration_of
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig
from qlora_hal.demo import data_path, model_path
from qlora_hal.detect.discovery import find, listed, load_spec, open_trainer, reports
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal.quantize.calibration import Recipe, quantize_into
from qlora_hal_oracle import read_shape
from qlora_hal_oracle.random_models import write_quantized

ROWS, TOKENS = 512, 512

PLAIN = (
    ("none", "cpu_torch", Quantization(WeightFormat.NONE)),
    ("nf4, block 64, double quantization", "cpu_torch", Quantization(WeightFormat.NF4, 64, True)),
    ("mlx affine int4, group 64", "mlx_lora", Quantization(WeightFormat.INT4_AFFINE, 64)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calibration", default=str(data_path("train")))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    table = json.dumps(measured(arguments.group_size, arguments.calibration), indent=2)
    print(table)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(table + "\n")


def measured(group_size: int, calibration: str) -> dict[str, object]:
    """All rows. `weight_error` is the relative root mean square error over all linear layers."""
    demo = ModelSource("demo", model_path(), read_facts(model_path()))
    storage = Quantization(WeightFormat.INT4_GPTQ, group_size)
    ready = {report.backend for report in reports(listed()) if report.ready}
    rows = [row(name, backend, demo, stored) for name, backend, stored in PLAIN if backend in ready]
    with TemporaryDirectory() as folder:
        rounded = rounded_to_nearest(Path(folder) / "rtn", storage)
        rows.append(row(f"int4 round to nearest, group {group_size}", "gptq_int4", rounded, storage))
        chosen = calibrated(Path(folder) / "gptq", demo, storage, calibration)
        rows.append(row(f"int4 gptq, group {group_size}", "gptq_int4", chosen, storage))
    return {
        "model": "demo",
        "group_size": group_size,
        "calibration": {"file": Path(calibration).name, "rows": ROWS},
        "formats": rows,
        "not_ready": [f"{name} ({backend})" for name, backend, _ in PLAIN if backend not in ready],
    }


def rounded_to_nearest(folder: Path, storage: Quantization) -> ModelSource:
    """The demo's weights on the symmetric min-max grid that GPTQ starts from, each at its nearest point."""
    config = json.loads((model_path() / "config.json").read_text())
    tensors = {n: t.float().numpy() for n, t in load_file(model_path() / "model.safetensors").items()}
    return ModelSource.in_folder(write_quantized(folder, read_shape(config), tensors, storage).folder)


def calibrated(folder: Path, demo: ModelSource, storage: Quantization, calibration: str) -> ModelSource:
    rows = calibration_of(demo, calibration, rows=ROWS, max_seq_length=TOKENS)
    spec = able_backend("gptq_int4", storage)
    return quantize_into(folder, demo, spec, Recipe(storage), rows, {}, lambda text: None)


def row(name: str, backend: str, source: ModelSource, storage: Quantization) -> dict[str, object]:
    tensors = load_file(model_path() / "model.safetensors")
    with open_trainer(load_spec(find(backend, listed()))) as trainer:
        trainer.load(source, storage, Compute("float32"))
        modules = trainer.linear_modules()
        # B starts at zero, so the adapter changes nothing; some backends evaluate with one only.
        config = AdapterConfig(4, 4.0, 0.0, False, tuple(sorted(modules)))
        trainer.attach(initial_adapter(config, modules, 0))
        loss = trainer.evaluate(text_windows()).loss
        squares = np.zeros(2)
        for module in modules:
            weight = tensors[f"{module}.weight"].float().numpy()
            apart = trainer.dequantized_weight(module) - weight
            squares += [float((apart.astype(np.float64) ** 2).sum()), float((weight.astype(np.float64) ** 2).sum())]
    return {
        "format": name,
        "backend": backend,
        "text_loss": round(loss, 4),
        "perplexity": round(float(np.exp(loss)), 3),
        "weight_error": round(float(np.sqrt(squares[0] / squares[1])), 4),
    }


if __name__ == "__main__":
    main()
