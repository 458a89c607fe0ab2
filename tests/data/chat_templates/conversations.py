"""Messages, templates and what comes of them, for the tests of chat templates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_hal.data import PreparedData

Prepare = Callable[..., PreparedData]
Trained = Callable[..., list[str]]
Message = dict[str, Any]

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|observation|>", "[THINK]"),
    *("<|header_start|>", "<|header_end|>", "<|eot|>", "<end_of_utterance>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>"),
    *("[INST]", "[/INST]", "[/THINK]", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|eom|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    *("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<seed:bos>", "<seed:eos>"),
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "<|start_of_role|>",
        "<|end_of_role|>",
        "<|end_of_text|>",
    ),
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "rain", "description": "tells rain", "parameters": {"type": "object", "properties": {}}},
    }
]
LEAVING_OUT = "not written by the template"


def call(name: str = "rain", number: int = 1, **arguments: object) -> Message:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def said(role: str, content: object = None, **more: object) -> Message:
    return {"role": role, **({} if content is None else {"content": content}), **more}


ASKED = said("user", "Is it raining in Oslo?")
RESULT = said("tool", "no", tool_call_id="c1")
DRY = said("assistant", "No, it is dry.")


@dataclass(frozen=True)
class Rendered:
    """One row as it is trained, beside what transformers writes for it."""

    data: PreparedData
    text: str
    trained: list[str]
    ids: list[int]
    theirs: Callable[..., Any]

    @property
    def alerts(self) -> list[str]:
        return list(self.data.report.alerts)

    @property
    def notes(self) -> list[str]:
        return list(self.data.report.train.notes)


Render = Callable[..., Rendered]

# Tools, calls and results, reasoning in the last turn alone: as many families write them.
CALLING = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content or '' }}"
    "{% for one in m.tool_calls or [] %}"
    "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<call>' + ({'name': one.function.name, 'arguments': one.function.arguments} | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3 does: the last turn has a thinking part in any case, so a turn changes when another follows.
REWRITING = CALLING.replace("and m.reasoning_content and", "and").replace("m.reasoning_content", "(m.thinking or '')")
RAIN = '<call>{"name": "rain", "arguments": {"town": "Oslo"}}</call>'
TIME = '<call>{"name": "time", "arguments": {}}</call>'
END = "<|im_end|>"

THINKING = [
    said("user", "Hi"),
    said("assistant", "<think>one</think>Hello."),
    said("user", "Bye"),
    said("assistant", "<think>two</think>See you."),
]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]
