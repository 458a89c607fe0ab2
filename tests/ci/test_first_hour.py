"""What the newcomer's script carries out is what README.md tells a newcomer to type."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = re.findall(r"(?m)^step '(.+)'$", (ROOT / "ci" / "first_hour.sh").read_text(encoding="utf-8"))


def test_an_own_adapter_takes_five_commands_and_each_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"(?ms)^```sh\n(.*?)^```", readme))
    typed = [re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines()]
    assert 0 < len(STEPS) <= 5
    assert [step for step in STEPS if step not in typed] == []
