"""Checkpoints to go on from after a kill: whole or not there at all, each known by a marker written last.

Trainer writes its checkpoints in place, where a process killed meanwhile leaves some files of many; going on from
these crashes, or goes wrong without a word. Here one is written beside its place, its files' digests noted last, and
takes its name in one rename. One whose files are not those noted is passed over for the one before it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from subjattn.digest import digests_in
from subjattn.run.folder import UNFINISHED


log = logging.getLogger(__name__)
WHOLE = ".whole.json"
"""The marker: digests of the other files."""
KEPT = 2
"""Checkpoints that are kept: the newest, and one to fall back to."""
_PREFIX = "checkpoint-"


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    return next(filter(_whole, _by_step(folder)), None)


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """A temporary folder that becomes the checkpoint of a step; older ones than the `KEPT` newest go.

    Where the disk is full, or nothing can be written, that is said and training goes on.
    """
    temporary = folder / f".{_PREFIX}{step}{UNFINISHED}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        (temporary / WHOLE).write_text(json.dumps(digests_in(temporary)))
        for path in temporary.iterdir():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        target = folder / f"{_PREFIX}{step}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _of_writing(error):
            raise
        log.error(
            "step %d: no checkpoint could be written (%s): training goes on, and after a kill begins from an older one",
            step,
            " ".join(str(error).split())[:200],
        )
    for old in _by_step(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints, the newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix(_PREFIX)))


def _whole(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / WHOLE).read_text()) == digests_in(checkpoint))
    except (OSError, ValueError):
        return False


def _of_writing(error: Exception) -> bool:
    """Whether an error is the file system's, in the words of whichever library wrote."""
    from safetensors import SafetensorError

    words = ("PytorchStreamWriter", "unexpected pos", "iostream")
    of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, OSError | SafetensorError) or of_torch
