"""Stage `mixing`: the tuned model's share of a mixture, chosen on validation facts and never on those tested."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.measures.accuracy import PREDICTING
from subjattn.measures.answers import predict
from subjattn.models.derived import mixed
from subjattn.prompts import Prompt, Style, make_prompts
from subjattn.run.plan import Context
from subjattn.study.stages.loading import loaded_pair


WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `mixing.json`: the `weight` chosen, and the accuracy at every share on both kinds of facts.

    Of shares that answer as many validation facts the one nearest to a half is taken.
    """
    tuned, base = loaded_pair(settings, inputs)
    form, style = settings["derived"]["mix"]["form"], Style.model_validate(settings["style"])
    shown = pd.read_parquet(inputs["shown"])
    curve: list[dict[str, float]] = [{"weight": weight} for weight in WEIGHTS]
    for role in ("validation", "test"):
        facts = pd.read_parquet(inputs[role])
        prompts = make_prompts(facts, tuned.tokenizer, style)
        behind: Sequence[Prompt] = ()
        if settings["base_style"]:
            own = Style.model_validate(settings["base_style"])
            behind = make_prompts(facts, tuned.tokenizer, own, demonstrations=shown)
        for row in curve:
            model = mixed(tuned, base, row["weight"], form, prompts=prompts, shown=behind)
            row[role] = float(predict(model, prompts, settings["scorer"])["correct"].mean())
            context.tell(2 * PREDICTING * len(prompts))
    best = max(row["validation"] for row in curve)
    chosen = min((row["weight"] for row in curve if row["validation"] == best), key=lambda weight: abs(weight - 0.5))
    (out / "mixing.json").write_text(json.dumps({"weight": chosen, "curve": curve}, indent=1))
