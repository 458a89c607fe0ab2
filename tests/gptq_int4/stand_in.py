"""A quantizer in place of an engine. Tests only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from gptq_int4.gptq_checkpoints import Kind, write_checkpoint

from qlora_hal.contract.backend import CalibrationJob
from qlora_hal.errors import BackendError

GROUP = 32


class StandIn:
    """A quantizer that packs with the oracle's codec and counts how often it is asked."""

    asked = 0
    version = "1"

    def versions(self, options: Mapping[str, object]) -> Mapping[str, str]:
        return {"stand_in": StandIn.version}

    def quantize(self, job: CalibrationJob, tell: Callable[[str], None]) -> None:
        StandIn.asked += 1
        write_checkpoint(job.output, Kind(GROUP))
        told = json.loads((job.output / "config.json").read_text())
        told["quantization_config"] |= {"dataset": ["a private row"], "offload_to_disk_path": str(job.output)}
        (job.output / "config.json").write_text(json.dumps(told))
        (job.output / "quant_log.csv").write_text("layer,loss")
        (job.output / "modeling.py").write_text("raise SystemExit")


class Failing(StandIn):
    def quantize(self, job: CalibrationJob, tell: Callable[[str], None]) -> None:
        super().quantize(job, tell)
        raise BackendError("QH-E62", "The engine failed in the middle.", fix="Nothing, it is a test.")
