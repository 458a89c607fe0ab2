"""Import every configuration below some folders, and say which keys no table knows: `python
benchmarks/import_configurations.py FOLDER...`. Run it on a tool's published examples after its release."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from qlora_hal.config.other_tools.importing import imported
from qlora_hal.config.other_tools.tables import Fate
from qlora_hal.errors import QloraHalError

ENDINGS = {".yaml", ".yml", ".json", ".py", ".ipynb"}


def main(folders: list[str]) -> None:
    results: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    fates: Counter[Fate] = Counter()
    for file in sorted(path for folder in folders for path in Path(folder).rglob("*") if path.suffix in ENDINGS):
        try:
            made = imported(file)
        except QloraHalError as error:
            results[error.code] += 1
            continue
        results[f"imported as {made.tool.title}"] += 1
        unknown.update(made.unknown)
        fates.update(line.outcome.fate for line in made.lines)
    print("\n".join(f"{count:6} {result}" for result, count in results.most_common()))
    print("keys:", ", ".join(f"{count} {fate.value}" for fate, count in fates.most_common()))
    print(f"keys that no table knows: {unknown.total()} ({len(unknown)} different)")
    print("\n".join(f"{count:6} {key}" for key, count in unknown.most_common(20)))


if __name__ == "__main__":
    main(sys.argv[1:])
