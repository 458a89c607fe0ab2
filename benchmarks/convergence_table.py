"""The tables of docs/convergence.md, from the records of `python -m qlora_hal_conformance.convergence --out FILE`.

    python benchmarks/convergence_table.py [--collect FILE ...]

`--collect` adds records of single commands to docs/runs/convergence.json first, each in place of an earlier one of the
same command.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent.parent / "docs" / "runs" / "convergence.json"
Document = dict[str, Any]


def documents() -> list[Document]:
    found: list[Document] = json.loads(RECORD.read_text(encoding="utf-8"))["runs"]
    return found


def table(runs: list[Document], *, defects: bool) -> str:
    """Shift of the mean in standard deviations of the reference, with its interval, and the ratio of the spreads."""
    lines = [
        f"| {'defect' if defects else 'runs'} | base | dtype | records: shift, in sigma | spread | "
        "answers: shift, in sigma | spread | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        if bool(run["defect"] and run["defect"] != "sums_reversed") != defects:
            continue
        cells = [cell for name in ("records", "answers") for cell in _cells(run["tasks"].get(name))]
        stored = run["quantization"]
        base = f"{run['model']}, `{stored['weight_format']}`"
        verdict = "passes" if run["passes"] else "refused"
        lines.append("| " + " | ".join((_name(run, defects), base, run["compute_dtype"], *cells, verdict)) + " |")
    return "\n".join(lines)


def _name(run: Document, defects: bool) -> str:
    if defects:
        return f"`{run['defect']}`"
    first = next(iter(run["tasks"].values()))
    seeds = f"{len(first['final_losses'])} {'' if first['judgement']['paired'] else 'other '}seeds"
    return f"`{run['backend']}`, {seeds}" + (", sums reversed" if run["defect"] else "")


def _cells(task: Document | None) -> tuple[str, str]:
    if task is None:
        return "-", "-"
    sigma, judgement = task["reference"]["standard_deviation"], task["judgement"]
    mean, spread = judgement["mean"], judgement["spread"]
    low, high = (end / sigma for end in mean["interval"])
    return f"{mean['found'] / sigma:+.3f} ({low:+.3f} to {high:+.3f})", f"{spread['found']:.3f}"


def _single(path: Path) -> Document:
    """The record of one command, without the file that it was told to write."""
    run: Document = json.loads(path.read_text(encoding="utf-8"))
    return {**run, "command": without_out(run["command"])}


def without_out(command: str) -> str:
    """The command without `--out FILE`, wherever that stands in it."""
    words = iter(shlex.split(command))
    return shlex.join(word for word in words if not (word == "--out" and next(words)) and not word.startswith("--out="))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", nargs="+", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.collect:
        runs = {run["command"]: run for run in (*documents(), *map(_single, given.collect))}
        RECORD.write_text(json.dumps({"runs": list(runs.values())}, indent=1) + "\n", encoding="utf-8")
    print(table(documents(), defects=False), table(documents(), defects=True), sep="\n\n")


if __name__ == "__main__":
    main()
