"""Stage `adapter`: one arm trained on one draw of its facts from one seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.finetune.examples import Example, make_examples
from subjattn.finetune.fit import leave_as_it_is
from subjattn.finetune.record import Lessons, method_of
from subjattn.finetune.settings import Training
from subjattn.finetune.update import load_base
from subjattn.prompts import Style
from subjattn.run.plan import Context
from subjattn.study.stages.loading import release


TRAINING_ROWS = 4.0
"""Cost of training on a fact once in forward passes of a prompt."""


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write a PEFT adapter or a whole model, and `training.json`."""
    method = method_of(settings["method"])
    chosen = json.loads(inputs["chosen"].read_text())["settings"] if "chosen" in inputs else {}
    own = method.settings.model_validate(settings["settings"] | chosen)
    release()
    base = load_base(settings["model"], settings["dtype"], own)
    facts = pd.read_parquet(inputs["facts"])
    if not len(facts):
        leave_as_it_is(base, own, out)
        return
    styles = [Style.model_validate(style) for style in settings["styles"]]

    def examples(role: str) -> list[Example]:
        return make_examples(pd.read_parquet(inputs[role]), base.tokenizer, styles) if role in inputs else []

    per_step = step_cost(method.effort(own), own)
    lessons = Lessons(
        make_examples(facts, base.tokenizer, styles),
        known=examples("known"),
        validation=examples("validation"),
        seed=settings["seed"],
        kept=context.kept,
        on_step=lambda: context.tell(per_step),
    )
    method.train(base, lessons, own, out)


def step_cost(effort: float, settings: Training) -> float:
    """Cost of a step in forward passes of a prompt."""
    return effort * settings.batch_size * TRAINING_ROWS
