"""Stages of `grid`: one combination of hyper-parameters tried on an arm's facts, and the choice among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from subjattn.errors import BadInput, TrainingDiverged
from subjattn.measures.answers import answer_logprob, predict
from subjattn.prompts import Style, make_prompts
from subjattn.run.plan import Context
from subjattn.study.stages.loading import loaded, release
from subjattn.study.stages.train import work as train


def work(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Train and write `score.json`: the settings, and accuracy and log-probability of the answers on validation facts.

    A run that diverges has a reason in their place.
    """
    said: dict[str, Any] = {"settings": settings["settings"]}
    with TemporaryDirectory() as folder:
        trained = Path(folder)
        try:
            train(settings, inputs, trained, context)
        except TrainingDiverged as error:
            said |= {"accuracy": None, "logprob": None, "reason": str(error)}
        else:
            model = loaded(settings, {"adapter": trained})
            facts = pd.read_parquet(inputs["validation"])
            prompts = make_prompts(facts, model.tokenizer, Style.model_validate(settings["styles"][0]))
            said["accuracy"] = float(predict(model, prompts, settings["scorer"])["correct"].mean())
            said["logprob"] = float(answer_logprob(model, prompts).mean())
            release()
    (out / "score.json").write_text(json.dumps(said, indent=1))


def choose(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context) -> None:
    """Write `chosen.json`: the settings of most accuracy on validation facts, of equal ones the likelier answers.

    Inputs are called `number of the combination/arm`; of several arms the mean counts, and a combination with which one
    of them diverges is out.
    """
    rows = [
        {"point": int(role.partition("/")[0]), "arm": role.partition("/")[2], **json.loads(path.read_text())}
        for role, path in inputs.items()
    ]
    scores: dict[int, tuple[float, float]] = {}
    for point in sorted({row["point"] for row in rows}):
        own = [row for row in rows if row["point"] == point]
        if all(row["accuracy"] is not None for row in own):
            scores[point] = tuple(float(np.mean([row[name] for row in own])) for name in ("accuracy", "logprob"))  # type: ignore[assignment]
    if not scores:
        raise BadInput(f"every combination of training.grid diverged: {rows[0]['reason']}")
    best = max(scores, key=lambda point: (*scores[point], -point))
    chosen = next(row["settings"] for row in rows if row["point"] == best)
    (out / "chosen.json").write_text(json.dumps({"settings": chosen, "tried": rows}, indent=1))
