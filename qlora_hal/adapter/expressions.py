"""Regular expressions over module paths, from settings and from strangers' adapters.

A short one can take longer than anyone waits, and within `re` nothing ends it. What is not quick by its form is matched
in a process of its own, which has an end.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from qlora_hal.processes.subprocess_call import SubprocessCallError, answer_stream, ask

_CHOICES = re.compile(r"[*+?{|]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_MOST_STEPS = 10**7
"""A second's work or less."""
_SECONDS = 2
_SECONDS_OF_WAITING = 60.0
"""For a start on a busy machine, and where the system has no clock of a process's own work."""


class ExpressionError(ValueError):
    """Why an expression chooses no modules, as words that complete "an expression that"."""


def matching(expression: str, paths: Collection[str]) -> frozenset[str]:
    """Those of `paths` that the expression matches whole. Raises ExpressionError for what is no expression, and for one
    that takes more than two seconds."""
    try:
        pattern = re.compile(expression)
    except (re.error, OverflowError, RecursionError) as problem:
        raise ExpressionError(f"is no regular expression ({problem})") from problem
    if _is_quick(expression, paths):
        return frozenset(filter(pattern.fullmatch, paths))
    return _matching_in_child(expression, paths)


def _is_quick(expression: str, paths: Collection[str]) -> bool:
    """Each choice may be made anew at each place of a path; inside a group that is repeated, any number of times."""
    choices = len(_CHOICES.findall(expression))
    most = max(map(len, paths), default=0)
    return not _REPEATED_GROUP.search(expression) and choices < 16 and len(paths) * most**choices <= _MOST_STEPS


def _matching_in_child(expression: str, paths: Collection[str]) -> frozenset[str]:
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        request.write_text(json.dumps({"expression": expression, "paths": list(paths)}), encoding="utf-8")
        try:
            answer = ask(__name__, str(request), seconds=_SECONDS_OF_WAITING)
        except SubprocessCallError as problem:
            is_slow = problem.waited is not None or problem.signal == getattr(signal, "SIGVTALRM", None)
            slow = f"takes more than {_SECONDS} s to match with {len(paths)} module paths"
            raise ExpressionError(slow if is_slow else f"cannot be matched: its process {problem}") from problem
    return frozenset(answer["matched"])


def _answer() -> None:
    stream = answer_stream()
    if hasattr(signal, "setitimer"):  # not on Windows; its signal ends the process, in the middle of a match too
        signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    pattern = re.compile(request["expression"])
    with stream:
        json.dump({"matched": [path for path in request["paths"] if pattern.fullmatch(path)]}, stream)


if __name__ == "__main__":
    _answer()
