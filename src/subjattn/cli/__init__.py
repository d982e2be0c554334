"""The command line: one thin function per command over the Python API.

Bad input ends with status 2 and one line on standard error; stages that failed with status 1 and a line each.
"""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from subjattn.cli import across, compare, facts, finetune, init, measure, measuring, models, probe, studies
from subjattn.cli.app import app
from subjattn.errors import StagesFailed, SubjattnError, WrongFields


# Typer carries a click of its own; this is its UsageError, whichever click that is.
_UsageError: Any = typer.BadParameter.__base__
_INTERRUPTED, _TERMINATED = 130, 143
_RESUMED = (["run"], ["compare"], ["knowledge"], ["finetune"])
"""Commands that go on where they were stopped."""


def main() -> None:
    """Run the command line; known errors become one line and status 2."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)
        status = _run()
    if status == _INTERRUPTED and _stopped:
        status = _TERMINATED
    sys.exit(status if isinstance(status, int) else 0)


def _run() -> Any:
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == _INTERRUPTED:  # typer makes this of Ctrl-C
            raise KeyboardInterrupt
        return status
    except StagesFailed as error:
        for name, reason in error.reasons.items():
            _fail(f"{name}: {reason}")
        return _fail(f"{len(error.reasons)} failed; a second run makes what is left", 1)
    except WrongFields as error:
        return max(map(_fail, error.messages))
    except SubjattnError as error:
        return _fail(error.in_shell() if hasattr(error, "in_shell") else str(error))
    except _UsageError as error:
        return _fail(f"{error.format_message().rstrip('.')} (see --help)")
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except (KeyboardInterrupt, typer.Abort):
        goes_on = ": what is finished is kept, and the same command goes on from there"
        return _fail(f"interrupted{goes_on if sys.argv[1:2] in _RESUMED else ''}", _INTERRUPTED)


_stopped: list[int] = []


def _interrupt(number: int, _: Any) -> None:
    """Let SIGTERM stop what Ctrl-C stops: workers end, locks and semaphores are given back, what is finished stays."""
    _stopped.append(number)
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.SIG_DFL, None):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:  # noqa: ARG001
    """One line, without the place in our code that it comes from."""
    Console(stderr=True).print(Text(f"warning: {' '.join(str(message).split())}"), soft_wrap=True)


def _fail(message: str, status: int = 2) -> int:
    Console(stderr=True).print(Text(f"error: {' '.join(message.split())}"), soft_wrap=True)
    return status


__all__ = [
    "across",
    "app",
    "compare",
    "facts",
    "finetune",
    "init",
    "main",
    "measure",
    "measuring",
    "models",
    "probe",
    "studies",
]
