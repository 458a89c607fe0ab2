"""Build the pretraining text: everything extracted, less what is held out, less repetitions, with limits a package.

Writes ``corpus.jsonl`` (the pretraining documents, shuffled), ``validation.jsonl`` (documents the trainer
measures its loss on) and the demo's language-model test text. The held-out documents are taken first, so that a
line they share with a pretraining document is removed there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from near_copies import ANSWER_GRAM, TEXT_GRAM, Phrases
from wordnet import Synset, read_synsets

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "qlora_hal" / "demo" / "data"
PACKAGE_LIMIT = 9_000_000
VALIDATION_SHARE = 0.006
TEST_BYTES = 160_000
Document = dict[str, str]

PHRASES = Phrases()


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def manual_names(document: Document) -> set[str]:
    """The commands a manual page is about: its file name and the names of its NAME section."""
    listed = re.search(r"^NAME\n\s+([^\n]*?) +-", document["text"], re.MULTILINE)
    names = {name.strip() for name in listed[1].split(",")} if listed else set()
    return names | {document["name"].rpartition(".")[0]}


def reason_to_hold_out(document: Document, held_out: dict[str, set[str]], synsets: dict[str, Synset]) -> str:
    """Why a document must not be trained on; empty if it may be."""
    kind = document["kind"]
    if kind == "manual":
        names = manual_names(document)
        if names & held_out["commands"]:
            return "test command" if names & held_out["test_commands"] else "validation command"
    elif kind == "wordnet":
        words = set(synsets[document["name"]].words)
        if words & held_out["words"]:
            return "test word" if words & held_out["test_words"] else "validation word"
    elif kind == "dictionary" and document["name"].lower() in held_out["words"]:
        return "validation word"
    draw = hashlib.sha256(f"{document['package']}/{document['name']}".encode()).digest()
    fraction = int.from_bytes(draw[:4], "big") / 2**32
    if fraction < VALIDATION_SHARE:
        return "validation sample"
    return "test sample" if fraction < VALIDATION_SHARE + 0.002 else ""


def part(
    documents: Iterable[Document], held_out: dict[str, set[str]], synsets: dict[str, Synset]
) -> dict[str, list[Document]]:
    """Documents by the reason they are held out for; at most ``PACKAGE_LIMIT`` characters a package are used."""
    parts: dict[str, list[Document]] = {}
    used: Counter[str] = Counter()
    for document in documents:
        reason = reason_to_hold_out(document, held_out, synsets)
        if not reason and document["kind"] not in ("dictionary", "wordnet"):
            used[document["package"]] += len(document["text"])
            if used[document["package"]] > PACKAGE_LIMIT:
                continue
        parts.setdefault(reason, []).append(document)
    return parts


def without_seen_lines(document: Document, seen: set[int]) -> Document:
    """A document without the long lines that occurred before, here or elsewhere."""
    kept = []
    for line in document["text"].split("\n"):
        key = " ".join(re.findall(r"[a-z]+", line.lower()))
        if len(key) >= 40:
            if hash(key) in seen:
                continue
            seen.add(hash(key))
        kept.append(line)
    return document | {"text": re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()}


def without_phrases(document: Document) -> tuple[Document, int]:
    """A document without the lines that hold a phrase of a held-out answer or of the test text, and their number."""
    lines = document["text"].split("\n")
    kept = [line for line in lines if not PHRASES.found_in(line)]
    return document | {"text": "\n".join(kept)}, len(lines) - len(kept)


def excerpt(document: Document, longest: int) -> str:
    """The beginning of a document, cut at the end of a line."""
    text = document["text"]
    return text if len(text) <= longest else text[:longest].rpartition("\n")[0]


def write_test_text(parts: dict[str, list[Document]], rng: random.Random) -> str:
    """Write the test text: manuals and glosses behind test rows, and samples of the other documents."""
    chosen: list[tuple[str, str, str]] = []
    shares = (("test command", 0.5), ("test word", 0.1), ("test sample", 0.4))
    for reason, share in shares:
        size = 0
        for document in rng.sample(parts[reason], len(parts[reason])):
            text = excerpt(document, 5000)
            if len(text) > 60 and size + len(text) <= share * TEST_BYTES:
                chosen.append((text, document["package"], document["name"]))
                size += len(text)
    rng.shuffle(chosen)
    joined = "\n\n".join(text for text, _, _ in chosen) + "\n"
    (DATA / "test_text.txt").write_text(joined, encoding="utf-8")
    sources = ",\n".join(json.dumps([package, name]) for _, package, name in chosen)
    (DATA / "test_text_sources.json").write_text(f"[\n{sources}\n]\n", encoding="utf-8")
    return joined


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write documents that still have text."""
    with path.open("w", encoding="utf-8") as output:
        for document in documents:
            if len(document["text"]) >= 40:
                output.write(json.dumps(document, ensure_ascii=False) + "\n")


def usable(documents: Iterable[Document]) -> list[Document]:
    """Documents of which repetition has left something."""
    return [document for document in documents if len(document["text"]) >= 40]


def main() -> None:
    """Hold out, remove repetitions, remove held-out phrases, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "build")
    work: Path = parser.parse_args().work
    rng = random.Random(21)
    record: dict[str, Any] = json.loads((work / "held_out.json").read_text(encoding="utf-8"))
    synsets = read_synsets(next((work / "unpacked").glob("wordnet-base_*")) / "usr/share/wordnet")
    held_out = {name: set(values) for name, values in record.items()}
    parts = part(read_documents(work / "documents.jsonl"), held_out, synsets)
    print({reason or "pretraining": len(documents) for reason, documents in parts.items()})
    seen: set[int] = set()
    for reason in sorted(parts, reverse=True):  # the empty reason, pretraining, comes last
        rng.shuffle(parts[reason])
        parts[reason] = usable(without_seen_lines(document, seen) for document in parts[reason])
    test_text = write_test_text(parts, rng)
    write_documents(work / "validation.jsonl", parts["validation sample"])
    for answer in record["answers"]:
        PHRASES.add(answer, ANSWER_GRAM)
    for line in test_text.split("\n"):
        PHRASES.add(line, TEXT_GRAM)
    with Pool(2) as pool:
        cleaned = pool.map(without_phrases, parts[""], chunksize=2000)
    print("lines removed for a held-out phrase:", sum(count for _, count in cleaned))
    documents = usable(document for document, _ in cleaned)
    write_documents(work / "corpus.jsonl", documents)
    print(len(documents), "documents,", sum(len(d["text"]) for d in documents), "characters")


if __name__ == "__main__":
    main()
