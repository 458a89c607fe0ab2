"""The values that cross between core and backend: numpy arrays and plain numbers, never tensors of a framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

IGNORE_LABEL = -100
"""The label of a token that carries no loss (the convention of Hugging Face and torch)."""

PADDING_SEGMENT = 0
"""The segment id of padding."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer that can carry LoRA: its weight is `[outputs, inputs]`; that of a stack of experts, which is one
    module, `[experts, outputs, inputs]`."""

    inputs: int
    outputs: int
    experts: int = 1

    @property
    def weight(self) -> tuple[int, ...]:
        """The dimensions of the base weight."""
        return (*self._stack, self.outputs, self.inputs)

    def lora_a(self, r: int) -> tuple[int, ...]:
        """The dimensions of the adapter's A."""
        return (*self._stack, r, self.inputs)

    def lora_b(self, r: int) -> tuple[int, ...]:
        """The dimensions of the adapter's B."""
        return (*self._stack, self.outputs, r)

    @property
    def parameters(self) -> int:
        """Numbers in the base weight."""
        return self.experts * self.inputs * self.outputs

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self.experts == 1 else (self.experts,)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One micro-batch. All arrays are int32 `[batch, time]`, padded on the right.

    `labels` is aligned with `input_ids`: the logits at t are scored against `labels[t + 1]`. `segment_ids` is 0 for
    padding and 1..k for the packed samples of a row; a token attends causally, and only within its own segment.
    `position_ids` starts at 0 in each segment. The first token of each segment has `IGNORE_LABEL`.

    `rows` `[batch]` is the place of each row in the global window of its step; a step with LoRA dropout needs it
    (`qlora_hal.contract.dropout`). `weights` float32 `[batch, time]`, aligned with `labels`, is what the loss of each
    counted token is multiplied with; None is 1 everywhere (Feature.TOKEN_WEIGHTS).
    """

    input_ids: Int32
    labels: Int32
    position_ids: Int32
    segment_ids: Int32
    rows: Int32 | None = None
    weights: Float32 | None = None

    @property
    def counted_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.labels[:, 1:] != IGNORE_LABEL))

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(np.count_nonzero(self.segment_ids != PADDING_SEGMENT))

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one sample."""
        return bool((self.segment_ids > 1).any())


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What the core decides for one optimizer step.

    `dropout_key` is a pure function of (seed, step), from which `qlora_hal.contract.dropout` makes every mask of the
    window: a resumed run draws the same masks without any saved generator state. The step minimises (sum of weight *
    token loss) / `denominator`; for plain training that is the number of counted tokens in the *global* window, over
    all ranks.
    """

    learning_rate: float
    denominator: float
    dropout_key: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did. `grad_norm` is the global norm before clipping.

    `loss_sum` is the sum of token losses without weights; `weighted_loss_sum` the one that was minimised, None where no
    batch has weights. `applied` is False when the backend refused the update because the loss or the gradient was not
    finite.
    """

    loss_sum: float
    token_count: int
    grad_norm: float
    applied: bool = True
    weighted_loss_sum: float | None = None

    @property
    def loss(self) -> float:
        """Mean loss per counted token, in nats."""
        return self.loss_sum / self.token_count if self.token_count else float("nan")


class PendingStep(Protocol):
    """A step that the device may still be computing."""

    def resolve(self) -> StepStats:
        """Wait for the device and return the figures. Called exactly once."""
        ...


@dataclass(frozen=True, slots=True)
class LossSum:
    """Sum of token losses in nats, and how many tokens it sums; with weights, the weighted sum too."""

    loss_sum: float
    token_count: int
    weighted_loss_sum: float | None = None

    @property
    def loss(self) -> float:
        return self.loss_sum / self.token_count if self.token_count else float("nan")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What defines a LoRA adapter beside its tensors.

    `scale` is alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023).
    `target_modules` are full module paths (`model.layers.0.self_attn.q_proj`), sorted.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """LoRA tensors in PEFT names and layout: `base_model.model.<module>.lora_A.weight` `[r, in]`, `...lora_B.weight`
    `[out, r]`, float32."""

    tensors: Mapping[str, Float32]
    config: AdapterConfig


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerSnapshot:
    """AdamW state after `step` updates.

    `moments` holds `<adapter tensor>.exp_avg` and `.exp_avg_sq` as float32, readable by every backend. `native` holds
    the backend's own representation (8-bit codes and scales, say) for a bitwise resume on the same kind of backend;
    `native_kind` names it. `exact` is False when `moments` were dequantized.
    """

    step: int
    moments: Mapping[str, Float32]
    exact: bool = True
    native_kind: str = ""
    native: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of training, by cause; `high` bounds the total. `loading` is what the host's heap keeps of
    loading, which a step uses again: it is counted in `workspace` where a step needs less."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    runtime: int
    relative_error: float = 0.15
    loading: int = 0

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.workspace
            + self.runtime
        )

    @property
    def high(self) -> int:
        return int(self.total * (1 + self.relative_error))


ComputeDtype = Literal["bfloat16", "float16", "float32"]
