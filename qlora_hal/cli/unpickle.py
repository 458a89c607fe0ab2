"""`qlora-hal unpickle`: pickled weights into a folder with safetensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.errors.terminal_text import show, show_json


def unpickle(
    folder: Annotated[Path, Parameter(name="FOLDER", help="A model or PEFT adapter whose weights are .bin files.")],
    out: Annotated[Path, Parameter(name="OUT", help="A new folder for the same model with safetensors.")],
    /,
    *,
    json: Annotated[bool, Switch, Parameter(help="Print the result as JSON.")] = False,
) -> int:
    """Turn pickled weights into safetensors: qlora-hal unpickle downloaded converted."""
    from qlora_hal.errors import figures
    from qlora_hal.files.refused_paths import expanded, named_path
    from qlora_hal.model import pickled_weights
    from qlora_hal.report.console import RunConsole

    console = RunConsole(json=json)
    done = pickled_weights.unpickle(named_path(folder), expanded(out), console.note)
    for note in done.notes:
        show(f"note: {note}", stream=sys.stderr)
    if json:
        show_json(done.as_json())
    else:
        show(f"{done.tensor_count} tensors, {figures.size(done.byte_count)}, each compared bit by bit with its pickle")
        show(str(done.out))
    return 0
