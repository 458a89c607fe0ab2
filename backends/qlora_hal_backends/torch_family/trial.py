"""A few tokens through a loaded model, before anything is trained: our head against the architecture's own logits, no
look ahead, and whether samples that share a row keep to themselves.

What config.json may ask of a forward pass is endless (multipliers, caps, offsets, another norm before the head). Names
that are known to us are only guesses here; the architecture's own forward decides. Three short forward passes tell all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_hal.errors import ModelError
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.head_loss import Head
from qlora_hal_backends.torch_family.host_tables import StreamedMatrix

LEFT, RIGHT = (1, 2, 3), (5, 8, 4)
"""Two samples, of ids that every vocabulary has."""
OTHER_LAST_TOKEN = 6
MAGNIFIED_LOGIT = 64.0
"""Logits are tried at this size too: a cap at 30 bends those of a few units less than 16 bits can tell."""
OTHER_LEFT = (7, 2, 1)

_FAILURES = (TypeError, AttributeError, RuntimeError, KeyError, ValueError, IndexError, ImportError)


@dataclass(frozen=True, slots=True)
class Trial:
    """`body` gives last hidden states and `head` makes logits of them; None where only the architecture's whole forward
    pass gives its logits. `mixes_samples` says why samples cannot share a row, or is empty."""

    body: Any | None
    head: Head | None
    mixes_samples: str


@dataclass(slots=True)
class _Pass:
    """Float32 logits `[rows, time, vocabulary]` of the architecture, and the last hidden states that they were made
    from; None where its body was not run as one."""

    logits: Tensor
    states: Tensor | None
    dtype: torch.dtype

    @property
    def same_sums(self) -> float:
        """How far the same sums in a batch of the same shape may lie apart, relative to the largest."""
        return 1e-5 if self.dtype == torch.float32 else 4 * torch.finfo(self.dtype).eps

    @property
    def other_sums(self) -> float:
        """The same for sums in another order."""
        return 1e-4 if self.dtype == torch.float32 else 8 * torch.finfo(self.dtype).eps


@torch.no_grad()
def tried(causal: Any, source: ModelSource, device: torch.device) -> Trial:
    """Raises ModelError QH-M51 where a token changes what was computed before it, or the forward pass fails."""
    rows = ((*LEFT, *RIGHT), (*LEFT, *RIGHT[:-1], OTHER_LAST_TOKEN), (*RIGHT, *LEFT))
    try:
        body, apart = _first_pass(causal, torch.tensor(rows, device=device))
    except _FAILURES as error:
        raise _refusal(
            source, "cannot be run on text alone", f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    if not _near(apart.logits[0, :-1], apart.logits[1, :-1], apart.same_sums):
        raise _refusal(
            source,
            "is not a causal language model: a token changes what is computed for those before it",
            "It would be trained with the tokens visible that it should predict.",
        )
    larger = MAGNIFIED_LOGIT / max(float(apart.logits.abs().nan_to_num(0.0).max()), 1e-6)
    together, mixes = _shared_row(causal, body, device, larger)
    if not mixes and not _keep_apart(_seen(together, larger), _seen(apart), apart):
        mixes = "it mixes the samples of a row"
    head = _head(causal, body, apart, together, larger, torch.tensor(rows, device=device))
    return Trial(body if head is not None else None, head, mixes)


def _first_pass(causal: Any, tokens: Tensor) -> tuple[Any | None, _Pass]:
    """A forward pass, and the module that made its last hidden states."""
    bodies = [getattr(causal, causal.base_model_prefix, None)]
    if hasattr(causal, "get_decoder"):
        bodies.append(causal.get_decoder())
    for body in bodies:
        if body is not None and body is not causal:
            one = _run(causal, body, tokens)
            if one.states is not None:
                return body, one
    return None, _run(causal, None, tokens)


def _keep_apart(together: Tensor, alone: Tensor, first: _Pass) -> bool:
    """Whether the second sample of a row is the same behind another first one, and the same as alone."""
    half = len(LEFT)
    same = _near(together[0, half:], together[1, half:], first.same_sums)
    expected = torch.cat([alone[0, :half], alone[2, :half]])
    return same and _near(together[0], expected, first.other_sums)


def _shared_row(causal: Any, body: Any | None, device: torch.device, scale: float) -> tuple[_Pass, str]:
    """Two samples in one row, told apart by positions that start again; and another one before the second."""
    tokens = torch.tensor([[*LEFT, *RIGHT], [*OTHER_LEFT, *RIGHT]], device=device)
    positions = torch.tensor([[*range(len(LEFT)), *range(len(RIGHT))]] * 2, device=device)
    takes_positions = "position_ids" in inspect.signature(causal.forward).parameters
    failure = "" if takes_positions else "its forward pass does not accept position_ids"
    if takes_positions:
        try:
            return _run(causal, body, tokens, scale, position_ids=positions), ""
        except _FAILURES as error:
            failure = f"its forward pass fails on a shared row ({type(error).__name__})"
    return _run(causal, body, tokens, scale), failure


def _run(causal: Any, body: Any | None, tokens: Tensor, scale: float = 1.0, **more: Tensor) -> _Pass:
    """One forward pass, the body's last hidden states multiplied by `scale` on their way to the head."""
    seen: list[Tensor] = []

    def magnify(module: Any, arguments: Any, output: Any) -> Any:
        seen.append(output["last_hidden_state"])
        output["last_hidden_state"] = seen[-1] * scale
        return output

    handle = body.register_forward_hook(magnify) if body is not None else None
    try:
        logits: Tensor = causal(input_ids=tokens, use_cache=False, **more).logits
    finally:
        if handle is not None:
            handle.remove()
    return _Pass(logits.float(), seen[0] if len(seen) == 1 else None, causal.dtype)


def _seen(one: _Pass, scale: float = 1.0) -> Tensor:
    """What tells whether tokens saw one another."""
    return one.logits / scale if one.states is None else one.states.float()


def _head(causal: Any, body: Any | None, natural: _Pass, larger: _Pass, scale: float, tokens: Tensor) -> Head | None:
    """The first candidate that gives the architecture's logits from its last hidden states, at both sizes."""
    layer = causal.get_output_embeddings()
    if (
        natural.states is None
        or larger.states is None
        or not isinstance(getattr(layer, "weight", None), Tensor | StreamedMatrix)
    ):
        return None
    if not _is_body(body, natural, tokens):
        return None
    cases = ((natural.states, natural.logits), (larger.states * scale, larger.logits))
    for head in _candidates(causal, layer):
        if all(_agree(head, states, logits) for states, logits in cases):
            return head
    return None


def _is_body(body: Any, natural: _Pass, tokens: Tensor) -> bool:
    """Whether the body alone, called as in training, gives the states that the architecture made its logits from. The
    same `tokens` in the same shape: products of another one may be rounded otherwise, and eighty layers of random
    weights make much of that."""
    assert natural.states is not None
    try:
        found = body(input_ids=tokens, use_cache=False).last_hidden_state
        return _near(found.float(), natural.states.float(), natural.other_sums)
    except _FAILURES:
        return False


def _candidates(causal: Any, layer: Any) -> Iterator[Head]:
    """What is done to logits under names that are known: Gemma 2 caps them, Cohere multiplies, Granite divides,
    Falcon H1 multiplies."""
    config = causal.config.get_text_config()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    multipliers = [1.0]
    for name in ("logit_scale", "lm_head_multiplier"):
        multipliers += [float(value)] if (value := getattr(config, name, None)) else []
    if value := getattr(config, "logits_scaling", None):
        multipliers += [1.0 / float(value)]
    for softcap in dict.fromkeys((*(float(cap) for cap in caps if cap), None)):
        for multiplier in reversed(multipliers):
            yield Head(weight, bias, softcap, multiplier)


def _agree(head: Head, states: Tensor, logits: Tensor) -> bool:
    """Equal but for rounding: a product, a multiplier and a cap are rounded once each by the architecture, and ours
    only once, so that they lie within two units in the last place of the largest; four are allowed. In float32 the
    product may be summed in another order, an error of sqrt(4096) units."""
    units = 4 if states.dtype != torch.float32 else 256
    try:
        ours = head.logits(states)
    except _FAILURES:
        return False
    return ours.shape == logits.shape and _near(ours, logits, units * torch.finfo(states.dtype).eps)


def _near(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Relative to the largest; overflow is no matter of this trial, the first step will tell."""
    apart = (left - right).abs().nan_to_num(0.0, posinf=0.0)
    return bool(apart.max() <= tolerance * right.abs().nan_to_num(0.0, posinf=0.0).max())


def _refusal(source: ModelSource, what: str, cause: str) -> ModelError:
    name = source.facts.architecture or source.facts.model_type
    fix = "Choose a decoder-only causal language model."
    return ModelError("QH-M51", f"{name} {what}.", where=source.name, cause=cause, fix=fix)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason was given"])[0][:300]
