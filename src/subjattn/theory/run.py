"""Run a study of one-layer worlds: make what is not finished of its plan, and write tables and the page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
import yaml
from rich.console import Console

from subjattn.errors import BadInput
from subjattn.run.folder import Folder, replacing
from subjattn.run.plan import Plan
from subjattn.run.schedule import execute
from subjattn.study.foresee import expected
from subjattn.study.manifest import mixtures
from subjattn.study.opened import opened
from subjattn.study.places import Place, check_place, executors_of
from subjattn.theory import plan as names
from subjattn.theory.config import TheoryConfig
from subjattn.theory.gap import Pretraining, WorldSettings, pretrain
from subjattn.theory.plan import plan_theory
from subjattn.theory.results import along_of, gaps, percentiles_of, values_of


TABLES = ("values", "gaps", "percentiles", "along")
"""Written as `NAME.parquet`, those that the study has."""
SUMMARY, REPORT = "summary.json", "report.html"


def run_theory(
    config: TheoryConfig,
    out: str | Path,
    console: Console | None = None,
    *,
    workers: int | None = None,
    on: str | None = None,
    replace: bool = False,
) -> dict[str, pd.DataFrame]:
    """Run a study of one-layer worlds into a folder, and return its tables; what is finished there is reused.

    Args:
        config: the study.
        out: the folder.
        console: where progress is shown.
        workers: processes; None: as many as suit the machine.
        on: as for `run_study`.
        replace: as for `run_study`.

    Raises:
        StagesFailed: some stages failed; the others are made.
    """
    from subjattn.theory.page import write

    out = Path(out)
    check_place(workers, on)
    with opened(out, lambda: plan_theory(config), console, replace=replace) as (plan, folder, progress):
        execute(plan.before_models, folder, progress)
        with executors_of(Place.of(plan, folder, workers, on), progress) as executors:
            execute(plan, folder, progress, executors)
        folder.retire()
        tables = tables_of(config, folder)
        for name, table in tables.items():
            with replacing(out / f"{name}.parquet") as path:
                table.to_parquet(path, index=False)
        texts = {
            "plan.json": plan.to_json(),
            "study.yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
            SUMMARY: json.dumps(_summary(config, plan, folder), indent=1),
        }
        for name, text in texts.items():
            with replacing(out / name) as path:
                path.write_text(text, encoding="utf-8")
        write(out)
        folder.settle()
        return tables


def tables_of(config: TheoryConfig, folder: Folder) -> dict[str, pd.DataFrame]:
    """Every table of the arrays that are made; see `subjattn.theory.results`."""
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for world, of in config.worlds.items():
        for zipf in of.zipf:
            for way in config.ways_of(world):
                array = xr.load_dataset(folder.path(names.finetuned(world, zipf, way)) / "array.nc", engine="h5netcdf")
                about: dict[str, Any] = {"world": world, "zipf": zipf, "finetuning": way}
                found["values"].append(values_of(array).assign(**about))
                found["percentiles"].append(percentiles_of(array).assign(**about))
            for label in config.along:
                array = xr.load_dataset(folder.path(names.along(world, zipf, label)) / "array.nc", engine="h5netcdf")
                found["along"].append(along_of(array).assign(world=world, zipf=zipf, training=label))
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items() if parts}
    if "values" in tables:
        tables["gaps"] = gaps(tables["values"])
    return tables


def _summary(config: TheoryConfig, plan: Plan, folder: Folder) -> dict[str, Any]:
    path = folder.path(names.STATEMENTS) / "statements.json"
    return {
        "study": config.name,
        "theory": config.theory,
        "replicates": config.replicates,
        "statements": json.loads(path.read_text()) if config.statements else [],
        "mixtures": mixtures(plan, folder),
    }


def open_theory(out: str | Path) -> tuple[TheoryConfig, dict[str, Any], dict[str, pd.DataFrame]]:
    """Study, summary and tables of a finished run.

    Raises:
        BadInput: the folder holds none.
    """
    out = Path(out)
    if not (out / SUMMARY).is_file() or not (out / "study.yaml").is_file():
        raise BadInput(f"{str(out)!r} holds no finished study of worlds: run its command again, which goes on")
    config = TheoryConfig.model_validate(yaml.safe_load((out / "study.yaml").read_text(encoding="utf-8")))
    tables = {name: pd.read_parquet(path) for name in TABLES if (path := out / f"{name}.parquet").is_file()}
    return config, json.loads((out / SUMMARY).read_text(encoding="utf-8")), tables


def foresee_theory(config: TheoryConfig, out: Path, workers: int | None = None) -> dict[str, Any]:
    """A study's plan as plain data, as `foresee` gives it for other studies. Nothing is written."""
    return expected(config.name, plan_theory(config), out, workers, _seconds_per_pass(), starting=4.0)


def _seconds_per_pass() -> float:
    """Of a fact's part in a step of training, in a world of the usual size on this machine."""
    import torch

    settings, seeds, before = Pretraining(steps=[100]), [0, 1, 2, 3], torch.get_num_threads()
    torch.set_num_threads(1)  # as in stages
    try:
        pretrain(WorldSettings(), 1.0, Pretraining(steps=[2]), seeds)  # warms up
        started = time.perf_counter()
        pretrain(WorldSettings(), 1.0, settings, seeds)
        return (time.perf_counter() - started) / (settings.steps[-1] * settings.batch * len(seeds))
    finally:
        torch.set_num_threads(before)
