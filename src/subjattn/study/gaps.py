"""The factuality gap: what training on known facts answers more than training on unknown ones, by kind of prompt.

Gong et al. (2025) find it smaller behind demonstrations and chains of thought, far from the trained facts, and for
instruct models. Their templates and thresholds are not published: what is known is what the study says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.evidence.intervals import contrast
from subjattn.study.files import Run
from subjattn.study.values import Values


COLUMNS = (
    *("study", "model", "style", "prompt", "distribution", "checkpoint", "known", "unknown"),
    *("gap", "low", "high", "n_facts", "n_replicates", "scope", "reason"),
)
LAST = "end of training"
"""The only checkpoint that a study keeps so far."""


def factuality_gap(*runs: Run, arms: tuple[str, str] | None = None) -> pd.DataFrame:
    """Accuracy of the arm trained on known facts minus that of the arm trained on unknown ones, style by style.

    Args:
        runs: finished studies from `open_run`, such as one of a base and one of an instruct model.
        arms: names of the two arms, known first; None: those that train on `known` and on `unknown`, for every model
            of a study that has both.

    Returns:
        A row for each study, model, style and distribution (`in`: relations that were trained on, `out`: relations held
        out), with the columns `COLUMNS`: `prompt` says in words what stands around the question, `known` and `unknown`
        are the arms' accuracies, `gap` their difference with the ends of its 95 % interval, over facts and replicates.
        NaN, and why in `reason`, where it has none.

    Raises:
        BadInput: no runs, a study without the two arms, or one that did not ask for accuracy.
    """
    if not runs:
        raise BadInput("give finished studies: sa.factuality_gap(sa.open_run('runs/gong'))")
    rows = [row for run in runs for a, b in _pairs(run, arms) for row in _rows(run, a, b)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def kinds_of_prompts(run: Run) -> list[str]:
    """What stands around the question in the styles of a study, each kind once."""
    return list(dict.fromkeys(prompt_in_words(style) for style in run.study["styles"].values()))


def has_gap(run: Run) -> bool:
    """Whether a study has arms of known and of unknown facts, and asks in more than one kind of prompt."""
    return "accuracy" in run.study["measures"] and len(kinds_of_prompts(run)) > 1 and bool(_trained_on_both(run))


def prompt_in_words(style: Mapping[str, Any]) -> str:
    """Such as "4-shot, unknown facts, another relation" or "zero-shot, chain of thought"."""
    words = [f"{style['shots']}-shot" if style["shots"] else "zero-shot"]
    words += [f"{style['demonstrations']} facts"] if style["shots"] and style["demonstrations"] != "any" else []
    words += ["another relation"] if style["shots"] and style["relation"] == "other" else []
    words += ["chain of thought"] if style["chain_of_thought"] else []
    return ", ".join(words)


def _pairs(run: Run, arms: tuple[str, str] | None) -> list[tuple[str, str]]:
    if "accuracy" not in run.study["measures"]:
        raise BadInput(f"study {run.summary['study']!r} did not ask for accuracy, which the gap is of")
    if arms is not None:
        if missing := [arm for arm in arms if arm not in run.arms]:
            raise BadInput(f"study {run.summary['study']!r} has no arm {missing[0]!r}; it has {', '.join(run.arms)}")
        return [arms]
    if not (found := _trained_on_both(run)):
        raise BadInput(
            f"study {run.summary['study']!r} has no arms that train on 'known' and on 'unknown' facts of one model: "
            "name two, arms=('top', 'bottom')"
        )
    return found


def _trained_on_both(run: Run) -> list[tuple[str, str]]:
    """Of each model the first arm of known facts and the first of unknown ones."""
    found: dict[str, dict[str, str]] = {}
    for arm, of in run.study["arms"].items():
        if of["train"] in ("known", "unknown"):
            found.setdefault(_model(run, arm), {}).setdefault(of["train"], arm)
    return [(of["known"], of["unknown"]) for of in found.values() if len(of) == 2]


def _model(run: Run, arm: str) -> str:
    return str(run.study["arms"][arm].get("model") or run.study["model"])


def _rows(run: Run, known: str, unknown: str) -> Iterator[dict[str, Any]]:
    table = run.values[run.values["quantity"] == "accuracy"]
    outside = table["out_of_distribution"].to_numpy(bool)
    for where, chosen in (("in", ~outside), ("out", outside)):
        values = Values(table[chosen])
        for style, how in run.study["styles"].items():
            of = [values.of(arm, style, "accuracy") for arm in (known, unknown)]
            if of[0] is None or of[1] is None:
                continue
            yield {
                "study": run.summary["study"],
                "model": _model(run, known),
                "style": style,
                "prompt": prompt_in_words(how),
                "distribution": where,
                "checkpoint": LAST,
                "known": float(of[0].mean()),
                "unknown": float(of[1].mean()),
                **_gap(of[0], of[1]),
            }


def _gap(known: Any, unknown: Any) -> dict[str, Any]:
    try:
        found = contrast(known, unknown, bounds=(0, 1))
    except BadInput as error:
        return {"gap": float(known.mean() - unknown.mean()), "low": np.nan, "high": np.nan, "reason": str(error)}
    low, high = found.ends()
    about = {"n_facts": found.n_facts, "n_replicates": found.n_replicates, "scope": found.scope, "reason": ""}
    return {"gap": found.estimate, "low": low, "high": high} | about
