"""A few tokens through a loaded model, before anything is trained: our head against the architecture's own logits, no
look ahead, and whether samples that share a row keep to themselves.

What config.json may ask of a forward pass is endless (multipliers, caps, offsets, another norm before the head). Names
that are known to us are only guesses here; the architecture's own forward decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qlora_hal.errors import ModelError
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.head_loss import Head

TRIAL_TOKENS = (1, 2, 3, 5, 8, 4)
"""Ids that every vocabulary has. The last is the one that nothing before it may see."""
OTHER_LAST_TOKEN = 6
MAGNIFIED_LOGIT = 64.0
"""Logits are tried at this size too: a cap at 30 bends those of a few units less than 16 bits can tell."""


@torch.no_grad()
def find_head(causal: Any, body: Any | None, device: torch.device) -> Head | None:
    """The head whose product with the body's last hidden states gives the architecture's own logits of a few tokens,
    or None: then only the whole forward pass gives them."""
    layer = causal.get_output_embeddings()
    if body is None or not isinstance(getattr(layer, "weight", None), Tensor):
        return None
    tokens = _tokens(TRIAL_TOKENS, device)
    try:
        states = body(input_ids=tokens, use_cache=False).last_hidden_state
        raw = torch.nn.functional.linear(states, layer.weight, getattr(layer, "bias", None))
        larger = MAGNIFIED_LOGIT / max(float(raw.abs().max()), 1e-6)
        cases = [(scale, _own_logits(causal, body, tokens, scale)) for scale in (1.0, larger)]
    except (TypeError, AttributeError, RuntimeError, KeyError, ValueError):
        return None
    for head in _candidates(causal, layer):
        if all(_agree(head.logits(states * scale), logits, states.dtype) for scale, logits in cases):
            return head
    return None


def _candidates(causal: Any, layer: Any) -> Iterator[Head]:
    """What is done to logits under names that are known: Gemma 2 caps them, Cohere multiplies, Granite divides,
    Falcon H1 multiplies."""
    config = causal.config.get_text_config()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    cap = getattr(config, "final_logit_softcapping", None)
    multipliers = [1.0]
    for name in ("logit_scale", "lm_head_multiplier"):
        multipliers += [float(value)] if (value := getattr(config, name, None)) else []
    if value := getattr(config, "logits_scaling", None):
        multipliers += [1.0 / float(value), float(value)]
    for multiplier in multipliers:
        for softcap in dict.fromkeys((None, cap)):
            yield Head(weight, bias, softcap, multiplier)


def _own_logits(causal: Any, body: Any, tokens: Tensor, scale: float) -> Tensor:
    """`[1, time, vocabulary]`, with the body's last hidden states multiplied by `scale` on their way to the head."""

    def magnify(module: Any, arguments: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"] * scale
        return output

    handle = body.register_forward_hook(magnify)
    try:
        logits: Tensor = causal(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    return logits.float()


def _agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding: a product, a multiplier and a cap are rounded once each by the architecture, and ours
    only once, so that they lie within two units in the last place of the largest; four are allowed. In float32 the
    product may be summed in another order, an error of sqrt(4096) units."""
    units = 4 if dtype != torch.float32 else 256
    apart = (ours - theirs).abs().max()
    return ours.shape == theirs.shape and bool(apart <= units * torch.finfo(dtype).eps * theirs.abs().max())


@torch.no_grad()
def check_causal(causal: Any, source: ModelSource, device: torch.device) -> str:
    """Why samples cannot share a row with this architecture, or "" where they can.

    Raises ModelError QH-M51 where a token changes what was computed before it, or the forward pass fails.
    """
    words = source.facts.architecture or source.facts.model_type
    try:
        first = _logits(causal, TRIAL_TOKENS, device)
        second = _logits(causal, (*TRIAL_TOKENS[:-1], OTHER_LAST_TOKEN), device)
    except (TypeError, AttributeError, RuntimeError, KeyError, ValueError, IndexError, ImportError) as error:
        raise ModelError(
            "QH-M51",
            f"{words} cannot be run on text alone.",
            where=source.name,
            cause=f"{type(error).__name__}: {(str(error).splitlines() or ['no reason was given'])[0][:300]}",
            fix="Choose a decoder-only causal language model.",
        ) from error
    if not _near(first[:, :-1], second[:, :-1]):
        raise ModelError(
            "QH-M51",
            f"{words} is no causal language model: a token changes what is computed for those before it.",
            where=source.name,
            cause="It would be trained on seeing the tokens that it should predict.",
            fix="Choose a decoder-only causal language model.",
        )
    return _packing_refusal(causal, device)


def _packing_refusal(causal: Any, device: torch.device) -> str:
    """Two samples in one row, told apart by positions that start again, must be as each alone."""
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return "its forward pass takes no position_ids"
    left, right = TRIAL_TOKENS[:3], TRIAL_TOKENS[3:]
    positions = torch.tensor([[*range(len(left)), *range(len(right))]], device=device)
    try:
        together = _logits(causal, (*left, *right), device, position_ids=positions)
        apart = torch.cat([_logits(causal, left, device), _logits(causal, right, device)], dim=1)
    except (TypeError, AttributeError, RuntimeError, KeyError, ValueError, IndexError) as error:
        return f"its forward pass fails on a shared row ({type(error).__name__})"
    return "" if _near(together, apart) else "it mixes the samples of a row"


def _logits(causal: Any, tokens: tuple[int, ...], device: torch.device, **more: Tensor) -> Tensor:
    logits: Tensor = causal(input_ids=_tokens(tokens, device), use_cache=False, **more).logits
    return logits.float()


def _near(left: Tensor, right: Tensor) -> bool:
    """Within what kernels for other lengths make of the same sums; a token that is seen changes far more."""
    return bool((left - right).abs().max() <= 0.02 * right.abs().max())


def _tokens(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([ids], device=device)
