"""The arguments of a training script or notebook, read from its syntax. Nothing of it is run.

A value counts where it is written down: a number, a text, a list of them, or a name that one line sets to such a value.
Anything else is `Computed`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.config.other_tools.tables import Computed, Value
from qlora_hal.errors import ConfigError
from qlora_hal.files import strict_json
from qlora_hal.files.opening import read_stored

_CONFIGURATIONS = frozenset({"SFTConfig", "TrainingArguments", "UnslothTrainingArguments"})
_TRAINERS = frozenset({"SFTTrainer", "UnslothTrainer", "Trainer"})
_OBJECTS = frozenset(
    {
        *("model", "tokenizer", "processing_class", "train_dataset", "eval_dataset", "args", "peft_config"),
        *("data_collator", "callbacks", "compute_metrics", "formatting_func", "optimizers"),
    }
)
_OTHER_OBJECTIVES = (
    "DPO",
    "ORPO",
    "KTO",
    "GRPO",
    "PPO",
    "CPO",
    "RLOO",
    "Reward",
    "GKD",
    "OnlineDPO",
    "SentenceTransformer",
)
_METHODS = frozenset({"get_peft_model"})
_FUNCTIONS = frozenset({"load_dataset", "train_on_responses_only", "get_chat_template"})
_RECORDS = frozenset({"LoraConfig", "BitsAndBytesConfig"})
_LOADERS = ("AutoModelFor", "Fast")
_READ_NAMES = _CONFIGURATIONS | _TRAINERS | _METHODS | _FUNCTIONS | _RECORDS | {"from_pretrained"}
_POSITIONAL = {
    "from_pretrained": ("model_name",),
    "load_dataset": ("path", "name"),
    "TrainingArguments": ("output_dir",),
    "SFTConfig": ("output_dir",),
    **dict.fromkeys(_TRAINERS, ("model",)),
}
_OTHER_NAMES = {"pretrained_model_name_or_path": "model_name", "model_id": "model_name"}
_MOST_BYTES = 16 * 1024 * 1024
"""Of a notebook with its pictures; its code, as a script, has far less."""
_MOST_CODE = 1024 * 1024
_SHELL = re.compile(r"\s*(?:[!%?]|[\w.,\s\[\]]+=\s*[!%]|[\w.]+\?{1,2}\s*$)")
"""A line for a notebook's own shell: a command, a magic, a value made by one of them, a question."""


@dataclass(frozen=True, slots=True)
class Script:
    """What its calls say: values and lines by `Call.argument` or, for training arguments, `argument`; `names` are those
    of the classes and functions that it calls; `objective` is another objective than fine-tuning, or nothing."""

    values: Mapping[str, Value]
    lines: Mapping[str, int]
    names: frozenset[str]
    objective: str


def read_script(path: Path) -> Script:
    """Read `.py` or `.ipynb`. Raises ConfigError (QH-U02, QH-U03)."""
    text = _text(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(
            "QH-U03",
            f"{path.name} is not Python that can be read: "
            f"{getattr(error, 'msg', None) or str(error) or 'it is nested too deeply'}.",
            where=f"{path}:{line}" if line else str(path),
            fix="Correct that line, or write its arguments into a YAML file.",
        ) from error
    return _arguments(tree)


def _text(path: Path) -> str:
    try:
        raw = read_stored(path, _MOST_BYTES)
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        is_notebook = path.suffix.lower() == ".ipynb"
        text = "\n".join(_cells(strict_json.decode_foreign(raw))) if is_notebook else raw.decode("utf-8-sig")
        if len(text) > _MOST_CODE:
            raise ValueError(f"it has {len(text)} characters of code, more than the limit of {_MOST_CODE}")
        return text
    except OSError as error:
        raise ConfigError(
            "QH-U02",
            f"{path} cannot be read: {error.strerror or error}.",
            where=str(path),
            fix="Check the path.",
        ) from error
    except (strict_json.JsonProblem, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            "QH-U03",
            f"{path.name} is not well formed: {error}.",
            where=str(path),
            fix="Save it again as UTF-8, or write its arguments into a YAML file.",
        ) from error


def _cells(notebook: object) -> Iterator[str]:
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    for cell in cells if isinstance(cells, list) else []:
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source", "")
            yield _python_of("".join(map(str, source)) if isinstance(source, list) else str(source))


def _python_of(cell: str) -> str:
    """A cell without lines for the notebook's own shell, which are no Python. What still is none is left out where
    nothing in it could say anything of a run, and is kept, to be refused, where it could."""
    if _is_python(cell):
        return cell
    lines = cell.splitlines()
    continued = False
    for number, line in enumerate(lines):
        if is_shell := continued or _SHELL.match(line) is not None:  # `pass` keeps a block that holds nothing else
            lines[number] = line[: len(line) - len(line.lstrip())] + "pass" if not continued else ""
        continued = is_shell and line.rstrip().endswith("\\")
    text = "\n".join(lines)
    if _is_python(text):
        return text
    return text if any(name in cell for name in _READ_NAMES) else ""


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _arguments(tree: ast.Module) -> Script:
    written = _constants(tree)
    values: dict[str, Value] = {}
    lines: dict[str, int] = {}
    names: set[str] = set()
    objective = ""
    calls = sorted((node for node in ast.walk(tree) if isinstance(node, ast.Call)), key=lambda call: call.lineno)
    for call in calls:
        owner, name = _called(call)
        names |= {owner, name}
        if name.endswith(("Config", "Trainer")) and name.startswith(_OTHER_OBJECTIVES):
            objective = name
        prefix = _prefix(owner, name)
        if prefix is None:
            continue
        found = dict(_keywords(call, name, written))
        if name == "train_on_responses_only":
            found["called"] = True
        for argument, value in found.items():
            # Old releases of TRL took what is SFTConfig's today.
            key = argument if name in _TRAINERS and argument not in _OBJECTS else f"{prefix}{argument}"
            if key not in values:  # the first call counts: later ones load what was trained
                values[key], lines[key] = value, call.lineno
        if name in _CONFIGURATIONS:
            values.setdefault("trainer", name)
    return Script(values, lines, frozenset(names - {""}), objective)


def _called(call: ast.Call) -> tuple[str, str]:
    """(`FastLanguageModel`, `from_pretrained`), or ("", `SFTConfig`)."""
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = function.value
        last = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
        return last, function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def _prefix(owner: str, name: str) -> str | None:
    """What stands before an argument's name in the tables; None for a call that says nothing of a run."""
    if name in _CONFIGURATIONS:
        return ""
    if name in _TRAINERS:
        return "SFTTrainer."
    if name == "from_pretrained":
        return "from_pretrained." if owner.startswith(_LOADERS) else None
    if name in _METHODS:
        return f"{name}." if owner.startswith("Fast") else None
    return f"{name}." if name in _FUNCTIONS | _RECORDS else None


def _keywords(call: ast.Call, name: str, written: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    for argument, node in zip(_POSITIONAL.get(name, ()), call.args, strict=False):
        yield argument, _value(node, written)
    for keyword in call.keywords:
        if keyword.arg is None:
            yield from _spread(keyword.value, written)
        else:
            yield _OTHER_NAMES.get(keyword.arg, keyword.arg), _value(keyword.value, written)


def _spread(node: ast.expr, written: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    """The arguments that `**` gives, where the mapping is written down."""
    value = _value(node, written)
    if not isinstance(value, Mapping):
        yield "**", Computed(ast.unparse(node))
        return
    for name, given in value.items():
        yield _OTHER_NAMES.get(str(name), str(name)), given


def _constants(tree: ast.Module) -> Mapping[str, Value]:
    """Names that are set once in the whole script, to a value that is written down."""
    assigned: dict[str, list[ast.expr | None]] = {}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
                assigned.setdefault(target.id, []).append(value)
    once = {name: _value(found[0], {}) for name, found in assigned.items() if len(found) == 1 and found[0] is not None}
    return {name: value for name, value in once.items() if not isinstance(value, Computed)}


def _value(node: ast.expr, written: Mapping[str, Value]) -> Value:
    if isinstance(node, ast.Name) and node.id in written:
        return written[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return f"torch.{node.attr}"
    if isinstance(node, ast.Call) and _called(node) == ("", "dict") and not node.args:
        return {word.arg: _value(word.value, written) for word in node.keywords if word.arg is not None}
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Computed(ast.unparse(node))
    if isinstance(value, tuple | set):
        return list(value)
    return value if isinstance(value, str | int | float | bool | list | dict | type(None)) else Computed(repr(value))
