"""A real huggingface_hub client in a child process with a cache of its own, sent to a server on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from qlora_hal.errors import QloraHalError
from qlora_hal.model import hub
from qlora_hal.model.source import resolve_model

asked = json.loads(sys.argv[1])
waits = []
patient = hub.Retries(sleep=waits.append)
hub.Retries = lambda: patient
try:
    source = resolve_model(asked["name"], revision=asked["revision"], trust_remote_code=asked["trust"])
    print(json.dumps({
        "files": sorted(p.name for p in source.path.iterdir()), "revision": source.revision, "waits": waits,
        "linear": len(source.facts.linear_modules), "path": str(source.path),
    }))
except QloraHalError as error:
    print(json.dumps({**error.as_json(), "exit_status": error.exit_status, "waits": waits}))
"""


class Client:
    """Resolves a model in a child that has its own cache; retries do not really sleep, their waits are reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "hf"
        self.patience_seconds = 10

    def resolve(
        self,
        address: str,
        name: str = "org/tiny",
        *,
        revision: str | None = None,
        trust: bool = False,
        offline: bool = False,
    ) -> dict[str, Any]:
        asked = json.dumps({"name": name, "revision": revision, "trust": trust})
        done = self._run([sys.executable, "-c", CHILD, asked], address, offline=offline)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def command(self, address: str, *arguments: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
        """`qlora-hal` with these arguments."""
        return self._run([sys.executable, "-m", "qlora_hal", *arguments], address, offline=offline)

    def _run(self, command: list[str], address: str, *, offline: bool) -> subprocess.CompletedProcess[str]:
        # Nothing of this process's settings: libraries that other tests import change the environment.
        kept = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT")
        environment = {key: os.environ[key] for key in kept if key in os.environ}
        environment |= {
            "HF_ENDPOINT": address, "HF_HOME": str(self.cache), "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(self.patience_seconds),
        }  # fmt: skip
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300)
