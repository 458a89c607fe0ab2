"""`qlora-hal conformance`: prove that a backend computes what the others compute, or check a certificate."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.errors import ConfigError
from qlora_hal.errors.terminal_text import show
from qlora_hal.files.opening import read_stored
from qlora_hal.files.strict_json import MAX_JSON_BYTES

CASE_SECONDS = 180.0


def conformance(
    backend: Annotated[
        str | None, Parameter(help="The backend to test; with --verify, the one that the certificate must be of.")
    ] = None,
    *,
    run: Annotated[
        Path | None,
        Parameter(
            name="--for",
            help="Judge only what this settings file, or the run in this folder, computes; the result lies beside it.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None, Parameter(help="With --for: say what this certificate has to do with the run.")
    ] = None,
    verify: Annotated[Path | None, Parameter(help="Check this certificate instead of running.")] = None,
    out: Annotated[
        Path | None, Parameter(help="Folder for the certificate and the reports; default: conformance/BACKEND.")
    ] = None,
    seed: Annotated[
        int | None, Parameter(help="Seed of the run to repeat; without it, one is drawn and printed.")
    ] = None,
    timeout: Annotated[float, Parameter(help="Time limit for each case in seconds.")] = CASE_SECONDS,
    waivers: Annotated[
        Path | None, Parameter(help="File of known failures; default: waivers.toml, if it exists.")
    ] = None,
    trainer: Annotated[str | None, Parameter(help="package.module:Name of a backend that is not installed.")] = None,
    spec: Annotated[str | None, Parameter(help="package.module:SPEC of a backend that is not installed.")] = None,
    section: Annotated[
        tuple[str, ...],
        Parameter(help="For development: run only this section; no certificate is written.", negative=""),
    ] = (),
    level: Annotated[
        tuple[str, ...],
        Parameter(help="For development: run only this level, L0 to L4; no certificate is written.", negative=""),
    ] = (),
    keyword: Annotated[
        str | None, Parameter(help="For development: run only cases whose name matches; no certificate is written.")
    ] = None,
    lanes: Annotated[
        int | None, Parameter(help="Processes that run cases side by side; default: one a processor, up to 4.")
    ] = None,
    quiet: Annotated[bool, Switch, Parameter(help="Print nothing.")] = False,
) -> int:
    """Run the conformance suite against one backend, or judge exactly what one run computes. Exit 0 only when it is
    conformant, 20 when not, 3 when it cannot run on this machine."""
    narrowed = {
        "--out": out,
        "--seed": seed,
        "--timeout": None if timeout == CASE_SECONDS else timeout,
        "--trainer": trainer,
        "--spec": spec,
        "--keyword": keyword,
        "--lanes": lanes,
    }
    of_a_whole_run = {"--section": section, "--level": level, "--waivers": waivers}
    if verify is not None:
        _refuse_beside("--verify", {"--for": run, "--certificate": certificate, **narrowed, **of_a_whole_run})
    elif run is not None:
        _refuse_beside("--for", of_a_whole_run)
    elif certificate is not None:
        raise _without_a_run()
    _require_pytest()
    from qlora_hal_conformance.__main__ import verify_and_print
    from qlora_hal_conformance.conformance_run import NOT_CONFORMANT, Options
    from qlora_hal_conformance.conformance_run import run as run_suite
    from qlora_hal_conformance.for_run import ForOptions
    from qlora_hal_conformance.running import lanes_here
    from qlora_hal_conformance.subject import Reference
    from qlora_hal_conformance_runs.judging import judge_run

    if verify is not None:
        _require_bounded(verify)
        with redirect_stdout(io.StringIO()) as said:
            status = verify_and_print(verify)
            if backend is not None and (of := _backend_of(verify)) != backend:
                show(f"{verify}: is of the backend {of}, not of {backend}")
                status = NOT_CONFORMANT
        if not quiet:
            show(said.getvalue(), end="")  # a certificate is a stranger's file
        return status
    reference = Reference(backend or "", trainer or "", spec or "")
    is_named = bool(backend or trainer or spec)
    side_by_side = lanes_here() if lanes is None else lanes
    if run is not None:
        given = reference if is_named else None
        return judge_run(ForOptions(run, given, out, certificate, keyword or "", seed, timeout, quiet, side_by_side))[0]
    if not is_named:
        raise _nothing_named()
    name = reference.backend or (reference.trainer or reference.spec).partition(":")[0]
    options = Options(
        reference=reference,
        out=out or Path("conformance") / name,
        seed=seed,
        keyword=keyword or "",
        sections=section,
        levels=tuple(chosen.upper() for chosen in level),
        timeout_seconds=timeout,
        waivers=waivers,
        quiet=quiet,
        lanes=side_by_side,
    )
    return run_suite(options).status


def _require_bounded(certificate: Path) -> None:
    """A certificate is a stranger's file. Raises ConfigError QH-B51 for what is no file, or larger than JSON may be."""
    try:
        size = len(read_stored(certificate, MAX_JSON_BYTES))
    except OSError as problem:
        raise _no_certificate(certificate, problem.strerror or str(problem)) from problem
    if size > MAX_JSON_BYTES:
        raise _no_certificate(certificate, f"it has more than {MAX_JSON_BYTES} bytes")


def _backend_of(certificate: Path) -> str:
    from qlora_hal_conformance.certificate import read_certificate

    told = read_certificate(certificate).get("backend")
    return str(told.get("name", "")) if isinstance(told, dict) else ""


def _refuse_beside(chosen: str, others: Mapping[str, object]) -> None:
    """Raises ConfigError QH-U54 for options that would be ignored."""
    given = [name for name, value in others.items() if value not in (None, ())]
    if given:
        raise ConfigError(
            "QH-U54",
            f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no meaning beside {chosen}.",
            fix=f"Leave {'it' if len(given) == 1 else 'them'} out, or run qlora-hal conformance without {chosen}.",
        )


def _without_a_run() -> ConfigError:
    return ConfigError(
        "QH-U54",
        "--certificate has no meaning without --for.",
        fix="Check a certificate with --verify FILE, or name the run that it is to be compared with: --for RUN.",
    )


def _no_certificate(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        "QH-B51",
        f"{path.name} is no certificate: {reason}.",
        where=str(path),
        fix="Name a certificate.json that the conformance suite wrote.",
    )


def _require_pytest() -> None:
    from importlib.util import find_spec

    if find_spec("pytest") is None:
        from qlora_hal.errors.installation import install_line

        raise ConfigError(
            "QH-U50",
            "The conformance suite runs on pytest, which is not installed.",
            fix=f"Run: {install_line('conformance')}",
        )


def _nothing_named() -> Exception:
    return ConfigError(
        "QH-U51",
        "No backend was named, and no certificate to check.",
        fix="Run qlora-hal conformance BACKEND; qlora-hal backends lists them.",
    )
