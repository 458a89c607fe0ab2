"""How the user goes on from here: a command in a terminal, a call of Python in a notebook."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shlex import quote


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook: IPython is loaded, and its shell talks to a front end."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def resume_line(run_dir: Path) -> str:
    """What goes on with a run, to be typed where its user is."""
    if not in_notebook():
        return f"qlora-hal resume {quote(str(run_dir))}"
    near = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    return f"qlora_hal.resume({json.dumps(near.as_posix(), ensure_ascii=False)})"
