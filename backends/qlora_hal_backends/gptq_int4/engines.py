"""The GPTQ libraries that can stand under this backend, as data, and the values that cross their border.

Light: imports no tensor library. An engine is one row with two functions, named by path and imported when used:

- `load_weight(packed, settings, kernel, dtype) -> BaseWeight` turns one linear layer's stored tensors into a weight
  whose `dense()` runs the engine's own dequantization. `dense()` computes in float32 and rounds once to `dtype`.
- `quantize(job, report)` reads a 16-bit model folder and writes a GPTQ checkpoint. It runs in a child process only.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.errors.installation import install_line, requirement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qlora_hal_backends.torch_family.base_weights import BaseWeight

WORD_BITS = 32

CheckpointFormat = Literal["gptq", "gptq_v2"]
"""v1 (`gptq`) stores each zero point less one, v2 stores it as it is."""


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """How a checkpoint says that it is packed, checked. `group_size` None: one group over all inputs. `quantizer` is
    what wrote it (`gptqmodel:7.6.0`), "" where it does not tell."""

    group_size: int | None
    symmetric: bool
    act_order: bool
    checkpoint_format: CheckpointFormat
    quantizer: str = ""
    bits: int = 4

    @property
    def codes_per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def largest_code(self) -> int:
        """In v1 also what a zero point of 0 is stored as: -1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of every symmetric group."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One linear layer as it is stored, checked and on its device.

    qweight int32 [in * bits / 32, out]; qzeros int32 [groups, out * bits / 32]; scales float16 [groups, out]; g_idx
    int32 [in], the group of each input (scattered where act-order was on). The zero points are in the checkpoint's own
    convention.
    """

    name: str
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    @property
    def in_features(self) -> int:
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]


@dataclass(frozen=True, slots=True)
class QuantizationJob:
    """What a child process quantizes. `calibration` holds token ids; no text reaches the engine.

    The engine writes `config.json` with a `quantization_config` and safetensors weights into `output`, which exists
    and is empty. `seed` fixes what the engine draws, if anything.
    """

    model: Path
    output: Path
    calibration: Sequence[Sequence[int]]
    settings: GptqSettings
    device: str = "cpu"
    batch_size: int = 1
    seed: int = 0


Report = Callable[[int, int, str], None]
"""(done, total, what): how far the work is."""

LoadWeight = Callable[["PackedLinear", GptqSettings, str, "torch.dtype"], "BaseWeight"]
Quantize = Callable[[QuantizationJob, Report], None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """Dequantization code of an engine that training can run on.

    `devices` are platform names (`cuda`, `rocm`, `cpu`, `mps`). `act_order` tells whether it reads `g_idx`; a kernel
    that takes groups in order would give wrong weights for a checkpoint made with desc_act.
    """

    name: str
    devices: tuple[str, ...]
    act_order: bool = True


@dataclass(frozen=True, slots=True)
class Engine:
    """One GPTQ library.

    `requires` maps distributions to (lowest version, first version that is too new or ""); the first is the engine's
    own. `kernels` are those that training can run on, best first; `inference_only_kernels` are the names that people
    ask for and that have no backward pass. `environment` is set in a process that quantizes, before it imports the
    library. `install` is the line that helps where the engine is missing, `needed_for` says who needs it where another
    engine is there. `asymmetric_format` is what it writes asymmetric weights in.
    """

    name: str
    requires: Mapping[str, tuple[str, str]]
    load_weight: str
    quantize: str
    kernels: tuple[Kernel, ...]
    inference_only_kernels: tuple[str, ...]
    install: str
    environment: Mapping[str, str] = field(default_factory=dict)
    needed_for: str = ""
    asymmetric_format: CheckpointFormat = "gptq_v2"

    @property
    def distribution(self) -> str:
        return next(iter(self.requires))

    @property
    def trainable_kernels(self) -> tuple[str, ...]:
        return tuple(kernel.name for kernel in self.kernels)


GPTQMODEL = Engine(
    name="gptqmodel",
    requires={"gptqmodel": ("7.6", "8"), "transformers": ("5.10", "6")},
    load_weight="qlora_hal_backends.gptq_int4.gptqmodel_engine:load_weight",
    quantize="qlora_hal_backends.gptq_int4.gptqmodel_engine:quantize",
    kernels=(Kernel("triton", ("cuda",)), Kernel("torch", ("cuda", "rocm", "cpu", "mps"))),
    inference_only_kernels=(
        "marlin",
        "machete",
        "exllama",
        "exllama_v2",
        "bitblas",
        "qqq",
        "swordfish",
        "torch_int8",
    ),
    install=install_line("gptq"),
    environment={
        # 7.6 builds a pool of two loader threads within one that has a single thread on two cores, and raises.
        "GPTQMODEL_CPU_WORKERS": "2",
        # Compiling takes longer than what it saves here, and needs a compiler.
        "GPTQMODEL_DISABLE_PACK_EXT": "1",
        "TORCHDYNAMO_DISABLE": "1",
    },
)
_AUTO_GPTQ_INSTALL = (
    f"python3.11 -m venv .venv-auto-gptq && .venv-auto-gptq/bin/pip install {requirement('auto-gptq', 'conformance')}"
)
"""Linux x86-64 and Python 3.11 only. transformers 4.53 is the newest whose decoder layers return the tuples that
auto-gptq's solver indexes, and the oldest that masks packed samples."""
AUTO_GPTQ = Engine(
    name="auto_gptq",
    requires={"auto-gptq": ("0.7.1", "0.8"), "transformers": ("4.53", "4.54")},
    load_weight="qlora_hal_backends.gptq_int4.auto_gptq_engine:load_weight",
    quantize="qlora_hal_backends.gptq_int4.auto_gptq_solver:quantize",
    kernels=(Kernel("cuda_old", ("cpu", "cuda"), act_order=False), Kernel("cuda", ("cpu", "cuda"))),
    inference_only_kernels=("marlin", "exllama", "exllamav2", "qigen"),
    install=_AUTO_GPTQ_INSTALL,
    asymmetric_format="gptq",  # it knows no other, and refuses to write a zero point of 0
    needed_for="Checkpoints of auto-gptq load here unchanged. Only quantizing or training with auto-gptq 0.7.1 itself "
    f"needs an environment of its own: {_AUTO_GPTQ_INSTALL}",
)

ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (GPTQMODEL, AUTO_GPTQ)}
"""In order of preference."""

GPTQ_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "engine": ("auto", *ENGINES),
    "kernel": tuple(
        dict.fromkeys(
            [
                "auto",
                *(kernel for engine in ENGINES.values() for kernel in engine.trainable_kernels),
                *(kernel for engine in ENGINES.values() for kernel in engine.inference_only_kernels),
            ]
        )
    ),
}
"""`backend.options` of this backend beside the family's. Inference-only kernels are known so that they are refused
with a reason."""


def installed_engine(wanted: object = "auto", *, version: Callable[[str], str | None] | None = None) -> Engine:
    """The engine that was asked for, else the first that is installed and fits its surroundings.

    Raises UnsupportedFeatureError QH-E60. No engine is imported to find out: `import auto_gptq` fails beside a
    transformers 5, and gptqmodel takes seconds.
    """
    version = version or _installed_version
    candidates = [ENGINES[str(wanted)]] if wanted != "auto" else list(ENGINES.values())
    obstacles = {engine.name: engine_obstacle(engine, version) for engine in candidates}
    for engine in candidates:
        if not obstacles[engine.name]:
            return engine
    raise UnsupportedFeatureError(
        "QH-E60",
        f"No GPTQ engine can be used: {'; '.join(obstacles.values())}.",
        where="backend.options.engine",
        fix=candidates[0].install,
        context={"obstacles": obstacles},
    )


def engine_obstacle(engine: Engine, version: Callable[[str], str | None]) -> str:
    """Why an engine cannot be used with the installed packages, or ""."""
    for distribution, (lowest, too_new) in engine.requires.items():
        found = version(distribution)
        if found is None:
            return f"{distribution} is not installed"
        if _numbers(found) < _numbers(lowest) or (too_new and _numbers(found) >= _numbers(too_new)):
            below = f", below {too_new}" if too_new else ""
            return f"{engine.name} needs {distribution} {lowest} or newer{below}; {found} is installed"
    return ""


def chosen_kernel(engine: Engine, wanted: object, device: str, *, act_order: bool) -> Kernel:
    """The kernel for training on a device. Raises UnsupportedFeatureError QH-N15 for one that cannot train there."""
    here = [kernel for kernel in engine.kernels if device in kernel.devices]
    serving = [kernel for kernel in here if kernel.act_order or not act_order]
    for kernel in serving:
        if wanted in ("auto", kernel.name):
            return kernel
    if wanted in engine.inference_only_kernels:
        cause = "It computes the forward pass only: no gradient would reach the layers below."
    elif any(kernel.name == wanted for kernel in here):
        cause = "The checkpoint was made with desc_act, and this kernel processes the groups in order."
    else:
        cause = f"{engine.name} has no such kernel on {device}."
    raise UnsupportedFeatureError(
        "QH-N15",
        f"The kernel {wanted} of {engine.name} cannot train this checkpoint on {device}; trainable are: "
        f"{', '.join(kernel.name for kernel in serving) or 'none'}.",
        where="backend.options.kernel",
        cause=cause,
        fix="Remove backend.options.kernel, or name one of the trainable kernels.",
        context={"trainable": [kernel.name for kernel in serving], "wanted": wanted},
    )


def load_function(path: str) -> Callable[..., object]:
    """Import `module:function`."""
    module, _, name = path.partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return function


def _installed_version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
