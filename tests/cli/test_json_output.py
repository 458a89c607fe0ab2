"""With --json standard output is one object, whatever a library prints meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import ctypes, logging, os, sys
from qlora_hal.cli.json_output import kept_for_json
log = logging.StreamHandler(sys.stdout)
with kept_for_json({as_json}):
    print("a print")
    log.emit(logging.makeLogRecord({{"msg": "a log"}}))
    os.system("echo a child")
    ctypes.CDLL(None).printf(b"a native library\\n")
print('{{"answer": 1}}')
"""
PRINTED = ["a child", "a log", "a native library", "a print"]


def lines(as_json: bool) -> tuple[str, list[str]]:
    program = PROGRAM.format(as_json=as_json)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout, sorted(done.stderr.splitlines())


def test_only_the_answer_is_on_standard_output() -> None:
    shown, errors = lines(as_json=True)
    assert json.loads(shown) == {"answer": 1}
    assert errors == PRINTED


def test_without_json_everything_stays_where_it_was_printed() -> None:
    shown, errors = lines(as_json=False)
    assert sorted(shown.splitlines()) == sorted([*PRINTED, '{"answer": 1}'])
    assert errors == []
