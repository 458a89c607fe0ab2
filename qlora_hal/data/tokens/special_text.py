"""Special tokens inside what people wrote: found, counted, and encoded as ordinary text.

`tokenizers` turns the characters of a special token into that token wherever they stand, so a user who writes
`<|im_end|>` would end his own turn. Here the template's special tokens are renamed to aliases, and the text is encoded
by a copy of the tokenizer that knows the aliases and takes everything else as text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from qlora_hal.data.tokens.guarded_tokenizer import guarded
from qlora_hal.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

# Unicode noncharacters: no text that is meant for people holds them.
_ALIAS = "\ufdd7{}\ufdd8"
_MASKED = "\ufdd5{}\ufdd6"
_MASKED_PATTERN = re.compile("\ufdd5(\\d{1,7})\ufdd6")
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
"""What a row may not hold where its text passes through a template piece by piece."""


class SpecialText:
    """The special tokens of one tokenizer, as text."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        self._tokens = list(self.ids)
        self._numbers = {token: str(number) for number, token in enumerate(self._tokens)}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._next = re.compile(rf"\s*({self.pattern.pattern})")

    def found_in(self, texts: Iterable[str]) -> Counter[str]:
        """How often each special token stands in the texts."""
        return Counter(token for text in texts for token in self.pattern.findall(text))

    def next_after(self, text: str, at: int) -> tuple[str, int] | None:
        """(the special token that follows `at` with only white space between, where it ends)."""
        match = self._next.match(text, at)
        return (match.group(1), match.end()) if match else None

    def end_of_last(self, text: str) -> int | None:
        """Where the last special token of a text ends, if only white space follows it."""
        end = None
        for match in self.pattern.finditer(text):
            end = match.end()
        return end if end is not None and not text[end:].strip() else None

    def mask(self, text: str) -> str:
        """The text with placeholders for special tokens; `restore` puts them back as ordinary text."""
        return self.pattern.sub(lambda match: _MASKED.format(self._numbers[match.group()]), text)

    def alias(self, text: str) -> str:
        """The text with its special tokens under the names that `ProtectedTokenizer` takes as tokens."""
        return self.pattern.sub(lambda match: self.alias_of(match.group()), text)

    def alias_of(self, token: str) -> str:
        return _ALIAS.format(self._numbers[token])

    def unmask(self, text: str) -> str:
        """The text with the special tokens that `mask` hid."""
        return _MASKED_PATTERN.sub(self._unmasked, text)

    def _unmasked(self, match: re.Match[str]) -> str:
        number = int(match.group(1))
        return self._tokens[number] if number < len(self._tokens) else match.group()  # a template can write anything

    def restore(self, text: str) -> str:
        """The template's special tokens as aliases, the masked ones of the user as the characters they were."""
        return self.unmask(self.alias(text))


def masked(special: SpecialText, value: object) -> Any:
    """A value in which the special tokens of every string are masked, of keys too unless a template could name them.

    Raises DataError (QH-D08) when a text holds the signs that masks are made of.
    """
    if isinstance(value, str):
        refuse_noncharacters([value])
        return special.mask(value)
    if isinstance(value, Mapping):
        return {_masked_key(special, key): masked(special, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(special, item) for item in value]
    return value


def _masked_key(special: SpecialText, key: object) -> object:
    return masked(special, key) if isinstance(key, str) and not key.isidentifier() else key


def refuse_noncharacters(texts: Iterable[str]) -> None:
    """Raise DataError (QH-D08) when a text holds the signs that masks and other marks in it are made of."""
    if any(map(NONCHARACTERS.search, texts)):
        raise DataError(
            "QH-D08",
            "A text holds code points between U+FDD0 and U+FDEF, which are not characters.",
            fix="Remove them from the row, or set data.on_bad_row to skip.",
        )


class ProtectedTokenizer:
    """A copy of a tokenizer that takes aliases as special tokens and the characters of special tokens as text."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialText) -> None:
        copy: Any = Tokenizer.from_str(tokenizer.to_str())
        declared = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        copy.add_tokens(
            [
                AddedToken(
                    special.alias_of(content),
                    special=False,
                    normalized=False,
                    lstrip=declared[content].lstrip,
                    rstrip=declared[content].rstrip,
                    single_word=declared[content].single_word,
                )
                for content in special.ids
            ]
        )
        copy.encode_special_tokens = True
        self._copy = guarded(copy, Path("tokenizer.json"))
        self._original = {
            self._copy.token_to_id(special.alias_of(content)): number for content, number in special.ids.items()
        }

    def encode(self, text: str) -> tuple[list[int], Encoding]:
        """Token ids of the original tokenizer, and the encoding for its character offsets."""
        encoding: Encoding = self._copy.encode(text, add_special_tokens=False)
        return [self._original.get(number, number) for number in encoding.ids], encoding
