"""Reading a settings file (YAML, TOML or JSON) without trusting it, and remembering the line of every key.

Nothing in a file is executed, interpolated or fetched. YAML is read by YAML 1.2 rules (`1e-4` is a number, `no` a
text), duplicate keys are errors, and a file that would grow when its aliases are written out is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode

from qlora_hal.errors import ConfigError, UnsafeInputError
from qlora_hal.files import strict_json, strict_toml
from qlora_hal.files.opening import read_stored
from qlora_hal.files.refused_paths import named_path

if TYPE_CHECKING:
    from ruamel.yaml.nodes import Node

ENDINGS = (".yaml", ".yml", ".toml", ".json")
BYTE_LIMIT = 256 * 1024
NODE_LIMIT, DEPTH_LIMIT = strict_toml.MAX_VALUES, strict_toml.MAX_DEPTH
"""Keys and values, also after every alias is written out, and groups and lists within one another; the largest sensible
file has a few hundred, three deep."""
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
)
_ENDINGS = (".yaml", ".yml", ".toml", ".json")
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """The content of one file: nested `values`, and `lines` from dotted key to line number (from 1)."""

    path: Path
    values: Mapping[str, object]
    lines: Mapping[str, int]

    def origin(self, key: str) -> str:
        """`run.yaml:12`, or the line of the nearest group above when the key itself has none."""
        while key:
            if key in self.lines:
                return f"{self.path.name}:{self.lines[key]}"
            key = key.rpartition(".")[0]
        return self.path.name


def is_settings_file(named: str | Path) -> bool:
    """Whether a path is one of settings, and not of a model: by its ending, or because a file is there, which no model
    is. Raises OSError as `named_path`."""
    return Path(named).suffix.lower() in ENDINGS or named_path(named).is_file()


def read_settings_file(path: Path) -> SettingsFile:
    """Read `.yaml`, `.yml`, `.toml` or `.json`. Raises ConfigError (U02, U03), UnsafeInputError (X07)."""
    text = _text(path)
    readers = dict(zip(ENDINGS, (_yaml, _yaml, _toml, _json), strict=True))
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            "QH-U02",
            f"Settings file {path.name} ends in {path.suffix or 'nothing'}; one of {', '.join(readers)} is expected.",
            where=str(path),
            fix="Rename the file to the format it is written in.",
        )
    try:
        values, lines = reader(path, text)
    except RecursionError as error:
        raise _refused(path, "its values are nested too deeply") from error
    if not isinstance(values, dict):
        raise ConfigError(
            "QH-U03",
            f"Settings file {path.name} holds {_kind(values)}; groups of settings are expected.",
            where=str(path),
            fix="Run qlora-hal init to get a commented file to start from.",
        )
    return SettingsFile(path, values, lines)


def _text(path: Path) -> str:
    try:
        raw = read_stored(path, BYTE_LIMIT)
        if len(raw) > BYTE_LIMIT:
            raise _refused(path, f"it has {path.stat().st_size} bytes, more than the limit of {BYTE_LIMIT}")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            "QH-U02",
            f"Settings file {path} cannot be read: {error.strerror or error}{_near(path)}",
            where=str(path),
            cause=""
            if path.suffix
            else "An argument without a flag is the settings file; boolean flags take true or false.",
            fix="Check the path, or run qlora-hal init to create one.",
        ) from error
    except UnicodeDecodeError as error:
        _raise_malformed(path, None, f"byte {error.start} is not UTF-8", error)


def _near(path: Path) -> str:
    """`; did you mean run.yaml?` where a settings file of nearly that name lies beside."""
    try:
        beside = {entry.stem: entry for entry in path.parent.iterdir() if entry.suffix.lower() in _ENDINGS}
    except OSError:
        beside = {}
    if path in beside.values():  # it is there, and what is wrong is not its name
        return "."
    near = get_close_matches(path.stem, beside, n=1)
    return f"; did you mean {beside[near[0]]}?" if near else "."


# YAML ------------------------------------------------------------------------------------------------------------


def _yaml(path: Path, text: str) -> tuple[object, dict[str, int]]:
    class CountingComposer(Composer):
        """Ends at a limit while nodes are made, which takes far longer than to read over the text."""

        nodes = depth = 0

        def compose_node(self, parent: Node | None, index: object) -> Node | None:
            self.nodes += 1
            self.depth += 1
            _refuse_above_limits(path, self.nodes, self.depth)
            node: Node | None = super().compose_node(parent, index)
            self.depth -= 1
            return node

    begun: list[Node] = []

    class MarkingConstructor(SafeConstructor):
        """Leaves the node whose value is made where an error finds it. A word with underscores is no number, as YAML
        1.2 has it and its library has not."""

        def construct_object(self, node: Node, deep: bool = False) -> object:
            begun[:] = [node]
            if node.tag in _NUMBER_TAGS and "_" in node.value:
                return node.value
            return super().construct_object(node, deep=deep)

    _refuse_other_versions(path, text)
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.Composer = CountingComposer
        root = yaml.compose(text)
        if root is None:
            return {}, {}
        _refuse_growth_and_tags(path, root)
        yaml = YAML(typ="safe", pure=True)
        yaml.Constructor = MarkingConstructor
        return yaml.load(text), _yaml_lines(root)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = (error.problem or str(error)).splitlines()[0]
        _raise_malformed(path, mark.line + 1 if mark else None, said, error)
    except YAMLError as error:
        _raise_malformed(path, None, str(error).splitlines()[0], error)
    except (ConfigError, UnsafeInputError, RecursionError):
        raise
    except Exception as error:  # values that look like numbers or dates and are none, of many kinds
        _raise_malformed(path, begun[0].start_mark.line + 1 if begun else None, _said(error), error)


def _refuse_other_versions(path: Path, text: str) -> None:
    """By the rules of 1.1 that a directive asks for, 010 is 8 and 1:30 is 90."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("---"):
            return
        if (directive := re.match(r"%YAML\s+(\S+)", line)) and directive[1] != "1.2":
            said = f"it declares YAML {directive[1][:20]}, and is read by the rules of YAML 1.2"
            _raise_malformed(path, number, said, None)


def _refuse_growth_and_tags(path: Path, root: Node) -> None:
    # A node is measured once; its aliases count as often as they stand there.
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise _refused(path, f"the anchor at line {node.start_mark.line + 1} contains itself")
        tag = str(node.tag)
        if tag not in _PLAIN_TAGS and tag != "tag:yaml.org,2002:merge":
            raise _refused(path, f"line {node.start_mark.line + 1} carries the tag {tag}, and tags can run code")
        open_nodes.add(id(node))
        count = 1
        if isinstance(node, SequenceNode):
            count += sum(size(item) for item in node.value)
        elif isinstance(node, MappingNode):
            count += sum(size(key) + size(value) for key, value in node.value)
        open_nodes.discard(id(node))
        sizes[id(node)] = count
        if count > NODE_LIMIT:
            raise _refused(path, f"its aliases expand to more than {NODE_LIMIT} values")
        return count

    size(root)


def _yaml_lines(root: Node) -> dict[str, int]:
    lines: dict[str, int] = {}

    def walk(node: Node, prefix: str) -> None:
        if isinstance(node, MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                lines.setdefault(name, key.start_mark.line + 1)
                walk(value, f"{name}.")

    walk(root, "")
    return lines


# TOML and JSON -----------------------------------------------------------------------------------------------------


def _toml(path: Path, text: str) -> tuple[object, dict[str, int]]:
    try:
        return strict_toml.decode(text), _toml_lines(text)
    except strict_toml.TomlProblem as problem:
        if problem.is_bomb:
            raise _refused(path, str(problem)) from problem
        _raise_malformed(path, problem.line, str(problem), problem)


def _toml_lines(text: str) -> dict[str, int]:
    """Lines of tables and of keys with bare names: what a settings file holds. Others fall back to their table."""
    lines: dict[str, int] = {}
    prefix = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if table := re.match(r"\s*\[([\w.\-]+)\]", line):
            prefix = f"{table[1]}."
            lines.setdefault(table[1], number)
        elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
            lines.setdefault(f"{prefix}{key[1]}", number)
    return lines


def _json(path: Path, text: str) -> tuple[object, dict[str, int]]:
    _refuse_above_limits(path, sum(map(text.count, ",[{")), 0)
    try:
        values = strict_json.decode(text.encode("utf-8"))
    except strict_json.JsonProblem as problem:
        cause = problem.__cause__
        if isinstance(cause, RecursionError):
            raise cause from None
        if isinstance(cause, json.JSONDecodeError):
            _raise_malformed(path, cause.lineno, cause.msg, cause)
        _raise_malformed(path, None, str(problem), problem)
    return values, _json_lines(text)


def _json_lines(text: str) -> dict[str, int]:
    """Lines of keys in JSON that is written one key a line; a key of a one-line group falls back to the group."""
    lines: dict[str, int] = {}
    path: list[str] = []
    pending = ""
    for number, line in enumerate(text.splitlines(), start=1):
        for token in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*(:)?|[{}]', line):
            if token[2]:
                pending = token[1]
                lines.setdefault(".".join([*filter(None, path), pending]), number)
            elif token[0] == "{":
                path.append(pending)
                pending = ""
            elif token[0] == "}" and path:
                path.pop()
    return lines


# Errors ------------------------------------------------------------------------------------------------------------


def _refuse_above_limits(path: Path, nodes: int, depth: int) -> None:
    if nodes > NODE_LIMIT:
        raise _refused(path, f"it holds more than {NODE_LIMIT} values")
    if depth > DEPTH_LIMIT:
        raise _refused(path, f"its values are nested more than {DEPTH_LIMIT} deep")


def _said(error: Exception) -> str:
    """What a library said, without advice that is for programs."""
    return str(error).partition("; use sys.")[0].splitlines()[0][:200] if str(error) else type(error).__name__


def _kind(value: object) -> str:
    return {list: "a list", str: "a text", type(None): "nothing"}.get(type(value), f"a {type(value).__name__}")


def _refused(path: Path, reason: str) -> UnsafeInputError:
    return UnsafeInputError(
        "QH-X07",
        f"Settings file {path.name} is refused: {reason}.",
        where=str(path),
        cause="A settings file is plain data: names and values, without tags, and small when its aliases are expanded.",
        fix="Write the values out plainly; qlora-hal init gives a file to start from.",
    )


def _raise_malformed(path: Path, line: int | None, said: str, cause: Exception | None) -> NoReturn:
    raise ConfigError(
        "QH-U03",
        f"Settings file {path.name} is not well formed: {said}.",
        where=f"{path}:{line}" if line else str(path),
        fix="Correct that line." if line else "Correct the file.",
    ) from cause
