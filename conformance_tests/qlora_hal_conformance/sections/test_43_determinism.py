"""L2: the same start gives the same run; dropout is a function of its key."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, pairwise

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import IGNORE_LABEL, Batch, Float32
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients
from qlora_hal_conformance.fixtures import Opened, Opener, placed
from qlora_hal_conformance.parameters import OracleOf, in_each_dtype
from qlora_hal_conformance.random_inputs import (
    draw_adapter,
    draw_batch,
    draw_window,
    joined,
    rows_of,
    with_field,
    with_zero,
)
from qlora_hal_conformance.tolerances import (
    Bound,
    UpdateSettings,
    agreement_above_chance,
    agreement_of_chance,
    gradient_bounds,
    kept_share,
    update_bounds,
)

RATE = 1e-3
DROP, LOW_DROP = 0.3, 0.05
KEYS = (1, 2, 77, 2**31 + 5, 2**62 + 11, 2**63 - 1)
"""The core's keys have 63 bits."""


@in_each_dtype
def test_same_start_gives_the_same_run(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Bit for bit where that is declared; within twice the rounding bound of a step elsewhere."""
    shape, _ = opened.models.drawn("main")
    adapter, window = draw_adapter(seeded, shape), draw_window(seeded, shape)
    first, second = opened(adapter=adapter), opened(adapter=adapter)
    bounds = _twice(update_bounds(oracle(first), window, first.dtype, UpdateSettings(RATE)).parameters)
    exactly = opened.subject.declares(Feature.BITWISE_DETERMINISM)
    for _ in range(3 if exactly else 1):
        losses = [ready.step(window, RATE, dropout_key=5).loss_sum for ready in (first, second)]
    found, expected = (ready.trainer.export_adapter().tensors for ready in (first, second))
    if exactly:
        judging.equal("adapter", found, expected)
        assert losses[0] == losses[1], f"losses {losses} of the same step"
    else:
        judging.all_within("adapter", found, expected, bounds)


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
def test_same_key_gives_the_same_masks(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """In another trainer, after other steps: nothing but the key decides."""
    shape, _ = opened.models.drawn("main")
    adapter, window = draw_adapter(seeded, shape, dropout=DROP), draw_window(seeded, shape)
    fresh, used = opened(adapter=adapter), opened(adapter=adapter)
    for key in (9, 10):
        used.step(draw_window(seeded, shape), 0.0, dropout_key=key)
    used.trainer.evaluate(window)
    expected, found = (ready.trained_gradient(window, dropout_key=123) for ready in (fresh, used))
    if opened.subject.declares(Feature.BITWISE_DETERMINISM):
        judging.equal("gradients", found, expected)
    else:
        bounds = gradient_bounds(oracle(fresh), window, fresh.dtype)
        judging.all_within("gradients", found, expected, _twice(bounds, 2.0 / (1.0 - DROP) ** 2))


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
def test_other_key_gives_other_masks(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    probe = _MaskProbe(opened, seeded)
    for one, other in pairwise(KEYS):
        judging.at_most(
            "agreement, above chance, of two keys' masks", *_agreement(probe.masks(one), probe.masks(other))
        )


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
def test_layers_and_micro_batches_have_masks_of_their_own(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    probe = _MaskProbe(opened, seeded)
    masks = probe.masks(41)
    of_equal_width = [name for name, mask in masks.items() if mask.size == shape.hidden_size]
    for one, other in pairwise(of_equal_width):
        judging.at_most(
            "agreement, above chance, of two layers' masks", *_agreement({"": masks[one]}, {"": masks[other]})
        )
    judging.at_most(
        "agreement, above chance, of two micro-batches' masks", *_agreement(masks, probe.masks_of_second(41))
    )


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
def test_rows_and_positions_have_masks_of_their_own(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Early and late in a row, and in another row; everywhere a share of 1 - p is kept."""
    probe = _MaskProbe(opened, seeded)
    shape, _ = opened.models.drawn("main")
    rows = draw_batch(seeded, shape, lengths=(14, 14, 14))
    found = [probe.masks_at(place, rows, shape.num_hidden_layers - 1, key=97) for place in ((0, 0), (0, 11), (2, 11))]
    for one, other in combinations(found, 2):
        judging.at_most("agreement, above chance, of two places' masks", *_agreement(one, other))
    for masks in found:
        kept = np.concatenate(list(masks.values()))
        judging.at_most("|share kept - (1 - p)|", abs(float(kept.mean()) - (1.0 - DROP)), kept_share(kept.size, DROP))


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
def test_share_and_scale_of_what_is_kept(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Of the adapter's inputs a share 1 - p is kept, and multiplied by 1 / (1 - p); the others are exactly 0."""
    probe = _MaskProbe(opened, seeded)
    bounds = gradient_bounds(oracle(probe.ready), [probe.batch], probe.ready.dtype)
    kept, drawn = 0, 0
    for key in KEYS:
        found = probe.gradient(key)
        for name, mask in probe.masks_in(found).items():
            kept, drawn = kept + int(mask.sum()), drawn + mask.size
            expected = probe.plain[name] * mask / (1.0 - DROP)
            judging.within(f"gradient of {name}", found[name], expected, bounds[name].times(1 / (1 - DROP) + 1, "kept"))
    assert drawn, "no gradient shows the masks"
    judging.at_most("|share kept - (1 - p)|", abs(kept / drawn - (1.0 - DROP)), kept_share(drawn, DROP))


@pytest.mark.needs(Feature.LORA_DROPOUT)
@pytest.mark.parametrize("rate", [LOW_DROP, DROP], ids=["low_rate", "high_rate"])
@in_each_dtype
def test_masks_are_those_of_the_contract(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge, rate: float
) -> None:
    """The gradient of a window is that of `qlora_hal.contract.dropout`, in every layer and micro-batch, by all of a
    key's bits."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, dropout=rate))
    window = placed([*draw_window(seeded, shape), draw_batch(seeded, shape, lengths=(7, 11))])
    reference = oracle(ready)
    for key in (KEYS[0], KEYS[0] + 2**45):
        masks = [ready.masks(batch, key) for batch in window]
        found = ready.trained_gradient(window, dropout_key=key)
        judge_gradients(found, reference, window, ready, judging, masks=masks)


@pytest.mark.needs(Feature.LORA_DROPOUT)
@pytest.mark.parametrize("cut", [1, 2], ids=["rows_alone", "in_halves"])
@in_each_dtype
def test_a_window_is_the_same_however_it_is_cut(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge, cut: int
) -> None:
    """Four rows in one micro-batch and in more, as when memory ran out, or where a device takes fewer."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, dropout=DROP))
    (whole,) = placed([draw_batch(seeded, shape, lengths=(9, 16, 5, 12))])
    rows = rows_of(whole)
    parts = rows if cut == 1 else [joined(rows[:2]), joined(rows[2:])]
    bounds = _twice(gradient_bounds(oracle(ready), [whole], ready.dtype), 2.0 / (1.0 - DROP) ** 2)
    found, expected = (ready.trained_gradient(window, dropout_key=31) for window in (parts, [whole]))
    judging.all_within("gradients", found, expected, bounds)


@in_each_dtype
def test_dropout_of_zero_needs_no_key(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    judge_gradients(ready.trained_gradient(window, dropout_key=8), oracle(ready), window, ready, judging)


class _MaskProbe:
    """Reads dropout masks off a training step.

    With A = 0 the adapter adds nothing, so no mask changes what later layers see; the gradient of A is v drop(x) with
    v = scale dy B untouched by any mask. In a window whose only counted prediction is made at the first token of a
    row, drop(x) is one vector: column j of the gradient is 0 where input j was dropped.
    """

    def __init__(self, opened: Opener, seeded: np.random.Generator) -> None:
        shape, _ = opened.models.drawn("main")
        self.batch = draw_batch(seeded, shape, lengths=(2,), prompt=1)
        adapter = with_zero(draw_adapter(seeded, shape, dropout=DROP, rank=4), "A")
        self.ready: Opened = opened(adapter=adapter)
        plain = self.ready.trainer.gradients([self.batch])
        self.plain = {name: gradient for name, gradient in plain.items() if _shows_masks(name, gradient)}

    def gradient(self, key: int, window: list[Batch] | None = None) -> dict[str, Float32]:
        return self.ready.trained_gradient(window or [self.batch], dropout_key=key)

    def masks(self, key: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        """Tensor name -> which inputs were kept."""
        return self.masks_in(self.gradient(key))

    def masks_of_second(self, key: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        """The masks of the second of two micro-batches that are the same, found by taking away the first's part."""
        both = self.gradient(key, [self.batch, self.batch])
        first = self.gradient(key)
        return self.masks_in({name: 2.0 * both[name] - first[name] for name in self.plain})

    def masks_at(self, place: tuple[int, int], rows: Batch, last_layer: int, key: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        """The masks of one token, of the modules that see it alone: behind the attention of the last layer."""
        row, position = place
        labels = np.full_like(rows.labels, IGNORE_LABEL)
        labels[row, position + 1] = rows.input_ids[row, position + 1]
        window = [with_field(rows, labels=labels)]
        behind = tuple(f"layers.{last_layer}.{name}" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"))
        plain = {
            name: gradient
            for name, gradient in self.ready.trainer.gradients(window).items()
            if _shows_masks(name, gradient) and any(module in name for module in behind)
        }
        assert plain, "no gradient shows the masks"
        found = self.gradient(key, window)
        return {n: np.abs(found[n]).sum(axis=0) > 0.5 * np.abs(g).sum(axis=0) for n, g in plain.items()}

    def masks_in(self, gradient: Mapping[str, Float32]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        # Half of what a kept column would have tells it from a dropped one with any rounding.
        sizes = {name: np.abs(plain).sum(axis=0) for name, plain in self.plain.items()}
        return {name: np.abs(gradient[name]).sum(axis=0) > 0.5 * size for name, size in sizes.items()}


def _shows_masks(name: str, gradient: Float32) -> bool:
    """Tensors A whose gradient is not zero: with one token there is nothing for queries and keys to choose from."""
    return "lora_A" in name and "q_proj" not in name and "k_proj" not in name and bool(np.abs(gradient).any())


def _agreement(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> tuple[float, Bound]:  # type: ignore[type-arg]
    one, other = (np.concatenate([masks[name] for name in left]) for masks in (left, right))
    above = float((one == other).mean()) - agreement_of_chance(DROP)
    return max(above, 0.0), agreement_above_chance(one.size, DROP)


def _twice(bounds: Mapping[str, Bound], factor: float = 2.0) -> dict[str, Bound]:
    return {name: bound.times(factor, "two results") for name, bound in bounds.items()}
