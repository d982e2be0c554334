"""What a study would do: its stages, what is finished, and what the rest takes. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subjattn.models import model_shape
from subjattn.progress import clock
from subjattn.run.folder import Folder
from subjattn.run.plan import Plan
from subjattn.study.config import StudyConfig
from subjattn.study.manifest import check_version, mixtures
from subjattn.study.places import OVERHEAD, Place
from subjattn.study.plan import plan_study
from subjattn.study.planning import weight_bytes
from subjattn.study.registration import registration_status


TOKENS = 12
"""Of a prompt, where nothing was run yet."""
SHARE = 0.75
"""Of the matrix rate that whole stages reach, loading and waiting counted in, where nothing was run yet."""


STARTING = 18.0
"""Seconds in which processes start, load a model, and in the end write the report; of a small one."""


def foresee(config: StudyConfig, out: Path, workers: int | None = None) -> dict[str, Any]:
    """A study's plan as plain data: stages with their state, forward passes, time and memory expected.

    Raises:
        BadInput: as `run_study` does before it computes anything.
    """
    plan, folder = plan_study(config), Folder(out)
    status = registration_status(config, out)
    return expected(config.name, plan, out, workers, _seconds_per_pass(config, plan, folder), STARTING, status)


def expected(
    name: str,
    plan: Plan,
    out: Path,
    workers: int | None,
    seconds_per_pass: float,
    starting: float,
    registration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Any plan as plain data, with what is left of it; `starting` is in seconds."""
    check_version(out)
    folder = Folder(out)
    states, place = folder.states(plan), Place.of(plan, folder, workers)
    left = [stage for stage in plan if states[stage.name] != "finished"]
    passes = sum(stage.cost for stage in left)
    seconds = passes * seconds_per_pass / min(place.workers or 1, max(1, len(left)))
    seconds += starting if passes else 0.0
    return {
        "study": name,
        "out": str(out),
        "threads": plan.threads,
        "stages": [{**asdict(stage), "passes": stage.cost, "state": states[stage.name]} for stage in plan],
        "finished": sum(state == "finished" for state in states.values()),
        "passes": passes,
        "seconds": seconds,
        "time": clock(seconds),
        "memory": f"{(max((stage.memory for stage in left), default=0.0) + OVERHEAD) / 1e9:.1f} GB",
        "place": str(place),
        "mixtures": mixtures(plan, folder),
        "registration": registration,
    }


def _seconds_per_pass(config: StudyConfig, plan: Plan, folder: Folder) -> float:
    """What a pass took in stages that are made, else what it should take at this machine's matrix rate."""
    made = [(stage, record) for stage in plan if stage.cost and (record := folder.record(stage.name))]
    if made:
        return float(sum(record["seconds"] for _, record in made)) / sum(stage.cost for stage, _ in made)
    return seconds_of_a_pass(config.model, config.dtype, plan.threads)


def seconds_of_a_pass(model: str, dtype: str, threads: int) -> float:
    """What a forward pass of a prompt should take at this machine's matrix rate."""
    import torch

    parameters = weight_bytes(model, dtype) / getattr(torch, dtype).itemsize
    return float(2 * parameters * TOKENS / (_matrix_rate(threads) * SHARE) + 1e-5 * model_shape(model)[0])


def _matrix_rate(threads: int) -> float:
    """FLOP a second of a matrix product, on the device that stages would use."""
    import torch

    from subjattn.models import best_device

    device, before = best_device(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(512, 1024, device=device), torch.randn(1024, 1024, device=device)
        a @ b
        start = time.perf_counter()
        for _ in range(10):
            result = a @ b
        result.sum().item()
        return 10 * 2 * 512 * 1024 * 1024 / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
