"""The report of a finished study: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from subjattn.evidence.changes import difference
from subjattn.evidence.returned import accuracy_gap_in_words
from subjattn.measures.record import Measure, measure_of
from subjattn.plots.figures import Drawn, figure_of
from subjattn.plots.mixing import plot_mixing
from subjattn.plots.over_training import plot_over_training
from subjattn.plots.verdicts import plot_claims
from subjattn.prompts import Style
from subjattn.run.folder import replacing
from subjattn.study import files
from subjattn.study.deciding import needed_in_words
from subjattn.study.files import Run, open_run
from subjattn.study.gaps import factuality_gap, has_gap
from subjattn.study.known_before import known_before
from subjattn.study.mixing_curves import mixing_curves
from subjattn.study.registration import registered_in


TOP_ANSWERS = 8


def write(folder: Path) -> Path:
    """Write `report.html` of a finished run from the files in its folder.

    Raises:
        BadInput: the folder holds no finished run.
    """
    run, environment = open_run(folder), templates()
    environment.filters |= {"signed": _signed, "short": _short, "shares": _shares, "needed": needed_in_words}
    environment.filters |= {"difference": difference, "part": _part, "accuracy_gap": accuracy_gap_in_words}
    page = environment.get_template("page.html.jinja").render(_content(run))
    target = folder / files.REPORT
    with replacing(target) as path:
        path.write_text(page, encoding="utf-8")
    return target


def templates() -> jinja2.Environment:
    """What pages are made with."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("subjattn", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(run: Run) -> dict[str, Any]:
    summary, measured = run.summary, [measure_of(name) for name in run.study["measures"]]
    return {
        "summary": summary,
        "manifest": run.manifest,
        "study": run.study,
        "styles": [_style(run, measured, style) for style in run.styles],
        "columns": _columns(summary),
        "scopes": _scopes(summary),
        "diagnosis": summary.get("diagnosis", []),
        "changed": [row for row in summary["contrasts"] if row.get("verdict")],
        "registered": registered_in(run.folder),
        "claims_figure": html_of(plot_claims(summary["claims"])) if _judged(summary) else None,
        "overview": summary.get("overview", []),
        "mixing": _mixing(run),
        "over_training": _over_training(run),
        "composition": _composition(run),
        "known_before": known_before(run),
        "gap": factuality_gap(run).to_dict("records") if has_gap(run) else [],
        "quantities": summary["quantities"],
        "plotly": Markup(get_plotlyjs()),
        "script": Markup(resources.files("subjattn.report").joinpath("page.js").read_text(encoding="utf-8")),
        "manifest_text": json.dumps(run.manifest, indent=1),
    }


def _scopes(summary: dict[str, Any]) -> list[str]:
    """What the intervals of a summary speak of."""
    rows = [*summary["contrasts"], *(found for claim in summary["claims"] for found in claim["styles"].values())]
    return list(dict.fromkeys(row["scope"] for row in rows if row.get("scope")))


def _style(run: Run, measured: list[Measure], style: str) -> dict[str, Any]:
    """What the report says of one style."""
    summary, contrasts = run.summary, run.study["contrasts"]
    asked = run.study["styles"][style]
    missing = {name: reasons[style] for name, reasons in summary["not_defined"].items() if style in reasons}
    return {
        "name": style,
        "asked": _asked(asked),
        "arms": _in_style(summary["arms"], style),
        "contrasts": [row for row in summary["contrasts"] if row["style"] == style],
        "across": [row for row in summary["across"] if row["style"] == style],
        "outside": _in_style(summary.get("out_of_distribution", {}), style),
        "facts": _facts(run, style),
        "figures": list(_figures(run, measured, style, contrasts[0] if contrasts else None)),
        "not_defined": {reason: [name for name, of in missing.items() if of == reason] for reason in missing.values()},
    }


def _in_style(arms: dict[str, Any], style: str) -> dict[str, Any]:
    """What a summary says of the arms that were asked in a style."""
    return {name: arm["styles"][style] for name, arm in arms.items() if style in arm["styles"]}


def _facts(run: Run, style: str) -> dict[str, Any] | None:
    """Test facts and what every arm answers to them; None where answers were not asked for."""
    if "accuracy" not in run.study["measures"]:
        return None
    found = run.predictions()
    found = found[found["style"] == style]
    by_fact = found.groupby(["fact_id", "arm"], sort=False).agg(
        prediction=("prediction", "first"),
        correct=("correct", "first"),
        n_right=("correct", "sum"),
        n=("correct", "size"),
    )
    about, arms = run.facts[run.facts["test"]].set_index("fact_id"), [a for a in run.arms if style in run.styles_of(a)]
    asked = [fact for fact in about.index if (fact, arms[0]) in by_fact.index]
    rows = [
        {
            **about.loc[fact, ["subject", "answer", "popularity"]].to_dict(),
            "cells": [by_fact.loc[(fact, arm)].to_dict() for arm in arms],
        }
        for fact in asked
    ]
    return {"arms": arms, "rows": rows, "replicates": bool((by_fact["n"] > 1).any())}


def _figures(run: Run, measured: list[Measure], style: str, difference: list[str] | None) -> Iterator[dict[str, Any]]:
    for measure in measured:
        if measure.figure is None:
            continue
        figure = figure_of(measure.figure)

        def array(variable: str, name: str = measure.name) -> Any:
            return run.array(name, variable, style) if run.has(name, variable, style) else None

        def stands(variable: str, name: str = measure.name) -> Any:
            if difference is None or not run.has(name, variable, style):
                return None
            return run.significant(name, variable, style, *difference)

        pair = None if difference is None else (difference[0], difference[1])
        try:
            drawn = figure.draw(Drawn(array, pair, stands))
        except Exception as error:  # one figure must not cost the report
            yield {"title": figure.title, "note": f"Not drawn: {type(error).__name__}: {error}", "html": ""}
            continue
        if drawn is not None:
            note = " ".join(part for part in (figure.note, _drawn_from(run, measure, style)) if part)
            yield {"title": figure.title, "note": note, "html": html_of(drawn)}


def _drawn_from(run: Run, measure: Measure, style: str) -> str:
    """How many pairs a figure of swaps stands on, and how many of them the model knows."""
    if "swaps" not in measure.needs:
        return ""
    found = run.measure(measure.name, run.arms[0], style)
    if "known" not in found.coords:
        return ""
    effect = found["patch_effect"]
    direction = effect.attrs.get("direction", "")
    moved = float((effect["clean_logit_diff"] - effect["corrupt_logit_diff"]).mean())
    return (
        f"Here: {direction}, {effect.sizes['fact']} pairs, {int(effect['known'].sum())} of two facts that the "
        f"reference arm answers rightly; in {run.arms[0]} the swap moves the logit difference by {moved:.2f} on "
        f"average, and in {int(effect['kept'].sum())} of them far enough to count."
    )


def _asked(style: dict[str, Any]) -> str:
    """A style in words: its template, and what stands around it."""
    defaults = Style(template="{subject}").model_dump(mode="json")
    around = {name: value for name, value in style.items() if name != "template" and value != defaults[name]}
    return str(style["template"]) + "".join(f"\n{name.replace('_', ' ')}: {value}" for name, value in around.items())


def _judged(summary: dict[str, Any]) -> bool:
    return any(found["estimate"] is not None for claim in summary["claims"] for found in claim["styles"].values())


def html_of(figure: go.Figure) -> Markup:
    """A figure's own HTML; Plotly escapes what would end its script."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _columns(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The quantities per fact of the arms' table, part by part; accuracy has columns of its own."""
    arm = next(iter(summary["arms"].values()))
    units = {name: of["unit"] for name, of in summary["quantities"].items() if not of["across"]}
    names = [name for name in arm if name.partition(".")[0] in units and name != "accuracy"]
    return [{"name": name, "unit": units[name.partition(".")[0]]} for name in names]


def _mixing(run: Run) -> Markup | None:
    curves = mixing_curves(run)
    return html_of(plot_mixing(curves)) if len(curves) else None


def _over_training(run: Run) -> Markup | None:
    """Curves of the quantities that are claimed, and of each measure's first; None where nothing was kept."""
    rows = run.summary.get("over_training", [])
    claimed = {claim["measure"] for claim in run.study["claims"]}
    measured = [measure_of(name) for name in run.study.get("over_training", [])]
    first = {measure.quantities[0].name for measure in measured}
    shown = [row for row in rows if row["measure"] in claimed or row["measure"].partition(".")[0] in first]
    units = {name: about["unit"] for name, about in run.summary["quantities"].items()}
    return html_of(plot_over_training(shown, units)) if shown else None


def _composition(run: Run) -> dict[str, Any]:
    """What the test set and each arm's training facts (of the first draw) are made of, side by side."""
    facts, study = run.facts, run.study
    test = facts[facts["test"]]
    trained = {arm: spec["train"] for arm, spec in study["arms"].items() if spec["train"]}
    answers = test["answer"].value_counts().index[:TOP_ANSWERS].tolist()
    groups = [
        {"title": "test facts", **_made_of(test, answers), "own_answers": None, "base_accuracy": None, "base_n": 0}
    ]
    for arm, spec in trained.items():
        own = facts[facts[f"train_{spec}"]]
        before = run.before_training(spec)
        if not len(own):
            continue
        taught = run.taught(spec).set_index("fact_id")["answer"].reindex(own["fact_id"])
        groups.append(
            {
                "title": arm,
                **_made_of(own, answers),
                "own_answers": float((taught.to_numpy() == own["answer"].to_numpy()).mean()),
                "base_accuracy": None if before is None else float(before["correct"].mean()),
                "base_n": 0 if before is None else len(before),
            }
        )
    styles = study["training"]["styles"] or [
        name for name, style in study["styles"].items() if not style["shots"] and not style["chain_of_thought"]
    ]
    return {"groups": groups, "answers": answers, "trained": bool(trained), "style": next(iter(styles), None)}


def _made_of(facts: pd.DataFrame, answers: list[str]) -> dict[str, Any]:
    return {
        "n": len(facts),
        "popularity": facts["popularity"].median(),
        "n_tokens": facts["n_tokens"].mean(),
        "lengths": facts["n_tokens"].clip(upper=6).value_counts(normalize=True).sort_index().to_dict(),
        "shares": {answer: float((facts["answer"] == answer).mean()) for answer in answers},
    }


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.4f}"


def _part(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _shares(shares: dict[str, float]) -> str:
    """What the variance of an estimate is due to, the largest part first."""
    parts = sorted(shares.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005)


def _short(value: float | None) -> str:
    if value is None or pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"
