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

PUSHING = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import qlora_hal
from qlora_hal.errors import QloraHalError
for token, run, repository, choices in json.loads(sys.argv[1]):
    os.environ.update(HF_TOKEN=token)
    try:
        print(json.dumps(qlora_hal.push(run, repository, quiet=True, **choices).as_json()))
    except QloraHalError as error:
        print(json.dumps({**error.as_json(), "exit_status": error.exit_status}))
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

    def push(
        self, address: str, *calls: tuple[str, Path, str, dict[str, Any]], offline: bool = False
    ) -> list[dict[str, Any]]:
        """What each call (token, run, repository, choices) of `qlora_hal.push` gives or raises, one after the other."""
        asked = json.dumps([(token, str(run), repository, choices) for token, run, repository, choices in calls])
        done = self._run([sys.executable, "-c", PUSHING, asked], address, offline=offline)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def download(self, address: str, repository: str, *, token: str) -> Path:
        """A new folder with all of a repository, as `hf download --local-dir` makes it."""
        fetch = "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir=sys.argv[2])"
        folder = self.folder / "downloaded"
        done = self._run([sys.executable, "-c", fetch, repository, str(folder)], address, offline=False, token=token)
        assert done.returncode == 0, done.stderr
        return folder

    def command(
        self, address: str, *arguments: str, offline: bool = False, token: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """`qlora-hal` with these arguments, logged in where a `token` is given."""
        return self._run([sys.executable, "-m", "qlora_hal", *arguments], address, offline=offline, token=token)

    def _run(
        self, command: list[str], address: str, *, offline: bool, token: str = ""
    ) -> subprocess.CompletedProcess[str]:
        # Nothing of this process's settings: libraries that other tests import change the environment.
        kept = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT")
        environment = {key: os.environ[key] for key in kept if key in os.environ}
        environment |= {
            "HF_ENDPOINT": address, "HF_HOME": str(self.cache), "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": str(self.patience_seconds),
            **({"HF_TOKEN": token} if token else {}),
        }  # fmt: skip
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300)
