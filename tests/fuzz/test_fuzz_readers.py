"""20,000 hostile inputs to the readers that take few milliseconds; `benchmarks/fuzz_readers.py` feeds all readers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fuzz_readers import outcomes
from fuzzed_readers import Reader, readers

INPUTS, PARTS = 20_000, 8


@pytest.fixture(scope="module")
def cheap(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    return [reader for reader in readers(tmp_path_factory.mktemp("fuzz"), pickles=False) if reader.cheap]


@pytest.mark.parametrize("part", range(PARTS))
def test_every_hostile_input_is_read_or_refused_by_a_typed_error(cheap: list[Reader], part: int) -> None:
    numbers = range(part * INPUTS // PARTS, (part + 1) * INPUTS // PARTS)
    found = list(outcomes(20_000, numbers, cheap))
    assert len(found) == INPUTS // PARTS
    assert [(outcome.number, outcome.reader, outcome.problem) for outcome in found if outcome.problem] == []
    # What is mutated little is still read, what is mutated much is refused: neither way is closed.
    endings = {outcome.ending for outcome in found}
    assert "read" in endings
    assert len(endings) > 10
