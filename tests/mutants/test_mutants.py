"""The suite catches every wrong backend in one of the sections that name its defect, and no honest one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_hal_conformance.mutants.__main__ import main
from qlora_hal_conformance.mutants.population import BY_NAME, MUTANTS
from qlora_hal_conformance.mutants.run_mutants import Hunt, failures_of_the_honest, hunt
from qlora_hal_conformance.mutants.table import put_section, rows_of_registry, write_table

SEED = 20261121
"""Any would do: the command line draws one afresh in each run; here a failure must come again."""
FEWEST = 44
SAMPLE = {mutant.caught_by[0]: mutant.name for mutant in MUTANTS}.values()
"""One for each section that is the first to catch some: `make test-slow` hunts these, `make test-long` all others."""
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "mutants.md"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.long) for name in BY_NAME]
)
def test_mutant_is_caught_in_a_section_that_names_its_defect(name: str) -> None:
    found = hunt(BY_NAME[name], seed=SEED)
    sections = ", ".join(BY_NAME[name].caught_by)
    assert found.caught_by, f"{name} passed sections {sections}: {BY_NAME[name].defect}"
    assert not found.too_early, f"{name} also failed {found.too_early}, before section {sections}"


@pytest.mark.long
def test_honest_reference_backend_fails_nothing() -> None:
    assert failures_of_the_honest(seed=SEED) == {}


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_honest_backend_of_one_half_precision_dtype_fails_nothing(dtype: str) -> None:
    spec = f"qlora_hal_conformance.reference_backend.narrow:{dtype.upper()}"
    assert failures_of_the_honest(seed=SEED, spec=spec) == {}


def test_there_are_enough_mutants_each_with_a_sentence_and_a_section() -> None:
    assert len(MUTANTS) >= FEWEST
    for mutant in MUTANTS:
        assert mutant.defect.endswith("."), mutant.name
        assert mutant.caught_by == tuple(sorted(mutant.caught_by)), f"{mutant.name}: the earliest section comes first"


@pytest.mark.slow
def test_cheat_that_knows_seed_0_is_caught_by_a_fresh_seed_alone() -> None:
    """What it answers for the inputs it knows is right: only fresh inputs tell."""
    known = hunt(BY_NAME["answers_seed_0_only"], seed=0)
    fresh = hunt(BY_NAME["answers_seed_0_only"], seed=SEED)
    first = "30_forward/logits_equal_the_oracle[none-float32]"
    assert first not in known.caught_by
    assert first in fresh.caught_by


def test_document_lists_every_mutant() -> None:
    listed = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    expected = rows_of_registry(MUTANTS)
    told = "run: python -m qlora_hal_conformance.mutants --out docs/mutants.md"
    assert len(listed) == len(expected), told
    assert all(line.startswith(start) for line, start in zip(listed, expected, strict=True)), told


def test_table_keeps_the_row_of_a_mutant_that_was_not_hunted(tmp_path: Path) -> None:
    first, second = MUTANTS[:2]
    path = tmp_path / "mutants.md"
    write_table(path, MUTANTS, {m.name: Hunt(m.name, ("10_detection/a",), (), "wrong", 1.0) for m in (first, second)})
    put_section(path, "Others", "A text.")
    write_table(path, MUTANTS, {second.name: Hunt(second.name, ("11_contract/b",), (), "wrong", 1.0)})
    listed = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert [line.split("|")[-2].strip() for line in listed] == ["`10_detection/a`", "`11_contract/b`"]
    assert path.read_text().endswith("## Others\n\nA text.\n")


def test_unknown_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "no_such_mutant"]) == 2
    assert "no_such_mutant" in capsys.readouterr().err
