"""Turn what packages ship (manual pages, HTML, XML, Info, dictionaries, plain files) into plain text.

Every function returns text with one paragraph a line, so that repeated paragraphs can be found by their hash
and no tokens are spent on line wrapping.
"""

from __future__ import annotations

import base64
import gzip
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# fmt: off
INLINE = frozenset((
    "a", "abbr", "acronym", "app", "application", "b", "bdi", "big", "cite", "cmd", "code", "command",
    "constant", "dfn", "em", "emphasis", "email", "envar", "file", "filename", "font", "function", "gui",
    "guibutton", "guilabel", "guimenu", "guimenuitem", "guiseq", "i", "input", "ins", "kbd", "key", "keycombo",
    "keycap", "keyseq", "link", "literal", "mark", "media", "option", "output", "parameter", "q", "quote",
    "replaceable", "s", "samp", "small", "span", "strong", "sub", "sup", "sys", "systemitem", "term", "tt",
    "type", "u", "ulink", "userinput", "var", "varname", "xref", "wbr",
))
# fmt: on
SKIPPED = frozenset(("script", "style", "head", "nav", "title", "svg", "math", "footer"))
PRESERVED = frozenset(("pre", "screen", "programlisting", "literallayout"))
INDENTS = ("", "  ", "  ", "    ", "    ")


def read_file(path: Path) -> str:
    """The text of a file, unpacked when its name ends in .gz or .dz."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def tidy(text: str) -> str:
    """Shorten indents to at most four spaces, runs of spaces to two, rulers to four signs, blank lines to one."""
    lines = []
    for line in text.replace("\t", "    ").split("\n"):
        body = line.strip()
        indent = INDENTS[min((len(line) - len(line.lstrip()) + 2) // 4, 4)]
        lines.append(indent + re.sub(r"([-_=*~#.+])\1{5,}", r"\1\1\1\1", re.sub(r" {3,}", "  ", body)) if body else "")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def unwrap(text: str) -> str:
    """Join the lines of hard-wrapped prose paragraphs; leave lists, tables and code as they are."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.replace("\r", "")):
        lines = block.split("\n")
        indents = {len(line) - len(line.lstrip()) for line in lines[1:]}
        prose = len(indents) == 1 and all(len(line.strip()) >= 45 for line in lines[:-1]) and "  " not in block.strip()
        blocks.append(lines[0] + " " + " ".join(line.strip() for line in lines[1:]) if prose else block)
    return "\n\n".join(blocks)


def manual_page(path: Path, mandoc: Path) -> str:
    """A manual page as mandoc renders it, without line wrapping; empty when it only points at another page."""
    source = read_file(path)
    if len(source) < 200 or source.lstrip().startswith(".so "):
        return ""
    command = [str(mandoc), "-T", "ascii", "-O", "width=1000"]
    result = subprocess.run(command, input=source.encode(), capture_output=True, timeout=20, check=False)
    text = re.sub(r".\x08", "", result.stdout.decode("ascii", errors="replace"))
    return tidy("\n".join(line[2:] if line.startswith("   ") else line for line in text.split("\n")[1:-2]))


class MarkupText(HTMLParser):
    """Collects the text of HTML, DocBook or Mallard: a tag that is not inline starts a new line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0
        self.preserving = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in SKIPPED
        self.preserving += tag in PRESERVED
        if tag not in INLINE:
            self.parts.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in SKIPPED))
        self.preserving = max(0, self.preserving - (tag in PRESERVED))
        if tag not in INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.preserving else re.sub(r"\s+", " ", data))


def markup(text: str) -> str:
    """The text of an HTML or XML document."""
    parser = MarkupText()
    parser.feed(text)
    lines = "".join(parser.parts).replace("\u00a0", " ").replace("\u00b6", "").split("\n")
    return tidy("\n".join(line for line in lines if line.strip()))


def info_manual(text: str) -> str:
    """A GNU Info file without its node headers and index tables."""
    nodes = text.split("\x1f")[1:]
    kept = [node.split("\n", 2)[-1] for node in nodes if node.lstrip().startswith("File:") and "[index" not in node]
    return tidy(unwrap("\n".join(kept)))


def number(digits: str) -> int:
    """An offset or a length as dictd writes it: base 64, most significant digit first."""
    padded = base64.b64decode("A" * (-len(digits) % 4) + digits)
    return int.from_bytes(padded, "big")


def clean_entry(text: str) -> str:
    """A dictionary entry on one line, without pronunciations, etymologies and source tags."""
    text = re.sub(r" ?\n\s*", " ", text.strip())
    text = re.sub(r"\\[^\\]{1,60}\\ ?(\([^)]{1,60}\))?", "", text)
    for _ in range(2):
        text = re.sub(r"\[[^\[\]]*\]", "", text)
    return re.sub(r"  +", " ", text.replace("{", "").replace("}", "")).strip()


def dictionary(index: Path) -> Iterator[tuple[str, str]]:
    """Every entry of a dictd dictionary as (headword, text)."""
    data = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    seen = set()
    for line in index.read_text(encoding="utf-8", errors="replace").split("\n"):
        fields = line.split("\t")
        if len(fields) < 3 or fields[0].startswith("00") or fields[1] in seen:
            continue
        seen.add(fields[1])
        start = number(fields[1])
        entry = data[start : start + number(fields[2])].decode("utf-8", errors="replace")
        yield fields[0], clean_entry(entry)
