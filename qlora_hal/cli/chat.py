"""`qlora-hal chat`: a conversation with two models at once, to see what the adapter changed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from qlora_hal.cli.arguments import TrustOption
from qlora_hal.cli.generate import (
    AdapterOption,
    BackendOption,
    LengthOption,
    MismatchOption,
    ModelOption,
    RunOption,
)
from qlora_hal.errors import ConfigError, DataError, StorageError
from qlora_hal.errors.terminal_text import show, visible
from qlora_hal.files.output_path import write_whole

if TYPE_CHECKING:
    from rich.console import Console

Message = dict[str, str]

_HELP = "/reset starts over, /save FILE saves the conversation as JSON, /stats shows counts, /quit ends the chat."


class Answers(Protocol):
    """What answers: `qlora_hal.inference.loaded_model.LoadedModel`."""

    def generate(self, messages: Sequence[Message], *, adapter: bool, max_new_tokens: int) -> str: ...


@dataclass(slots=True)
class Conversation:
    """Two conversations that share the user's turns; each model sees its own answers."""

    base: list[Message] = field(default_factory=list)
    adapter: list[Message] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.adapter)

    def ask(self, answers: Answers, text: str, *, max_new_tokens: int) -> tuple[str, str]:
        """Both answers to the next turn of the user."""
        turn = {"role": "user", "content": text}
        started = time.perf_counter()
        base = answers.generate([*self.base, turn], adapter=False, max_new_tokens=max_new_tokens)
        adapter = answers.generate([*self.adapter, turn], adapter=True, max_new_tokens=max_new_tokens)
        self.seconds += time.perf_counter() - started
        self.base += [turn, {"role": "assistant", "content": base}]
        self.adapter += [turn, {"role": "assistant", "content": adapter}]
        return base, adapter


def chat(
    *,
    run: RunOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    backend: BackendOption = "auto",
    allow_base_mismatch: MismatchOption = False,
    trust_remote_code: TrustOption = False,
    max_new_tokens: LengthOption = 256,
) -> int:
    """Chat with the base model and the trained one, side by side. Ends with /quit or the end of input."""
    from rich.console import Console

    from qlora_hal.inference.generate import open_generation
    from qlora_hal.run.samples import PLAIN_NOTE

    opened = open_generation(
        run_dir=run,
        adapter_dir=adapter,
        model=model,
        backend=backend,
        allow_base_mismatch=allow_base_mismatch,
        trust_remote_code=trust_remote_code,
    )
    with closing(opened) as pair:
        if pair.plain:
            show(f"note: {PLAIN_NOTE}", stream=sys.stderr)
        converse(pair, sys.stdin, Console(highlight=False, markup=False), max_new_tokens=max_new_tokens)
    return 0


def converse(answers: Answers, source: TextIO, console: Console, *, max_new_tokens: int) -> None:
    """Read turns until /quit or the end, and show both answers to each."""
    conversation = Conversation()
    if source.isatty():
        console.print(_HELP, style="dim")
    for line in _lines(source, console):
        if line == "/quit":
            return
        if line == "/reset":
            conversation = Conversation()
            console.print("The conversation starts over.", style="dim")
        elif line == "/stats":
            console.print(_stats(conversation), style="dim")
        elif line.startswith("/save"):
            _try_to_save(conversation, line.removeprefix("/save").strip(), console)
        elif line.startswith("/"):
            console.print(_HELP, style="dim")
        elif line:
            try:
                _show(console, *conversation.ask(answers, line, max_new_tokens=max_new_tokens))
            except (ConfigError, DataError) as error:  # beyond the model's positions, or no text
                console.print(visible(f"{error.message} {error.fix}"), style="red")


def save_conversation(conversation: Conversation, file: Path) -> None:
    """Write both conversations as JSON. Raises StorageError; an existing file is never replaced."""
    content = {"base": conversation.base, "adapter": conversation.adapter}
    try:
        write_whole(file, json.dumps(content, ensure_ascii=False, indent=2))
    except FileExistsError as error:
        raise _not_saved(file, "something of that name is there already") from error
    except OSError as error:
        raise _not_saved(file, error.strerror or str(error)) from error
    except ValueError as error:  # a zero byte, or half of a character
        raise _not_saved(file, "no file can have that name") from error


def _not_saved(file: Path, reason: str) -> StorageError:
    return StorageError("QH-S12", f"{file} cannot be written: {reason}.", where=str(file), fix="Choose another name.")


def _lines(source: TextIO, console: Console) -> Iterator[str]:
    watched = source.isatty()
    while True:
        if watched:
            console.print("you> ", end="", style="bold")
        line = source.readline()
        if not line:
            return
        yield line.strip()


def _show(console: Console, base: str, adapter: str) -> None:
    if not console.is_terminal:
        console.print(visible(f"base:    {base}\nadapter: {adapter}"), soft_wrap=True)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    table.add_column("base", ratio=1, overflow="fold")
    table.add_column("adapter", ratio=1, overflow="fold")
    table.add_row(Text(visible(base)), Text(visible(adapter)))
    console.print(table)


def _stats(conversation: Conversation) -> str:
    characters = sum(len(m["content"]) for m in conversation.adapter if m["role"] == "assistant")
    turns = f"{conversation.turns} turn{'' if conversation.turns == 1 else 's'}"
    return f"{turns}, {characters} characters answered with the adapter, {conversation.seconds:.1f} s"


def _try_to_save(conversation: Conversation, name: str, console: Console) -> None:
    if not name:
        console.print("/save needs a file name.", style="dim")
        return
    try:
        save_conversation(conversation, Path(name))
        console.print(visible(f"saved {name}"), style="dim")
    except StorageError as error:
        console.print(visible(error.message), style="red")
