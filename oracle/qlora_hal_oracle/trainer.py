"""The oracle as a trainer: the same verbs as a backend, in float64, one optimizer step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qlora_hal_oracle.loss import token_losses

from .adamw import AdamWState, adamw_update, clip_factor, global_norm
from .arithmetic import EXACT, Arithmetic, ErrorScale, MagnitudeRecorder, RandomRounding
from .arrays import AnyFloat, Float64, TokenBatch
from .fp8 import Fp8Products
from .llama import DropoutMasks, OracleLlama
from .lora import LoraScale
from .loss import count_tokens, token_loss_gradient, token_loss_sum
from .memo import Memo, Part
from .shape import LlamaShape

Result = TypeVar("Result")

EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"


@dataclass(frozen=True, slots=True)
class OracleStep:
    """One step: loss sum and counted tokens of the window, and the gradient norm before clipping.

    `applied` is False when the gradient norm was not finite; then adapter and moments are unchanged.
    """

    loss_sum: float
    token_count: int
    grad_norm: float
    applied: bool


@dataclass(frozen=True, slots=True, eq=False)
class WindowGradients:
    """Loss sum and counted tokens of a window, and the gradient of their quotient by adapter tensor name."""

    loss_sum: float
    token_count: int
    gradients: dict[str, Float64]


class OracleTrainer:
    """Trains adapters on a frozen float64 Llama.

    A window is the list of micro-batches of one optimizer step. Its loss is (sum of token losses over the window) /
    (counted tokens of the window), never a mean of means. Give a `RandomRounding` as `arithmetic` to see what a
    compute dtype would do to the same run, and `fp8` where products with the frozen base are in 8-bit floats.
    """

    def __init__(
        self,
        shape: LlamaShape,
        base: Mapping[str, AnyFloat],
        adapter: Mapping[str, AnyFloat],
        scale: LoraScale,
        arithmetic: Arithmetic = EXACT,
        fp8: Fp8Products | None = None,
    ) -> None:
        self._adapter = _as_float64(adapter)
        self.model = OracleLlama(shape, base, self._adapter, scale)
        if fp8 is not None:
            self.model.use_fp8(fp8)
        self._optimizer = AdamWState()
        self._arithmetic = arithmetic
        self._memo = Memo()

    @property
    def arithmetic(self) -> Arithmetic:
        """How it computes."""
        return self._arithmetic

    def logits(self, batch: TokenBatch) -> Float64:
        """`[batch, time, vocabulary]`, without dropout."""
        if self._arithmetic is not EXACT:
            return self.model.forward(batch, self._arithmetic).logits
        return self._kept(["logits", batch], lambda: _fixed(self.model.forward(batch).logits))

    def rounded_logits(self, batch: TokenBatch, unit_roundoff: float) -> Float64:
        """The same of a run that is rounded at random to a dtype, always with the same roundings."""

        def run() -> Float64:
            return _fixed(self.model.forward(batch, RandomRounding(unit_roundoff, seed=0)).logits)

        return self._kept(["rounded logits", unit_roundoff, batch], run)

    def _kept(self, parts: list[Part], make: Callable[[], Result]) -> Result:
        return self._memo.of([*parts, self._adapter], make)

    def evaluate(self, batches: Sequence[TokenBatch]) -> tuple[float, int]:
        """(loss sum, counted tokens) without dropout and without an update."""
        losses = (token_loss_sum(self.logits(batch), batch.labels, self._arithmetic) for batch in batches)
        return math.fsum(losses), count_tokens(batches)

    def token_losses(self, batch: TokenBatch) -> Float64:
        """The loss of each counted token `[batch, time]`, aligned with the labels, 0 elsewhere."""
        return token_losses(self.logits(batch), batch.labels)

    def window_gradients(
        self,
        window: Sequence[TokenBatch],
        *,
        masks: Sequence[DropoutMasks] | None = None,
        denominator: float | None = None,
        with_base: bool = False,
        arithmetic: Arithmetic | None = None,
    ) -> WindowGradients:
        """Loss and gradients of a window.

        `masks` holds one dropout mapping to each micro-batch. `denominator` is by default the number of
        counted tokens of this window; give the global one when the window is one rank's share. Raises ValueError if the
        divisor is 0.
        """
        used = self._arithmetic if arithmetic is None else arithmetic
        divisor = count_tokens(window) if denominator is None else denominator
        if divisor == 0:
            raise ValueError("no token of this window carries loss: its mean loss is undefined")
        if used is not EXACT or with_base:
            return self._window_gradients(window, masks, divisor, used, with_base=with_base)
        parts: list[Part] = ["gradients", float(divisor), *window, *(masks or ())]
        return self._kept(parts, lambda: self._window_gradients(window, masks, divisor, used, with_base=False))

    def _window_gradients(
        self,
        window: Sequence[TokenBatch],
        masks: Sequence[DropoutMasks] | None,
        divisor: float,
        used: Arithmetic,
        *,
        with_base: bool,
    ) -> WindowGradients:
        losses: list[float] = []
        total: dict[str, Float64] = {}
        for batch, batch_masks in zip(window, masks or [{}] * len(window), strict=True):
            forward = self.model.forward(batch, used, batch_masks)
            losses.append(token_loss_sum(forward.logits, batch.labels, used))
            grad_logits = used.store(token_loss_gradient(forward.logits, batch.labels, divisor, batch.weights))
            for name, gradient in self.model.backward(forward, grad_logits, used, with_base=with_base).items():
                total[name] = total[name] + gradient if name in total else gradient
        fixed = {name: _fixed(gradient) for name, gradient in total.items()}
        return WindowGradients(math.fsum(losses), count_tokens(window), fixed)

    def gradients(self, window: Sequence[TokenBatch]) -> dict[str, Float64]:
        """Gradient of the window's mean token loss by adapter tensor name, before clipping."""
        return self.window_gradients(window).gradients

    def rounded_gradients(
        self,
        window: Sequence[TokenBatch],
        unit_roundoff: float,
        *,
        masks: Sequence[DropoutMasks] | None = None,
        denominator: float | None = None,
    ) -> dict[str, Float64]:
        """The gradients of a run that is rounded at random to a dtype, always with the same roundings."""

        def run() -> dict[str, Float64]:
            arithmetic = RandomRounding(unit_roundoff, seed=0)
            found = self.window_gradients(window, masks=masks, denominator=denominator, arithmetic=arithmetic)
            return found.gradients

        return dict(self._kept(["rounded gradients", unit_roundoff, denominator, *window, *(masks or ())], run))

    def train_step(
        self,
        window: Sequence[TokenBatch],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        masks: Sequence[DropoutMasks] | None = None,
        denominator: float | None = None,
    ) -> OracleStep:
        """Gradient of the window, global-norm clip over all adapter tensors, one AdamW update."""
        result = self.window_gradients(window, masks=masks, denominator=denominator)
        norm = global_norm(result.gradients)
        if math.isfinite(norm):
            factor = clip_factor(norm, max_grad_norm)
            clipped = {name: gradient * factor for name, gradient in result.gradients.items()}
            adamw_update(
                self._adapter,
                clipped,
                self._optimizer,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                betas=betas,
                eps=eps,
                arithmetic=self._arithmetic,
            )
        return OracleStep(result.loss_sum, result.token_count, norm, math.isfinite(norm))

    def error_scales(self, window: Sequence[TokenBatch]) -> dict[str, ErrorScale]:
        """Scale of the rounding error of each product of this window's forward and backward pass.

        Keys: an adapter tensor's name for its gradient, `lm_head` for the logits, a module path for its base product.
        """

        def record() -> dict[str, ErrorScale]:
            recorder = MagnitudeRecorder()
            for batch in window:
                recorder.start_pass()
                self.window_gradients([batch], denominator=count_tokens(window), arithmetic=recorder)
            return recorder.scales

        return dict(self._kept(["error scales", *window], record))

    def export_adapter(self) -> dict[str, Float64]:
        """A copy of the adapter tensors by PEFT name."""
        return {name: tensor.copy() for name, tensor in self._adapter.items()}

    def import_adapter(self, tensors: Mapping[str, AnyFloat]) -> None:
        """Replace all adapter tensors. Raises ValueError, changing nothing, unless names and shapes are the same."""
        _check_shapes("adapter", self._adapter, tensors)
        self._adapter.update(_as_float64(tensors))

    def export_optimizer(self) -> tuple[int, dict[str, Float64]]:
        """(applied steps, moments named `<tensor>.exp_avg` and `<tensor>.exp_avg_sq`); zeros before the first step."""
        moments: dict[str, Float64] = {}
        for name, tensor in self._adapter.items():
            zeros = np.zeros_like(tensor)
            moments[f"{name}.{EXP_AVG}"] = self._optimizer.exp_avg.get(name, zeros).copy()
            moments[f"{name}.{EXP_AVG_SQ}"] = self._optimizer.exp_avg_sq.get(name, zeros).copy()
        return self._optimizer.step, moments

    def import_optimizer(self, step: int, tensors: Mapping[str, AnyFloat]) -> None:
        """Replace step and all moments. Raises ValueError, changing nothing, unless names and shapes are right."""
        _check_shapes("optimizer", self.export_optimizer()[1], tensors)
        moments = _as_float64(tensors)
        self._optimizer = AdamWState(
            step=step,
            exp_avg={name: moments[f"{name}.{EXP_AVG}"] for name in self._adapter},
            exp_avg_sq={name: moments[f"{name}.{EXP_AVG_SQ}"] for name in self._adapter},
        )


def _fixed(values: Float64) -> Float64:
    """A result that is handed out more than once: nobody writes into it."""
    values.flags.writeable = False
    return values


def _as_float64(tensors: Mapping[str, AnyFloat]) -> dict[str, Float64]:
    return {name: np.array(tensor, dtype=np.float64) for name, tensor in tensors.items()}


def _check_shapes(what: str, expected: Mapping[str, Float64], given: Mapping[str, AnyFloat]) -> None:
    wrong = sorted(expected.keys() ^ given.keys())
    wrong += sorted(name for name in expected.keys() & given.keys() if expected[name].shape != given[name].shape)
    if wrong:
        raise ValueError(f"{what} tensors missing, unknown or of another shape: {wrong}")
