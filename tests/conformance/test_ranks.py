"""Several ranks of a backend, as the suite starts them and hears them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conformance.conftest import verdicts

from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.errors import BackendError, ConfigError
from qlora_hal.processes.child_errors import told_of
from qlora_hal_conformance.asked_of_ranks import EVERY_BYTE, LENGTHS, SIZES, Inputs, every_byte
from qlora_hal_conformance.catalogue import all_cases, number_of
from qlora_hal_conformance.conformance_run import Outcome
from qlora_hal_conformance.fixtures import Models, make_oracle
from qlora_hal_conformance.reference_backend import SPEC
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.subject import Devices, Reference, Subject
from qlora_hal_conformance.tolerances import U32, over_ranks
from qlora_hal_conformance.verdicts import Claim, Phase, Verdict, judge
from qlora_hal_conformance.worlds import Worlds, devices_of_ranks, read_world
from qlora_hal_oracle import FourBitFormat, OracleTrainer, quantize_four_bit
from qlora_hal_oracle.random_models import SHAPES, draw_tensors, linear_shapes

NO_DEVICE = ConfigError("QH-R01", "Rank 1 has no device.", fix="Ask for 1 device.")
SHAPE = SHAPES[0]


def inputs(size: int) -> Inputs:
    return Inputs(7, SHAPE, size)


def rows(size: int) -> dict[int, bytes]:
    """The tokens of each row by its place in the window."""
    window = inputs(size).window("first").window
    return {
        int(place): batch.input_ids[at].tobytes()
        for batch in window
        for at, place in enumerate(batch.rows if batch.rows is not None else [])
    }


# verdicts -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("devices", "claim"), [(0, Claim.DECLARED), (1, Claim.NARROWED), (2, Claim.DECLARED)])
def test_two_ranks_ask_for_two_devices_where_devices_are_counted(devices: int, claim: Claim) -> None:
    subject = Subject(Reference(), SPEC, devices=devices)
    assert subject.claim((Feature.DATA_PARALLEL, Devices(2))) is claim


@pytest.mark.parametrize(
    ("shown", "devices"),
    [
        ({}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"HIP_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 3),
    ],
)
def test_devices_are_those_of_the_probe_that_are_not_hidden(shown: dict[str, str], devices: int) -> None:
    report = replace(SPEC.probe(), devices=("a", "b", "c"))
    assert devices_of_ranks(replace(SPEC, uses_accelerator=True), report, shown) == devices
    assert devices_of_ranks(SPEC, report, shown) == 0, "ranks share a CPU"
    assert devices_of_ranks(SPEC, replace(report, uses_accelerator=True), shown) == devices


@pytest.mark.parametrize(
    ("error", "claim", "verdict"),
    [
        (NO_DEVICE, Claim.NARROWED, Verdict.REFUSED),
        (NO_DEVICE, Claim.DECLARED, Verdict.FAILED),
        (NO_DEVICE, Claim.UNDECLARED, Verdict.FAILED),
        (ConfigError("QH-R04", "Not met.", fix="Meet."), Claim.NARROWED, Verdict.FAILED),
        (ConfigError("QH-R01", "No device.", fix=""), Claim.NARROWED, Verdict.FAILED),
    ],
)
def test_missing_device_is_a_refusal_where_the_probe_finds_too_few(
    error: ConfigError, claim: Claim, verdict: Verdict
) -> None:
    assert judge([Phase("setup"), Phase("call", error), Phase("teardown")], claim).verdict is verdict


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_cases_of_ranks_are_in_one_lane(lanes: int) -> None:
    shares = [Request(Reference(), 0, "", lane=lane, lanes=lanes).share(all_cases()) for lane in range(lanes)]
    assert [any(number_of(case) == "85" for case in share) for share in shares].count(True) == 1


# inputs ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
def test_every_row_of_the_window_is_on_one_rank_and_the_ranks_differ(size: int) -> None:
    dealt = inputs(size).window("first")
    places = Counter(int(place) for batch in dealt.window for place in (batch.rows if batch.rows is not None else []))
    assert places == Counter(range(len(LENGTHS)))
    assert len({len(share) for share in dealt.shares}) > 1
    tokens = [sum(batch.counted_tokens for batch in share) for share in dealt.shares]
    assert len(set(tokens)) == size, "equal numbers of tokens hide a mean of means"
    own = [[int(p) for batch in share for p in batch.rows] for share in dealt.shares]  # type: ignore[union-attr]
    assert own[1] != list(range(len(own[1]))), "a rank's own places are not those of the window"


def test_rows_are_the_same_whatever_the_number_of_ranks() -> None:
    assert rows(2) == rows(3)


def test_only_one_rank_has_weights_row_or_tokens() -> None:
    given = inputs(3)
    assert [[b.weights is not None for b in share] for share in given.weighted(2).shares[:2]] == [
        [False] * len(share) for share in given.weighted(2).shares[:2]
    ]
    assert [len(share) for share in given.with_row_for_one(2).shares] == [0, 0, 1]
    assert [any(b.counted_tokens for b in share) for share in given.with_tokens_for_one(0).shares] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("size", SIZES)
def test_votes_hold_integers_that_float32_does_not(size: int) -> None:
    votes = sum(inputs(size).votes(rank) for rank in range(size))
    whole = votes[12:25]
    assert (whole == whole.astype(np.int64)).all()
    assert not (whole.astype(np.float32) == whole).all()


@pytest.mark.parametrize("kind", [FourBitFormat.NF4, FourBitFormat.FP4])
def test_packed_bytes_of_the_model_of_every_byte_take_all_values_that_are_written(kind: FourBitFormat) -> None:
    tensors = every_byte(SHAPE, draw_tensors(SHAPE, np.random.default_rng(3)), WeightFormat(kind.value))
    for module in linear_shapes(SHAPE):
        packed = quantize_four_bit(tensors[f"{module}.weight"], weight_format=kind, block_size=64).packed
        written = [byte for byte in range(256) if kind is not FourBitFormat.FP4 or 8 not in (byte // 16, byte % 16)]
        found = packed.reshape(-1)
        assert set(found.tolist()) == set(written), module
        assert found[written].tolist() == written, "beside each other"
        # Read as bfloat16 from either end, some are no numbers, with the bit that says so quietly not set.
        words = found.view("<u2").astype(int)
        assert {word for word in words if word & 0x7F80 == 0x7F80 and word & 0x7F and not word & 0x40}, module


# bounds ---------------------------------------------------------------------------------------------------------------
def test_bound_of_a_sum_over_ranks_is_that_of_its_additions() -> None:
    """Two addends: one rounding, of what their magnitudes add up to. The sum of float32 parts keeps it."""
    given, base = inputs(2), draw_tensors(SHAPE, np.random.default_rng(3))
    adapter = given.adapter()
    oracle: OracleTrainer = make_oracle(SHAPE, base, adapter)
    window = given.window("first").window
    bounds, tokens = over_ranks(oracle, window, 2), given.window("first").tokens
    parts = [oracle.window_gradients([batch], denominator=tokens).gradients for batch in window]
    for name, bound in bounds.items():
        magnitude = np.sum([np.abs(part[name]) for part in parts], axis=0)
        assert float(bound.value) == pytest.approx(U32 * magnitude.max())
        whole = np.sum([part[name] for part in parts], axis=0)
        halves = [np.sum([p[name] for p in half], axis=0).astype(np.float32) for half in (parts[:4], parts[4:])]
        exact = halves[0].astype(np.float64) + halves[1].astype(np.float64)
        assert np.abs((halves[0] + halves[1]).astype(np.float64) - exact).max() <= float(bound.value)
        assert np.abs(exact - whole).max() <= 2 * float(bound.value)


# what the ranks say ---------------------------------------------------------------------------------------------------
def leave(folder: Path, rank: int, **record: object) -> None:
    (folder / f"rank-{rank}.json").write_text(json.dumps({"facts": {}, **record}))
    np.savez(folder / f"rank-{rank}.npz")


def test_cause_is_told_and_not_what_followed_from_it(tmp_path: Path) -> None:
    leave(tmp_path, 0, error=told_of(BackendError("QH-R02", "Rank 1 is gone.", fix="See there.")))
    leave(tmp_path, 1, error=told_of(NO_DEVICE))
    with pytest.raises(ConfigError, match="Rank 1 has no device"):
        read_world(tmp_path, inputs(2), "ended").of_each("votes")


def test_rank_that_was_ended_because_another_failed_is_not_the_cause(tmp_path: Path) -> None:
    leave(tmp_path, 1, error=told_of(NO_DEVICE))
    with pytest.raises(ConfigError, match="Rank 1 has no device"):
        read_world(tmp_path, inputs(2), "the ranks ended with status none, 1").of_each("votes")


def test_rank_that_left_nothing_comes_before_those_that_missed_it(tmp_path: Path) -> None:
    leave(tmp_path, 0, error=told_of(BackendError("QH-R04", "Not met.", fix="Meet.")))
    with pytest.raises(AssertionError, match="rank 1 of 2 left no answer"):
        read_world(tmp_path, inputs(2), "ended").of_each("votes")


def test_rank_that_left_nothing_is_told_with_how_it_ended(tmp_path: Path) -> None:
    leave(tmp_path, 0)
    with pytest.raises(AssertionError, match="rank 1 of 2 left no answer: the ranks ended with status 0, -9"):
        read_world(tmp_path, inputs(2), "the ranks ended with status 0, -9").of_each("votes")


def test_defect_of_one_rank_is_that_of_the_case(tmp_path: Path) -> None:
    leave(tmp_path, 0, defect={"summary": "KeyError: 'x'", "trace": "..."})
    leave(tmp_path, 1)
    with pytest.raises(RuntimeError, match="rank 0 of 2: KeyError"):
        read_world(tmp_path, inputs(2), "ended").of_each("votes")


def test_answers_come_back_by_question_kind_and_name(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps({"facts": {"votes": {"n": rank}}}))
        np.savez(tmp_path / f"rank-{rank}.npz", **{"votes|sums|own": np.full(3, rank)})
    world = read_world(tmp_path, inputs(2), "ended")
    assert world.failure is None
    assert [answer.facts["n"] for answer in world.of_each("votes")] == [0, 1]
    assert [answer.arrays["sums"]["own"].tolist() for answer in world.of_each("votes")] == [[0] * 3, [1] * 3]


def test_models_of_a_spread_base_are_the_declared_formats_and_every_byte(tmp_path: Path) -> None:
    subject = Subject(Reference(), SPEC, proved_dtypes=("float32",))
    bases = Worlds(subject, Models(tmp_path, 5), tmp_path).spread_bases()
    told = [(base["name"], *base["format"]) for base in bases]  # type: ignore[misc]
    assert (EVERY_BYTE, "nf4", 64, False) in told
    assert {("main", "nf4", 64, True), ("main", "fp4", 64, True)} <= set(told)
    assert {entry[1] for entry in told} == {f.value for f in SPEC.capabilities.weight_formats}


# whole ----------------------------------------------------------------------------------------------------------------
ONE_CASE = "equal_shares_have_the_gradient_of_one and float32"


def of(outcome: Outcome) -> Mapping[str, Verdict]:
    found = verdicts(outcome)
    return {case: found[case] for case in found if number_of(case) == "85"}


@pytest.mark.long
def test_machine_of_one_card_refuses_two_ranks_and_that_is_green(judged: Callable[..., Outcome]) -> None:
    assert set(of(judged("ONE_DEVICE", keyword=ONE_CASE)).values()) == {Verdict.REFUSED}


@pytest.mark.long
def test_machine_of_two_cards_may_not_refuse_two_ranks(judged: Callable[..., Outcome]) -> None:
    outcome = judged("NO_DEVICE_OF_TWO", keyword=ONE_CASE)
    assert set(of(outcome).values()) == {Verdict.FAILED}
    assert "Rank 1 has no device" in outcome.count.results[0].message


@pytest.mark.long
def test_rank_that_dies_fails_the_case_and_ends_the_others(judged: Callable[..., Outcome]) -> None:
    outcome = judged("DIES_AS_SECOND_RANK", keyword=ONE_CASE)
    [result] = [result for result in outcome.count.results if number_of(result.case) == "85"]
    assert result.verdict is Verdict.FAILED
    assert "rank 1 of 2 left no answer" in result.message
    assert ", 7" in result.message


@pytest.mark.long
def test_launcher_of_the_backend_starts_the_ranks(judged: Callable[..., Outcome]) -> None:
    assert set(of(judged("WITH_LAUNCHER", keyword=ONE_CASE)).values()) == {Verdict.PASSED}
