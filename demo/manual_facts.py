"""Take facts out of a rendered manual page: what the command is for, how it is called, what its options do."""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME_LINE = re.compile(r"^NAME\n\s+(\S[^\n]*?) +(?:-+|--) +(\S[^\n]*)$", re.MULTILINE)
SECTION = re.compile(r"^(?=[A-Z][A-Z ]+$)", re.MULTILINE)
OPTION = re.compile(r"^  (-[^\n]*?)(?:  (\S[^\n]*)|\n    (\S[^\n]*))$", re.MULTILINE)
GENERIC = re.compile(r"help|version|verbose|quiet|silent|debug|-h\b|-V\b|-v\b|-q\b", re.IGNORECASE)


@dataclass(frozen=True)
class Manual:
    """The facts of one page."""

    command: str
    names: tuple[str, ...]
    package: str
    purpose: str
    opening: str
    synopsis: str
    options: tuple[tuple[str, str], ...]


def first_sentence(text: str) -> str:
    """The first sentence, without its full stop."""
    return re.split(r"(?<=[a-z0-9)\"'])\.(?:\s|$)", text.strip())[0].strip()


def is_plain(text: str, fewest: int, most: int) -> bool:
    """Whether a text has a usable number of words and no remains of markup."""
    balanced = text.count("(") == text.count(")") and text.count("[") == text.count("]")
    return balanced and fewest <= len(text.split()) <= most and not re.search(r"[<>{}\\|^`\"]|\(\d\)|[:,]$|  ", text)


def options_of(text: str) -> tuple[tuple[str, str], ...]:
    """Options with the first sentence of their description, where that is short and says something particular."""
    found: dict[str, str] = {}
    for flags, inline, below in OPTION.findall(text):
        meaning = first_sentence(inline or below)
        if len(flags) <= 36 and not GENERIC.search(flags) and is_plain(meaning, 4, 18) and meaning[:1].isupper():
            found.setdefault(flags.strip(), meaning)
    return tuple(found.items())


def section(text: str, title: str) -> str:
    """The body of a section; empty if the page has none of that title."""
    return next((part[len(title) :].strip() for part in SECTION.split(text) if part.startswith(title + "\n")), "")


def read_manual(package: str, name: str, text: str) -> Manual | None:
    """The facts of a page of section 1 or 8; None if its NAME line cannot be used, or it is no command (perlre)."""
    match = NAME_LINE.search(text)
    stem, _, number = name.rpartition(".")
    if match is None or number not in ("1", "8") or not re.fullmatch(r"[a-z][a-z0-9_.+-]{1,23}", stem):
        return None
    purpose = match[2].strip().rstrip(".")
    if package == "perl-doc" or not is_plain(purpose, 3, 16) or not purpose[0].isalpha() or "manual page" in purpose:
        return None
    opening = first_sentence(section(text, "DESCRIPTION").split("\n")[0])
    synopsis = section(text, "SYNOPSIS").split("\n")[0].strip()
    names = tuple(part.strip() for part in match[1].split(","))
    return Manual(stem, names, package, purpose, opening, synopsis, options_of(text))
