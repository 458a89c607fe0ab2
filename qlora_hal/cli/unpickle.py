"""`qlora-hal unpickle`: pickled weights into a folder with safetensors."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.cli.train import Switch


def unpickle(
    folder: Annotated[Path, Parameter(name="FOLDER", help="A model or PEFT adapter whose weights are .bin files.")],
    out: Annotated[Path, Parameter(name="OUT", help="A new folder for the same model with safetensors.")],
    /,
    *,
    json: Annotated[bool, Switch, Parameter(help="Print the result as JSON.")] = False,
) -> int:
    """Turn pickled weights into safetensors: qlora-hal unpickle downloaded converted."""
    from qlora_hal.model import pickled_weights
    from qlora_hal.report import figures
    from qlora_hal.report.console import RunConsole

    console = RunConsole(json=json)
    done = pickled_weights.unpickle(folder.expanduser(), out.expanduser(), console.note)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if json:
        print(json_format.dumps(done.as_json(), ensure_ascii=False))
    else:
        print(f"{done.tensor_count} tensors, {figures.size(done.byte_count)}, each compared bit by bit with its pickle")
        print(done.out)
    return 0
