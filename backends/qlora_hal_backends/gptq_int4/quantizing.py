"""This backend's quantizer: an engine's solver in a child process, so that what it does to its process dies with it.

The child gets its job as a file, says on its standard output how far it is, one JSON object a line, and everything
that the engine prints goes to its standard error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_hal.contract.backend import CalibrationJob
from qlora_hal.errors import BackendError, ModelError
from qlora_hal.files.scratch import scratch_folder
from qlora_hal.formats.catalogue import record_of
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import error_from
from qlora_hal_backends.gptq_int4.engines import Engine, GptqSettings, QuantizationJob, chosen_kernel, installed_engine

CHILD = "qlora_hal_backends.gptq_int4.quantizing_child"
_TOLD_OF_FAILURE = 20
"""Lines of the child's standard error that an error carries."""


class GptqQuantizer:
    """GPTQ with the installed engine."""

    def versions(self, options: Mapping[str, object]) -> Mapping[str, str]:
        """The engine and what computes under it.

        Raises UnsupportedFeatureError: QH-E60, and QH-N15 for a kernel that could not train on the result.
        """
        engine = installed_engine(options.get("engine", "auto"))
        if (kernel := options.get("kernel", "auto")) in engine.inference_only_kernels:
            chosen_kernel(engine, kernel, "cpu", act_order=False)
        return {name: importlib.metadata.version(name) for name in (engine.distribution, "torch", "transformers")}

    def quantize(self, job: CalibrationJob, tell: Callable[[str], None]) -> None:
        """Run the engine in a child. Raises ModelError (QH-C75; of auto-gptq QH-M55, QH-C74), BackendError QH-E62,
        UnsupportedFeatureError QH-E60."""
        engine = installed_engine(job.options.get("engine", "auto"))
        check_group_size(job)
        settings = GptqSettings(
            group_size=job.quantization.block_size,
            symmetric=job.symmetric,
            act_order=job.act_order,
            # v1 cannot hold a zero point of 0, which only asymmetric groups have; v1 is what every reader knows.
            checkpoint_format="gptq" if job.symmetric else engine.asymmetric_format,
            bits=record_of(job.quantization.weight_format).bits,
        )
        with scratch_folder("qlora_hal-gptq-") as folder:
            path = folder / "job.json"
            path.write_text(json.dumps(_as_json(job, settings)), encoding="utf-8")
            _run_child(engine, path, folder, tell)


def check_group_size(job: CalibrationJob) -> None:
    """Every layer must divide into whole groups. Raises ModelError QH-C75 naming those that do not."""
    from qlora_hal.model.facts import read_facts

    size = job.quantization.block_size
    if size is None:
        return
    odd = {name: shape.inputs for name, shape in read_facts(job.model).linear_modules.items() if shape.inputs % size}
    if odd:
        name, inputs = next(iter(odd.items()))
        raise ModelError(
            "QH-C75",
            f"Groups of {size} do not divide {len(odd)} layers; {name} has {inputs} inputs.",
            where=str(job.model),
            fix=f"Choose a group size that divides them: {_dividing(odd)}.",
            context={"layers": dict(list(odd.items())[:20])},
        )


def _dividing(inputs: Mapping[str, int]) -> str:
    from qlora_hal_backends.gptq_int4.platforms import GROUP_SIZES

    fitting = [size for size in GROUP_SIZES if all(count % size == 0 for count in inputs.values())]
    return ", ".join(map(str, sorted(fitting))) or "-1 (one group for each output)"


def _as_json(job: CalibrationJob, settings: GptqSettings) -> dict[str, object]:
    return {
        "engine": job.options.get("engine", "auto"),
        "model": str(job.model.absolute()),
        "output": str(job.output.absolute()),
        "rows": [list(row) for row in job.rows],
        "group_size": settings.group_size,
        "symmetric": settings.symmetric,
        "act_order": settings.act_order,
        "checkpoint_format": settings.checkpoint_format,
        "bits": settings.bits,
        "seed": job.seed,
    }


def job_from_json(content: Mapping[str, object]) -> tuple[str, QuantizationJob]:
    """(engine, job) as the child reads them back."""
    rows = content["rows"]
    assert isinstance(rows, list)
    settings = GptqSettings(
        group_size=content["group_size"],  # type: ignore[arg-type]
        symmetric=bool(content["symmetric"]),
        act_order=bool(content["act_order"]),
        checkpoint_format=content["checkpoint_format"],  # type: ignore[arg-type]
        bits=int(str(content["bits"])),
    )
    job = QuantizationJob(Path(str(content["model"])), Path(str(content["output"])), rows, settings)
    return str(content["engine"]), job


def _run_child(engine: Engine, job: Path, folder: Path, tell: Callable[[str], None]) -> None:
    # Engines leave temporary folders behind; they go with this one.
    environment = {**os.environ, **engine.environment, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    errors = folder / "stderr.txt"
    with (
        open(errors, "w", encoding="utf-8") as stderr,
        child_process.start(
            child_process.module_command(CHILD, str(job)),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            cwd=folder,
            env=environment,
        ) as child,
    ):
        try:
            last = _followed(child, tell)
            status = child.wait()
        finally:
            child_process.ended(child)  # also where this process is being stopped
    if refusal := last.get("refusal"):
        raise error_from(refusal)
    if status or last:
        failure = last.get("failure", {})
        raise _failed(engine, status, failure, errors.read_text(encoding="utf-8", errors="replace"))


def _followed(child: subprocess.Popen[str], tell: Callable[[str], None]) -> Mapping[str, Mapping[str, str]]:
    """Pass on what the child says of its progress; what it says of its failure, if it fails: `refusal` is an error of
    ours, `failure` one of the engine's."""
    last: Mapping[str, Mapping[str, str]] = {}
    assert child.stdout is not None
    for line in child.stdout:
        said = json.loads(line)
        if "what" in said:
            tell(f"{said['what']}: {said['done']} of {said['total']}")
        else:
            last = said
    return last


def _failed(engine: Engine, status: int, failure: Mapping[str, str], stderr: str) -> BackendError:
    ending = f"signal {-status}" if status < 0 else f"exit status {status}"
    last = [line for line in stderr.splitlines() if line.strip()][-_TOLD_OF_FAILURE:]
    return BackendError(
        "QH-E62",
        f"{engine.name} could not quantize the model: {failure.get('message') or ending}.",
        where=failure.get("where", ""),
        cause=failure.get("kind", "")
        or ("The system ended it, most likely for lack of memory." if status == -9 else ""),
        fix="Free memory and try again, or quantize another model; the log is in the error's context (--json).",
        context={"log": last},
    )
