"""Make what is not finished of a plan: here, in order, or on any executors, several stages at a time.

A stage that fails does not stop those that do not need it. Each slot makes one stage at a time and is given
stages of the group it made last where there are any, so that a worker's model is loaded once.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from subjattn.errors import StagesFailed
from subjattn.run.events import Events
from subjattn.run.folder import UNFINISHED, Folder
from subjattn.run.perform import Outcome, perform
from subjattn.run.plan import Plan, Stage


_PROGRESS = f".progress{UNFINISHED}"
_LOOK_EVERY = 0.5


class Here(Executor):
    """Makes each stage at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass
class _Slot:
    """Where one stage at a time is made."""

    executor: Executor
    group: str = ""
    stage: Stage | None = None


def execute(plan: Plan, folder: Folder, events: Events, executors: Sequence[Executor] = ()) -> None:
    """Make every stage that is not finished.

    Args:
        plan: the stages.
        folder: the run's, held by the caller (`folder.alone`).
        events: told of all that happens.
        executors: one for every stage that may run at a time (the same one may be named several times); none:
            stages are made in this process, one after the other.

    Raises:
        StagesFailed: some stages failed; all that did not need them are made.
    """
    folder.sweep()
    shutil.rmtree(folder.root / "failed", ignore_errors=True)
    try:
        _Execution(plan, folder, events, [_Slot(executor) for executor in executors or (Here(),)]).run()
    finally:
        shutil.rmtree(folder.root / _PROGRESS, ignore_errors=True)


class _Execution:
    """One pass over a plan."""

    def __init__(self, plan: Plan, folder: Folder, events: Events, slots: list[_Slot]) -> None:
        self.plan, self.folder, self.events, self.slots = plan, folder, events, slots
        self.pending = list(plan)
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.running: dict[Future[Outcome], _Slot] = {}

    def run(self) -> None:
        self.events.planned(list(self.plan))
        with _interrupts() as interrupted:
            self._make(interrupted)
        if self.failed:
            needed = [f"{name}: {reason}" for name, reason in self.failed.items()]
            waiting = "wait for them" if self.slots else "are not made, for there is no worker left"
            left = f"; {len(self.pending)} more {waiting}" if self.pending else ""
            raise StagesFailed(f"{' | '.join(needed)}{left}", self.failed)

    def _make(self, interrupted: Callable[[], bool]) -> None:
        """Stage by stage until nothing is left that can be made."""
        while True:
            if interrupted():
                raise KeyboardInterrupt
            self._settle()
            for slot in self.slots:
                if slot.stage is None and (stage := self._next(slot)) is not None:
                    self._submit(slot, stage)
            if not self.running:
                break
            finished, _ = wait(self.running, _LOOK_EVERY, FIRST_COMPLETED)
            for future in finished:
                self._collect(future)
            self._look()

    def _settle(self) -> None:
        """Tick off pending stages that are finished as they are."""
        for stage in list(self.pending):
            if self._ready(stage) and self.folder.finished(stage, self.plan.threads):
                self.pending.remove(stage)
                self.done.add(stage.name)
                self.events.reused(stage)

    def _ready(self, stage: Stage) -> bool:
        return self.done.issuperset(stage.made_from)

    def _next(self, slot: _Slot) -> Stage | None:
        """The stage that a free slot makes next: of its own group, else of a group that no other slot makes."""
        ready = [stage for stage in self.pending if self._ready(stage)]
        taken = {other.group for other in self.slots if other is not slot and other.stage is not None}
        return min(
            ready,
            key=lambda stage: 0 if stage.group == slot.group and stage.group else 2 if stage.group in taken else 1,
            default=None,
        )

    def _submit(self, slot: _Slot, stage: Stage) -> None:
        for path in self.folder.damaged(stage.name):
            self.events.note(f"{path} is damaged (not what was written): {stage.name} is made anew")
        self.pending.remove(stage)
        slot.stage, slot.group = stage, stage.group
        self.events.started(stage)
        arguments = (stage, str(self.folder.root), self.folder.input_ids(stage), self.plan.threads)
        if isinstance(slot.executor, Here):
            reported = _Sum(lambda done: self.events.advanced(stage, done))
            self.running[slot.executor.submit(perform, *arguments, tell=reported)] = slot
            return
        progress = self._progress(stage)
        progress.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.running[slot.executor.submit(perform, *arguments, progress=str(progress))] = slot
        except BrokenExecutor as error:
            broken: Future[Outcome] = Future()
            broken.set_exception(error)
            self.running[broken] = slot

    def _progress(self, stage: Stage) -> Path:
        return self.folder.root / _PROGRESS / f"{stage.name.replace('/', '-')}.json"

    def _collect(self, future: Future[Outcome]) -> None:
        slot = self.running.pop(future)
        stage, slot.stage = slot.stage, None
        assert stage is not None
        try:
            outcome = future.result()
        except Exception as error:  # perform tells its own failures; this is its worker's
            text = " ".join(str(error).split())[:300]
            died = isinstance(error, BrokenExecutor)
            why = "its worker died (killed, or out of memory?)" if died else f"its worker failed: {text}"
            outcome = Outcome(stage.name, reason=why)
            self.slots.remove(slot)
        for note in outcome.notes:
            self.events.note(note)
        if outcome.reason is None:
            self.done.add(stage.name)
        else:
            self.failed[stage.name] = outcome.reason
        self.events.ended(stage)

    def _look(self) -> None:
        """How far stages in other processes are."""
        for slot in self.running.values():
            if slot.stage is not None and not isinstance(slot.executor, Here):
                with contextlib.suppress(OSError, ValueError):
                    self.events.advanced(slot.stage, float(json.loads(self._progress(slot.stage).read_text())))


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, also where its exception was lost, as it is in a finalizer that it falls into."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Sum:
    """Adds up what is told piece by piece."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self.tell, self.done = tell, 0.0

    def __call__(self, units: float) -> None:
        self.done += units
        self.tell(self.done)
