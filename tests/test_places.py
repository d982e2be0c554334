"""Where stages run: two workers, a local Ray, somebody's executors; the summary is the same, byte for byte."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from subjattn.errors import BadInput
from subjattn.run.folder import Folder
from subjattn.run.plan import Plan, Stage
from subjattn.study import places
from subjattn.study.config import StudyConfig
from subjattn.study.places import Place
from subjattn.study.run import run_study


Done = tuple[Path, dict[str, Any]]


def same(done: Done, out: Path) -> None:
    assert (out / "summary.json").read_bytes() == (done[0] / "summary.json").read_bytes()


def test_two_workers_give_the_same_summary(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    run_study(small, tmp_path, workers=2)
    same(done, tmp_path)


def test_threads_of_one_process_give_the_same_summary(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    """Any executor of `concurrent.futures`."""
    with ThreadPoolExecutor(1) as pool:
        run_study(small, tmp_path, executors=[pool])
    same(done, tmp_path)


@pytest.mark.slow
def test_ray_gives_the_same_summary(done: Done, small: StudyConfig, tmp_path: Path) -> None:
    """Two workers of a local Ray."""
    run_study(small, tmp_path, on="ray", workers=2)
    same(done, tmp_path)


def test_a_cluster_that_is_not_there_is_named(small: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--on 'slurm' is neither 'ray' nor 'ray://HOST:PORT'"):
        run_study(small, tmp_path, on="slurm")


def plan(n_groups: int, *, cost: float = 1e6, memory: float = 1e9, threads: int = 1) -> Plan:
    stages = [
        Stage(f"s{i}", "works:add", cost=cost, memory=memory, device=True, group=f"g{i % n_groups}") for i in range(8)
    ]
    return Plan(stages, threads)


@pytest.mark.parametrize(
    ("asked", "gpus", "cores", "free", "workers", "why"),
    [
        (plan(4), (), 8, 1e12, 4, "no more stages can be made at a time"),
        (plan(8), (), 4, 1e12, 4, "4 cores, 1 a stage"),
        (plan(8, threads=2), (), 4, 1e12, 2, "4 cores, 2 a stage"),
        (plan(8, threads=8), (), 4, 1e12, 1, "4 cores, 8 a stage"),
        (plan(8, memory=14e9), (), 8, 33e9, 2, "memory for 2 models of 14.0 GB"),
        (plan(8, cost=1.0), (), 8, 1e12, 1, "too little is left to share"),
        (plan(8), (0, 1), 64, 1e12, 2, "2 GPUs"),
    ],
)
def test_as_many_workers_as_suit_the_machine(
    asked: Plan,
    gpus: tuple[int, ...],
    cores: int,
    free: float,
    workers: int,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "_gpus", lambda: gpus)
    monkeypatch.setattr(places, "_free_memory", lambda: free)
    monkeypatch.setattr(places, "cores", lambda: cores)
    found = Place.of(asked, Folder(tmp_path))
    assert (found.workers, found.why) == (workers, why)
    assert Place.of(asked, Folder(tmp_path), workers=3).workers == 3
