"""`qlora-hal --install-completion`: commands and flags completed by the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from qlora_hal.errors.terminal_text import show

Shell = Literal["bash", "zsh", "fish", "powershell"]


def install_completion(
    *, shell: Annotated[Shell | None, Parameter(help="The shell; by default the one that is running.")] = None
) -> int:
    """Write the completion script of a shell, and load it from the shell's startup file.

    Raises ConfigError QH-U04 where the running shell is none of these, and StorageError.
    """
    from cyclopts.completion.detect import ShellDetectionError

    from qlora_hal.cli.application import application
    from qlora_hal.errors import ConfigError
    from qlora_hal.files.durable import storage_error

    try:
        script = application().install_completion(shell=shell)
    except ShellDetectionError as unknown:
        raise ConfigError(
            "QH-U04",
            "The running shell was not recognized; bash, zsh, fish and PowerShell can complete.",
            where="command line",
            fix="Name one: qlora-hal --install-completion --shell bash",
        ) from unknown
    except OSError as problem:
        raise storage_error(problem, Path.home(), what="the completion script") from problem
    show(f"Written: {script}\nOpen a new shell to complete with it.")
    return 0
