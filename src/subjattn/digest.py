"""Digests of plain data, and of what files and folders hold: a copy elsewhere is the same, a changed byte is not.

A large file is read once: its digest is kept, in memory and in the cache folder, by path, inode, size and both
times of its last change, the one that no program can set among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


LARGE = 1 << 20
"""Bytes from which a file's digest is kept on disk."""
SETTLED_NS = 2_000_000_000
"""A file changed less than this before it is read is read again: a change in the same tick would not show."""
_kept: dict[str, tuple[list[int], str]] = {}


def cache_folder() -> Path:
    """Where this package keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subjattn"


def digest_of(data: Any) -> str:
    """A digest of plain data, the same for the same data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def digests_in(folder: Path) -> dict[str, str]:
    """The digest of every file under a folder, by its path there; names that begin with a dot are left out."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def content_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, or of the names and bytes of all files under a folder.

    Times, owners and the folder's own name do not count, nor do files and folders whose name begins with a dot
    (what download tools note down).
    """
    root = Path(path)
    if root.is_file():
        return file_digest(root)
    inside = sorted((p.relative_to(root) for p in root.rglob("*") if p.is_file()), key=lambda p: p.as_posix())
    entries = [
        (file.as_posix(), file_digest(root / file))
        for file in inside
        if not any(part.startswith(".") for part in file.parts)
    ]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    real = str(file.resolve())
    stamp = _stamp(real)
    note = cache_folder() / "digests" / f"{hashlib.sha256(real.encode()).hexdigest()[:32]}.json"
    found = _kept.get(real) or (_read(note) if stamp[1] >= LARGE else None)
    if found is None or found[0] != stamp:
        with Path(real).open("rb") as opened:
            found = (stamp, hashlib.file_digest(opened, "sha256").hexdigest())
        if _stamp(real) != stamp or time.time_ns() - max(stamp[2:]) < SETTLED_NS:
            return found[1]
        if stamp[1] >= LARGE:
            keep(note, found)
    _kept[real] = found
    return found[1]


def _stamp(file: str) -> list[int]:
    """Inode, size, and when content and inode last changed."""
    stat = Path(file).stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(note: Path) -> tuple[list[int], str] | None:
    try:
        stamp, digest = noted(note)
    except (TypeError, ValueError):
        return None
    return stamp, str(digest)


def noted(note: Path) -> Any:
    """What another process kept by `keep`; None where there is nothing, or nothing that can be read."""
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None


def keep(note: Path, found: Any) -> None:
    """Keep plain data in a file for the next process; where that cannot be, it is found out again."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w") as opened:
            json.dump(found, opened)
        Path(temporary).replace(note)
