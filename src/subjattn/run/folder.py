"""The folder of a run: stages that appear whole or not at all, their records, and the lock.

A stage writes into a temporary folder beside its own, adds its record `stage.json`, and takes its name in
one rename, so a process killed at any moment leaves either the finished stage or none.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from subjattn.digest import digest_of, digests_in, file_digest
from subjattn.errors import BadInput
from subjattn.run.plan import SCHEMA, Plan, Stage, wrong_schema


RECORD = "stage.json"
RESULTS = ("summary.json", "report.html")
"""Stand for all that lies beside them: set aside before a stage takes its place, until their successors are whole."""
PREVIOUS = "previous"
"""The folder in which finished results wait for their successors."""
UNFINISHED = ".unfinished"
"""Ends the names of what is not yet whole."""
KEPT = ".kept"
"""Ends the names of what a stage may go on from."""
_LOCK = ".lock"


class Folder:
    """Stages of one run, and what is known of them on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, source: str) -> Path:
        """The folder of a stage, or the file that `stage:file` names."""
        stage, _, file = source.partition(":")
        return self.root / stage / file if file else self.root / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a stage recorded of itself; None where there is none, or only a torn one.

        Raises:
            BadInput: the record is of another version of subjattn.
        """
        try:
            record = json.loads((self.root / stage / RECORD).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or not ({"files", "recipe"} <= set(record) or "key" in record):
            return None
        if record.get("schema") != SCHEMA:
            raise BadInput(wrong_schema(f"{str(self.root / stage / RECORD)!r}", record.get("schema")))
        return record

    def id_of(self, source: str) -> str | None:
        """The digest of a stage's content, or of one of its files."""
        stage, _, file = source.partition(":")
        record = self.record(stage)
        if record is None:
            return None
        return record["files"].get(file) if file else digest_of(record["files"])

    def input_ids(self, stage: Stage) -> dict[str, str | None]:
        """What the inputs of a stage are at present, by role."""
        return {role: self.id_of(source) for role, source in stage.inputs.items()}

    def finished(self, stage: Stage, threads: int) -> bool:
        """Whether the folder holds this very stage, made from its inputs as they are now."""
        record = self.record(stage.name)
        same = record is not None and record["inputs"] == self.input_ids(stage)
        return same and self.holds(stage.name, stage.recipe(threads))

    def holds(self, stage: str, recipe: str) -> bool:
        """Whether the folder holds a stage of this recipe, as it was written."""
        record = self.record(stage)
        return record is not None and record["recipe"] == recipe and not self.damaged(stage, record)

    def damaged(self, stage: str, record: Mapping[str, Any] | None = None) -> list[Path]:
        """Files of a stage that are missing, or differ from what was written."""
        record = record or self.record(stage) or {"files": {}}
        files = {self.root / stage / name: digest for name, digest in record["files"].items()}
        return [path for path, digest in files.items() if not _intact(path, digest)]

    def states(self, plan: Plan) -> dict[str, str]:
        """`finished`, `to do`, or `waiting` for inputs that may come out as they were, by stage."""
        states: dict[str, str] = {}
        for stage in plan:
            ready = all(states[source] == "finished" for source in stage.made_from)
            done = self.finished(stage, plan.threads)
            recorded = self.record(stage.name)
            same = recorded is not None and recorded["recipe"] == stage.recipe(plan.threads)
            states[stage.name] = "finished" if ready and done else "waiting" if not ready and same else "to do"
        return states

    @contextmanager
    def writing(self, stage: str, record: dict[str, Any]) -> Iterator[Path]:
        """A temporary folder that becomes the stage's when the block ends without an error.

        `record` is completed by the digests of the files, and may be filled until the block ends.
        """
        target = self.root / stage
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
        temporary.mkdir()
        try:
            yield temporary
            record |= {"schema": SCHEMA, "files": digests_in(temporary)}
            (temporary / RECORD).write_text(json.dumps(record, indent=1))
            _sync(temporary)
            self.retire()
            if target.exists():
                old = temporary.with_name(f"{temporary.name}.old{UNFINISHED}")
                target.rename(old)
                temporary.rename(target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                temporary.rename(target)
            for kept in target.parent.glob(f".{target.name}.*{KEPT}"):
                shutil.rmtree(kept, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def kept(self, stage: str, record: Mapping[str, Any]) -> Path:
        """Where a stage of this recipe and inputs may keep what it has done so far; gone once the stage is made."""
        target = self.root / stage
        of = digest_of([record["recipe"], record["inputs"]])[:12]
        return target.with_name(f".{target.name}.{of}{KEPT}")

    @property
    def has_results(self) -> bool:
        """Whether a run was finished here, whether or not another was begun since."""
        return any((place / name).is_file() for place in (self.root, self.root / PREVIOUS) for name in RESULTS)

    def retire(self) -> None:
        """Set results aside that no longer stand for what lies beside them."""
        for name in RESULTS:
            if (self.root / name).is_file():
                (self.root / PREVIOUS).mkdir(exist_ok=True)
                (self.root / name).replace(self.root / PREVIOUS / name)

    def settle(self) -> None:
        """Take away earlier results, once their successors are whole."""
        shutil.rmtree(self.root / PREVIOUS, ignore_errors=True)

    def sweep(self) -> None:
        """Take away what a killed process left unfinished."""
        for path in list(self.root.rglob(f".*{UNFINISHED}")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _intact(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) == digest
    except OSError:
        return False


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second process writes into it.

    The lock is a file that names its holder, which works on network file systems too; one left behind by a
    process that has died on this machine is taken over.

    Raises:
        BadInput: another process holds it, or the folder cannot be written.
    """
    from filelock import SoftFileLock, Timeout

    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise BadInput(f"{str(root)!r} is a file: name a folder for the results") from None
    lock = SoftFileLock(root / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = " ".join((_read(root / _LOCK) or "unknown").split()[:2])
        raise BadInput(
            f"another process is writing to {str(root)!r} (process and host: {holder}): wait for it, choose another "
            f"--out, or delete {str(root / _LOCK)!r} if that process is no more"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that replaces the file `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text()
    return None


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
