"""What a run took: seconds and memory of its stages, by kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from subjattn.run.folder import Folder
from subjattn.run.plan import Plan
from subjattn.study import files


def spent(folder: Path) -> Iterator[str]:
    """A line for each kind of stage, those of a measure by its name, and one for all."""
    plan, found = Plan.from_json((folder / files.PLAN).read_text()), Folder(folder)
    rows = []
    for stage in plan:
        record = found.record(stage.name) or {}
        kind = str(stage.settings.get("measure") or stage.work.partition(":")[0].rpartition(".")[2])
        rows.append({"kind": kind, "seconds": record.get("seconds", 0.0), "peak": record.get("peak_memory", 0)})
    every = pd.DataFrame(rows)
    for kind, own in [*every.groupby("kind", sort=False), ("all", every)]:
        yield f"{kind}: {len(own)} stages, {own['seconds'].sum():.1f} s, at most {own['peak'].max() / 2**30:.2f} GiB"
