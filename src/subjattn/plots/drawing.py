"""Plotly figures that can be saved, for a page on a screen or of a paper, and what all of them look like."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from subjattn.errors import BadInput


SEQUENTIAL = "Viridis"
DIVERGING = "RdBu_r"
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": "#1f2933"}
Width = Literal["column", "page"]
NOTE = "note"
"""Name of the annotation beneath a figure; in a paper its words belong into the caption."""
INCHES: dict[str, float] = {"column": 3.25, "page": 6.75}
PIXELS = 96
"""Of an inch in SVG and PDF; a point is 4/3 of one."""
NARROWEST = 76
"""Pixels that a panel of a paper's figure takes at least."""


class Drawing(go.Figure):
    """A Plotly figure with `save`."""

    def save(self, path: str | Path, width: Width | None = None) -> Path:
        """Write the figure to a file, which its ending says the kind of: .html, .svg, .pdf or .png.

        Args:
            path: where to.
            width: "column" (3.25 in) or "page" (6.75 in) of a paper: that wide, text of 8 and 9 points, which stays
                text in .svg and .pdf; .png has 300 dots an inch. None: as on the screen.

        Returns:
            The path.

        Raises:
            BadInput: another ending or width, panels that the width does not hold, or nothing here that can draw it.
        """
        path = Path(path)
        kind = check_file(path)
        figure = self if width is None else self.for_paper(width)
        if kind == ".html":
            figure.write_html(path)
            return path
        try:
            figure.write_image(path, scale=1 if kind != ".png" else 2 if width is None else 300 / PIXELS)
        except RuntimeError as error:
            if "requires Google Chrome" not in str(error):
                raise
            raise BadInput(
                f"{kind} figures are drawn by Chrome or Chromium, and none was found: install one (apt install "
                "chromium), or save the figure as .html"
            ) from None
        return path

    def for_paper(self, width: Width) -> Drawing:
        """The figure as wide as a column or page of a paper, text in 8 points, titles in 9; notes are left out."""
        if width not in INCHES:
            raise BadInput(f"width {width!r} is not one of {', '.join(INCHES)}")
        pixels, small, title = round(INCHES[width] * PIXELS), 8 * 4 / 3, 9 * 4 / 3
        shown = {axis.domain for axis in self.select_xaxes() if axis.domain is not None}
        bar = 62 if "coloraxis" in self.layout.to_plotly_json() else 8
        if (each := (pixels - 45 - bar) / max(1, len(shown))) < NARROWEST:
            fits = next((f"width={name!r}, or " for name in INCHES if INCHES[name] > INCHES[width]), "")
            raise BadInput(
                f"{len(shown)} panels side by side are {each / PIXELS:.1f} in each in a {width} of {INCHES[width]} in: "
                f"take {fits}fewer arms"
            )
        rows = len({axis.domain for axis in self.select_yaxes() if axis.domain is not None})
        height = min(max(self.layout.height * pixels / self.layout.width, 60 + 150 * rows), 40 + 230 * rows)
        figure, family = Drawing(self), "Helvetica, Arial, sans-serif"
        figure.layout.annotations = [one for one in self.layout.annotations if one.name != NOTE]
        figure.update_layout(
            width=pixels,
            height=round(height),
            font={"size": small, "family": family},
            margin={"l": 10, "r": 8, "t": 22, "b": 10},
            legend={"font": {"size": small}},
        )
        figure.update_annotations(font={"size": title, "family": family})
        axes = {"automargin": True, "title_standoff": 4, "title_font_size": small, "tickfont_size": small}
        figure.update_xaxes(**axes)
        if each < 110:
            figure.for_each_xaxis(lambda one: one.update(tickangle=-90 if one.tickangle else None))
        figure.update_yaxes(**axes)
        for name in ("coloraxis", "coloraxis2"):
            if name in figure.layout.to_plotly_json():
                figure.layout[name].colorbar.update(thickness=8, title={"font": {"size": small}}, tickfont_size=small)
        return figure


def check_file(path: Path) -> str:
    """The ending of a figure's file; refuses one that no figure could be written to here."""
    kind = path.suffix.lower()
    if kind not in (".html", ".svg", ".pdf", ".png"):
        raise BadInput(f"a figure is saved as .html, .svg, .pdf or .png, not as {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"there is no folder {str(path.parent)!r} to save a figure in")
    try:
        if kind != ".html":
            import kaleido  # type: ignore  # noqa: F401
    except ImportError:
        raise BadInput(
            f"{kind} figures need a library: pip install 'subjattn[figures]' (or save the figure as .html)"
        ) from None
    return kind


def panels(rows: int, columns: int, titles: Iterable[str], **settings: Any) -> Drawing:
    """An empty figure of panels, their titles escaped, since Plotly reads markup in labels."""
    figure: Drawing = make_subplots(
        rows, columns, subplot_titles=[escaped(title) for title in titles], figure=Drawing(), **settings
    )
    return figure


def styled(figure: Drawing, height: int, width: int, note: str = "") -> Drawing:
    """With the house's fonts and margins; a note stands beneath."""
    figure.update_layout(
        font=FONT,
        height=height,
        width=width,
        margin={"l": 60, "r": 40, "t": 50, "b": 60},
        plot_bgcolor="white",
        paper_bgcolor="white",
    )
    figure.update_annotations(font={**FONT, "size": 14})
    if note:
        lines = textwrap.wrap(escaped(note), max(30, (width - 70) // 7))
        below = 70 + 18 * len(lines)
        figure.update_layout(height=height + below - 60, margin_b=below)
        figure.add_annotation(
            name=NOTE,
            text="<br>".join(lines),
            font={**FONT, "size": 12},
            align="left",
            showarrow=False,
            x=0,
            xref="paper",
            xanchor="left",
            y=0,
            yref="paper",
            yanchor="bottom",
            yshift=6 - below,
        )
    return figure


def cells(array: xr.DataArray, dim: str) -> list[Any]:
    """Where a heat map's cells stand along an axis."""
    return list(array[dim].values.tolist())


def axis(array: xr.DataArray, dim: str) -> dict[str, Any]:
    """Settings of an axis that `cells` go along: where its numbers have gaps, each is a category, of one size."""
    values = array[dim].values
    gaps = np.issubdtype(values.dtype, np.number) and not (np.diff(values) == 1).all()
    every = 1 if gaps and len(values) <= 16 else max(1, round(len(values) / 8))
    return {"dtick": every} | ({"type": "category"} if gaps else {})


def escaped(text: str) -> str:
    """Text that Plotly shows as it is; it reads tags, and no other entities than those of < > &."""
    return html.escape(text, quote=False)


def titled(array: xr.DataArray) -> str:
    """What the colours of an array are in: its unit, or its name where it has none."""
    return escaped(str(array.attrs.get("unit") or array.name or "value"))


def scale(values: np.ndarray, title: str, half: str = "", diverging: bool = False) -> dict[str, object]:
    """Colours that show every value: from 0 where all have one sign, else centred at 0.

    Args:
        values: all that the colours are for.
        title: of the colour bar.
        half: `top` or `bottom`, where another colour bar has the other half.
        diverging: centred at 0 in any case.
    """
    if not np.isfinite(values).any():
        raise BadInput("the array holds no number that could be drawn: every value is missing or decided beforehand")
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if diverging or low < 0 < high:
        bound = max(-low, high) or 1.0
        return {"colorscale": DIVERGING, "cmin": -bound, "cmax": bound, "colorbar": _bar(title, half)}
    colours = SEQUENTIAL if low >= 0 else f"{SEQUENTIAL}_r"
    return {"colorscale": colours, "cmin": min(low, 0), "cmax": max(high, 0), "colorbar": _bar(title, half)}


def _bar(title: str, half: str) -> dict[str, object]:
    place = {"": (1, "top", 1.0), "top": (1, "top", 0.48), "bottom": (0, "bottom", 0.48)}[half]
    return {
        "title": {"text": title, "side": "right"},
        "thickness": 12,
        "x": 1.01,
        "y": place[0],
        "yanchor": place[1],
        "len": place[2],
    }
