"""The contract of a backend: a light `BackendSpec` that is data, and a trainer class imported only when it runs.

The core owns the loop, a backend owns one whole optimizer step. What a backend cannot be looked at for cannot be
certified, so the views (`logits`, `gradients`, `dequantized_weight`) belong to the contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from qlora_hal.contract.capabilities import (
    Capabilities,
    WeightFormat,
)
from qlora_hal.contract.memory_constants import MemoryConstants, MemoryQuery, unfused
from qlora_hal.contract.world import RankFacts, World
from qlora_hal.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from qlora_hal.contract.longest_sample import LongestSample
    from qlora_hal.contract.rotary_length import RotaryLength
    from qlora_hal.contract.values import (
        Adapter,
        Batch,
        ComputeDtype,
        Float32,
        Float64,
        Int32,
        LinearShape,
        LossSum,
        OptimizerSnapshot,
        PendingStep,
        StepSettings,
    )
    from qlora_hal.model.source import ModelSource

CONTRACT_VERSION = 2
"""Major version of this contract; discovery refuses a spec of another one."""


class Availability(StrEnum):
    """The answer of a probe."""

    READY = "ready"
    MISSING_PACKAGE = "missing_package"
    NO_DEVICE = "no_device"
    WRONG_BUILD = "wrong_build"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Whether one backend can run here. Everything but READY carries a `reason` and a `fix`.

    `uses_accelerator` is for backends that run on several kinds of device: what holds here. None: as the spec says.
    `device_kind` (`cuda`, `rocm`, `mps`, `cpu`) and `compute_dtype`, what `auto` will most likely become on it, are for
    the memory estimate; empty and None where the probe cannot tell.
    `notes` are sentences for who looks closer (`qlora-hal doctor`), nothing that has to be mended.
    """

    backend: str
    availability: Availability
    reason: str
    fix: str = ""
    devices: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    distribution: str = ""
    uses_accelerator: bool | None = None
    notes: tuple[str, ...] = ()
    device_kind: str = ""
    compute_dtype: ComputeDtype | None = None

    @property
    def ready(self) -> bool:
        return self.availability is Availability.READY

    def as_json(self) -> dict[str, object]:
        return {
            "backend": self.backend,
            "availability": self.availability.value,
            "reason": self.reason,
            "fix": self.fix,
            "devices": list(self.devices),
            "versions": dict(self.versions),
            "distribution": self.distribution,
            "uses_accelerator": self.uses_accelerator,
            "notes": list(self.notes),
            "device_kind": self.device_kind,
            "compute_dtype": self.compute_dtype,
        }


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A backend before anything of it is imported.

    `probe` may read package metadata, device nodes and `find_spec`, and imports no tensor library. `trainer` is
    `package.module:Name`: a class, or a function without arguments, that gives a `QuantizedLoRATrainer`.
    `uses_accelerator` False keeps `auto` from choosing the backend silently (see `selection`). `card_vendors` are those
    whose cards it runs on, in the words of `memory.gpus.KnownGpu`. `option_choices` lists
    what `backend.options` may hold, the first choice being the default. `notes` maps the name of an optimizer or a
    compute dtype to what it becomes here; the note is printed. `memory` answers what the estimate must know of the code
    that will run. `quantizer` is `package.module:Name` of a
    `Quantizer` for `capabilities.calibrated_formats`. `outline` is `package.module:Name` of an `Outline`, which may
    import what the trainer imports; without one the headers of the weight files decide what a model has.
    `launcher` is a module that starts ranks of this machine: `python -m LAUNCHER RANKS MAX_RESTARTS MODULE FOLDER` runs
    `python -m MODULE FOLDER` in each, and leaves `failures.json` in the folder (Feature.DATA_PARALLEL).
    `supervised` asks for a run in a child process, where the device's driver may end it. `prepare_process` is called
    with `backend.options` before the trainer is imported, for variables that a library reads once; a default choice
    leaves alone what the user has set. `contract` is the number that the author wrote this for.
    """

    name: str
    title: str
    priority: int
    capabilities: Capabilities
    probe: Callable[[], ProbeReport]
    trainer: str
    contract: int = 1
    uses_accelerator: bool = True
    card_vendors: frozenset[str] = frozenset({"nvidia", "amd", "apple"})
    option_choices: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    memory: Callable[[MemoryQuery], MemoryConstants] = unfused
    quantizer: str = ""
    outline: str = ""
    launcher: str = ""
    supervised: bool = False
    prepare_process: Callable[[Mapping[str, object]], None] | None = None


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """What a backend will make of a model, told before any weight is read.

    `linear_modules` are those that the trainer will have after `load`; `notes` are sentences for the user, on what of
    the model is left out, left as it is, or taken for something else. `rotary` tells where rotary positions change
    with the length of a row; the core then refuses rows that would change one another. `longest_sample` is that of
    samples that are computed as config.json asks; the core refuses longer ones before any weight is read.
    """

    linear_modules: Mapping[str, LinearShape]
    notes: tuple[str, ...] = ()
    rotary: RotaryLength | None = None
    longest_sample: LongestSample | None = None


class Outline(Protocol):
    """A function that looks at config.json and the headers of the weight files only. Called before data are read, so
    that a model the backend cannot load is refused by name in a dry run. `options` are `backend.options`. While
    `source.remote` is set the weight files lie on the hub, and `source.facts` has what their headers say."""

    def __call__(self, source: ModelSource, options: Mapping[str, object]) -> ModelOutline:
        """Raises ModelError: QH-M51 for an architecture that the backend does not train, QH-M50 for tensors that do
        not belong to it."""
        ...


@dataclass(frozen=True, slots=True)
class CalibrationJob:
    """What a `Quantizer` is asked for: a 16-bit model folder, quantized with the help of these rows of token ids.

    `output` exists and is empty; `config.json` and safetensors weights are to be written into it. `options` are
    `backend.options`. No text of a row is known here, so none can be left in the result.
    """

    model: Path
    output: Path
    rows: Sequence[Sequence[int]]
    quantization: Quantization
    symmetric: bool = True
    act_order: bool = False
    seed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)


class Quantizer(Protocol):
    """Quantizes with calibration; a class without arguments. A library that changes its process runs in a child."""

    def versions(self, options: Mapping[str, object]) -> Mapping[str, str]:
        """Packages that decide about the result, with their versions. Imports none of them. Raises
        UnsupportedFeatureError where none is there."""
        ...

    def quantize(self, job: CalibrationJob, tell: Callable[[str], None]) -> None:
        """Do the job, saying from time to time how far it is. Raises ModelError, BackendError, ConfigError."""
        ...


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the base is stored, as resolved: no `auto`, no level."""

    weight_format: WeightFormat
    block_size: int | None = None
    double_quant: bool = False


Recompute = Literal["selective", "full", "offload"]
OffloadedPart = Literal["embeddings", "layers", "head"]
"""The table of token embeddings, the decoder layers' packed weights, the output head."""


@dataclass(frozen=True, slots=True)
class Compute:
    """How the backend computes. `options` are the backend's own settings, from `backend.options`; `world` is which of
    several ranks this trainer is (Feature.DATA_PARALLEL), `shard_base` whether each of them holds a part of the packed
    base alone and gathers the rest when it is needed (Feature.SHARDED_BASE).

    With `gradient_checkpointing`, `recompute` says what of a layer is computed again: all of it from its input
    (`full`), all with the inputs waiting in the host's memory (`offload`), or its feed-forward's products alone
    (`selective`); the others than `full` need Feature.RECOMPUTATION_CHOICE. `base_offload` names the parts of the base
    that live in the host's memory and reach the device when they are needed (Feature.BASE_OFFLOAD).

    With `fp8_products`, `dtype` is bfloat16 and the products with the frozen base's linear layers, forward and
    backward, are of 8-bit floats (E4M3: largest 448, Micikevicius et al. 2022), summed in float32 with the adapter's
    and rounded once: each row of a weight, of an input and of a gradient has a float32 scale that takes its largest
    magnitude to 448. The base is the rounded one in both directions (Feature.FP8_PRODUCTS)."""

    dtype: ComputeDtype = "float32"
    gradient_checkpointing: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    world: World = field(default_factory=World)
    shard_base: bool = False
    recompute: Recompute = "full"
    base_offload: tuple[OffloadedPart, ...] = ()
    fp8_products: bool = False


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the trainer really runs on, for `run.json` and certificates.

    `kernel_path` names what multiplies (for example `bitsandbytes dequantize + cuBLAS`).
    """

    device: str
    versions: Mapping[str, str]
    kernel_path: str = ""
    driver: str = ""
    memory_limit_bytes: int | None = None


class QuantizedLoRATrainer(ABC):
    """One model, quantized and frozen, with one trainable LoRA adapter on it.

    Meaning of a step, on every backend: minimise (sum of token losses) / (counted tokens) over the whole window;
    add the adapter's product to the base product before anything is rounded to the compute dtype; clip by the global
    norm of all adapter gradients; AdamW with decoupled decay and bias correction, epsilon outside the root; learning
    rate given by the core; master adapter weights and moments in float32. A step whose loss or gradient is not finite
    changes nothing and says so in its stats.

    Where layers are mixtures of experts (Feature.EXPERTS) a stack of experts is one module. Every token passes through
    the experts that the architecture's own scores choose, of equal ones through those with the lower index; none is
    dropped. An expert whose A and B have no gradient at all in a step, because no token that counts reached it, keeps
    them and their moments to the last bit: no decay, no momentum. Clip and step count are as ever. Routers are frozen.
    Dropout on a stack's input is refused.

    With several ranks the window of a step is that of all ranks together, of which each is given its share, and what a
    step reports is of all. Memory that runs out on one rank raises OutOfMemoryError on all, with nothing changed.
    `evaluate` and the views are of this rank's batches, but `gradients`, which is of the whole window.
    """

    spec: ClassVar[BackendSpec]

    load_notes: tuple[str, ...] = ()
    """Sentences for the user on what only reading the weights could tell, set by `load`."""

    # life ----------------------------------------------------------------------------------------------------------
    def join_ranks(self, world: World, timeout_seconds: float) -> None:
        """Meet the other ranks and take this rank's device, before anything else and where there are several. From here
        on every verb is called by all ranks in the same order, and `sum_over_ranks` works; whichever waits longer than
        `timeout_seconds` for another rank raises. Feature.DATA_PARALLEL.

        Raises ConfigError QH-R01 (no device for this rank), BackendError QH-R02 (a rank is gone), QH-R04 (they did not
        meet).
        """
        raise _undeclared(self, "data_parallel")

    @abstractmethod
    def proved_compute_dtypes(self) -> Sequence[str]:
        """The compute dtypes that this device has, found by computing, best first. Called before `load`."""

    @abstractmethod
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        """Load and quantize the frozen base, shard by shard. Raises ModelError, UnsupportedFeatureError."""

    @abstractmethod
    def linear_modules(self) -> Mapping[str, LinearShape]:
        """Module path -> shape of every linear layer that can carry LoRA, the output head left out."""

    @abstractmethod
    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        """Put the adapter on the base with a fresh optimizer. A second call replaces both. Raises AdapterError."""

    def sum_over_ranks(self, values: Float64) -> Float64:
        """The sum over all ranks of a few numbers `[n]`, for the core's votes (stop, save, split a window, evaluation
        sums); what was given where there is one rank. It is the same on every rank, bit for bit. Feature.DATA_PARALLEL.

        Raises BackendError QH-R02 where a rank is gone, or does not come within the time that `join_ranks` was given.
        """
        return values

    def rank_facts(self) -> RankFacts:
        """How the ranks are joined, and what it has cost so far. Feature.DATA_PARALLEL; may be left as it is."""
        return RankFacts()

    @abstractmethod
    def device_facts(self) -> DeviceFacts:
        """What this trainer runs on."""

    @abstractmethod
    def close(self) -> None:
        """Free the device. Safe to call twice."""

    # training ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        """Queue one whole optimizer step over the window and return without waiting for the device."""

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        """Sum of token losses, without dropout and without any effect on later steps."""

    # state: host float32, canonical names --------------------------------------------------------------------------
    @abstractmethod
    def export_adapter(self) -> Adapter:
        """The adapter as it stands."""

    @abstractmethod
    def export_optimizer(self) -> OptimizerSnapshot:
        """The optimizer as it stands."""

    @abstractmethod
    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        """Continue from a snapshot, of this backend or another. Raises AdapterError when tensors do not fit."""

    # views for the conformance suite -------------------------------------------------------------------------------
    @abstractmethod
    def logits(self, batch: Batch) -> Float32:
        """Logits `[batch, time, vocabulary]`, without dropout."""

    @abstractmethod
    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        """Gradient of the window's token mean for every adapter tensor, unclipped, without dropout; state untouched."""

    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        """The loss in nats of each counted token `[batch, time]`, aligned with `labels`, 0 where nothing counts.

        Without dropout and without any effect on later steps. `adapter` False is the base alone: the reference model
        of preference tuning. Feature.TOKEN_WEIGHTS.
        """
        raise _undeclared(self, "token_weights")

    @abstractmethod
    def dequantized_weight(self, module: str) -> Float32:
        """The base weight `[out, in]` exactly as the products see it."""

    # optional, guarded by Feature ----------------------------------------------------------------------------------
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        """Greedy continuation of one prompt `[time]`: new tokens up to and without the first stop token.
        Feature.GENERATE."""
        raise _undeclared(self, "generate")

    def peak_memory_bytes(self) -> int:
        """Highest memory of the device since load, in bytes. Feature.PEAK_MEMORY."""
        raise _undeclared(self, "peak_memory")

    def __enter__(self) -> QuantizedLoRATrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _undeclared(trainer: QuantizedLoRATrainer, feature: str) -> Exception:
    return UnsupportedFeatureError(
        "QH-B01",
        f"Backend {trainer.spec.name} does not support {feature}.",
        fix="Run qlora-hal backends to see which backend does.",
    )
