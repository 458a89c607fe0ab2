"""A red run says what is wrong, what is still right, and which known mutant looks like it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conformance.conftest import suite

from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.facts import Fact, measured
from qlora_hal_conformance.localisation import (
    Localisation,
    fingerprints,
    likely_mutants,
    most_telling_first,
    plain_name,
)
from qlora_hal_conformance.mutants.__main__ import main as mutants
from qlora_hal_conformance.mutants.fingerprints import missing, with_entry
from qlora_hal_conformance.mutants.population import BY_NAME
from qlora_hal_conformance.verdicts import CaseResult, Verdict

MUTANT = "--spec qlora_hal_conformance.mutants.specs:{}".format
BOOK = {
    "judged": ["30_forward/logits", "31_gradients/long", "40_step/first_step[decayed]", "40_step/first_step[plain]"],
    "mutants": {
        "scale_lost": {"defect": "Loses the scale.", "red": ["30_forward/logits", "31_gradients/long"]},
        "decay_lost": {"defect": "Loses the decay.", "red": ["40_step/first_step[decayed]"]},
        "ends_early": {"defect": "Ends early.", "red": ["31_gradients/long"]},
    },
}


def of(verdicts: dict[str, Verdict]) -> list[CaseResult]:
    return [CaseResult(case, verdict) for case, verdict in verdicts.items()]


def result_of(red: list[str]) -> list[CaseResult]:
    judged = [str(case) for case in BOOK["judged"]]
    return of({case: Verdict.FAILED if case in red else Verdict.PASSED for case in judged})


# measured facts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1.0, "the part: right"),
        (2.0, "the part: 2 times what it should be, as if alpha were doubled"),
        (0.7, "the part: 0.7 times what it should be"),
        (0.0, "the part: missing"),
    ],
)
def test_factor_is_told_with_its_reason(factor: float, words: str) -> None:
    expected = np.random.default_rng(1).normal(size=(7, 5))
    noise = 1e-6 * np.random.default_rng(2).normal(size=(7, 5))
    fact = measured("the part", [factor * expected + noise], [expected], "float32", {"alpha were doubled": 2.0})
    assert fact.in_words() == words
    assert Fact.from_json(json.loads(json.dumps(fact.as_json()))) == fact


def test_what_no_factor_explains_is_told_as_such() -> None:
    expected = np.random.default_rng(1).normal(size=50)
    fact = measured("the part", [np.roll(expected, 1)], [expected], "float32")
    assert "wrong, by no common factor" in fact.in_words()
    assert not measured("the part", [np.full(3, np.nan)], [np.ones(3)], "float32").is_right


def test_rounding_of_the_dtype_is_right() -> None:
    expected = np.random.default_rng(1).normal(size=500)
    rounded = expected * (1.0 + 2.0**-8 * np.random.default_rng(2).uniform(-1, 1, 500))
    assert measured("", [rounded], [expected], "bfloat16").is_right
    assert not measured("", [rounded], [expected], "float32").is_right


# likely mutants -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("red", "first"),
    [
        (["30_forward/logits", "31_gradients/long"], "scale_lost"),
        (["40_step/first_step[decayed]"], "decay_lost"),
        (["31_gradients/long"], "ends_early"),
    ],
)
def test_mutant_with_the_same_red_cases_comes_first(red: list[str], first: str) -> None:
    likely = likely_mutants(result_of(red), BOOK)
    assert likely[0].mutant == first
    assert likely[0].alike == 1.0


def test_red_cases_of_no_mutant_look_like_none() -> None:
    assert likely_mutants(result_of(["40_step/first_step[plain]"]), BOOK) == ()
    assert likely_mutants(result_of([]), {}) == ()


def test_cases_that_one_of_both_was_not_put_to_do_not_count() -> None:
    """A run of one section is compared over that section."""
    results = [r for r in result_of(["31_gradients/long"]) if r.case.startswith("31")]
    assert {each.mutant for each in likely_mutants(results, BOOK)} == {"ends_early", "scale_lost"}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("30_forward/logits_equal_the_oracle[nf4-float32]", "30_forward/logits_equal_the_oracle"),
        ("40_step/first_step[decayed]", "40_step/first_step[decayed]"),
        ("20_quantization/stored[nf4-64-double]", "20_quantization/stored"),
        ("44_young_update/four_small_steps", "44_young_update/four_small_steps"),
    ],
)
def test_name_of_a_case_is_told_without_formats_and_dtypes(case: str, name: str) -> None:
    assert plain_name(case) == name


def test_case_that_few_mutants_turn_red_comes_first() -> None:
    """One that no mutant turns red is of no help, and comes last."""
    red = ["40_step/first_step[plain]", "31_gradients/long", "30_forward/logits"]
    ordered = most_telling_first(of(dict.fromkeys(red, Verdict.FAILED)), BOOK)
    assert [result.case for result in ordered] == red[::-1]


def test_book_is_of_mutants_that_there_are() -> None:
    entries = fingerprints()["mutants"]
    assert isinstance(entries, dict)
    assert entries.keys() <= BY_NAME.keys()
    assert {name: entry["defect"] for name, entry in entries.items()} == {
        name: BY_NAME[name].defect for name in entries
    }


def test_book_takes_a_mutant_and_keeps_the_others() -> None:
    taken, other = BY_NAME["decay_ignored"], BY_NAME["clip_per_tensor"]
    book = with_entry(BOOK, taken, {"40_step/first_step[decayed]"}, {"40_step/first_step[decayed]", "40_step/new"})
    assert book["mutants"] == {
        **BOOK["mutants"],  # type: ignore[dict-item]
        taken.name: {"defect": taken.defect, "suite": SUITE_VERSION, "red": ["40_step/first_step[decayed]"]},
    }
    assert book["judged"] == sorted([*BOOK["judged"], "40_step/new"])
    assert missing([taken, other], book) == [other]
    without = with_entry(book, taken, set(), set())
    assert without["mutants"] == BOOK["mutants"], "what turns nothing red looks like nothing"
    assert missing([taken, other], without) == [other], "it was tried all the same"


def test_entry_of_an_earlier_revision_is_missing() -> None:
    """Its cases are others. Those that the book's own sections must catch come first."""
    storage, decay = BY_NAME["nibble_order_swapped"], BY_NAME["decay_ignored"]
    book = with_entry(with_entry({}, storage, set(), set()), decay, {"40_step/first_step[decayed]"}, set())
    book["mutants"][decay.name]["suite"] = book["nothing_red"][storage.name] = "4"  # type: ignore[index]
    assert missing([storage, decay], book) == [decay, storage]


def test_missing_without_fingerprints_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mutants(["--missing"])
    assert "--missing is about --fingerprints" in capsys.readouterr().err


def test_what_is_wrong_comes_before_what_is_right() -> None:
    right, wrong = Fact("the base", 1.0, 0.0, 0.0, 1e-3), Fact("the adapter", 2.0, 0.0, 1.0, 1e-3)
    lines = Localisation((wrong, right), (), ()).lines()
    assert lines == ["wrong: the adapter: 2 times what it should be", "still right: the base"]


# whole ----------------------------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.parametrize(
    ("mutant", "keyword", "wrong", "right"),
    [
        ("alpha_over_r_dropped", "scale_of_the_adapter", "as if alpha / r were left out", "the base's logits"),
        ("alpha_used_as_scale", "scale_of_the_adapter", "as if alpha were not divided by r", "the base's logits"),
        ("target_module_missed", "each_window_has", "the adapter's part of the logits, up_proj alone: missing", "base"),
        ("samples_see_each_other", "packed_samples", "logits of packed samples: wrong", "the base's logits;"),
        ("decay_ignored", "first_step", "the way of a step that decays", "the way of a plain step"),
        ("never_clips", "first_step", "the way of a step that clips", "the way of a step that decays"),
    ],
)
def test_mutant_is_located(mutant: str, keyword: str, wrong: str, right: str, tmp_path: Path) -> None:
    ended = suite(*MUTANT(mutant).split(), "-k", keyword, "--seed", "3", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 20
    said = [line for line in ended.stderr.splitlines() if line.startswith(("wrong:", "still right:"))]
    assert any(wrong in line for line in said if line.startswith("wrong:")), said
    assert any(right in line for line in said if line.startswith("still right:")), said
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["localisation"]["lines"][: len(said)] == said
    assert wrong.split(":")[0] in (tmp_path / "out" / "matrix.md").read_text()


def test_crash_needs_no_search(tmp_path: Path) -> None:
    """What the case says is where it is; the backend is not opened again."""
    ended = suite("--spec", "odd_backends:EXITS", "-k", "evaluation_gives", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 20
    assert "localisation" not in json.loads((tmp_path / "out" / "results.json").read_text())
