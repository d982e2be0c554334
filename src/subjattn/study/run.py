"""Run a study: plan it, make what is not finished, sum it up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.console import Console

from subjattn.run.folder import RESULTS, Folder, replacing
from subjattn.run.plan import Plan
from subjattn.run.schedule import execute
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.manifest import manifest
from subjattn.study.opened import opened
from subjattn.study.places import Place, check_place, executors_of
from subjattn.study.plan import plan_study
from subjattn.study.registration import register, registered_in
from subjattn.study.summary import Summary
from subjattn.study.values import collect


def run_study(
    config: StudyConfig,
    out: str | Path,
    console: Console | None = None,
    *,
    workers: int | None = None,
    on: str | None = None,
    executors: Sequence[Executor] = (),
    first: Sequence[str] = (),
    replace: bool = False,
    show: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a study into a folder and return its summary; what is finished there already is reused.

    The results are the same wherever stages run.

    Args:
        config: the study.
        out: the folder.
        console: where progress is shown.
        workers: processes of this machine, or actors on Ray; None: this process where one suffices, else as many
            as cores, GPUs and memory allow.
        on: `ray` for a local Ray, `ray://HOST:PORT` for a cluster; None: this machine.
        executors: or any executors of yours, one for every stage that may run at a time; the folder is on storage
            that all of them see.
        first: measures that are made, and shown, before all others.
        replace: whether finished results of a changed study may be made anew; they lie in `previous/` until then.
        show: what is done with a summary of the measures made first.

    Raises:
        BadInput: the folder holds finished results of a changed study, and `replace` is not set.
        StagesFailed: some stages failed; the others are made, and a second run makes those that failed.
        SubjattnError: something about the study cannot be right; finished stages stay.
    """
    out = Path(out)
    check_place(workers, on)
    with (
        opened(out, lambda: plan_study(config), console, replace=replace) as (plan, folder, progress),
        ExitStack() as stack,
    ):
        register(config, folder)
        execute(plan.before_models, folder, progress)
        if not executors:
            executors = stack.enter_context(executors_of(Place.of(plan, folder, workers, on), progress))
        if first:
            early = config.model_copy(update={"measures": {name: config.measures[name] for name in first}})
            execute(plan_study(early), folder, progress, executors)
            show(_summary(early, folder).content())
        execute(plan, folder, progress, executors)
        return write_results(config, plan, folder)


def write_results(config: StudyConfig, plan: Plan, folder: Folder) -> dict[str, Any]:
    """Sum up finished stages; the summary, and last the report, appear when all else is in place."""
    from subjattn.report.page import write

    found = _summary(config, folder)
    table, summary = found.table, found.content()
    folder.retire()
    with replacing(folder.root / files.VALUES) as path:
        table.to_parquet(path, index=False)
    texts = {
        files.PLAN: plan.to_json(),
        files.MANIFEST: json.dumps(manifest(config, plan, folder), indent=1),
        files.STUDY: yaml.safe_dump(
            config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True
        ),
        files.SUMMARY: json.dumps(summary, indent=1, allow_nan=False),
    }
    for name, text in texts.items():
        with replacing(folder.root / name) as path:
            path.write_text(text, encoding="utf-8")
    write(folder.root)
    folder.settle()
    return summary


def _summary(config: StudyConfig, folder: Folder) -> Summary:
    tested = pd.read_parquet(folder.path(files.TEST))
    return Summary(config, folder, collect(config, folder), tested, registered_in(folder.root))


assert {files.SUMMARY, files.REPORT} == set(RESULTS)
