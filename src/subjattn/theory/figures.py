"""Figures of one-layer worlds: the map of settings, gaps, percentiles, training along the way, errors."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from subjattn.theory.gap import ARMS, ERRORS
from subjattn.theory.results import PATTERNS, means


COLORS = dict(zip(ARMS, qualitative.D3, strict=False))
PATTERN_COLORS = ("#5aae61", "#a6dba0", "#d9f0d3", "#92c5de", "#f7f7f7", "#fddbc7", "#e7d4e8", "#c2a5cf", "#9970ab")


def plot_map(gaps: pd.DataFrame) -> go.Figure:
    """Which gaps appear where: a panel for each world, a row for each way and pre-training, a column for each exponent.

    Args:
        gaps: of `results.gaps`; its last step of each cell is drawn.
    """
    last = _last(gaps)
    worlds = list(dict.fromkeys(last["world"]))
    rows = [last[last["world"] == world][["finetuning", "pretraining"]].drop_duplicates().shape[0] for world in worlds]
    height = 24 * sum(rows) + 80 * len(worlds) + 80
    figure = make_subplots(
        rows=len(worlds),
        cols=1,
        subplot_titles=[f"world “{world}”" for world in worlds],
        row_heights=rows,
        vertical_spacing=80 / height,
    )
    order = list(PATTERNS.values())
    for number, world in enumerate(worlds, start=1):
        own = last[last["world"] == world].assign(
            code=lambda of: of["pattern"].map(order.index),
            label=lambda of: of["finetuning"] + ", " + of["pretraining"].astype(str) + " steps",
            text=lambda of: of["accuracy"].map("{:+.2f}".format) + " / " + of["attention"].map("{:+.2f}".format),
            column=lambda of: "α " + of["zipf"].map("{:g}".format),
        )
        shape = {"index": "label", "columns": "column", "sort": False}
        codes, texts = (own.pivot_table(values=of, aggfunc="first", **shape) for of in ("code", "text"))
        figure.add_trace(
            go.Heatmap(
                z=codes.to_numpy(),
                x=list(codes.columns),
                y=list(codes.index),
                text=texts.to_numpy(),
                texttemplate="%{text}",
                textfont={"size": 11, "color": "#1f2933"},
                zmin=-0.5,
                zmax=len(order) - 0.5,
                colorscale=_steps(PATTERN_COLORS),
                showscale=False,
                xgap=2,
                ygap=2,
                hovertemplate="%{y}, %{x}: %{text}<extra></extra>",
            ),
            row=number,
            col=1,
        )
    for name, color in zip(order, PATTERN_COLORS, strict=True):
        if name in set(last["pattern"]):
            marker = {"color": color, "size": 12, "symbol": "square", "line": {"color": "#7b8794", "width": 1}}
            figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=marker))
    figure.update_yaxes(autorange="reversed")
    legend = {"orientation": "h", "y": 1 + 40 / height, "yanchor": "bottom", "font": {"size": 11}}
    return _laid_out(figure, height).update_layout(legend=legend, margin={"t": 110})


def plot_gaps(gaps: pd.DataFrame, along: str = "zipf") -> go.Figure:
    """Accuracy and attention gaps, top − bottom, at the last step, along popularity's exponent or pre-training.

    Args:
        gaps: of `results.gaps`, of one world and one value of what is not drawn along.
        along: `zipf` (fig. 2b) or `pretraining` (fig. 2c).
    """
    last = _last(gaps)
    figure = make_subplots(rows=1, cols=2, subplot_titles=["accuracy gap", "attention gap"])
    for number, name in enumerate(("accuracy", "attention"), start=1):
        for color, (way, own) in zip(qualitative.D3, last.groupby("finetuning", sort=False), strict=False):
            spread = {"array": own[f"{name}_high"] - own[name], "arrayminus": own[name] - own[f"{name}_low"]}
            line = go.Scatter(x=own[along], y=own[name], name=str(way), legendgroup=str(way), error_y=spread)
            line.update(mode="lines+markers", line={"color": color}, showlegend=number == 1)
            figure.add_trace(line, row=1, col=number)
        figure.add_hline(y=0, line={"color": "#7b8794", "width": 1, "dash": "dot"}, row=1, col=number)
    title = {"zipf": "Zipf exponent of popularity", "pretraining": "steps of pre-training"}[along]
    return _laid_out(figure.update_xaxes(title_text=title), 380)


def plot_percentiles(percentiles: pd.DataFrame) -> go.Figure:
    """Accuracy over the most popular share of test subjects, an arm a line with its band (fig. 2a)."""
    found = means(percentiles, ["arm", "share"], ["accuracy"])
    figure = go.Figure()
    for arm in ARMS:
        _band(figure, found[found["arm"] == arm], "share", arm, COLORS[arm])
    figure.update_xaxes(title_text="most popular share of test subjects").update_yaxes(title_text="accuracy")
    return _laid_out(figure, 380)


def plot_along(along: pd.DataFrame) -> go.Figure:
    """Accuracy over all facts and attention to the subject along a pre-training, with bands (fig. 6)."""
    trainings = list(dict.fromkeys(along["training"]))
    figure = make_subplots(rows=1, cols=len(trainings), subplot_titles=trainings, shared_yaxes=True)
    for number, training in enumerate(trainings, start=1):
        found = means(along[along["training"] == training], ["step"], ["accuracy", "attention"])
        for color, (name, label) in zip(
            qualitative.D3, {"accuracy": "accuracy", "attention": "attention to the subject"}.items(), strict=False
        ):
            own = found[found["quantity"] == name]
            _band(figure, own, "step", label, color, row=1, col=number, first=number == 1)
    return _laid_out(figure.update_xaxes(title_text="training step", type="log").update_yaxes(range=[0, 1.02]), 380)


def plot_attention(values: pd.DataFrame) -> go.Figure:
    """Attention along fine-tuning: to held-out subjects by arm, and to the arm's own by tercile of salience."""
    titles = ["held-out subjects", "own facts of low salience", "own facts of high salience"]
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, shared_yaxes=True)
    for number, name in enumerate(("attention", "attention_low", "attention_high"), start=1):
        found = means(values, ["arm", "step"], [name])
        for arm in ARMS:
            own = found[found["arm"] == arm]
            _band(figure, own, "step", arm, COLORS[arm], row=1, col=number, first=number == 1)
    figure.update_xaxes(title_text="steps of fine-tuning").update_yaxes(title_text="attention to the subject", col=1)
    return _laid_out(figure, 380)


def plot_errors(values: pd.DataFrame) -> go.Figure:
    """What held-out facts are answered, by arm at the last step: the shares of every kind of answer."""
    last = values[values["step"] == values["step"].max()]
    kinds = ["accuracy", *ERRORS[1:]]
    labels = dict(zip(kinds, ("right", "subject's other answer", "relation's other answer", "else"), strict=True))
    found = last.groupby("arm", sort=False)[kinds].mean().reindex(list(ARMS))
    bars = [
        go.Bar(name=labels[kind], y=found.index, x=found[kind], orientation="h", marker={"color": color})
        for kind, color in zip(kinds, ("#1b7837", "#d6604d", "#4393c3", "#bababa"), strict=True)
    ]
    figure = go.Figure(bars).update_layout(barmode="stack").update_yaxes(autorange="reversed")
    return _laid_out(figure.update_xaxes(title_text="share of answers"), 280)


def _band(
    figure: go.Figure,
    own: pd.DataFrame,
    along: str,
    name: str,
    color: str,
    *,
    row: int | None = None,
    col: int | None = None,
    first: bool = True,
) -> None:
    """A line of means with the band of its interval."""
    own = own.sort_values(along)
    x, low, high = own[along].tolist(), own["low"].tolist(), own["high"].tolist()
    band = go.Scatter(x=x + x[::-1], y=high + low[::-1], mode="lines", fill="toself", fillcolor=color, opacity=0.15)
    band.update(line={"width": 0}, legendgroup=name, showlegend=False, hoverinfo="skip")
    line = go.Scatter(x=x, y=own["mean"], mode="lines+markers", name=name, legendgroup=name, showlegend=first)
    line.update(line={"color": color}, marker={"size": 5})
    figure.add_traces([band, line], rows=row and [row] * 2, cols=col and [col] * 2)


def _last(gaps: pd.DataFrame) -> pd.DataFrame:
    return gaps[gaps["step"] == gaps.groupby("finetuning")["step"].transform("max")]


def _steps(colors: Sequence[str]) -> list[tuple[float, str]]:
    """A colour scale of equal steps."""
    n = len(colors)
    return [(edge, color) for i, color in enumerate(colors) for edge in (i / n, (i + 1) / n)]


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    return figure.update_layout(height=height, template="plotly_white", margin={"t": 50, "b": 50})
