"""Check that the test data is new to the model: no row, entity, phrase or page of it was trained on.

Always compares the splits with each other. With ``--work`` (the folder the corpus was built in) it also looks for
held-out pages, answers and test text in the pretraining text. Prints what it counted; exits with 1 on a leak.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from build_corpus import manual_names
from near_copies import ANSWER_GRAM, TEXT_GRAM, NearCopies, Phrases

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "qlora_hal" / "demo" / "data"
SPLITS = ("train", "validation", "test")
NEAR_COPY = 0.75

ANSWERS = Phrases()
TEST_TEXT = Phrases()
TEST_LINES: set[str] = set()


@dataclass
class Report:
    """Counts that are printed; those that must be zero decide the exit status."""

    leaks: dict[str, int] = field(default_factory=dict)

    def must_be_zero(self, what: str, count: int) -> None:
        """Print a count, and remember it if it is a leak."""
        print(f"{'ok  ' if count == 0 else 'LEAK'} {what}: {count}")
        if count:
            self.leaks[what] = count


def rows_of(split: str) -> list[list[dict[str, str]]]:
    """The conversations of a split."""
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def texts(rows: list[list[dict[str, str]]], role: str) -> list[str]:
    """All turns of one role."""
    return [turn["content"] for row in rows for turn in row if turn["role"] == role]


def entities() -> dict[str, list[tuple[str, str]]]:
    """For each split, what each row is about: (command or word, its name)."""
    found = {}
    for line in (DATA / "provenance.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        subjects = [("word" if package == "wordnet-base" else "command", name) for _, name, package in record["rows"]]
        found[record["split"]] = subjects
    return found


def compare_splits(report: Report) -> None:
    """Entities, identical texts and near copies across the splits."""
    rows = {split: rows_of(split) for split in SPLITS}
    subjects = entities()
    for split in SPLITS:
        words = sum(len(turn["content"].split()) for row in rows[split] for turn in row)
        print(f"     {split}: {len(rows[split])} rows, {len(set(subjects[split]))} entities, {words} words")
    for first, second in combinations(SPLITS, 2):
        report.must_be_zero(f"entities in {first} and {second}", len(set(subjects[first]) & set(subjects[second])))
        for role in ("user", "assistant"):
            compare_texts(
                texts(rows[first], role), texts(rows[second], role), f"{role} turns of {second}", first, report
            )


def compare_texts(known: list[str], new: list[str], what: str, split: str, report: Report) -> None:
    """Identical and nearly identical texts of two splits."""
    seen = {" ".join(text.lower().split()) for text in known}
    report.must_be_zero(f"{what} that stand in {split}", sum(" ".join(t.lower().split()) in seen for t in new))
    index = NearCopies(known)
    similarities = [index.similarity(text) for text in new]
    above = sum(value >= NEAR_COPY for value in similarities)
    report.must_be_zero(f"{what} with similarity >= {NEAR_COPY} to {split} (highest {max(similarities):.3f})", above)


def letters(line: str) -> str:
    """A line reduced to its words, as the corpus builder compares lines."""
    return " ".join(re.findall(r"[a-z]+", line.lower()))


def line_findings(line: str) -> tuple[int, int, int]:
    """Whether a line of the pretraining text holds an answer's phrase, one of the test text, or is a line of it."""
    return ANSWERS.found_in(line), TEST_TEXT.found_in(line), letters(line) in TEST_LINES


def document_findings(document: dict[str, str]) -> tuple[int, int, int]:
    """The findings of all lines of a document, added up."""
    findings = [line_findings(line) for line in document["text"].split("\n")]
    return sum(f[0] for f in findings), sum(f[1] for f in findings), sum(f[2] for f in findings)


def pretraining_documents(work: Path) -> Iterator[dict[str, str]]:
    """The documents the tokens were made of."""
    with (work / "corpus.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def prepare_phrases(held_out: dict[str, Any]) -> None:
    """Collect what must not be found."""
    searchable = sum(ANSWERS.add(answer, ANSWER_GRAM) for answer in held_out["answers"])
    print(f"     {searchable} of {len(held_out['answers'])} held-out answers are long enough to look for")
    lines = (DATA / "test_text.txt").read_text(encoding="utf-8").split("\n")
    TEST_LINES.update(letters(line) for line in lines if len(letters(line)) >= 40)
    phrases = sum(TEST_TEXT.add(line, TEXT_GRAM) for line in lines)
    print(f"     {phrases} lines of the test text are long enough to look for")


def compare_with_corpus(report: Report, work: Path) -> None:
    """Held-out pages, words, answers and test text in the pretraining text."""
    held_out: dict[str, Any] = json.loads((work / "held_out.json").read_text(encoding="utf-8"))
    commands, words = set(held_out["commands"]), set(held_out["words"])
    prepare_phrases(held_out)
    documents = list(pretraining_documents(work))
    pages = sum(bool(manual_names(d) & commands) for d in documents if d["kind"] == "manual")
    report.must_be_zero(f"manual pages of the {len(commands)} held-out commands", pages)
    glosses = sum(bool(words & set(head_words(d))) for d in documents if d["kind"] == "wordnet")
    report.must_be_zero(f"WordNet entries of the {len(words)} held-out words", glosses)
    with Pool(2) as pool:
        findings = pool.map(document_findings, documents, chunksize=2000)
    report.must_be_zero(
        f"pretraining lines with {ANSWER_GRAM} words in a row of a held-out answer", sum(f[0] for f in findings)
    )
    report.must_be_zero(
        f"pretraining lines with {TEXT_GRAM} words in a row of the test text", sum(f[1] for f in findings)
    )
    report.must_be_zero("pretraining lines that are lines of the test text", sum(f[2] for f in findings))


def head_words(document: dict[str, str]) -> list[str]:
    """The words a WordNet entry of the corpus is about."""
    return document["text"].split(" (")[0].split(", ")


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="the folder the corpus was built in")
    work: Path | None = parser.parse_args().work
    report = Report()
    compare_splits(report)
    if work is None:
        print("     the pretraining text was not looked at: give --work")
    else:
        compare_with_corpus(report, work)
    sys.exit(1 if report.leaks else 0)


if __name__ == "__main__":
    main()
