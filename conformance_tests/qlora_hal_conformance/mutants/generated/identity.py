"""What tells one change from all others, in a form that can be written down: `llama:145:21:add_to_sub`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """A module, a place in it (line from 1, column from 0), and what is done there."""

    module: str
    line: int
    column: int
    operator: str

    @classmethod
    def read(cls, text: str) -> Identity:
        """Raises ValueError for text of another form."""
        module, line, column, operator = text.split(":")
        return cls(module, int(line), int(column), operator)

    def __str__(self) -> str:
        return f"{self.module}:{self.line}:{self.column}:{self.operator}"

    @property
    def where(self) -> tuple[int, int, str]:
        return self.line, self.column, self.operator
