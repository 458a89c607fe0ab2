"""How many held-out answers of the demo are exactly right, before and after tuning, for each kind of question.

Greedy answers to the 712 test rows, letter for letter; a row of two turns is asked its second question, with the first
one answered as the row has it. With several runs, the record lists the questions that every one of them answers right:
of these the demo's sample prompts are chosen. The base is the same in all of them and is asked once.

    python demo/score_answers.py --run runs/demo
    python demo/score_answers.py --run runs/a --run runs/b --out docs/runs/demo_answers.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import qlora_hal
from qlora_hal import LoadedModel
from qlora_hal.config.demo import demo_settings
from qlora_hal.demo import data_path
from qlora_hal.report.run_file import read_run_file

SPARE_TOKENS = 2
"""Beyond the right answer: an answer that is longer is a wrong one."""


@dataclass(frozen=True)
class HeldOutRow:
    """One test row: what is asked, and what is right."""

    kind: str
    asked: tuple[dict[str, str], ...]
    right: str

    @property
    def is_plain_question(self) -> bool:
        """Whether a sample prompt can ask it: one turn, and no system message."""
        return len(self.asked) == 1


@dataclass(frozen=True)
class Score:
    """Which rows are answered right after a run, by their number."""

    seed: int
    steps: int
    right: frozenset[int]


def held_out_rows() -> list[HeldOutRow]:
    """The test rows with their kinds, which stand beside them in the same order."""
    splits = map(json.loads, data_path("test").with_name("provenance.jsonl").read_text(encoding="utf-8").splitlines())
    kinds = next([kind for kind, _, _ in split["rows"]] for split in splits if split["split"] == "test")
    lines = data_path("test").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    return [HeldOutRow(kind, tuple(turns[:-1]), turns[-1]["content"]) for kind, turns in zip(kinds, rows, strict=True)]


def scored(run: Path, rows: Sequence[HeldOutRow]) -> Score:
    """Ask the trained model every question."""
    record = read_run_file(run)
    resolved, steps = record["resolved"], record["steps"]
    assert isinstance(resolved, dict)
    assert isinstance(steps, int)
    return Score(resolved["seed"], steps, rows_right(run, rows, adapter=True))


def rows_right(run: Path, rows: Sequence[HeldOutRow], *, adapter: bool) -> frozenset[int]:
    """The rows that a run's model, or its base as it was stored in training, answers right."""
    with qlora_hal.load(run) as model:
        right = []
        for number, row in enumerate(rows):
            if is_right(model, row, adapter=adapter):
                right.append(number)
            if not number % 50:
                print(f"{run}: {number} of {len(rows)} asked", file=sys.stderr)
    return frozenset(right)


def is_right(model: LoadedModel, row: HeldOutRow, *, adapter: bool) -> bool:
    """Whether the greedy answer is the row's, but for space at its ends."""
    most = len(model.tokenizer.encode(row.right)) + SPARE_TOKENS
    return model.generate(row.asked, max_new_tokens=most, adapter=adapter) == row.right.strip()


def record_of(before: frozenset[int], scores: Sequence[Score], rows: Sequence[HeldOutRow]) -> dict[str, object]:
    """What docs/runs/demo_answers.json holds; lists are by run."""
    always = sorted(frozenset.intersection(*(score.right for score in scores)))
    return {
        "rows": len(rows),
        "seeds": [score.seed for score in scores],
        "steps": [score.steps for score in scores],
        "before": len(before),
        "after": [len(score.right) for score in scores],
        "kinds": {
            kind: {
                "rows": len(numbers),
                "before": len(numbers & before),
                "after": [len(numbers & score.right) for score in scores],
            }
            for kind, numbers in rows_by_kind(rows).items()
        },
        "sample_prompts": [
            number
            for prompt in demo_settings()["training.sample_prompts"]  # type: ignore[attr-defined]
            for number, row in enumerate(rows)
            if row.is_plain_question and row.asked[0]["content"] == prompt
        ],
        "right_after_every_run": [
            {"row": number, "kind": rows[number].kind, "asked": rows[number].asked[0]["content"]}
            for number in always
            if rows[number].is_plain_question
        ],
    }


def as_text(before: frozenset[int], scores: Sequence[Score], rows: Sequence[HeldOutRow]) -> str:
    """A table: the share of answers that are right before, and after each run."""
    titles = [f"seed {score.seed}" for score in scores]
    lines = [f"{'kind':<15}{'rows':>5}{'before':>9}" + "".join(f"{title:>9}" for title in titles)]
    for kind, numbers in {**rows_by_kind(rows), "all": frozenset(range(len(rows)))}.items():
        shares = [len(numbers & right) / len(numbers) for right in (before, *(score.right for score in scores))]
        lines.append(f"{kind:<15}{len(numbers):>5}" + "".join(f"{share:>9.1%}" for share in shares))
    return "\n".join(lines)


def rows_by_kind(rows: Sequence[HeldOutRow]) -> dict[str, frozenset[int]]:
    """The numbers of the rows of each kind, the most frequent kind first."""
    kinds = Counter(row.kind for row in rows).most_common()
    return {kind: frozenset(number for number, row in enumerate(rows) if row.kind == kind) for kind, _ in kinds}


def main() -> None:
    """Score the runs, print the table, write the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, action="append", required=True, help="a finished run of the demo")
    parser.add_argument("--out", type=Path, help="write the record here")
    arguments = parser.parse_args()
    rows = held_out_rows()
    before = rows_right(arguments.run[0], rows, adapter=False)
    scores = [scored(run, rows) for run in arguments.run]
    print(as_text(before, scores, rows))
    if arguments.out is not None:
        text = json.dumps(record_of(before, scores, rows), indent=1, ensure_ascii=False)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
