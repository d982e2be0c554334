"""Make one stage, in whatever process: its work, its record, one more try when a device runs out of memory."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from subjattn.errors import SubjattnError
from subjattn.run.folder import Folder, replacing
from subjattn.run.plan import Stage


VERSIONS = ("subjattn", "torch", "transformers", "peft", "numpy", "pandas", "scipy", "xarray")
_TOLD_EVERY = 0.5
_alone_in_process = threading.Lock()
"""Threads of one process take turns: they would share a model, and what is hooked into it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: made, or failed for a reason; `notes` are worth a reader's line."""

    stage: str
    seconds: float = 0.0
    reason: str | None = None
    notes: tuple[str, ...] = ()


class Reporter:
    """A stage's context: tells a function in this process, or a file that the driver reads."""

    def __init__(self, tell: Callable[[float], None] | None, file: Path | None, kept: Path) -> None:
        self.memory_share, self.done, self.kept = 1.0, 0.0, kept
        self._tell, self._file, self._told_at = tell, file, 0.0

    def tell(self, units: float) -> None:
        self.done += units
        if self._tell is not None:
            self._tell(units)
        elif self._file is not None and time.monotonic() - self._told_at > _TOLD_EVERY:
            self._told_at = time.monotonic()
            with contextlib.suppress(OSError), replacing(self._file) as path:
                path.write_text(json.dumps(self.done))


def perform(
    stage: Stage,
    root: str,
    ids: Mapping[str, str | None],
    threads: int,
    progress: str | None = None,
    tell: Callable[[float], None] | None = None,
) -> Outcome:
    """Make a stage in the run's folder.

    Args:
        stage: what to make; its inputs are finished.
        root: the run's folder, which every process sees.
        ids: of the inputs, as the driver found them.
        threads: of torch.
        progress: a file to tell of the work done, where the driver is another process.
        tell: a function to tell instead.
    """
    folder, started, notes = Folder(Path(root)), time.monotonic(), list[str]()
    made_from = {"recipe": stage.recipe(threads), "inputs": dict(ids)}
    reporter = Reporter(tell, None if progress is None else Path(progress), folder.kept(stage.name, made_from))
    try:
        while True:
            record: dict[str, Any] = made_from | {"threads": threads}
            try:
                with (
                    _alone_in_process,
                    folder.writing(stage.name, record) as out,
                    _threads(threads if stage.device else None),
                ):
                    _forget_peak()
                    inputs = {role: folder.path(source) for role, source in stage.inputs.items()}
                    stage.resolve()({**stage.settings, **stage.where}, inputs, out, reporter)
                    record |= {"settings": dict(stage.settings), "external": dict(stage.external)}
                    record |= _circumstances(stage) | {"seconds": round(time.monotonic() - started, 2)}
                return Outcome(stage.name, time.monotonic() - started, notes=tuple(notes))
            except Exception as error:
                if not _out_of_memory(error) or reporter.memory_share < 1:
                    raise
            reporter.memory_share = 0.5
            notes.append(f"{stage.name}: the device ran out of memory; tried once more with half of the budget")
            _empty_cache()
    except (SubjattnError, OSError) as error:
        return Outcome(stage.name, reason=_one_line(error), notes=tuple(notes))
    except Exception as error:
        trace = folder.root / "failed" / f"{stage.name.replace('/', '-')}.txt"
        trace.parent.mkdir(exist_ok=True)
        trace.write_text(traceback.format_exc())
        return Outcome(stage.name, reason=f"{_one_line(error)} (trace in {trace})", notes=tuple(notes))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, SubjattnError) else f"{type(error).__name__}: {text}"


def _circumstances(stage: Stage) -> dict[str, Any]:
    """Where a stage was made; none of it is part of what the stage is."""
    found: dict[str, Any] = {
        "versions": {name: version(name) for name in VERSIONS},
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "device": None,
    }
    if stage.device:
        import torch

        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        found["peak_memory"] = _peak_memory()
    return found


def _peak_memory() -> int:
    """Bytes held at most since a stage began, on a GPU; of this process since its start, without one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


class _threads:  # noqa: N801
    """Let torch use so many threads for a while; None: leave it."""

    def __init__(self, number: int | None) -> None:
        self.number, self.before = number, 0

    def __enter__(self) -> None:
        if self.number is not None:
            import torch

            self.before = torch.get_num_threads()
            if self.before != self.number:
                torch.set_num_threads(self.number)

    def __exit__(self, *_: object) -> None:
        if self.number is not None and self.before != self.number:
            import torch

            torch.set_num_threads(self.before)


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def watch_parent() -> None:
    """End this process when the one that started it is gone, so that no orphan writes into a run."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
