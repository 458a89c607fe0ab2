"""From a row to what is trained on: a conversation, or a text with a part that carries loss.

A shape is recognised by the keys of each row, never from the first row alone, so a file may mix shapes and the report
counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_hal.data.source.json_text import decoded_cell
from qlora_hal.data.source.row_errors import MISSING, field_fault, value_fault
from qlora_hal.data.source.row_values import refuse_other_values
from qlora_hal.data.source.rows import Row
from qlora_hal.data.template.turns import Conversation, Message, conversation_of, from_json_text, joined
from qlora_hal.data.tokens.objectives import refuse_other_objective

__all__ = ["EVIDENCE", "USED_COLUMNS", "Conversation", "Example", "Shape", "Writing"]

Shape = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]


@dataclass(frozen=True, slots=True)
class Writing:
    """Text that is trained as it stands; loss falls on `target`, which follows `prompt`."""

    prompt: str
    target: str


Example = Conversation | Writing


def shape_of(value: Mapping[str, object]) -> Shape | None:
    """The shape that a row's keys show, or None. Where keys of several shapes are present, the richer one counts; keys
    without a value count only where there are no others, for a table has every column in every row."""
    if value.get("messages") is not None:
        return "messages"
    return _shape_by({key: held for key, held in value.items() if held is not None}) or _shape_by(value)


def _shape_by(value: Mapping[str, object]) -> Shape | None:
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        turns = value["conversations"]
        first = turns[0] if isinstance(turns, list | tuple) and turns else turns
        return "messages" if isinstance(first, Mapping) and "role" in first else "sharegpt"
    if "prompt" in value and "completion" in value:
        return "prompt_completion"
    if "instruction" in value and "output" in value:
        return "alpaca"
    return "text" if "text" in value else None


EVIDENCE: Mapping[Shape, str] = {
    "messages": "key messages, a list of role and content",
    "sharegpt": "key conversations, a list of from and value",
    "alpaca": "keys instruction and output",
    "prompt_completion": "keys prompt and completion",
    "text": "key text",
}
"""What a shape is recognised by, for the report and for messages."""

_BESIDE_TURNS = frozenset({"system", "system_prompt", "tools", "functions"})

USED_COLUMNS: Mapping[Shape, frozenset[str]] = {
    "messages": _BESIDE_TURNS | {"messages", "conversations"},
    "sharegpt": _BESIDE_TURNS | {"messages", "conversations"},
    "alpaca": _BESIDE_TURNS | {"instruction", "input", "output", "history"},
    "prompt_completion": _BESIDE_TURNS | {"prompt", "completion"},
    "text": frozenset({"text"}),
}
"""The columns that a row of each shape is read from."""


def example_of(row: Row, shape: Shape, input_heading: str = "") -> Example:
    """The row read as `shape`. Raises DataError (QH-D03 field, QH-D12 role), naming file, line and field.

    `input_heading` stands between an Alpaca row's instruction and its input.
    """
    assert isinstance(row.value, Mapping)
    refuse_other_objective(row, row.value, is_text=shape == "text")
    if shape == "alpaca":
        return _alpaca(row, row.value, input_heading)
    return _READ_AS[shape](row, row.value)


def _string(row: Row, value: Mapping[str, object], field: str, *, may_be_absent: bool = False) -> str:
    found = value.get(field, MISSING)
    if isinstance(found, str):
        return found
    if may_be_absent and (found is MISSING or found is None):
        return ""
    raise field_fault(row, field, found, "a string")


def _turns(row: Row, value: Mapping[str, object]) -> Conversation:
    """The turns of a row, whichever of the two names they stand under."""
    messages = value.get("messages")
    if messages is not None and len(value) == 1:
        return conversation_of(row, messages, "messages")
    conversations = value.get("conversations")
    if messages and conversations and messages != conversations:
        raise value_fault(row, "conversations", conversations, "what messages holds, or nothing,")
    only = "conversations" in value and "messages" not in value
    key = "conversations" if only or (conversations and not messages) else "messages"
    return _with_columns(row, value, conversation_of(row, value.get(key, MISSING), key))


def _with_columns(row: Row, value: Mapping[str, object], conversation: Conversation) -> Conversation:
    """The conversation with what other columns say of it: a system message and tools."""
    if len(value) == 1:
        return conversation
    if (system := _system(row, value)) and not _opens_with(row, conversation, system):
        first_target = conversation.first_target and conversation.first_target + 1
        conversation = conversation.after([{"role": "system", "content": system}], first_target=first_target)
    tools = _tools(row, value)
    return replace(conversation, tools=tools, plain=False) if tools else conversation


def _system(row: Row, value: Mapping[str, object]) -> str:
    found = [text for name in ("system", "system_prompt") if (text := _string(row, value, name, may_be_absent=True))]
    if len(set(found)) > 1:
        raise value_fault(row, "system_prompt", found[1], "what system holds, or nothing,")
    return found[0] if found else ""


def _opens_with(row: Row, conversation: Conversation, system: str) -> bool:
    """Whether the turns begin with this very system message; a row with two different ones is refused."""
    first = conversation.messages[0]
    if first["role"] != "system":
        return False
    if joined(first.get("content")) != system:
        raise value_fault(row, "system", system, "the system message of the turns, or nothing,")
    return True


def _tools(row: Row, value: Mapping[str, object]) -> Sequence[object]:
    """The tools of a row: a list of objects or its JSON text; OpenAI's older `functions` in today's form."""
    named = {name: _listed_tools(row, name, value[name]) for name in ("tools", "functions") if value.get(name)}
    tools, functions = named.get("tools", ()), named.get("functions", ())
    if tools and functions:
        raise value_fault(row, "functions", functions, "nothing, as there are tools,")
    return tools or [{"type": "function", "function": function} for function in functions]


def _listed_tools(row: Row, field: str, given: object) -> Sequence[object]:
    wanted = "a list of tools"
    tools = from_json_text(row, given, field, wanted) if isinstance(given, str) and given.strip() else given
    if tools is None or tools == given == "":
        return ()
    if not isinstance(tools, list | tuple):
        raise field_fault(row, field, tools, f"{wanted}, or its JSON text,")
    refuse_other_values(row, tools, field)
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise value_fault(row, f"{field}[{index}]", tool, "an object that describes a tool")
    return [_with_parameters(row, tool, f"{field}[{index}]") for index, tool in enumerate(tools)]


def _with_parameters(row: Row, tool: Mapping[str, object], field: str) -> Mapping[str, object]:
    """A tool whose parameters are an object, also where they are its JSON text: a template would put that in quotes."""
    inner = tool.get("function")
    if isinstance(inner, Mapping):
        described = _with_parameters(row, inner, f"{field}.function")
        return tool if described is inner else {**tool, "function": described}
    parameters = tool.get("parameters")
    if not isinstance(parameters, str) or not parameters.strip():
        return tool
    wanted = "an object that describes parameters"
    read = from_json_text(row, parameters, f"{field}.parameters", wanted)
    if not isinstance(read, Mapping):
        raise value_fault(row, f"{field}.parameters", parameters, f"{wanted}, or its JSON text,")
    return {**tool, "parameters": read}


def _alpaca(row: Row, value: Mapping[str, object], input_heading: str) -> Conversation:
    instruction, output = _string(row, value, "instruction"), _string(row, value, "output")
    extra = _string(row, value, "input", may_be_absent=True)
    asking = [instruction, f"{input_heading}{extra}"] if instruction.strip() else [extra]
    question = "\n\n".join(asking) if extra.strip() else instruction
    asked = Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": output}])
    earlier = _history(row, value["history"]) if value.get("history") else None
    if earlier is not None:
        asked = replace(earlier, messages=[*earlier.messages, *asked.messages], plain=earlier.plain)
    return _with_columns(row, value, asked)


def _history(row: Row, given: object) -> Conversation | None:
    """The exchanges before an Alpaca row's own, trained like it: pairs of question and answer, or turns."""
    wanted = "a list of pairs of question and answer, or of turns"
    history = from_json_text(row, given, "history", wanted) if isinstance(given, str) else given
    if not isinstance(history, list | tuple):
        raise field_fault(row, "history", history, wanted)
    if not history:
        return None
    if all(isinstance(turn, Mapping) for turn in history):
        return conversation_of(row, history, "history")
    messages: list[Message] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise value_fault(row, f"history[{index}]", pair, "a pair of question and answer, two strings,")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return Conversation(messages)


def _prompt_completion(row: Row, value: Mapping[str, object]) -> Example:
    prompt, completion = value.get("prompt", MISSING), value.get("completion", MISSING)
    if isinstance(prompt, str) and isinstance(completion, str):
        turns = _messages_as_text(prompt), _messages_as_text(completion)
        if None in turns:
            return _plain_writing(row, value, prompt, completion)
        prompt, completion = turns
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        before, after = conversation_of(row, prompt, "prompt"), conversation_of(row, completion, "completion")
        both = after.after(before.messages, first_target=len(before.messages))
        return _with_columns(row, value, replace(both, plain=before.plain and after.plain))
    if isinstance(prompt, str):
        raise field_fault(row, "completion", completion, "a string, as prompt is,")
    if isinstance(prompt, list | tuple):
        raise field_fault(row, "completion", completion, "a list of messages, as prompt is,")
    raise field_fault(row, "prompt", prompt, "a string or a list of messages")


def _messages_as_text(text: str) -> object:
    """The messages that a table holds as JSON text; None for any other text."""
    if not text.startswith("[{"):
        return None
    try:
        turns = decoded_cell(text)
    except (ValueError, RecursionError):
        return None
    is_turns = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns
    )
    return turns if is_turns else None


def _plain_writing(row: Row, value: Mapping[str, object], prompt: str, completion: str) -> Writing:
    for name in ("system", "system_prompt", "tools", "functions"):
        if value.get(name):
            fix = "Give prompt and completion as lists of messages, so that a template writes it."
            raise value_fault(row, name, value[name], "nothing next to a prompt that is plain text", fix)
    return Writing(prompt, completion)


def _text(row: Row, value: Mapping[str, object]) -> Writing:
    return Writing("", _string(row, value, "text"))


_READ_AS: Mapping[Shape, Callable[[Row, Mapping[str, object]], Example]] = {
    "messages": _turns,
    "sharegpt": _turns,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
