"""Base, adapter, loss, gradient, step: each looked at by itself, and the adapter one kind of module at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest

from qlora_hal.contract.values import Adapter, Float32
from qlora_hal.formats.catalogue import record_of
from qlora_hal_conformance.dropout_oracle import DropoutOracle
from qlora_hal_conformance.facts import Fact, measured
from qlora_hal_conformance.fixtures import Opened, Opener, oracle_step, placed
from qlora_hal_conformance.journal import Journal
from qlora_hal_conformance.parameters import OracleOf
from qlora_hal_conformance.random_inputs import (
    at_real_tokens,
    draw_adapter,
    draw_batch,
    draw_window,
    packed,
    total_tokens,
    with_zero,
)
from qlora_hal_conformance.request import Request
from qlora_hal_oracle.arrays import AnyFloat
from qlora_hal_oracle.random_models import linear_shapes

RANK, DROP, RATE, DECAY = 8, 0.3, 1e-2, 2.0
LOOSE = 4.0
"""The first step of AdamW is a sign, undecided for the smallest gradients."""
Note = Callable[..., None]


@pytest.fixture
def note(run_request: Request, opened: Opener) -> Note:
    """Writes a fact down: `note(what, found, expected)`."""
    journal = Journal(run_request.journal_path)

    def write(
        what: str,
        found: Iterable[AnyFloat],
        expected: Iterable[AnyFloat],
        causes: Mapping[str, float] | None = None,
        *,
        looseness: float = 1.0,
        rounded: AnyFloat | None = None,
    ) -> None:
        dtype = opened.subject.main_dtype
        fact: Fact = measured(what, found, expected, dtype, causes, looseness=looseness, rounded=rounded)
        journal.write("fact", **fact.as_json())

    return write


@pytest.fixture
def adapter(opened: Opener, seeded: np.random.Generator) -> Adapter:
    shape, _ = opened.models.drawn("main")
    return draw_adapter(seeded, shape, rank=RANK)


def test_weights(opened: Opener, note: Note) -> None:
    ready = opened()
    codec, size = record_of(ready.quantization.weight_format).codec, ready.quantization.block_size
    kinds: dict[str, list[tuple[AnyFloat, AnyFloat]]] = {}
    for module, found in ((m, ready.trainer.dequantized_weight(m)) for m in ready.trainer.linear_modules()):
        if ready.model.stored is not None:
            expected = ready.model.stored[module]
        else:
            packed_weight = codec.quantize(
                ready.model.tensors[f"{module}.weight"], size, ready.quantization.double_quant
            )
            expected = codec.dequantize(packed_weight)
        kinds.setdefault(_kind(module), []).append((found, expected))
    for kind, pairs in kinds.items():
        note(f"stored weights of {kind}", *zip(*pairs, strict=True))


def test_base(opened: Opener, oracle: OracleOf, adapter: Adapter, seeded: np.random.Generator, note: Note) -> None:
    ready = opened(adapter=with_zero(adapter, "B"))
    batch = draw_batch(seeded, ready.model.shape)
    reference = oracle(ready)
    found, expected = (at_real_tokens(each.logits(batch), batch) for each in (ready.trainer, reference))
    note("the base's logits", [found], [expected])
    losses = ready.trainer.evaluate([batch]).loss_sum, reference.evaluate([batch])[0]
    note("the base's loss", [np.array([losses[0]])], [np.array([losses[1]])])
    together = packed([draw_batch(seeded, ready.model.shape, lengths=(11, 7, 9))])
    found, expected = (at_real_tokens(each.logits(together), together) for each in (ready.trainer, reference))
    note("the base's logits of packed samples", [found], [expected])


def test_adapter(opened: Opener, oracle: OracleOf, adapter: Adapter, seeded: np.random.Generator, note: Note) -> None:
    ready = opened(adapter=with_zero(adapter, "B"))
    batch, causes = draw_batch(seeded, ready.model.shape), _causes_of_scale(adapter)
    kinds = sorted({_kind(module) for module in linear_shapes(ready.model.shape)})
    bare, exact = at_real_tokens(ready.trainer.logits(batch), batch), at_real_tokens(oracle(ready).logits(batch), batch)
    for kind in (*kinds, ""):
        # So small that its part of the logits grows with it in proportion, and a factor shows as a factor.
        alone = _small(_only(adapter, kind), bare, ready)
        ready.attach(alone)
        found = at_real_tokens(ready.trainer.logits(batch), batch).astype(np.float64) - bare
        expected = at_real_tokens(oracle(ready).logits(batch), batch) - exact
        note(
            f"the adapter's part of the logits{f', {kind} alone' if kind else ''}",
            [found],
            [expected],
            causes,
            rounded=exact,
        )


def test_gradients(opened: Opener, oracle: OracleOf, adapter: Adapter, seeded: np.random.Generator, note: Note) -> None:
    ready, window = opened(adapter=adapter), draw_window(seeded, opened.models.drawn("main")[0])
    expected = oracle(ready).gradients(window)
    causes = {
        "the sum were not divided by the counted tokens": float(total_tokens(window)),
        "each half of the window counted by itself": float(len(window)),
        **_causes_of_scale(adapter),
    }
    for where, found in (
        ("", ready.trainer.gradients(window)),
        (" in a training step", ready.trained_gradient(window)),
    ):
        for half in ("lora_A", "lora_B"):
            names = [name for name in expected if half in name]
            note(f"the gradient of {half}{where}", [found[n] for n in names], [expected[n] for n in names], causes)


def test_steps(opened: Opener, adapter: Adapter, seeded: np.random.Generator, note: Note) -> None:
    """A plain step, one that clips, and one that decays."""
    shape, _ = opened.models.drawn("main")
    window = draw_window(seeded, shape)
    clips: dict[str, float | None] = {"a plain step": None, "a step that clips": 0.05, "a step that decays": None}
    for what, clip in clips.items():
        given = {"max_grad_norm": clip, "weight_decay": DECAY if "decays" in what else 0.0}
        ready = opened(adapter=adapter)
        reference = DropoutOracle.at_state_of(ready, 0)
        before = ready.trainer.export_adapter().tensors
        ready.step(window, RATE, **given)
        oracle_step(reference, window, RATE, **given)
        found, expected = ready.trainer.export_adapter().tensors, reference.export_adapter()
        moved = [found[name].astype(np.float64) - before[name] for name in before]
        note(f"the way of {what}", moved, [expected[name] - before[name] for name in before], looseness=LOOSE)


def test_recomputation(opened: Opener, adapter: Adapter, seeded: np.random.Generator, note: Note) -> None:
    window = draw_window(seeded, opened.models.drawn("main")[0])
    _note_trained("with recomputation", opened(adapter=adapter, checkpointing=True), window, note)


def test_packing(opened: Opener, adapter: Adapter, seeded: np.random.Generator, note: Note) -> None:
    shape, _ = opened.models.drawn("main")
    window = [packed([draw_batch(seeded, shape, lengths=(11, 7, 13))], time=36)]
    _note_trained("of packed samples", opened(adapter=adapter), window, note)


def test_dropout(opened: Opener, seeded: np.random.Generator, note: Note) -> None:
    shape, _ = opened.models.drawn("main")
    window = draw_window(seeded, shape)
    _note_trained("with dropout", opened(adapter=draw_adapter(seeded, shape, rank=RANK, dropout=DROP)), window, note)


def _note_trained(what: str, ready: Opened, window: list, note: Note) -> None:  # type: ignore[type-arg]
    found = ready.trained_gradient(window, dropout_key=77)
    expected = DropoutOracle.at_state_of(ready, 77).gradients(placed(window))
    note(f"gradients {what}", [found[name] for name in expected], list(expected.values()))


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def _only(adapter: Adapter, kind: str) -> Adapter:
    """The adapter with B zero everywhere but on one kind of module; all of it for no kind."""
    tensors = {
        name: tensor if "lora_A" in name or f".{kind}.lora_B" in name or not kind else np.zeros_like(tensor)
        for name, tensor in adapter.tensors.items()
    }
    return Adapter(tensors, adapter.config)


def _small(adapter: Adapter, bare: Float32, ready: Opened) -> Adapter:
    """B made smaller: to a 500th in float32; a coarser dtype would not show that, and gets a quarter."""
    share = np.float32(0.002 if ready.dtype == "float32" else 0.25)
    return Adapter({n: t * share if "lora_B" in n else t for n, t in adapter.tensors.items()}, adapter.config)


def _causes_of_scale(adapter: Adapter) -> dict[str, float]:
    config = adapter.config
    return {
        "alpha / r were left out (alpha_over_r_dropped)": 1.0 / config.scale,
        "alpha were not divided by r (alpha_used_as_scale)": float(config.r),
        "alpha were divided by sqrt(r)": config.r**0.5,
        "alpha / r were applied twice": config.scale,
        "its sign were turned": -1.0,
    }
