"""What `data.train_on: last` and `data.mask_reasoning` train with the chat templates that `trl` and `transformers`
publish, and that no generation prompt is ever trained.

Each template meets four conversations with several answers, calls, and reasoning as a field and inside contents. For
each pair, against masks that are found in another way:
- `last` trains what flags of weight 0 on all earlier answers leave;
- where transformers' generation prompt before the last answer begins the row's text, nothing of it is trained;
- `mask_reasoning` takes the loss from the row's thoughts, wherever the template writes them, and from white space
  beside them; from nothing else.
Anything else is a fault: it is listed, and the command ends with 1.

    pip download --no-deps trl --dest wheels
    python benchmarks/chat_template_options.py --trl wheels/trl-*.whl --out docs/runs/chat_template_options.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from chat_templates import CONVERSATIONS, templates_of_transformers, templates_of_trl, write_folder
from jinja2.exceptions import TemplateError

from qlora_hal.config.schema import DataConfig
from qlora_hal.contract.values import Int32
from qlora_hal.data import ChatTokenizer, prepare
from qlora_hal.data.tokens.token_rows import UInt8
from qlora_hal.errors import DataError, QloraHalError

THOUGHTS = ("counting fingers", "adding onwards")
ROWS: Mapping[str, Mapping[str, Any]] = {
    **{title: CONVERSATIONS[title] for title in ("multi turn", "tools", "reasoning")},
    "reasoning in contents": {
        "messages": [
            {"role": "user", "content": "Two plus two?"},
            {"role": "assistant", "content": f"<think>\n{THOUGHTS[0]}\n</think>\n\nFour."},
            {"role": "user", "content": "Plus nine?"},
            {"role": "assistant", "content": f"<think>\n{THOUGHTS[1]}\n</think>\n\nThirteen."},
        ]
    },
}


@dataclass(slots=True)
class Options:
    """One template with each option."""

    folder: Path
    tokenizer: ChatTokenizer
    transformers: Any

    def checked(self, row: Mapping[str, Any]) -> list[str]:
        """What was found of a conversation: words of `held`, or faults that begin with `fault`."""
        try:
            ids, usual, _ = self._prepared(row)
        except QloraHalError as error:
            return [f"refused: {error.code}"]
        return [*self._last(row, ids), *self._reasoning(row, ids, usual)]

    def _prepared(self, row: Mapping[str, Any], **settings: object) -> tuple[Int32, UInt8, list[str]]:
        config = DataConfig.model_validate({"max_seq_length": 8192, **settings})
        data = prepare(config, self.tokenizer, cache_dir=self.folder / "cache", seed=0, rows=[row])
        return *data.train.row(0), data.report.lines()

    def _last(self, row: Mapping[str, Any], ids: Int32) -> list[str]:
        messages = row["messages"]
        last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
        flagged = [
            {**message, "weight": 0} if message["role"] == "assistant" and number != last else message
            for number, message in enumerate(messages)
        ]
        try:
            found, mask, _ = self._prepared(row, train_on="last")
        except DataError as error:
            return [f"fault: train_on last is refused: {error.code}"]
        _, expected, _ = self._prepared({**row, "messages": flagged})
        faults = [] if np.array_equal(found, ids) and np.array_equal(mask, expected) else ["fault: other mask of last"]
        return [*faults, "last as flagged", *self._prompt(row, last, found, mask)]

    def _prompt(self, row: Mapping[str, Any], last: int, ids: Int32, mask: UInt8) -> list[str]:
        try:
            prompt = self.transformers.apply_chat_template(
                row["messages"][:last],
                tools=row.get("tools"),
                tokenize=True,
                return_dict=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError):  # it refuses the beginning of the conversation, or cannot write it
            return ["prompt: none"]
        if list(prompt) != ids[: len(prompt)].tolist():
            return ["prompt: not the beginning of the row"]
        return ["fault: the generation prompt is trained"] if mask[: len(prompt)].any() else ["prompt without loss"]

    def _reasoning(self, row: Mapping[str, Any], ids: Int32, usual: UInt8) -> list[str]:
        held, masked, _ = self._prepared(row, mask_reasoning=True)
        if not np.array_equal(held, ids) or (masked > usual).any():
            return ["fault: more is trained with mask_reasoning"]
        before, after = (" ".join(self._texts(ids, mask)) for mask in (usual, masked))
        thoughts = [thought for thought in THOUGHTS if thought in before]
        faults = [f"fault: {thought} is trained" for thought in thoughts if thought in after]
        removed = [text.strip() for text in self._texts(ids, usual - masked)]
        faults += [f"fault: without loss is {text!r}" for text in removed if text and text not in THOUGHTS]
        return [*faults, f"thoughts without loss: {len(thoughts)}"]

    def _texts(self, ids: Int32, mask: UInt8) -> Sequence[str]:
        """The text of each run of tokens with a mask."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        return [self.tokenizer.decode(ids[first:last].tolist(), False) for first, last in edges.reshape(-1, 2)]


def checked(templates: Mapping[str, str]) -> dict[str, dict[str, list[str]]]:
    """What was found, by template and conversation."""
    from transformers import AutoTokenizer

    everything = "\n".join(templates.values())
    found: dict[str, dict[str, list[str]]] = {}
    for name, template in templates.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_folder(folder, everything, template)
            options = Options(folder, ChatTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(place))
            found[name] = {title: options.checked(row) for title, row in ROWS.items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="a wheel of trl")
    parser.add_argument("--out", type=Path, help="where the record goes")
    parser.add_argument("--only", default="", help="templates whose name holds this")
    arguments = parser.parse_args()
    templates = {**templates_of_trl(arguments.trl), **templates_of_transformers()}
    found = checked({name: text for name, text in templates.items() if arguments.only in name})
    pairs = {f"{name}: {title}": held for name, row in found.items() for title, held in row.items()}
    trl_version = arguments.trl.name.split("-")[1]
    record = {
        "command": "python benchmarks/chat_template_options.py --trl WHEEL --out docs/runs/chat_template_options.json",
        "versions": {"trl": trl_version, **{name: version(name) for name in ("transformers", "tokenizers")}},
        "templates": len(found),
        "pairs": len(pairs),
        "found": dict(Counter(one for held in pairs.values() for one in held if "fault" not in one).most_common()),
        "faults": {pair: held for pair, held in pairs.items() if any("fault" in one for one in held)},
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1, ensure_ascii=False))
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
