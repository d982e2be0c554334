"""The facts of one arm, drawn as a study draws them, without the rest of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.errors import BadInput, StagesFailed
from subjattn.run.events import Events
from subjattn.run.folder import Folder, alone
from subjattn.run.plan import Plan
from subjattn.run.schedule import execute
from subjattn.study import files
from subjattn.study.plan import plan_study
from subjattn.study.read import parse_study


def drawn_arm(study: Mapping[str, Any], specs: Sequence[str], folder: Path, events: Events) -> dict[str, pd.DataFrame]:
    """Training facts of arms by specification, and `test` and `validation` facts.

    Args:
        study: the fields `model`, `facts`, `styles`, … of a study.
        specs: which facts, such as `unknown`.
        folder: where it is worked out, so that a second run takes what is there.
        events: told of all that happens.

    Raises:
        BadInput: the facts do not give what is asked, or the model cannot rank them; the message says why.
    """
    arms = {f"arm{i}": {"train": spec} for i, spec in enumerate(specs)}
    config = parse_study({"name": "one-arm", **study, "arms": arms}, "finetune")
    whole = plan_study(config)
    needed = {files.SPLIT}
    for stage in reversed(whole.stages):
        needed |= set(stage.made_from) if stage.name in needed else set()
    plan = Plan([stage for stage in whole if stage.name in needed], whole.threads)
    with alone(folder):
        try:
            execute(plan, Folder(folder), events)
        except StagesFailed as error:
            raise BadInput(next(iter(error.reasons.values()))) from None
    found = {spec: pd.read_parquet(Folder(folder).path(files.training_facts(spec, 0))) for spec in specs}
    held_out = {"test": files.TEST, "validation": files.VALIDATION}
    return found | {name: pd.read_parquet(Folder(folder).path(file)) for name, file in held_out.items()}
