"""Small tasks for really pretrained models, made of what the project ships and generates: the same rows everywhere.

`records` is a format to follow: a sentence about a person, and the same facts as a record. The sentences are generated.
`answers` goes on from a question: the instruction rows that the demo ships, made of manual pages and dictionaries.
Held-out rows are never trained: other facts of the same kind, and the demo's own test rows.

A row is `<begin> prompt answer <end>` without a chat template; only answer and end are counted. So a task is the same
rows for each tokenizer, and needs nothing but a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qlora_hal.contract.values import IGNORE_LABEL, PADDING_SEGMENT, Batch
from qlora_hal.demo import data_path

TRAINED_RECORDS, TRAINED_ANSWERS, HELD_OUT = 768, 2048, 64
LONGEST_ROW = 64
"""Tokens. Rows that are longer with some tokenizer are left out for that one."""
PAD_TO = 8

_FIRST_NAMES = (
    "Anna", "Bruno", "Carla", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jonas", "Karin", "Louis", "Maria",
    "Nadia", "Oscar", "Paula", "Ralph", "Sonia", "Thomas", "Vera",
)  # fmt: skip
_LAST_NAMES = (
    "Adams", "Baker", "Carter", "Dunn", "Ellis", "Fisher", "Gray", "Hill", "Irving", "Jones", "King", "Lane", "Moore",
    "Nash", "Owen", "Parker", "Reed", "Stone", "Turner", "Wood",
)  # fmt: skip
_CITIES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Havana", "Lima", "London", "Madrid", "Oslo", "Paris", "Prague",
    "Rome", "Sofia", "Tokyo", "Vienna",
)  # fmt: skip
_WORK = (
    "actor", "baker", "carpenter", "doctor", "driver", "farmer", "gardener", "judge", "miner", "nurse", "painter",
    "pilot", "sailor", "singer", "tailor", "teacher",
)  # fmt: skip
_SENTENCES = (
    "{first} {last} is {age} years old, lives in {city} and works as a {work}.",
    "The {work} {first} {last} has been living in {city} for years and is now {age}.",
    "In {city} there is a {work} called {first} {last}, who is {age} years of age.",
)
_RECORD = "[name] {last}, {first} [age] {age} [city] {city} [work] {work}"
_STREAM = 0x7265636F726473
"""Key of the generated facts: `records` in ASCII."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, and the answer that is learnt."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained and what is held out. No held-out row is among the trained ones."""

    trained: tuple[Row, ...]
    held_out: tuple[Row, ...]


def records() -> Task:
    """Generated sentences and the records that they become."""
    rows: dict[str, Row] = {}
    words = np.random.Philox(key=np.array([_STREAM, 0], np.uint64))
    while len(rows) < TRAINED_RECORDS + HELD_OUT:
        drawn = [int(word) for word in words.random_raw(6)]
        facts: dict[str, object] = {
            "first": _FIRST_NAMES[drawn[0] % len(_FIRST_NAMES)],
            "last": _LAST_NAMES[drawn[1] % len(_LAST_NAMES)],
            "city": _CITIES[drawn[2] % len(_CITIES)],
            "work": _WORK[drawn[3] % len(_WORK)],
            "age": 20 + drawn[4] % 70,
        }
        sentence = _SENTENCES[drawn[5] % len(_SENTENCES)].format(**facts)
        rows[_RECORD.format(**facts)] = Row(f"{sentence}\nRecord:", " " + _RECORD.format(**facts))
    made = tuple(rows.values())
    return Task(made[:TRAINED_RECORDS], made[TRAINED_RECORDS:])


def answers() -> Task:
    """The demo's own rows with one question, in their order: its training rows, and its test rows."""
    trained = dict.fromkeys(_questions(data_path("train"), TRAINED_ANSWERS))
    held_out = [row for row in _questions(data_path("test"), 4 * HELD_OUT) if row not in trained]
    return Task(tuple(trained), tuple(held_out))


def _questions(path: Path, count: int) -> list[Row]:
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        if [message["role"] for message in messages] == ["user", "assistant"]:
            rows.append(Row(messages[0]["content"] + "\n", messages[1]["content"]))
        if len(rows) == count:
            break
    return rows


TASKS: Mapping[str, Callable[[], Task]] = {"records": records, "answers": answers}


# tokens ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of a row; the first `uncounted` of them carry no loss."""

    ids: tuple[int, ...]
    uncounted: int


@dataclass(frozen=True, slots=True)
class TokenTask:
    """A task in the tokens of one model."""

    trained: tuple[TokenRow, ...]
    held_out: tuple[TokenRow, ...]
    pad_id: int


def tokenized(task: Task, folder: Path) -> TokenTask:
    """The rows of a task with the tokenizer and the special tokens of a model folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    begin, end = int(config["bos_token_id"]), int(config["eos_token_id"])

    def encoded(rows: Sequence[Row]) -> list[TokenRow]:
        found = []
        for row in rows:
            prompt = [begin, *tokenizer.encode(row.prompt, add_special_tokens=False).ids]
            ids = (*prompt, *tokenizer.encode(row.answer, add_special_tokens=False).ids, end)
            if len(ids) <= LONGEST_ROW:
                found.append(TokenRow(ids, len(prompt)))
        return found

    pad = config.get("pad_token_id")
    held_out = encoded(task.held_out)[:HELD_OUT]
    return TokenTask(tuple(encoded(task.trained)), tuple(held_out), end if pad is None else int(pad))


def batch_of(rows: Sequence[TokenRow], pad_id: int, first_place: int = 0) -> Batch:
    """One micro-batch, padded on the right to a multiple of 8; `first_place` is its first row's place in the window."""
    time = -(-max(len(row.ids) for row in rows) // PAD_TO) * PAD_TO
    shape = (len(rows), time)
    ids, labels = np.full(shape, pad_id, np.int32), np.full(shape, IGNORE_LABEL, np.int32)
    positions, segments = np.zeros(shape, np.int32), np.full(shape, PADDING_SEGMENT, np.int32)
    for place, row in enumerate(rows):
        length = len(row.ids)
        ids[place, :length] = row.ids
        labels[place, row.uncounted : length] = row.ids[row.uncounted :]
        positions[place, :length] = np.arange(length)
        segments[place, :length] = 1
    places = np.arange(first_place, first_place + len(rows), dtype=np.int32)
    return Batch(ids, labels, positions, segments, rows=places)
