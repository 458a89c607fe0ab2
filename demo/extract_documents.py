"""Write every document of the unpacked packages as plain text, with its package, version and licence."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from urllib.parse import unquote

from plain_text import dictionary, info_manual, manual_page, markup, read_file, tidy, unwrap
from wordnet import describe, read_synsets

HERE = Path(__file__).resolve().parent
# fmt: off
STOP_WORDS = frozenset((
    "the", "of", "and", "to", "in", "is", "a", "for", "that", "it", "with", "be", "or", "as", "are", "by",
    "on", "this", "an", "if", "not", "from", "can",
))
# fmt: on
UNWANTED = re.compile(
    r"changelog|copyright|/examples?/|_sources|_static|_modules|genindex|search\.html|py-modindex|/test"
    r"|NEWS|/COPYING|/LICENSE|AUTHORS|MAINTAINERS|CREDITS|THANKS|ChangeLog|COPYING|GPL|/Documentation/|hierarchy"
    r"|robots\.txt|requirements\.txt|CMakeLists|bookmarks|contents\.html|/(fr|de|es|it|ja|pt|ru|zh|nl|da|sv|nb|pl|ko)[/_.]"
    r"|/html/(?!en-)[a-z]{2}-[a-z]{2}/"
    r"|\.(fr|de|es|it|ja|pt_BR|pt|ru|zh|nl|da|sv|nb|pl|ko|tr)\.",
    re.IGNORECASE,
)
COMMON = re.compile(r"/usr/share/common-licenses/([A-Za-z]+-?[\d.]*\d|[A-Z][A-Za-z]+)")
NAMED = (
    ("MIT/Expat", "Permission is hereby granted, free of charge"),
    ("BSD", "Redistribution and use in source and binary forms"),
    ("public domain", "public domain"),
    ("ISC", "Permission to use, copy, modify"),
    ("Artistic", "same terms as Perl itself"),
    ("GFDL", "GNU Free Documentation License"),
    ("GPL", "GNU General Public License"),
)


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    package: str
    kind: str
    name: str
    text: str


def licences(copyright_text: str) -> list[str]:
    """Short names of the licences a Debian copyright file states."""
    if copyright_text.startswith("Format:"):
        names = re.findall(r"^License: *(\S[^\n]*)", copyright_text, re.MULTILINE)
        found = {name.strip().rstrip(",")[:80] for name in names}
    else:
        found = set(COMMON.findall(copyright_text))
        flat = re.sub(r"\s+", " ", copyright_text)
        found |= {name for name, words in NAMED if words.lower() in flat.lower()}
    return sorted(found)


def is_english(text: str, least: float) -> bool:
    """Whether nearly all characters are ASCII and enough of the words are English function words."""
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < 20 or len(text.encode("ascii", "ignore")) < 0.97 * len(text):
        return False
    return sum(word in STOP_WORDS for word in words) >= least * len(words)


def file_text(path: Path) -> str:
    """The text of a file below /usr/share/doc, /usr/share/info or /usr/share/help; empty if it has no text format."""
    name = path.name.removesuffix(".gz")
    if re.search(r"\.x?html?$|\.page$|\.docbook$|\.xml$", name):
        return markup(read_file(path))
    if re.search(r"\.info(-\d+)?$", name):
        return info_manual(read_file(path))
    if re.search(r"\.(txt|md|rst)$", name, re.IGNORECASE) or re.match(r"README|FAQ|MANUAL|GUIDE|HOWTO|INTRO", name):
        return tidy(unwrap(read_file(path)))
    return ""


def manual_documents(package: str, share: Path, mandoc: Path) -> Iterator[Document]:
    """The English manual pages of a package."""
    for path in sorted(share.glob("man/man[1-8]/*")):
        text = manual_page(path, mandoc)
        if is_english(text, 0.08):
            yield Document(package, "manual", unquote(path.name.removesuffix(".gz")), text)


def other_documents(package: str, share: Path) -> Iterator[Document]:
    """The READMEs, guides, help pages and Info manuals of a package."""
    for folder in ("doc", "info", "help"):
        for path in sorted((share / folder).rglob("*")):
            name = str(path.relative_to(share))
            if not path.is_file() or path.stat().st_size > 3_000_000 or UNWANTED.search(name):
                continue
            text = file_text(path)
            if len(text) > 200 and is_english(text, 0.12):
                yield Document(package, folder, name, text)


def dictionary_documents(package: str, share: Path) -> Iterator[Document]:
    """The entries of a dictd dictionary and the synsets of WordNet, one document each."""
    for index in sorted(share.glob("dictd/*.index")):
        for headword, text in dictionary(index):
            yield Document(package, "dictionary", headword, tidy(text))
    if (share / "wordnet").is_dir():
        synsets = read_synsets(share / "wordnet")
        for synset in synsets.values():
            yield Document(package, "wordnet", synset.key, describe(synset, synsets))


def copyright_file(folder: Path, package: str) -> Path:
    """The copyright file of a package, which may be that of the package its documentation is shared with."""
    link = folder / "documentation_of"
    if not link.exists():
        return folder / "usr/share/doc" / package / "copyright"
    owner = link.read_text(encoding="utf-8")
    return next(folder.parent.glob(f"{owner}_*"), folder) / "usr/share/doc" / owner / "copyright"


def package_documents(folder: Path, mandoc: Path) -> tuple[dict[str, object], list[Document]]:
    """What a package is, and its documents; no documents if its copyright file names no licence."""
    package, version, _ = folder.name.rsplit("_", 2)
    share = folder / "usr" / "share"
    statement = copyright_file(folder, package)
    found = licences(read_file(statement)) if statement.exists() else []
    source: dict[str, object] = {"package": package, "version": unquote(version), "licences": found}
    if not found or package == "mandoc":
        return source, []
    documents = [*manual_documents(package, share, mandoc), *other_documents(package, share)]
    return source, documents + list(dictionary_documents(package, share))


def main() -> None:
    """Extract every package, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "build")
    work: Path = parser.parse_args().work
    folders = sorted(path for path in (work / "unpacked").iterdir() if path.is_dir())
    extract = partial(package_documents, mandoc=(work / "mandoc/usr/bin/mandoc").resolve())
    sources = []
    with Pool(2) as pool, (work / "documents.jsonl").open("w", encoding="utf-8") as output:
        for source, documents in pool.imap(extract, folders, chunksize=4):
            sources.append(source | {"documents": len(documents), "characters": sum(len(d.text) for d in documents)})
            for document in documents:
                output.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
    (work / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
