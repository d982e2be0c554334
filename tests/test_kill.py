"""Studies killed at random moments, in the driver or in a worker, once or twice: the same summary as never killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from subjattn.facts import draw
from subjattn.run.folder import Folder
from subjattn.study.config import StudyConfig
from subjattn.study.plan import plan_study
from subjattn.study.read import parse_study
from subjattn.study.run import run_study


pytestmark = pytest.mark.slow
KILLS = 50
TWICE = 10
"""Of them, those whose resume is killed too."""
PRELOADED = ["torch", "transformers", "peft", "pandas", "xarray", "subjattn.study.run", "subjattn.report.page"]


def drive(raw: dict[str, Any], out: str, workers: int) -> None:
    """What the driver does; it ends with status 1 where stages failed."""
    import torch

    os.setpgrp()
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    run_study(parse_study(raw, "killed"), out, workers=workers)


@pytest.fixture(scope="module")
def raw(
    tiny_folders: dict[str, Path], cities: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    facts = tmp_path_factory.mktemp("facts") / "cities.csv"
    few = draw(cities, 200)
    few.assign(answer=few["answers"].str[0])[["fact_id", "subject", "answer", "popularity"]].to_csv(facts, index=False)
    return {
        "name": "killed",
        "model": str(tiny_folders["llama"]),
        "facts": {"source": str(facts), "n_train": 8, "n_test": 6, "split": {"match": [], "within": []}},
        "styles": {"list": "City: {subject}\nCountry:"},
        "arms": {"base": {}, "known": {"train": "known"}, "unknown": {"train": "unknown"}},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "measures": {"answer_logprob": {}, "knockout": {"by": "layer", "facts": 1}, "patching": {"pairs": 1}},
        "contrasts": [["unknown", "known"]],
    }


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.ForkServerContext:
    """A server that has imported everything, since a start would cost seconds; workers of a driver come from it too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture(scope="module")
def whole(
    raw: dict[str, Any], context: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[bytes, float]]:
    """The summary that is never killed, and how long it takes, by number of workers."""
    found = {}
    for workers in (1, 2):
        out = tmp_path_factory.mktemp("whole") / str(workers)
        started(context, raw, tmp_path_factory.mktemp("warm") / "up", workers).join()
        start = time.monotonic()
        process = started(context, raw, out, workers)
        process.join()
        assert process.exitcode == 0
        found[workers] = (out / "summary.json").read_bytes(), time.monotonic() - start
    assert found[1][0] == found[2][0]
    return found


def started(context: Any, raw: dict[str, Any], out: Path, workers: int) -> Any:
    process = context.Process(target=drive, args=(raw, str(out), workers))
    process.start()
    return process


def kill(process: Any, after: float, worker: bool, rng: np.random.Generator) -> None:
    """SIGKILL to the driver, or to one of its workers, at this moment; wait until it has ended."""
    process.join(after)
    if process.exitcode is not None:
        return
    victims = [process.pid]
    if worker:
        server = psutil.Process(process.pid).parent()
        siblings = [one.pid for one in server.children() if one.pid != process.pid] if server else []
        victims = siblings or victims
    os.kill(victims[int(rng.integers(len(victims)))], signal.SIGKILL)
    process.join(120)
    assert process.exitcode is not None, "a driver whose worker was killed ends by itself"


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_study_ends_with_the_same_summary(
    number: int, raw: dict[str, Any], context: Any, whole: dict[int, tuple[bytes, float]], tmp_path: Path
) -> None:
    rng = np.random.default_rng(number)
    workers = 1 + number % 2
    expected, seconds = whole[workers]
    worker = workers == 2 and number % 4 == 1
    for _ in range(2 if number < TWICE else 1):
        kill(started(context, raw, tmp_path, workers), float(rng.random()) * seconds, worker, rng)
        nothing_half_done(parse_study(raw, "killed"), tmp_path)
    last = started(context, raw, tmp_path, workers)
    last.join()
    assert last.exitcode == 0
    assert (tmp_path / "summary.json").read_bytes() == expected
    assert (tmp_path / "report.html").exists() and not list(tmp_path.rglob("*.unfinished"))


def test_an_interrupted_study_with_workers_goes_on(
    raw: dict[str, Any], context: Any, whole: dict[int, tuple[bytes, float]], tmp_path: Path
) -> None:
    """Ctrl-C: the driver ends its workers at once and leaves nothing half done."""
    expected, _ = whole[2]
    process = started(context, raw, tmp_path, 2)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("arms/**/.*.unfinished")):
        assert time.monotonic() < deadline and process.exitcode is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1
    assert not (tmp_path / ".lock").exists() and not list(tmp_path.rglob("*.unfinished"))
    nothing_half_done(parse_study(raw, "killed"), tmp_path)
    last = started(context, raw, tmp_path, 2)
    last.join()
    assert last.exitcode == 0 and (tmp_path / "summary.json").read_bytes() == expected


def nothing_half_done(config: StudyConfig, out: Path) -> None:
    """What has a record is whole, and a summary stands for all of it."""
    folder = Folder(out)
    plan = plan_study(config)
    for stage in plan:
        assert folder.record(stage.name) is None or not folder.damaged(stage.name)
    if (out / "summary.json").exists():
        assert set(folder.states(plan).values()) == {"finished"}
        json.loads((out / "summary.json").read_text())
