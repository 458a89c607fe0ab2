"""What the backend is, as data. Nothing heavy is imported here: listing backends reads this file."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from qlora_hal.contract.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Capabilities, Feature, WeightFormat


def probe() -> ProbeReport:
    """Whether the backend can run here; every answer but READY says what to do."""
    missing = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    if missing:
        names = " ".join(missing)
        return ProbeReport("toy", Availability.MISSING_PACKAGE, f"Missing: {names}.", f"Run: pip install {names}")
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    return ProbeReport("toy", Availability.READY, "A CPU is enough.", devices=("cpu",), versions=versions)


SPEC = BackendSpec(
    name="toy",
    title="Plain torch on the CPU",
    priority=0,
    capabilities=Capabilities(
        weight_formats=frozenset({WeightFormat.NONE, WeightFormat.INT8}),
        compute_dtypes=frozenset({"float32"}),
        features=frozenset({Feature.QUANTIZE_ON_LOAD}),
        levels={"none": WeightFormat.NONE, "8bit": WeightFormat.INT8},
    ),
    probe=probe,
    trainer="qlora_hal_toy.trainer:ToyTrainer",
    contract=2,
    uses_accelerator=False,
)
