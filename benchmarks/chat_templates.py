"""What is trained with the chat templates that `trl` and `transformers` publish, against transformers' own answers.

Each template meets twelve conversations. For each pair the row is prepared as for a run, and compared with
`apply_chat_template`: the ids, and where a template (or the variant of it that trl trains with, if it writes the same
text) has `{% generation %}` blocks, the mask as well. A pair is `equal`; `refused` by a fault with its code where
transformers renders (or `refused by both`); or `different on purpose`, for one of the reasons that
docs/what_is_trained.md gives, each of which is checked here by computing what it leads to. Anything else is a fault of
ours: it is listed, and the command ends with 1. So is a word of a conversation that the text does not hold and the data
report does not tell.

The templates are read from the installed package `transformers` and from a wheel of `trl`, of which nothing is run:
    pip download --no-deps trl --dest wheels
    python benchmarks/chat_templates.py --trl wheels/trl-*.whl --out docs/runs/chat_templates.json
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora_hal.config.schema import DataConfig
from qlora_hal.data import ChatTokenizer, prepare
from qlora_hal.data.template.sandbox import TEMPLATE_DATE
from qlora_hal.errors import QloraHalError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rainfall",
            "description": "tells whether it rains",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string", "description": "its name"}},
                "required": ["town"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "clocktime",
            "description": "tells the time",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "its name"}}},
        },
    },
]


def _call(number: int, name: str, **arguments: str) -> dict[str, object]:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


# No word of a content stands in another, so that a missing one can be told.
CONVERSATIONS: Mapping[str, Mapping[str, Any]] = {
    "single turn": {"messages": [_said("user", "Name a colour."), _said("assistant", "Crimson.")]},
    "multi turn": {
        "messages": [
            _said("user", "Name a colour."),
            _said("assistant", "Crimson."),
            _said("user", "Which river?"),
            _said("assistant", "Danube it is."),
        ]
    },
    "system": {
        "messages": [
            _said("system", "Answer briefly."),
            _said("user", "Name a colour."),
            _said("assistant", "Crimson."),
        ]
    },
    "tools": {
        "messages": [
            _said("user", "Weather in Oslo?"),
            _said("assistant", "Looking outside.", tool_calls=[_call(1, "rainfall", town="Oslo")]),
            _said("tool", "drizzling", tool_call_id="call00001", name="rainfall"),
            _said("assistant", "Take umbrellas."),
        ],
        "tools": TOOLS,
    },
    "parallel calls": {
        "messages": [
            _said("user", "Weather and hour?"),
            _said(
                "assistant",
                "",
                tool_calls=[_call(1, "rainfall", town="Bergen"), _call(2, "clocktime", zone="Europe")],
            ),
            _said("tool", "drizzling", tool_call_id="call00001", name="rainfall"),
            _said("tool", "midnight", tool_call_id="call00002", name="clocktime"),
            _said("assistant", "Take umbrellas."),
        ],
        "tools": TOOLS,
    },
    "reasoning": {
        "messages": [
            _said("user", "Two plus two?"),
            _said("assistant", "Four.", reasoning_content="counting fingers"),
            _said("user", "Plus nine?"),
            _said("assistant", "Thirteen.", reasoning_content="adding onwards"),
        ]
    },
    "developer role": {
        "messages": [
            _said("developer", "Use French."),
            _said("user", "Name a colour."),
            _said("assistant", "Cramoisi."),
        ]
    },
    "empty answer": {
        "messages": [
            _said("user", "Say nothing."),
            _said("assistant", ""),
            _said("user", "Name a colour."),
            _said("assistant", "Crimson."),
        ]
    },
    "white space at the edges": {
        "messages": [
            _said("user", "  Name a colour.\n"),
            _said("assistant", "\n\n Crimson. \n"),
            _said("user", "\tWhich river? "),
            _said("assistant", "   Danube it is.\n\n"),
        ]
    },
    "special tokens in contents": {
        "messages": [
            _said("user", "What does {eos} mean?"),
            _said("assistant", "The mark {eos} ends a turn."),
        ]
    },
    "unicode": {
        "messages": [
            _said("user", "\u4f60\u597d\uff0ccafe\u0301?"),
            _said("assistant", "\u05e9\u05dc\u05d5\u05dd \U0001f642\u200d\u2194\ufe0f na\u00efve\u2028."),
        ]
    },
    "parts": {
        "messages": [
            _said("user", [*_parts("Name "), *_parts("a colour.")]),
            _said("assistant", _parts("Crimson.")),
        ]
    },
}

# Tokens that end a turn, and what a template's text has in which they do; the first that fits is the eos.
_ENDS = {
    "gMASK": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "<|return|>": ("<|return|>", "<|call|>"),
    "<|im_end|>": ("<|im_end|>",),
    "<|eot_id|>": ("<|eot_id|>",),
    "<|eot|>": ("<|eot|>",),
    "<end_of_turn>": ("<end_of_turn>",),
    "<turn|>": ("<turn|>",),
    "<end_of_utterance>": ("<end_of_utterance>",),
    "END_OF_TURN_TOKEN": ("<|END_OF_TURN_TOKEN|>",),
    "\uff5cend\u2581of\u2581sentence\uff5c": ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
    "<|end|>": ("<|endoftext|>", "<|end|>"),
    "</s>": ("</s>",),
    "": ("<|endoftext|>",),
}
_MARKER = re.compile(r"<[|\uff5c][^<>\s'\"]*>|<[^<>\s'\"|]*\|>|\[gMASK\]|</s>|<\w+_of_\w+>|<sop>")
_TAG = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")


# the templates ------------------------------------------------------------------------------------------------------
def templates_of_trl(wheel: Path) -> dict[str, str]:
    """The templates in a wheel of trl, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            f"trl/{Path(name).stem}": archive.read(name).decode()
            for name in sorted(archive.namelist())
            if name.startswith("trl/chat_templates/") and name.endswith(".jinja")
        }


def templates_of_transformers() -> dict[str, str]:
    """The templates that transformers' code holds as text, by the module that holds them."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, str] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        raw = path.read_bytes()
        if b"{%" not in raw or b"messages" not in raw:
            continue
        module = ast.parse(raw)
        prose = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
        for node in ast.walk(module):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in prose else None
            if isinstance(text, str) and "{%" in text and re.search(r"\bin messages\b", text):
                found[f"transformers/{path.parent.name}"] = text
    return found


def write_folder(folder: Path, source: str, template: str) -> None:
    """A model folder whose tokenizer has the template's marks as tokens; marks are looked for in `source`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    ends = next(ends for sign, ends in _ENDS.items() if sign in template)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(["<|endoftext|>", "<|begin|>", *ends, *_MARKER.findall(source)])
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 1000,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(CONVERSATIONS), source], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in dict.fromkeys(_TAG.findall(source))])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": ends[0],
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = [tokenizer.token_to_id(token) for token in ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")


# one pair ------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Pair:
    """What came of one template and one conversation."""

    outcome: str
    reasons: list[str] = field(default_factory=list)
    mask: str = ""
    mask_reasons: set[str] = field(default_factory=set)
    told: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Ours:
    """A row as it is trained."""

    ids: list[int]
    mask: list[int]
    lines: list[str]


@dataclass(slots=True)
class Reference:
    """A row as transformers writes it, and why it was not given as it is."""

    text: str
    messages: Sequence[Any]
    tools: object
    reason: str


class Comparison:
    """One template against transformers. `marked` is the template whose `{% generation %}` blocks are the reference."""

    def __init__(self, folder: Path, template: str, marked: str | None) -> None:
        from transformers import AutoTokenizer

        self._theirs: Any = AutoTokenizer.from_pretrained(str(folder))
        self._ours = ChatTokenizer.from_folder(folder)
        self._cache, self._template, self._marked = folder / "cache", template, marked

    def pair(self, conversation: Mapping[str, Any]) -> Pair:
        row = json.loads(json.dumps(conversation).replace("{eos}", self._theirs.eos_token))
        try:
            ours: Ours | QloraHalError = self._prepared(row)
        except QloraHalError as error:
            ours = error
        reference = self._reference(row["messages"], row.get("tools"))
        if isinstance(ours, QloraHalError):
            both = isinstance(reference, Exception) or bool(reference.reason)
            return Pair("refused by both" if both else "refused", [f"{ours.code} {ours.message}"])
        if isinstance(reference, Exception):
            return Pair("fault", faults=[f"trained where transformers fails: {reference}"])
        pair = self._compared(ours, reference)
        pair.told = [line for line in ours.lines if "not written by the template" in line or "no loss" in line]
        self._compare_masks(ours, reference, pair)
        self._check_what_is_told(reference, pair)
        return pair

    def _prepared(self, row: Mapping[str, Any]) -> Ours:
        config = DataConfig.model_validate({"max_seq_length": 8192})
        prepared = prepare(config, self._ours, cache_dir=self._cache, seed=0, rows=[row])
        ids, mask = prepared.train.row(0)
        return Ours(ids.tolist(), mask.tolist(), prepared.report.lines())

    def _rendered(self, messages: Sequence[Any], tools: object, template: str | None = None) -> str:
        text = self._theirs.apply_chat_template(messages, tools=tools, tokenize=False, chat_template=template)
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._theirs(text, add_special_tokens=False)["input_ids"]
        return ids

    # ids -------------------------------------------------------------------------------------------------------------
    def _compared(self, ours: Ours, reference: Reference) -> Pair:
        reasons = [reference.reason] if reference.reason else []
        text, found = reference.text, ours.ids
        for form in set(re.findall(r"strftime_now\(['\"]([^'\"]+)['\"]\)", self._template)):
            if (today := datetime.now().strftime(form)) in text:
                text = text.replace(today, TEMPLATE_DATE.strftime(form))
                reasons.append("the date is a fixed day")
        if self._theirs.decode(found) != text and found[-1] in self._ours.stop_ids:
            found = found[:-1]
            reasons.append("an end token behind the row, for the template writes none")
        if found == self._ids(text):
            return Pair("different on purpose" if reasons else "equal", reasons)
        eos = self._theirs.eos_token
        if "encoded as text" in "\n".join(ours.lines) and self._theirs.decode(found) == text:
            said = sum(part.count(eos) for part in _strings(reference.messages) if part.strip() in text)
            if found.count(self._theirs.eos_token_id) == text.count(eos) - said:
                return Pair("different on purpose", [*reasons, "special tokens in contents are text"])
        return Pair("fault", reasons, faults=[f"other ids: {self._theirs.decode(found)!r} for {text!r}"])

    def _reference(self, messages: Sequence[Any], tools: object) -> Reference | Exception:
        """What transformers writes for a row: as it is, or in the form that holds most of its words."""
        forms: list[tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = [
            ("", dict),
            ("contents in the form that the template takes", _in_parts),
            ("contents in the form that the template takes", _as_text),
            ("arguments of calls in the form that the template takes", _arguments_as_text),
            ("arguments of calls in the form that the template takes", _arguments_as_objects),
        ]
        found: list[Reference] = []
        fault: Exception = ValueError("no form was tried")
        for reason, form in forms:
            changed = [form(message) for message in messages]
            try:
                found.append(Reference(self._rendered(changed, tools), changed, tools, reason))
            except Exception as error:  # templates fail in many ways
                fault = fault if found or reason else error
        return max(found, key=lambda one: _words_held(one.text, messages), default=fault)

    # masks -----------------------------------------------------------------------------------------------------------
    def _compare_masks(self, ours: Ours, reference: Reference, pair: Pair) -> None:
        if self._marked is None or pair.outcome == "fault" or "special tokens in contents are text" in pair.reasons:
            return
        try:
            found = self._theirs.apply_chat_template(
                reference.messages,
                tools=reference.tools,
                chat_template=self._marked,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception:  # the variant refuses what the template takes
            return
        ids, theirs = list(found["input_ids"]), list(found["assistant_masks"])
        if len(ours.ids) == len(ids) + 1 and ours.ids[-1] in self._ours.stop_ids:
            ids, theirs = [*ids, ours.ids[-1]], [*theirs, 0]
        # A date stands in front of all turns and can have another number of tokens.
        behind = len(ids) - theirs.index(1) if 1 in theirs else 0
        if not behind or ids[-behind:] != ours.ids[-behind:] or 1 in ours.mask[:-behind]:
            return
        theirs = [0] * (len(ours.ids) - behind) + theirs[-behind:]
        theirs[0] = 0
        if theirs == ours.mask:
            pair.mask = "equal"
            return
        pair.mask = "different on purpose"
        for start, stop in _runs([a != b for a, b in zip(theirs, ours.mask, strict=True)]):
            reason = self._mask_reason(reference, ours, theirs, start, stop)
            if reason:
                pair.mask_reasons.add(reason)
            else:
                pair.mask = "fault"
                sign, text = "+" if ours.mask[start] else "-", self._theirs.decode(ours.ids[start:stop])
                pair.faults.append(f"mask {sign}{text!r} in {self._theirs.decode(ours.ids)!r}")

    def _mask_reason(self, reference: Reference, ours: Ours, theirs: Sequence[int], start: int, stop: int) -> str:
        text = self._theirs.decode(ours.ids[start:stop])
        if ours.mask[start]:
            behind = start > 0 and theirs[start - 1] and ours.ids[stop - 1] in self._ours.special.ids.values()
            return "the end token behind a block is trained" if behind else ""
        if not text.strip() and start and ours.mask[start - 1]:
            return "white space behind an end token is not trained"
        if any("carry no loss" in line or "carries no loss" in line for line in ours.lines) and not any(
            ours.mask[place] for place in range(start, stop)
        ):
            return "a turn that says nothing, or not what the row holds, is not trained"
        prompts = [
            self._theirs.apply_chat_template(
                reference.messages[:n], tools=reference.tools, tokenize=False, add_generation_prompt=True
            )
            for n, message in enumerate(reference.messages)
            if n and message["role"] == "assistant"
        ]
        if any(text.strip() in prompt[-len(text) - 40 :] for prompt in prompts):
            return "what the generation prompt holds is not trained"
        if all(
            number in self._ours.stop_ids or not self._theirs.decode([number]).strip() for number in ours.ids[start:]
        ):
            return "an end token behind the whole conversation is not trained"
        return ""

    # what is told ----------------------------------------------------------------------------------------------------
    def _check_what_is_told(self, reference: Reference, pair: Pair) -> None:
        """Whether what is missing is told and what is told is missing, found out in another way than by trials."""
        text, messages, told = reference.text, reference.messages, "\n".join(pair.told)
        signs: dict[str, tuple[str, bool]] = {
            "content": (r"messages? (is|are) not written", _are_missing([m.get("content") for m in messages], text)),
            "reasoning": ("reasoning: ", _are_missing([m.get("reasoning_content") for m in messages], text)),
            "tools": ("tools: ", bool(reference.tools) and self._rendered(messages, None) == text),
            "calls": ("tool_calls: ", self._lacks_calls(reference)),
        }
        for what, (sign, is_missing) in signs.items():
            if is_missing != bool(re.search(sign, told)):
                pair.faults.append(f"{what} {'missing and not told' if is_missing else 'told and not missing'}: {told}")

    def _lacks_calls(self, reference: Reference) -> bool:
        calls = [call for message in reference.messages for call in message.get("tool_calls", ())]
        others = [{**call, "function": {**call["function"], "name": f"other{n}"}} for n, call in enumerate(calls)]
        waiting = iter(others)
        changed = [
            {**message, "tool_calls": [next(waiting) for _ in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in reference.messages
        ]
        return bool(calls) and any(
            call["function"]["name"] not in self._rendered(changed, reference.tools) for call in others
        )


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    start = None
    for place, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = place
        elif not flag and start is not None:
            yield start, place
            start = None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "type", "id", "tool_call_id", "parameters", "description"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _words(value: object) -> list[str]:
    return [word for text in _strings(value) for word in text.split()]


def _words_held(text: str, messages: Sequence[Any]) -> int:
    return sum(word in text for word in _words(messages)) - 100 * ("'type': 'text'" in text or '"type": "text"' in text)


def _are_missing(values: Sequence[object], text: str) -> bool:
    return any(word not in text for word in _words(values))


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": _parts(content) if isinstance(content, str) else content}


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": content if isinstance(content, str) else "".join(part["text"] for part in content)}


def _arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    return _with_arguments(message, lambda value: value if isinstance(value, str) else json.dumps(value))


def _arguments_as_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    return _with_arguments(message, lambda value: json.loads(value) if isinstance(value, str) else value)


def _with_arguments(message: Mapping[str, Any], form: Any) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": form(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


# all of them ---------------------------------------------------------------------------------------------------------
def compared(templates: Mapping[str, str]) -> dict[str, dict[str, Pair]]:
    """The pairs by template and conversation."""
    everything = "\n".join(templates.values())
    found: dict[str, dict[str, Pair]] = {}
    for name, template in templates.items():
        marked = template if "endgeneration" in template else templates.get(f"{name}_training")
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), everything, template)
            comparison = Comparison(Path(folder), template, marked)
            found[name] = {title: comparison.pair(row) for title, row in CONVERSATIONS.items()}
    return found


def record(pairs: Mapping[str, Mapping[str, Pair]], trl_version: str) -> dict[str, object]:
    """The counts, and every pair that is not simply equal."""
    every = [pair for row in pairs.values() for pair in row.values()]
    counts: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    why: dict[str, Counter[str]] = defaultdict(Counter)
    for pair in every:
        counts[pair.outcome] += 1
        if pair.mask:
            masks[pair.mask] += 1
        why["ids"].update(pair.reasons if pair.outcome == "different on purpose" else [])
        why["masks"].update(pair.mask_reasons)
    return {
        "command": "python benchmarks/chat_templates.py --trl WHEEL --out docs/runs/chat_templates.json",
        "versions": {"trl": trl_version, **{name: version(name) for name in ("transformers", "tokenizers", "jinja2")}},
        "templates": len(pairs),
        "conversations": len(CONVERSATIONS),
        "pairs": len(every),
        "ids": dict(counts.most_common()),
        "ids_different_on_purpose": dict(why["ids"].most_common()),
        "masks": dict(masks.most_common()),
        "masks_different_on_purpose": dict(why["masks"].most_common()),
        "pairs_with_something_told": sum(bool(pair.told) for pair in every),
        "faults": {
            f"{name}: {title}": pair.faults for name, row in pairs.items() for title, pair in row.items() if pair.faults
        },
        "not_equal": {
            name: {
                title: _brief(pair)
                for title, pair in row.items()
                if pair.outcome != "equal" or pair.mask_reasons or pair.told
            }
            for name, row in pairs.items()
        },
    }


def _brief(pair: Pair) -> list[str]:
    return [pair.outcome, *pair.reasons, *(f"mask: {reason}" for reason in sorted(pair.mask_reasons)), *pair.told]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="a wheel of trl")
    parser.add_argument("--out", type=Path, help="where the record goes")
    parser.add_argument("--only", default="", help="templates whose name holds this")
    arguments = parser.parse_args()
    templates = {**templates_of_trl(arguments.trl), **templates_of_transformers()}
    chosen = {name: text for name, text in templates.items() if arguments.only in name}
    found = record(compared(chosen), arguments.trl.name.split("-")[1])
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "not_equal"}, indent=1, ensure_ascii=False))
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
