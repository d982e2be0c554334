"""Stages `prompts`: the test facts asked in one style; where it lets an arm reason, by that arm alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.errors import BadInput
from subjattn.measures.answers import reason
from subjattn.models import load_tokenizer
from subjattn.prompts import PromptSet, Style, make_prompts
from subjattn.run.plan import Context
from subjattn.study.stages.loading import loaded
from subjattn.study.stages.tables import save_prompts


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `prompts.parquet`, which every arm's tokenizer must read alike."""
    test, shown = (pd.read_parquet(inputs[role]) for role in ("test", "shown"))
    style = Style.model_validate(settings["style"])
    prompts = make_prompts(test, load_tokenizer(settings["model"]), style, demonstrations=shown)
    for arm, model in settings["others"].items():
        _check_same(prompts, make_prompts(test, load_tokenizer(model), style, demonstrations=shown), arm)
    save_prompts(prompts, out / "prompts.parquet")


def reasoned(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `prompts.parquet`, each behind what the arm thought before its answer."""
    test, shown = (pd.read_parquet(inputs[role]) for role in ("test", "shown"))
    style, model = Style.model_validate(settings["style"]), loaded(settings, inputs)
    asked = make_prompts(test, model.tokenizer, style, demonstrations=shown)
    thoughts = reason(model, asked)
    context.tell(len(asked) * THINKING)
    prompts = make_prompts(test, model.tokenizer, style, demonstrations=shown, reasoning=thoughts)
    save_prompts(prompts, out / "prompts.parquet", thoughts)


THINKING = 10.0
"""Forward passes of a prompt that a thought costs, roughly."""


def _check_same(prompts: PromptSet, others: PromptSet, arm: str) -> None:
    for a, b in zip(prompts, others, strict=True):
        if a.ids != b.ids:
            raise BadInput(
                f"arm {arm!r} reads {a.text!r} as other tokens than the study's model does, so their numbers "
                "are of different prompts: save the same tokenizer with both"
            )
