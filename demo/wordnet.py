"""Read WordNet's data files: synsets with their words, gloss, example sentences and the kind of thing they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FILES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
NAMES = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}


@dataclass(frozen=True)
class Synset:
    """One meaning and the words that have it."""

    key: str
    part: str
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    parents: tuple[str, ...]


def split_gloss(text: str) -> tuple[str, tuple[str, ...]]:
    """Part a gloss into its definition and its quoted example sentences."""
    examples = tuple(re.findall(r'"([^"]{8,120})"', text))
    definition = re.split(r'[;:,]?\s*"', text)[0]
    return definition.strip().rstrip(";").strip(), examples


def parse_line(line: str, part: str) -> Synset:
    """One line of a data file."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words = tuple(re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count))
    pointers = fields[4 + 2 * count + 1 :]
    parents = tuple(
        f"{pointers[4 * i + 2]}{pointers[4 * i + 1]}"
        for i in range(int(fields[4 + 2 * count]))
        if pointers[4 * i] == "@"
    )
    definition, examples = split_gloss(gloss.strip())
    return Synset(f"{part}{fields[0]}", part, words, definition, examples, parents)


def read_synsets(folder: Path) -> dict[str, Synset]:
    """All synsets of the four data files, by key."""
    synsets = {}
    for name, part in FILES.items():
        for line in (folder / f"data.{name}").read_text(encoding="utf-8", errors="replace").split("\n"):
            if line and not line.startswith(" "):
                synset = parse_line(line, part)
                synsets[synset.key] = synset
    return synsets


def describe(synset: Synset, synsets: dict[str, Synset]) -> str:
    """A synset as a line of a dictionary: words, part of speech, definition, examples and what it is a kind of."""
    text = f"{', '.join(synset.words)} ({NAMES[synset.part]}): {synset.gloss}."
    if synset.examples:
        text += " " + " ".join(f'"{example}"' for example in synset.examples)
    parents = [synsets[key].words[0] for key in synset.parents if key in synsets]
    return text + (f" Kind of: {', '.join(parents)}." if parents else "")
