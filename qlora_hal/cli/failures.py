"""How a failure looks: one block of text on stderr, or one JSON object on stdout; the exit status says its kind."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from qlora_hal.errors import QloraHalError
from qlora_hal.errors.terminal_text import show, show_json, visible, visible_line
from qlora_hal.ranks.identity import is_following, rank_here

INTERRUPTED = 130
TOLD_BY_THE_FIRST = frozenset({"QH-R03", "QH-S19", "QH-N01", "QH-N02", "QH-C18"})
"""What all ranks find together, in the same words."""


def reported(error: QloraHalError, *, as_json: bool) -> int:
    """Show one of our errors and give its exit status. A rank behind the first leaves to that what all found."""
    if error.code in TOLD_BY_THE_FIRST and is_following():
        return error.exit_status
    if not (as_json and _printed({**error.as_json(), "exit_status": error.exit_status})):
        _print_error(error)
    return error.exit_status


def report_interrupt(interrupt: KeyboardInterrupt, *, as_json: bool) -> int:
    """Ctrl-C outside a run, or the second signal inside: what is safe, and how to go on."""
    from qlora_hal.processes.signals import EndedAtOnce

    status, text = INTERRUPTED, "stopped from the keyboard; nothing more was saved."
    context: dict[str, object] = {}
    if isinstance(interrupt, EndedAtOnce):
        interrupt.learn_of_run()
        run_dir = None if interrupt.run_dir is None else str(interrupt.run_dir)
        status, text, context = interrupt.exit_status, str(interrupt), {"run_dir": run_dir, "step": interrupt.safe_step}
    if not (as_json and _printed({"code": "QH-S21", "message": text, **context, "exit_status": status})):
        show(f"\n{rank_here()}{text}", stream=sys.stderr)
    return status


def report_unexpected(error: Exception, *, as_json: bool) -> int:
    """A defect of ours: the last line of the story, and where the whole of it can be had."""
    place = _place(error)
    if os.environ.get("QLORA_HAL_TRACEBACK"):
        import traceback

        show("".join(traceback.format_exception(error)), stream=sys.stderr, end="")
    content = {"code": "QH-I01", "message": f"{type(error).__name__}: {error}", "where": place, "exit_status": 1}
    if as_json and _printed(content):
        return 1
    why, fix = "this is a defect of qlora-hal, not of your input", ""
    if library := _broken_library(error):
        why = f"{library}, which qlora-hal needs, is missing or broken in this installation"
        from qlora_hal.errors.installation import pip

        fix = f"{pip(f'install --force-reinstall {library}')}; if it stays so, "
    _print_lines(
        f"error[QH-I01]: {type(error).__name__}: {error}",
        [
            ("where", place),
            ("why", why),
            ("help", f"{fix}run again with QLORA_HAL_TRACEBACK=1 and report what it prints"),
        ],
    )
    return 1


def _broken_library(error: BaseException) -> str:
    """The distribution whose import failed, if it is not ours; else nothing."""
    import traceback
    from importlib.metadata import packages_distributions

    if not isinstance(error, ImportError):
        return ""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = next((name for name in reversed(frames) if not name.startswith("importlib.")), "")
    for module in (error.name or "", raised_in):
        package = module.partition(".")[0]
        if package and not package.startswith("qlora_hal") and package not in sys.stdlib_module_names:
            return next(iter(packages_distributions().get(package, [])), package)
    return ""


def _printed(content: Mapping[str, object]) -> bool:
    """Whether the object is out on standard output; where that cannot be written, the text on stderr has to do."""
    show_json(content, default=str)
    sys.stdout.flush()
    return getattr(sys.stdout, "problem", None) is None


def _print_error(error: QloraHalError) -> None:
    from qlora_hal.errors.fault_catalogue import find_fault

    more = f"qlora-hal explain {error.code}" if find_fault(error.code) else ""  # a plugin's codes are its own
    rows = [("where", visible_line(error.where)), ("why", error.cause), ("help", error.fix), ("more", more)]
    _print_lines(f"error[{error.code}]: {error.message}", rows)


def _print_lines(headline: str, rows: list[tuple[str, str]]) -> None:
    from rich.text import Text

    from qlora_hal.report.console import stderr_console

    console = stderr_console()
    head, separator, rest = visible(headline).partition("]: ")
    console.print(Text.assemble((f"{rank_here()}{head}{separator}", "bold red"), (rest, "bold")), soft_wrap=True)
    for name, text in rows:
        if text:
            console.print(Text.assemble((f"  {name + ':':<7}", "cyan"), visible(text)), soft_wrap=True)


def _place(error: BaseException) -> str:
    """File and line of the innermost frame that is ours, without the path of the installation."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "qlora_hal" in frame.filename] or list(frames)
    if not ours:
        return ""
    frame = ours[-1]
    parts = frame.filename.replace("\\", "/").split("/")
    start = next((i for i, part in enumerate(parts) if part.startswith("qlora_hal")), max(len(parts) - 1, 0))
    return f"{'/'.join(parts[start:])}:{frame.lineno} in {frame.name}"
