"""Build the instruction data: questions about commands and words, answered with text of manual pages and WordNet.

A row belongs to an entity (a command, or a word with one meaning), and the entity alone decides the split, so
nothing about a command or word of the test split is asked in the train split. The entities of the validation and
test splits are written to ``held_out.json``; the corpus is built without them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from manual_facts import Manual, is_plain, read_manual
from near_copies import NearCopies
from wordnet import NAMES, Synset, read_synsets

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "qlora_hal" / "demo" / "data"
TOO_SIMILAR = 0.75
LONGEST = 520
Turn = dict[str, str]

PURPOSE = (
    "What does the command {c} do?",
    "What is {c} for?",
    "Explain the program {c} in one line.",
    "I found a program called {c} on my system. What is it?",
    "Tell me the purpose of {c}.",
)
COMMAND = (
    "Which command is for this: {p}?",
    "I want to do this: {p}. Which program fits?",
    "Name the program with this purpose: {p}.",
)
READING = (
    "{c} - {p}\nThe description begins like this: {o}.\nSum it up in one line.",
    "{c} - {p}\n{o}.\nIn one line: what is {c}?",
    "Read this and sum it up in one line.\n{c} - {p}\n{o}.",
)
CALLING = (
    "The synopsis of {c} says: {s}\nHow is {c} called?",
    "How do I call {c}? Its manual page says:\n{s}",
)
CHOICE = (
    "Some options of {c}:\n{l}\nWhich one is for this: {m}?",
    "{l}\nThese are options of {c}. Which one do I need for this: {m}?",
)
OPTION = (
    "What does the option {f} of {c} do?",
    "What happens when I call {c} with {f}?",
    "Explain {f} in {c}.",
)
MEANING = (
    'What does "{w}" mean?',
    "Define {w}.",
    'What is the meaning of the {n} "{w}"?',
    "Please explain the word {w} to me.",
)
WORD = ("Which {n} means this: {g}?", "I am looking for a {n} with this meaning: {g}.")
KIND = ("{w} means: {g}. What kind of thing is that?", "If {w} is {g}, what is {w} a kind of?")
EXAMPLE = ('Use "{w}" in a sentence. It means: {g}.', "{w}: {g}. Give me an example sentence.")
SYSTEM = {
    "command": (
        "You answer questions about Unix commands in one line.",
        "You are a manual. Answer with what the manual page says.",
    ),
    "word": ("You are a dictionary.", "You explain English words briefly."),
}


@dataclass(frozen=True)
class Row:
    """A conversation, and what it was made from."""

    kind: str
    entity: str
    package: str
    messages: tuple[Turn, ...]


def split_of(entity: str) -> str:
    """The split of an entity: decided by a hash of its name, so it never depends on what else is in the corpus."""
    bucket = hashlib.sha256(entity.encode()).digest()[0]
    return "test" if bucket < 30 else "validation" if bucket < 51 else "train"


def exchange(question: str, answer: str) -> tuple[Turn, Turn]:
    """One question and its answer."""
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}


def about_purpose(m: Manual, rng: random.Random) -> tuple[Turn, ...]:
    """What is this command for?"""
    return exchange(rng.choice(PURPOSE).format(c=m.command), f"{m.command}: {m.purpose}.")


def about_command(m: Manual, rng: random.Random) -> tuple[Turn, ...]:
    """Which command is for this?"""
    return exchange(rng.choice(COMMAND).format(p=m.purpose), f"Use {m.command}: {m.purpose}.")


def about_reading(m: Manual, rng: random.Random) -> tuple[Turn, ...]:
    """The answer stands in the question, and has to be found there."""
    if not is_plain(m.opening, 6, 35):
        return ()
    return exchange(rng.choice(READING).format(c=m.command, p=m.purpose, o=m.opening), f"{m.command}: {m.purpose}.")


def about_calling(m: Manual, rng: random.Random) -> tuple[Turn, ...]:
    """How is the command called? Its synopsis is given."""
    if not m.synopsis.startswith(m.command) or not 2 <= len(m.synopsis.split()) <= 16:
        return ()
    return exchange(rng.choice(CALLING).format(c=m.command, s=m.synopsis), f"Call it like this: {m.synopsis}")


def as_clause(sentence: str) -> str:
    """A sentence inside a question: without its capital, unless that is an abbreviation's."""
    return sentence if sentence[1:2].isupper() else sentence[0].lower() + sentence[1:]


def about_choice(m: Manual, rng: random.Random) -> tuple[Turn, ...]:
    """Which of these options does this?"""
    if len(m.options) < 3:
        return ()
    options = rng.sample(m.options, 3)
    flags, meaning = rng.choice(options)
    listed = "\n".join(f"{flag}: {text}." for flag, text in options)
    question = rng.choice(CHOICE).format(c=m.command, l=listed, m=as_clause(meaning))
    return exchange(question, f"Use {flags}: {meaning}.")


def about_option(m: Manual, rng: random.Random) -> tuple[Turn, ...]:
    """What does this option do?"""
    if not m.options:
        return ()
    flags, meaning = rng.choice(m.options)
    return exchange(rng.choice(OPTION).format(c=m.command, f=flags), f"{flags}: {meaning}.")


def about_command_twice(m: Manual, rng: random.Random) -> tuple[Turn, ...]:
    """Two questions in a row about one command."""
    second = about_option(m, rng)
    return (*about_purpose(m, rng), *second) if second else ()


@dataclass(frozen=True)
class Word:
    """A word in its first meaning."""

    word: str
    synset: Synset
    parent: str

    @property
    def noun(self) -> str:
        """The name of its part of speech."""
        return NAMES[self.synset.part]


def about_meaning(w: Word, rng: random.Random) -> tuple[Turn, ...]:
    """What does this word mean?"""
    return exchange(rng.choice(MEANING).format(w=w.word, n=w.noun), f"{w.word} ({w.noun}): {w.synset.gloss}.")


def about_word(w: Word, rng: random.Random) -> tuple[Turn, ...]:
    """Which word has this meaning?"""
    return exchange(rng.choice(WORD).format(n=w.noun, g=w.synset.gloss), f"{w.word} ({w.noun}): {w.synset.gloss}.")


def about_kind(w: Word, rng: random.Random) -> tuple[Turn, ...]:
    """What kind of thing is this?"""
    if not w.parent or w.synset.part != "n":
        return ()
    return exchange(rng.choice(KIND).format(w=w.word, g=w.synset.gloss), f"{w.word}: a kind of {w.parent}.")


def about_example(w: Word, rng: random.Random) -> tuple[Turn, ...]:
    """Use this word in a sentence."""
    if not w.synset.examples:
        return ()
    sentence = w.synset.examples[0][0].upper() + w.synset.examples[0][1:]
    return exchange(rng.choice(EXAMPLE).format(w=w.word, g=w.synset.gloss), f"{sentence}.")


def about_word_twice(w: Word, rng: random.Random) -> tuple[Turn, ...]:
    """First the meaning, then a sentence."""
    if not w.synset.examples:
        return ()
    sentence = w.synset.examples[0][0].upper() + w.synset.examples[0][1:]
    follow_up = rng.choice(('Use "{w}" in a sentence.', "Now give me a sentence with {w}.")).format(w=w.word)
    return (*about_meaning(w, rng), *exchange(follow_up, f"{sentence}."))


COMMAND_KINDS: dict[str, tuple[int, Callable[[Manual, random.Random], tuple[Turn, ...]]]] = {
    "purpose": (800, about_purpose),
    "command": (350, about_command),
    "reading": (750, about_reading),
    "calling": (450, about_calling),
    "choice": (850, about_choice),
    "option": (750, about_option),
    "command-twice": (300, about_command_twice),
}
WORD_KINDS: dict[str, tuple[int, Callable[[Word, random.Random], tuple[Turn, ...]]]] = {
    "meaning": (750, about_meaning),
    "word": (350, about_word),
    "kind": (600, about_kind),
    "example": (350, about_example),
    "word-twice": (300, about_word_twice),
}


def read_manuals(path: Path) -> list[Manual]:
    """One page for every command name and every purpose."""
    chosen: dict[str, Manual] = {}
    purposes = set()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if '"kind": "manual"' not in line:
                continue
            document = json.loads(line)
            manual = read_manual(document["package"], document["name"], document["text"])
            if manual and manual.command not in chosen and manual.purpose.lower() not in purposes:
                chosen[manual.command] = manual
                purposes.add(manual.purpose.lower())
    return list(chosen.values())


def read_words(folder: Path) -> list[Word]:
    """Lower-case single words, each with the first of its synsets that has a usable gloss."""
    synsets = read_synsets(folder)
    chosen: dict[str, Word] = {}
    for synset in synsets.values():
        word = synset.words[0]
        plain = is_plain(synset.gloss, 4, 16) and not re.search(r"[();]", synset.gloss)
        if plain and re.fullmatch(r"[a-z]{4,14}", word) and word not in chosen:
            parents = [synsets[key].words[0] for key in synset.parents if key in synsets]
            chosen[word] = Word(word, synset, parents[0] if parents else "")
    return list(chosen.values())


def make_rows(rng: random.Random, work: Path) -> list[Row]:
    """Rows of every kind, more than are kept."""
    manuals = read_manuals(work / "documents.jsonl")
    words = read_words(next((work / "unpacked").glob("wordnet-base_*")) / "usr/share/wordnet")
    print(f"{len(manuals)} commands, {len(words)} words")
    rows = []
    for kind, (count, about_manual) in COMMAND_KINDS.items():
        pairs = ((m, about_manual(m, rng)) for m in rng.sample(manuals, len(manuals)))
        made = [Row(kind, m.command, m.package, with_system(turns, "command", rng)) for m, turns in pairs if turns]
        rows += [row for row in made if is_short(row)][: int(1.2 * count)]
    for kind, (count, about_one) in WORD_KINDS.items():
        sample = ((w, about_one(w, rng)) for w in rng.sample(words, 20 * count))
        made = [Row(kind, w.word, "wordnet-base", with_system(turns, "word", rng)) for w, turns in sample if turns]
        rows += [row for row in made if is_short(row)][: int(1.2 * count)]
    return rows


def with_system(turns: tuple[Turn, ...], subject: str, rng: random.Random) -> tuple[Turn, ...]:
    """Put a system turn before one conversation in six."""
    if not turns or rng.random() > 1 / 6:
        return turns
    return ({"role": "system", "content": rng.choice(SYSTEM[subject])}, *turns)


def is_short(row: Row) -> bool:
    """Whether a row fits the short sequences the demo trains on."""
    return sum(len(turn["content"]) for turn in row.messages) <= LONGEST


def contents(rows: Iterable[Row], role: str) -> list[str]:
    """All turns of one role."""
    return [turn["content"] for row in rows for turn in row.messages if turn["role"] == role]


def without_repeats(rows: list[Row]) -> list[Row]:
    """Drop rows that repeat a question or an answer of another row word for word."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        texts = {f"{turn['role']} {turn['content'].lower()}" for turn in row.messages if turn["role"] != "system"}
        if seen.isdisjoint(texts):
            kept.append(row)
            seen |= texts
    return kept


def without_near_copies(rows: list[Row], others: list[Row]) -> list[Row]:
    """Drop rows with a question or an answer that is nearly one of ``others``."""
    indexes = {role: NearCopies(contents(others, role)) for role in ("user", "assistant")}
    return [
        row
        for row in rows
        if all(indexes[t["role"]].similarity(t["content"]) < TOO_SIMILAR for t in row.messages if t["role"] in indexes)
    ]


def limited(rows: list[Row]) -> list[Row]:
    """At most the planned number of each kind."""
    limits = {kind: count for kind, (count, _) in (COMMAND_KINDS | WORD_KINDS).items()}
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row.kind] += 1
        if seen[row.kind] <= limits[row.kind]:
            kept.append(row)
    return kept


def splits(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each split; a validation or test row that resembles a row of another split is left out."""
    parts = {name: [row for row in rows if split_of(row.entity) == name] for name in ("train", "validation", "test")}
    parts["validation"] = without_near_copies(parts["validation"], parts["train"])
    parts["test"] = without_near_copies(parts["test"], parts["train"] + parts["validation"])
    return parts


def write(parts: dict[str, list[Row]], work: Path) -> None:
    """Write the splits, where each row comes from, and what the corpus must not contain."""
    for name, rows in parts.items():
        lines = [json.dumps({"messages": row.messages}, ensure_ascii=False) for row in rows]
        (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    provenance = {name: [[row.kind, row.entity, row.package] for row in rows] for name, rows in parts.items()}
    lines = [json.dumps({"split": name, "rows": rows}, separators=(",", ":")) for name, rows in provenance.items()]
    (DATA / "provenance.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_out = parts["validation"] + parts["test"]
    record = {
        "commands": sorted({row.entity for row in held_out if row.kind in COMMAND_KINDS}),
        "words": sorted({row.entity for row in held_out if row.kind in WORD_KINDS}),
        "test_commands": sorted({row.entity for row in parts["test"] if row.kind in COMMAND_KINDS}),
        "test_words": sorted({row.entity for row in parts["test"] if row.kind in WORD_KINDS}),
        "answers": contents(held_out, "assistant"),
    }
    (work / "held_out.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Make, filter, split and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "build")
    work: Path = parser.parse_args().work
    rng = random.Random(20)
    rows = limited(without_repeats(make_rows(rng, work)))
    rng.shuffle(rows)
    parts = splits(rows)
    for name, part in parts.items():
        print(name, len(part), dict(Counter(row.kind for row in part)))
    DATA.mkdir(parents=True, exist_ok=True)
    write(parts, work)


if __name__ == "__main__":
    main()
