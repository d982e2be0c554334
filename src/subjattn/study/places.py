"""Where the stages of a plan run: in this process, in workers of this machine, or on Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from subjattn.errors import BadInput
from subjattn.run.events import Events
from subjattn.run.folder import Folder
from subjattn.run.plan import Plan


WORTH_SHARING = 2e11
"""Forward passes × bytes of weights from which starting workers pays: under about ten seconds' work on one core."""
OVERHEAD = 1.5e9
"""Bytes of a worker beside the weights: libraries, and the working memory of the engine."""


@dataclass(frozen=True)
class Place:
    """How many stages at a time, where, and why so many."""

    workers: int | None
    on: str | None
    threads: int
    gpus: tuple[int, ...]
    why: str

    @classmethod
    def of(cls, plan: Plan, folder: Folder, workers: int | None = None, on: str | None = None) -> Place:
        """What was asked for, or what suits the machine and what is left to do."""
        check_place(workers, on)
        gpus = _gpus()
        states = folder.states(plan)
        left = [stage for stage in plan if states[stage.name] != "finished" and stage.device]
        if workers is not None or on is not None:
            return cls(workers, on, plan.threads, gpus, "as asked" if workers else "as many as the cluster takes")
        if gpus:
            most, why = len(gpus), f"{len(gpus)} GPUs"
        else:
            there = cores()
            most, why = max(1, there // plan.threads), f"{there} cores, {plan.threads} a stage"
            if needed := max((stage.memory for stage in left), default=0.0):
                fits = max(1, int(_free_memory() // (needed + OVERHEAD)))
                if fits < most:
                    most, why = fits, f"memory for {fits} models of {needed / 1e9:.1f} GB"
        if most > 1 and sum(stage.cost * stage.memory for stage in left) < WORTH_SHARING:
            most, why = 1, "too little is left to share"
        groups = len({stage.group for stage in left})
        if groups < most:
            most, why = max(1, groups), "no more stages can be made at a time" if left else "nothing is left to compute"
        return cls(most, on, plan.threads, gpus, why)

    def __str__(self) -> str:
        return f"{self.workers or 'some'} worker{'' if self.workers == 1 else 's'} ({self.why})"


@contextmanager
def executors_of(place: Place, events: Events) -> Iterator[Sequence[Executor]]:
    """Executors for a place; none means this process."""
    if place.on is not None:
        from subjattn.run.ray import on_ray

        with on_ray(place.on, place.workers, place.threads) as found:
            yield found
    elif place.workers is not None and place.workers > 1:
        from subjattn.run.workers import workers

        events.note(str(place))
        with workers(place.workers, place.gpus) as found:
            yield found
    else:
        yield ()


def check_place(workers: int | None, on: str | None) -> None:
    """Refuse a place that cannot be, before anything is done."""
    if on is not None and on != "ray" and not on.startswith("ray://"):
        raise BadInput(f"--on {on!r} is neither 'ray' nor 'ray://HOST:PORT'")
    if workers is not None and workers < 1:
        raise BadInput(f"--workers {workers}: one or more")


def _gpus() -> tuple[int, ...]:
    import torch

    return tuple(range(torch.cuda.device_count()))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_memory() -> int:
    """Bytes that can still be had, of the machine or of the control group that holds this process."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free
