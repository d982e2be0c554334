"""Stage `adapter`: one arm trained on one draw of its facts from one seed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.finetune.record import method_of
from subjattn.models import load_model
from subjattn.prompts import Prompt, Style, make_prompts
from subjattn.run.plan import Context
from subjattn.study.stages.loading import release


TRAINING_ROWS = 4.0
"""Cost of training on a fact once in forward passes of a prompt."""


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write a PEFT adapter and `training.json`."""
    facts = pd.read_parquet(inputs["facts"])
    method = method_of(settings["method"])
    chosen = method.settings.model_validate(settings["settings"])
    release()
    base = load_model(settings["model"], dtype=settings["dtype"])
    styles = [Style.model_validate(style) for style in settings["styles"]]
    rows = method.rows(chosen) * TRAINING_ROWS
    method.train(
        base,
        taking_turns(facts, base.tokenizer, styles),
        chosen,
        out,
        seed=settings["seed"],
        on_step=lambda: context.tell(rows),
    )


def taking_turns(facts: pd.DataFrame, tokenizer: Any, styles: list[Style]) -> list[Prompt]:
    """One prompt per fact; which style asks it depends on the fact alone."""
    asked = [make_prompts(facts, tokenizer, style) for style in styles]
    return [asked[zlib.crc32(str(fact_id).encode()) % len(styles)][i] for i, fact_id in enumerate(facts["fact_id"])]
