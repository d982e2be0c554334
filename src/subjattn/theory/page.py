"""The page of a study of one-layer worlds: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from subjattn.report.page import html_of, templates
from subjattn.run.folder import replacing
from subjattn.theory import figures
from subjattn.theory.run import REPORT, open_theory


def write(folder: Path) -> Path:
    """Write `report.html` of a finished run from the files in its folder."""
    config, summary, tables = open_theory(folder)
    content = {
        "summary": summary,
        "worlds": {name: world.model_dump() for name, world in config.worlds.items()},
        "ways": {name: way.model_dump() for name, way in config.finetuning.items()},
        "map": html_of(figures.plot_map(tables["gaps"])) if "gaps" in tables else None,
        "parts": list(_parts(tables)),
        "plotly": Markup(get_plotlyjs()),
    }
    target = folder / REPORT
    with replacing(target) as path:
        path.write_text(templates().get_template("theory.html.jinja").render(content), encoding="utf-8")
    return target


def _parts(tables: dict[str, pd.DataFrame]) -> Iterator[dict[str, Any]]:
    """Figures of every world: the gaps; and of its longest pre-training, at the exponent next to 1, all else."""
    for world, own in tables["gaps"].groupby("world", sort=False) if "gaps" in tables else ():
        longest = own["pretraining"].max()
        last = own[own["pretraining"] == longest]
        drawn = [(f"Gaps by popularity (fig. 2b), {longest} steps of pre-training", figures.plot_gaps(last))]
        if own["pretraining"].nunique() > 1:
            drawn += [
                (f"Gaps by pre-training (fig. 2c), α {zipf:g}", figures.plot_gaps(of, "pretraining"))
                for zipf, of in own.groupby("zipf")
            ]
        yield {"title": f"World “{world}”", "figures": [(title, html_of(figure)) for title, figure in drawn]}
        middle = min(own["zipf"].unique(), key=lambda of: abs(of - 1))
        chosen = tables["values"].query("world == @world and zipf == @middle")
        for way, values in chosen.groupby("finetuning", sort=False):
            at = values[values["pretraining"] == longest]
            where = "world == @world and zipf == @middle and finetuning == @way and pretraining == @longest"
            curve = tables["percentiles"].query(where)
            drawn = [
                ("Accuracy by popularity of the test subjects (fig. 2a)", figures.plot_percentiles(curve)),
                ("Attention along fine-tuning", figures.plot_attention(at)),
                ("What is answered", figures.plot_errors(at)),
            ]
            title = f"World “{world}”, α {middle:g}, {way}, {longest} steps of pre-training"
            yield {"title": title, "figures": [(name, html_of(figure)) for name, figure in drawn]}
    if "along" in tables:
        for (name, zipf), curve in tables["along"].groupby(["world", "zipf"], sort=False):
            yield {
                "title": f"Long training from scratch in “{name}”, α {zipf:g} (fig. 6)",
                "figures": [("Accuracy and attention on (subject, relation)", html_of(figures.plot_along(curve)))],
            }
