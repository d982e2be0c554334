"""The report of a finished study: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from subjattn.errors import BadInput
from subjattn.plots.heatmaps import plot_attention, plot_patching, plot_tokens
from subjattn.plots.verdicts import plot_claims
from subjattn.prompts import Style
from subjattn.stages import replacing


TOP_ANSWERS = 8


def write(run: Path) -> Path:
    """Write `report.html` of a finished run from the files in its folder.

    Raises:
        BadInput: the folder holds no finished run.
    """
    if not (run / "summary.json").is_file():
        raise BadInput(f"{str(run)!r} holds no finished study (no summary.json): run 'subjattn run' first")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("subjattn", "plots"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": lambda value: "–" if value is None else f"{value:+.4f}", "short": _short}
    page = environment.get_template("report.html.jinja").render(_content(run))
    with replacing(run / "report.html") as path:
        path.write_text(page, encoding="utf-8")
    return run / "report.html"


def _content(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    study = manifest["study"]
    measures = xr.load_dataset(run / "measures.nc", engine="h5netcdf")
    subjects = "attention_to_subject" in measures
    styles = [
        {
            "name": style,
            "asked": _asked(asked),
            "arms": {name: arm["styles"][style] for name, arm in summary["arms"].items()},
            "contrasts": [row for row in summary["contrasts"] if row["style"] == style],
            "attention": _figure(_attention(measures, style, study["contrasts"])) if subjects else None,
            "outside": {name: arm["styles"][style] for name, arm in summary.get("out_of_distribution", {}).items()},
            "tokens": _optional(run / f"tokens-{style}.nc", plot_tokens),
            "patching": _optional(run / f"patching-{style}.nc", plot_patching),
            "n_pairs": _n_facts(run / f"patching-{style}.nc"),
        }
        for style, asked in study["styles"].items()
    ]
    return {
        "summary": summary,
        "manifest": manifest,
        "study": study,
        "styles": styles,
        "claims_figure": _figure(plot_claims(summary["claims"])) if _judged(summary) else None,
        "composition": _composition(run, study),
        "definitions": {name: array.attrs for name, array in measures.data_vars.items()},
        "plotly": Markup(get_plotlyjs()),
        "manifest_text": json.dumps(manifest, indent=1),
    }


def _asked(style: dict[str, Any]) -> str:
    """A style in words: its template, and what stands around it."""
    defaults = Style(template="{subject}").model_dump()
    around = {name: value for name, value in style.items() if name != "template" and value != defaults[name]}
    return str(style["template"]) + "".join(f"\n{name.replace('_', ' ')}: {value}" for name, value in around.items())


def _attention(measures: xr.Dataset, style: str, contrasts: list[list[str]]) -> go.Figure:
    attention = measures["attention_to_subject"].sel(style=style)
    return plot_attention(attention, (contrasts[0][0], contrasts[0][1]) if contrasts else None)


def _optional(path: Path, plot: Any) -> Markup | None:
    return _figure(plot(xr.load_dataarray(path, engine="h5netcdf"))) if path.is_file() else None


def _n_facts(path: Path) -> int:
    return int(xr.load_dataarray(path, engine="h5netcdf").sizes["fact"]) if path.is_file() else 0


def _judged(summary: dict[str, Any]) -> bool:
    return any(found["estimate"] is not None for claim in summary["claims"] for found in claim["styles"].values())


def _figure(figure: go.Figure) -> Markup:
    """A figure's own HTML; Plotly escapes what would end its script."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))


def _composition(run: Path, study: dict[str, Any]) -> dict[str, Any]:
    """What each training arm and the test set are made of, side by side."""
    facts = pd.read_parquet(run / "facts" / "facts.parquet")
    groups = {"test": facts[facts["test"]]}
    for arm, spec in study["arms"].items():
        if spec["train"]:
            groups[arm] = facts[facts[f"train_{spec['train']}"]]
    plain = [name for name, style in study["styles"].items() if not style["shots"] and not style["chain_of_thought"]]
    reference, style = next(iter(study["arms"])), next(iter(plain), None)
    checked = run / "training_facts" / "predictions.parquet"
    predictions = pd.read_parquet(checked) if len(groups) > 1 else None
    answers = groups["test"]["answer"].value_counts().index[:TOP_ANSWERS].tolist()
    columns = {}
    for name, group in groups.items():
        split = study["arms"].get(name, {}).get("train")
        own = predictions[predictions["split"] == split] if predictions is not None and split else None
        columns[name] = {
            "n": len(group),
            "popularity": group["popularity"].median(),
            "n_tokens": group["n_tokens"].mean(),
            "lengths": group["n_tokens"].clip(upper=6).value_counts(normalize=True).sort_index().to_dict(),
            "shares": {answer: float((group["answer"] == answer).mean()) for answer in answers},
            "base_accuracy": None if own is None else float(own["correct"].mean()),
            "base_n": 0 if own is None else len(own),
        }
    return {"groups": columns, "answers": answers, "reference": reference, "style": style}


def _short(value: float | None) -> str:
    if value is None or pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
