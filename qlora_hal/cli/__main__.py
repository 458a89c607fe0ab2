"""The entry point: parse, run one verb, turn every failure into its text (or JSON) and its exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from qlora_hal.cli.failures import report_interrupt, report_unexpected, reported
from qlora_hal.cli.stream_encoding import escape_what_streams_cannot_hold
from qlora_hal.cli.streams import output_error, usable_streams
from qlora_hal.errors import QloraHalError
from qlora_hal.errors.foreign_output import foreign_output_visible
from qlora_hal.files.refused_paths import refused_paths_told
from qlora_hal.processes.signals import ended_by_signals
from qlora_hal.ranks.identity import is_following


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status (docs/cli.md). A rank behind the first writes nothing to standard
    output, which is that of all."""
    escape_what_streams_cannot_hold()
    tokens = list(sys.argv[1:] if argv is None else argv)
    with usable_streams() as output:
        if is_following():
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
                return _status(tokens, as_json=False)
        status = _status(tokens, as_json="--json" in tokens)
        output.flush()
        if output.problem is None or status != 0:
            return status
        if isinstance(output.problem, BrokenPipeError):  # `qlora-hal schema | head` has what it wanted
            return 0
        return reported(output_error(output.why), as_json=False)


def _status(tokens: list[str], *, as_json: bool) -> int:
    try:
        with ended_by_signals(), foreign_output_visible(), refused_paths_told():
            return _run(tokens)
    except QloraHalError as error:
        from qlora_hal.cli.completed_command import with_completed_command

        return reported(with_completed_command(error, tokens), as_json=as_json)
    except KeyboardInterrupt as interrupt:
        return report_interrupt(interrupt, as_json=as_json)
    except Exception as error:
        return report_unexpected(error, as_json=as_json)


def _run(tokens: list[str]) -> int:
    from cyclopts import CycloptsError

    from qlora_hal.cli.application import application
    from qlora_hal.cli.arguments import canonical
    from qlora_hal.cli.usage import report_usage

    try:
        app = application()
        status = app(canonical(tokens), exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise report_usage(error, tokens) from error
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
