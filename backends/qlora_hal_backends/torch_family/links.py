"""What joins the GPUs of this machine, by what NVIDIA's own tool says; a word for `run.json`, and no decision."""

from __future__ import annotations

import re
import subprocess
from functools import cache

import torch

UNKNOWN = "unknown"
TOPOLOGY = ("nvidia-smi", "topo", "-m")
SECONDS = 20.0


@cache
def links_between(device: torch.device) -> str:
    """`NVLink`, `PCIe`, or both, of all NVIDIA GPUs of this machine, used or not; `this machine` for a CPU; `unknown`
    where the tool is missing or says nothing."""
    if device.type == "cpu":
        return "this machine"
    if device.type != "cuda" or torch.version.hip:
        return UNKNOWN
    try:
        said = subprocess.run(TOPOLOGY, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return links_in(said)


def links_in(topology: str) -> str:
    """The words for a table of `nvidia-smi topo -m`: a row and a column for each GPU, `NV18` for 18 NVLinks, `PIX`,
    `PXB`, `PHB`, `NODE` and `SYS` for ways over PCIe."""
    rows = re.findall(r"^\s*GPU\d+\s+(.*)$", re.sub(r"\x1b\[[0-9;]*m", "", topology), re.MULTILINE)
    rows = [row.split() for row in rows if not re.match(r"GPU\d", row)]  # the head names the columns
    cells = {cell for row in rows for cell in row[: len(rows)] if cell != "X"}
    found = [
        name
        for name, pattern in (("NVLink", r"NV\d+"), ("PCIe", r"PIX|PXB|PHB|NODE|SYS"))
        if any(re.fullmatch(pattern, cell) for cell in cells)
    ]
    return " and ".join(found) or UNKNOWN
