"""Find texts that are nearly the same, and texts that contain a phrase of another text.

The builder of the data set uses this to leave rows out; the checker uses it to look at what was written.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

ANSWER_GRAM = 8
SHORTEST_PHRASE = 5
TEXT_GRAM = 13


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation does not make a text different."""
    return re.findall(r"[a-z0-9]+", text.lower())


def shingles(text: str) -> frozenset[str]:
    """The words and the pairs of adjacent words of a text; options keep their dashes, so that -a is not a."""
    words = re.findall(r"[a-z0-9_+./=-]+", text.lower())
    return frozenset(words) | {f"{a} {b}" for a, b in pairwise(words)}


class NearCopies:
    """An index of texts that answers how similar the most similar one is (Jaccard similarity of shingles)."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.members: list[frozenset[str]] = []
        self.holders: dict[str, list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Put a text into the index."""
        parts = shingles(text)
        for part in parts:
            self.holders[part].append(len(self.members))
        self.members.append(parts)

    def similarity(self, text: str) -> float:
        """The similarity of the most similar text in the index; 1.0 means the same shingles."""
        parts = shingles(text)
        shared = Counter(index for part in parts for index in self.holders.get(part, ()))
        return max((n / (len(parts) + len(self.members[i]) - n) for i, n in shared.items()), default=0.0)


class Phrases:
    """A set of word n-grams that can be looked for in a large text."""

    def __init__(self) -> None:
        self.grams: set[str] = set()
        self.lengths: dict[str, set[int]] = defaultdict(set)

    def add(self, text: str, size: int) -> bool:
        """Add all n-grams of ``size`` words, or the whole text if that is shorter; False if it is too short."""
        words = words_of(text)
        size = min(size, len(words))
        if size < SHORTEST_PHRASE:
            return False
        for start in range(len(words) - size + 1):
            self.grams.add(" ".join(words[start : start + size]))
            self.lengths[f"{words[start]} {words[start + 1]}"].add(size)
        return True

    def found_in(self, line: str) -> bool:
        """Whether the line contains one of the n-grams."""
        words = words_of(line)
        for start in range(len(words) - SHORTEST_PHRASE + 1):
            for size in self.lengths.get(f"{words[start]} {words[start + 1]}", ()):
                if " ".join(words[start : start + size]) in self.grams:
                    return True
        return False
