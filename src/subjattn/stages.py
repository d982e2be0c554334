"""Stages of a study: each a folder that appears whole or not at all.

A stage writes into a temporary folder beside its own, adds its key, and takes its name in one rename,
so a process killed at any moment leaves either the finished stage or none. The key is a digest of
everything the stage depends on; a stage with another key is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subjattn.errors import BadInput


_KEY_FILE = "stage.json"


def key_of(**parts: Any) -> str:
    """A digest of plain data, the same for the same data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def finished(folder: Path, key: str) -> bool:
    """Whether the folder holds this very stage, whole."""
    try:
        return bool(json.loads((folder / _KEY_FILE).read_text())["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def writing(folder: Path, key: str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    (temporary / _KEY_FILE).write_text(json.dumps({"key": key}))
    _sync(temporary)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run folder, so that no second process writes into it; the system lets go of it when we end.

    Raises:
        BadInput: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"another process is writing to {str(folder)!r}: wait for it, or choose another --out"
            ) from None
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that replaces the file `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.unfinished")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
