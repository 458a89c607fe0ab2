"""The child process that renders chat templates of strangers: `python -m qlora_hal.data.template.child`.

Requests come as lines of JSON on the standard input, answers go as lines to the standard output. What a template could
do to a process, in spite of the sandbox, is done to this one: its memory is bounded here where the system can do so,
its processor time by the parent (process.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_hal.data.template.compiled import CompiledTemplate
from qlora_hal.data.template.outlines import Unread, Watch
from qlora_hal.data.template.process import UNREAD, memory_allowed
from qlora_hal.data.template.sandbox import Looked, TemplateFault, TooMuch
from qlora_hal.data.template.turn_marks import Rendering

_MOST_KEPT = 16


class _AddressSpace:
    """The limit of this process's address space, from what it has at the start. Nothing where there is no such."""

    def __init__(self) -> None:
        self._at_start = 0
        with suppress(OSError, ValueError, ImportError):
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            self._at_start = pages * resource.getpagesize()

    def allow(self, byte_count: int) -> None:
        if self._at_start:
            import resource

            with suppress(OSError, ValueError):
                hard = resource.getrlimit(resource.RLIMIT_AS)[1]
                resource.setrlimit(resource.RLIMIT_AS, (self._at_start + byte_count, hard))


class _Templates:
    """The templates that were compiled last, by key."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, CompiledTemplate] = OrderedDict()

    def answer(self, request: Mapping[str, Any]) -> dict[str, object]:
        try:
            if "source" in request:
                started = time.thread_time()
                self._kept[request["key"]] = CompiledTemplate(request["source"])
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
                return {"seconds": time.thread_time() - started}
            template = self._kept.get(request["key"])
            if template is None:
                return {"unknown": True}
            self._kept.move_to_end(request["key"])
            return _rendered(template, request)
        except TooMuch as error:
            return {"too_much": str(error)}
        except MemoryError:
            return {"out_of_memory": True}
        except TemplateFault as error:
            return {"fault": str(error)}


def _rendered(template: CompiledTemplate, request: Mapping[str, Any]) -> dict[str, object]:
    watch = Watch()
    variables = request["variables"]
    if request["unread"]:
        variables = _with_unread(variables, watch)
    try:
        rendering = template.render(variables, turns=request["turns"], most=request["most"])
    except Looked:
        rendering = Rendering("", {}, 0, ())
    return {"rendering": rendering.as_json(), "looked": watch.looked, "asked": watch.asked_for_content}


def _with_unread(value: Any, watch: Watch) -> Any:
    if isinstance(value, dict):
        if value.keys() == {UNREAD}:
            return Unread(value[UNREAD], watch)
        return {key: _with_unread(item, watch) for key, item in value.items()}
    return [_with_unread(item, watch) for item in value] if isinstance(value, list) else value


def main() -> int:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to end
    said = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    address_space, templates = _AddressSpace(), _Templates()
    said.write("{}\n")  # ready
    for line in sys.stdin.buffer:
        address_space.allow(memory_allowed(len(line)))
        answer = templates.answer(json.loads(line))
        try:
            said.write(json.dumps(answer) + "\n")
        except MemoryError:
            answer = {"out_of_memory": True}
            said.write(json.dumps(answer) + "\n")
        if "out_of_memory" in answer:
            break  # what is left of the memory is in pieces
    return 0


if __name__ == "__main__":
    sys.exit(main())
