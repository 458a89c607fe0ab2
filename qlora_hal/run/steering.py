"""What observers asked of a run that is under way: part of its state, so that a resume does what was asked before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qlora_hal.hooks import Control

STOP, SAVE, EVALUATE = "stop", "save", "evaluate"


@dataclass(slots=True)
class Steering:
    """What is due once so many steps are taken (two places at most: an answer to a step and one to an evaluation), and
    the factors of the learning rate with the step (from 0) that each begins with. Both are told by steps and not by the
    moment, so a run that was killed in between goes the same way."""

    due: dict[str, list[int]] = field(default_factory=dict)
    factors: list[tuple[int, float]] = field(default_factory=list)

    def heed(self, control: Control, after: int) -> None:
        """It takes hold once `after` steps are taken: from then on the rate is another one."""
        if control.stop:  # a run that has stopped stays so, whatever its last step is answered with
            self.due[STOP] = [min((after, *self.due.get(STOP, ())))]
        for name, asked in ((SAVE, control.save), (EVALUATE, control.evaluate)):
            if asked:
                self.due[name] = sorted({after, *self.due.get(name, ())})[-2:]
        if control.learning_rate_factor is not None:
            factor = self.factor(after) * control.learning_rate_factor
            begun = [change for change in self.factors if change[0] < after]
            self.factors = [*begun[-1:], (after, factor)]  # the one before it may be that of the next step

    def factor(self, step: int) -> float:
        """What the scheduled rate of a step, counted from 0, is multiplied by."""
        return next((factor for begins, factor in reversed(self.factors) if begins <= step), 1.0)

    def is_due(self, name: str, taken: int) -> bool:
        return taken in self.due.get(name, ())

    def has_stopped(self, taken: int) -> bool:
        return any(step <= taken for step in self.due.get(STOP, ()))

    def as_json(self) -> dict[str, object]:
        return {"due": self.due, "factors": [list(change) for change in self.factors]}

    @classmethod
    def from_json(cls, stored: Mapping[str, object]) -> Steering:
        """Raises TypeError or ValueError for what `as_json` does not give."""
        due, factors = stored.get("due", {}), stored.get("factors", [])
        if not isinstance(due, dict) or not isinstance(factors, list | tuple):
            raise ValueError("what observers asked for is no table with a list of factors")
        return cls(dict(due), [(int(begins), float(factor)) for begins, factor in factors])
