"""The log of a run as a table: a row for each step, with the evaluation that followed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_hal.report.metrics import read_metrics


class MetricsTable(list[dict[str, Any]]):
    """Rows by step, from step 0 where the base was evaluated. A row has what was logged: `loss`, `learning_rate`,
    `grad_norm` and so on, and `eval_loss` with `eval_<name>` of each metric where an evaluation followed."""

    @classmethod
    def of_run(cls, path: Path) -> MetricsTable:
        """Of a metrics.jsonl; of a step that stands there twice the last line counts. Raises OSError."""
        steps: dict[int, dict[str, Any]] = {}
        for record in read_metrics(path):
            step = record.get("step")
            if isinstance(step, int):
                steps.setdefault(step, {}).update(record)
        return cls(steps[step] for step in sorted(steps))

    def columns(self) -> dict[str, list[Any]]:
        """The same by column, with None where a row has no such figure."""
        names = dict.fromkeys(name for row in self for name in row)
        return {name: [row.get(name) for row in self] for name in names}

    def to_pandas(self) -> Any:
        """A pandas DataFrame. Raises ImportError where pandas is not installed."""
        import pandas

        return pandas.DataFrame(self.columns())
