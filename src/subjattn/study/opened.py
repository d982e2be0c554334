"""A folder that a plan is made in: held for one run, of this version, swept when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from subjattn.errors import BadInput
from subjattn.progress import Progress
from subjattn.run.changes import replaced
from subjattn.run.folder import Folder, alone
from subjattn.run.plan import Plan
from subjattn.study.manifest import check_version


@contextmanager
def opened(
    out: Path, plan_of: Callable[[], Plan], console: Console | None, *, replace: bool = False
) -> Iterator[tuple[Plan, Folder, Progress]]:
    """The plan, its folder and the progress shown; what is made again because it changed is noted there.

    Raises:
        BadInput: another run is at work in the folder, it is another version's, or it holds finished results of a
            changed study that nobody said to `replace`.
    """
    with Progress(console) as progress:
        plan = plan_of()
        with alone(out):
            check_version(out)
            folder = Folder(out)
            lines = replaced(plan, folder)
            if lines and folder.has_results and not replace:
                raise BadInput(
                    f"{str(out)!r} holds finished results of another study ({lines[0].removeprefix('made anew: ')}):"
                    " choose another folder, or --replace (replace=True) to make them anew"
                )
            for line in lines:
                progress.note(line)
            try:
                yield plan, folder, progress
            finally:
                folder.sweep()
