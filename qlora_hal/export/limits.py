"""How far the merged model may be from the adapter model, derived from the roundings between the two.

Both compute the same function; what differs is rounding. Each of the M linear layers multiplies with weights that were
rounded once to the output's dtype: relative errors spread evenly over +-u_w have variance u_w^2 / 3. Both models also
round: their activations to the compute dtype, u_c, and each of the k terms of a product to float32, u_32. Independent
errors add in squares, so that the last hidden state, and with it the logits, move by the relative amount

    e = sqrt(M (u_w^2 + 2 u_c^2 + 2 k u_32^2) / 3).

Layers also amplify what reaches them, so twice e is allowed: in units of e, a trained model was seen to move by 0.12
and models of random weights, which amplify most, by 0.6 to 1.5. Logits with standard deviation s over the vocabulary
then move by d = 2 e s, and for small moves the divergence is half their variance: KL = d^2 / 2 (second order of the
log-sum-exp). A word loses its first place where the difference of two moves, of deviation sqrt(2) d, is larger than its
lead over the second. Where leads near 0 are evenly spread that happens to 0.4 times the tokens whose lead is below
sqrt(2) d; the limit for top-1 allows as many as there are such tokens.

The second limit on the divergence keeps what was learnt: merged and adapter model may differ by a tenth of what the
adapter changed at all. Rounding moves every weight a little at random, a young adapter moves few; where rounding is the
larger, the merged model would not be the trained one, however small the figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import NumericsError
from qlora_hal.export.reference import Closeness, Spread
from qlora_hal.export.rounding import UNIT_ROUNDOFF

AMPLIFICATION = 2.0
SHARE_OF_EFFECT = 0.1
LEAD_DEVIATIONS = 2**0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_kl` in nats per token, `min_top1` a share, and in words where each comes from."""

    max_kl: float
    min_top1: float
    kl_reason: str
    top1_reason: str

    def held_by(self, closeness: Closeness) -> bool:
        # Written so that NaN does not hold.
        return closeness.kl_mean <= self.max_kl and closeness.top1 >= self.min_top1

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def derived_limits(
    *,
    spread: Spread,
    effect: Closeness,
    linear_modules: Mapping[str, LinearShape],
    dtype: str,
    compute_dtype: str,
    max_kl: float | None = None,
    min_top1: float | None = None,
) -> Limits:
    """The limits for a merge into `dtype` compared in `compute_dtype`; `max_kl` and `min_top1` replace them.

    `effect` is how far the base alone is from the adapter model.
    """
    u_w, u_c = UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF[compute_dtype]
    terms = max(shape.inputs for shape in linear_modules.values()) * UNIT_ROUNDOFF["float32"] ** 2
    error = (len(linear_modules) * (u_w**2 + 2 * u_c**2 + 2 * terms) / 3) ** 0.5
    move = AMPLIFICATION * error * spread.deviation
    by_rounding = move**2 / 2
    kl, kl_reason = (
        by_rounding,
        f"rounding to {dtype}, computing in {compute_dtype}, {len(linear_modules)} linear layers",
    )
    if 0 < effect.kl_mean * SHARE_OF_EFFECT < by_rounding:
        kl = effect.kl_mean * SHARE_OF_EFFECT
        kl_reason = (
            f"a tenth of what the adapter changes ({effect.kl_mean:.3g}); rounding alone would allow {by_rounding:.3g}"
        )
    close = float(np.mean(spread.margins < LEAD_DEVIATIONS * move))
    top1, top1_reason = 1.0 - close, f"{close:.2%} of the tokens have a first word that rounding could change"
    if max_kl is not None:
        kl, kl_reason = max_kl, "given"
    if min_top1 is not None:
        top1, top1_reason = min_top1, "given"
    return Limits(kl, top1, kl_reason, top1_reason)


def require_close(closeness: Closeness, limits: Limits, *, base: str, dtype: str, trained_on_original: bool) -> None:
    """Raises NumericsError QH-C21 when the merged model is farther from the adapter model than the limits allow."""
    if limits.held_by(closeness):
        return
    other_base = base == "original" and not trained_on_original
    wider = "float32" if dtype == "float16" else "float32 or float16"
    if other_base:
        fix = "Merge into the base that was trained on (--base dequantized), or set the limit yourself: --max-kl."
    elif dtype != "float32":
        fix = f"Merge into {wider}, keep the adapter separate, or set the limit yourself: --max-kl, --min-top1."
    else:
        fix = "Keep the adapter separate, or set the limit yourself: --max-kl, --min-top1."
    raise NumericsError(
        "QH-C21",
        f"The merged model is not the adapter model: KL {closeness.kl_mean:.3g} nats per token (at most "
        f"{limits.max_kl:.3g}: {limits.kl_reason}), top-1 agreement {closeness.top1:.2%} (at least "
        f"{limits.min_top1:.2%}). Nothing was written.",
        cause="The adapter was trained on the quantized base, and corrects for its errors, which the original "
        "does not have."
        if other_base
        else f"Rounding the merged weights to {dtype} changes them too much for what the adapter adds.",
        fix=fix,
        context={"comparison": closeness.as_json(), "limits": limits.as_json(), "base": base, "dtype": dtype},
    )
