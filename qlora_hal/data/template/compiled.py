"""One chat template, compiled with marks in its loops: rendered here, or in the process for templates of strangers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2.nodes

from qlora_hal.data.template.sandbox import Looked, Sandbox, TemplateFault, TooMuch, encloses_generation, shown, size_of
from qlora_hal.data.template.turn_marks import LOOP_FILTERS, Rendering, mark_loops, rendering_of

MAX_OUTPUT_FACTOR, MAX_OUTPUT_FLOOR = 16, 2**16
"""A template may write 16 times what it was given, and 64 Ki characters in any case."""

_LONGEST_FAULT = 500


class _MarkingSandbox(Sandbox):
    """The sandbox, with marks in every loop."""

    def __init__(self, *, quick: bool) -> None:
        super().__init__(quick=quick)
        self.filters.update(LOOP_FILTERS)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        template = super()._parse(source, name, filename)
        mark_loops(template)
        template.set_environment(self)
        return template


class CompiledTemplate:
    """One template in a sandbox of its own. Its size and its output are bounded by ChatTemplate."""

    def __init__(self, source: str, *, quick: bool = False) -> None:
        """Raises TemplateFault when it is no template, TooMuch."""
        self._sandbox = _MarkingSandbox(quick=quick)
        self._sandbox.begin(0, turns=0)
        self._encloses_generation = encloses_generation(source)
        try:
            self._compiled = self._sandbox.from_string(source)
        except (TooMuch, MemoryError):
            raise
        # Deep nesting ends in Python's own compiler and its recursion limit; constants are computed, with any fault.
        except Exception as error:
            raise _fault(error) from error

    def render(self, variables: Mapping[str, Any], *, turns: int, most: int) -> Rendering:
        """The text of the template with these variables, of at most `most` characters, and where each of the `messages`
        stands in it; `turns` is their number. Raises TemplateFault, TooMuch, Looked."""
        self._sandbox.begin(size_of(list(variables.values())), turns)
        pieces: list[str] = []
        try:
            for piece in self._compiled.generate(**variables):
                pieces.append(piece)
                most -= str.__len__(piece)
                if most < 0:
                    raise TooMuch(f"writes more than {MAX_OUTPUT_FACTOR} times its input")
            text = shown(self._sandbox.concat(pieces))
            return rendering_of(pieces, text, variables["messages"], generation=self._encloses_generation)
        except (TooMuch, Looked, MemoryError):
            raise
        except Exception as error:  # what filters and methods make of wrong types is of many kinds
            raise _fault(error) from error


def _fault(error: Exception) -> TemplateFault:
    # The text of an error can hold what the template made.
    return TemplateFault((str(error) or type(error).__name__)[:_LONGEST_FAULT])
