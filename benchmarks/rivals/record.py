"""The suite's results on the rivals, as one record and one table.

    python -m benchmarks.rivals.record peft_bitsandbytes=RESULTS.json,LATER.json mlx_lm=RESULTS.json ...

Of several results of one rival, a later one replaces the cases that it ran. Writes `docs/runs/rivals.json` and the
tables between the marks of `docs/rivals.md`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs"
RECORD, PAGE = DOCS / "runs" / "rivals.json", DOCS / "rivals.md"
START, END = "<!-- tables: benchmarks/rivals/record.py -->\n", "<!-- end of tables -->"
GREEN = ("passed", "refused")

NOT_FINITE = "A step with a loss or gradient that is not finite is taken like any other, and the adapter is lost."
PAD_TOKEN = (
    "`default_loss` counts one token too many: its mask is `step <= length`, so the first padding token of each padded "
    "row is trained on."
)
MEAN_OF_MEANS = "Micro-batches count alike, however many tokens they have: a mean of means."
NO_TOKEN = "A micro-batch without a counted token is 0/0, and NaN goes into every gradient."
NO_DENOMINATOR = "The trainer takes no count of a global window, so the adapter cannot hand it one."
IN_FLOAT32 = (
    "MLX's AdamW takes 1 - beta^t in float32, where 1 - 0.999 keeps half its digits: each update is off by less than "
    "1 part in 10,000."
)
SCALES_TAKEN = (
    "PEFT's `dequantize_module_weight`, which the adapter's view uses, takes the scales of an int8 layer that has run: "
    "its next product raises."
)
NO_LABELS = "mlx-lm has no labels: the targets are the tokens themselves, under a mask."
FULL_WIDTH = "A layer whose width is no multiple of the group is left unquantized, without a word."

REASONS: Mapping[str, Sequence[tuple[str, str]]] = {
    "peft_bitsandbytes": (
        (
            r"20_.*\[nf4-128\]",
            "Its checkpoints may have other block sizes than the one it quantizes with; a spec cannot say that, so the "
            "adapter refuses: no fault of the library.",
        ),
        (r"41_.*int8", SCALES_TAKEN),
        (
            r"30_.*int8",
            "LLM.int8 rounds the activations to 8 bits too, so its product is not that of its own weights.",
        ),
        (r"refused_step|after_a_refused|not_finite", NOT_FINITE),
        (
            r"missing_tensor|another_shape|another_model|left_over",
            "transformers draws what is missing at random and drops what it does not know: a warning, no error.",
        ),
        (
            r"broken_configuration",
            "An empty config.json is a Llama of 7 billion parameters, drawn at random, until memory or time is up.",
        ),
        (r"number_of_new_tokens", "`generate` does not take 0 new tokens."),
    ),
    "mlx_lm": (
        (r"labels_decide", NO_LABELS),
        (r"without_a_counted_token", NO_TOKEN),
        (r"denominator_is_that", NO_DENOMINATOR),
        (r"rows_without_a_whole", FULL_WIDTH),
        (r"evaluation_of_nothing", "`evaluate` of no token is 0/0."),
        (
            r"young_update",
            "The adapter's part is rounded to bfloat16 and then added in bfloat16: small updates vanish.",
        ),
        (r"refused_step|after_a_refused|not_finite\[.*(nan|infinity)|steps_after_many", NOT_FINITE),
        (
            r"window_that_no_memory",
            "The adapter looked at the window before it was ready for its size: its fault, mended since.",
        ),
        (r"41_|unequal|window|many_", f"{MEAN_OF_MEANS} {PAD_TOKEN}"),
        (r".", PAD_TOKEN),
    ),
    "mlx_lm_summed": (
        (r"labels_decide", NO_LABELS),
        (r"without_a_counted_token", NO_TOKEN),
        (r"denominator_is_that", NO_DENOMINATOR),
        (r"refused_step|after_a_refused|not_finite", NOT_FINITE),
        (r".", IN_FLOAT32),
    ),
}
"""For each rival the first pattern that a red case's name has, and what is behind it."""


def merged(files: Iterable[Path]) -> dict[str, Any]:
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    cases = {case["case"]: case for document in documents for case in document["cases"]}
    return {**documents[0], "cases": list(cases.values())}


def reason(rival: str, case: Mapping[str, Any]) -> str:
    return next((why for pattern, why in REASONS[rival] if re.search(pattern, case["case"])), "Not known.")


def judged(rival: str, document: Mapping[str, Any]) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {}
    for case in document["cases"]:
        section = sections.setdefault(
            case["case"].partition("/")[0], {"passed": 0, "failed": 0, "refused": 0, "worst": None, "worst_case": ""}
        )
        section["failed" if case["verdict"] not in GREEN else case["verdict"]] += 1
        if case["verdict"] == "passed":
            for measure in case["measures"]:
                if measure["bound"] and (section["worst"] or 0.0) < (ratio := measure["measured"] / measure["bound"]):
                    section["worst"], section["worst_case"] = ratio, case["case"]
    red = [case for case in document["cases"] if case["verdict"] not in GREEN]
    return {
        "seed": document["seed"],
        "suite": document["suite"],
        "device": document["device"],
        "machine": document["machine"],
        "capabilities": document["backend"]["capabilities"],
        "sections": sections,
        "red": [
            {"case": c["case"], "verdict": c["verdict"], "message": c["message"][:300], "why": reason(rival, c)}
            for c in red
        ],
    }


def tables(rivals: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join(line for name, result in rivals.items() for line in table(name, result))


def table(name: str, result: Mapping[str, Any]) -> list[str]:
    lines = [f"### `{name}`", "", "| section | passed | failed | refused | worst error / bound where passed |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for section, found in result["sections"].items():
        worst = "" if found["worst"] is None else f"{found['worst']:.2g}"
        lines.append(f"| {section} | {found['passed']} | {found['failed']} | {found['refused']} | {worst} |")
    total = {kind: sum(s[kind] for s in result["sections"].values()) for kind in ("passed", "failed", "refused")}
    lines += [f"| all | {total['passed']} | {total['failed']} | {total['refused']} | |", ""]
    reasons: dict[str, list[str]] = {}
    for case in result["red"]:
        reasons.setdefault(case["why"], []).append(case["case"])
    lines += ["| why | red cases |", "| --- | --- |"] if reasons else []
    for why, cases in sorted(reasons.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(f"`{case}`" for case in cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")
        lines.append(f"| {why} | {len(cases)}: {shown} |")
    return [*lines, ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RIVAL=FILE[,FILE]")
    given = dict(argument.split("=", 1) for argument in parser.parse_args().results)
    found = {name: judged(name, merged(map(Path, files.split(",")))) for name, files in given.items()}
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + "\n" + tables(found) + END + rest.partition(END)[2], encoding="utf-8")
