"""Tables and figures of docs/theory.md, from the runs of theory_gap.yaml and theory_long.yaml.

    subjattn run experiments/theory_gap.yaml && subjattn run experiments/theory_long.yaml
    python experiments/theory_page.py

The text between the marks `<!-- NAME -->` and `<!-- end -->` is written anew; what stands around it is kept.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.theory.figures import plot_along, plot_attention, plot_map
from subjattn.theory.results import PATTERNS, means
from subjattn.theory.run import open_theory


DOC = Path(__file__).parent.parent / "docs" / "theory.md"
PAPER_2A = {
    "top": {0.05: 0.94, 0.1: 0.85, 0.2: 0.82, 1.0: 0.57},
    "bottom": {0.05: 0.79, 0.1: 0.67, 0.2: 0.62, 1.0: 0.47},
}
PAPER_2B = {0.1: 0.01, 1.0: 0.10, 2.0: 0.20}
PAPER_2C = {2000: 0.165, 3000: 0.08, 4000: 0.07, 5000: 0.035}
"""Read by eye off the paper's figures."""


def statements(summary: dict[str, Any]) -> str:
    rows = []
    for of in summary["statements"]:
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in of["figures"].items())
        fared = "holds" if of["holds"] else "**fails**"
        rows.append([of["statement"], fared, f"{of['violations']:,} of {of['n']:,}", figures])
    return table(["statement", "", "violated", "figures"], rows)


def percentiles(tables: dict[str, pd.DataFrame]) -> str:
    own = tables["percentiles"].query("world == 'several' and zipf == 1 and pretraining == 4000")
    rows = [["the paper, by eye", arm, *(f"{of:.2f}" for of in by.values())] for arm, by in PAPER_2A.items()]
    for way in ("empty-adam", "copied-adam", "empty-sgd", "copied-sgd"):
        for arm in PAPER_2A:
            found = means(own[(own["finetuning"] == way) & (own["arm"] == arm)], ["share"], ["accuracy"])
            at = found.set_index("share")
            cells = [_accuracy(at.loc[share]) for share in PAPER_2A[arm]]
            rows.append([way, arm, *cells])
    return table(["fine-tuning", "arm", *(f"top {share:.0%}" for share in PAPER_2A["top"])], rows)


def by_popularity(tables: dict[str, pd.DataFrame]) -> str:
    last = _last(tables["gaps"]).query("pretraining == 4000")
    rows = [["the paper, by eye", "", *(f"{of:+.2f}" for of in PAPER_2B.values())]]
    for (world, way), own in last.groupby(["world", "finetuning"], sort=False):
        at = own.set_index("zipf")
        rows.append([way, world, *(_gap(at.loc[zipf]) for zipf in PAPER_2B)])
    return table(["fine-tuning", "world", *(f"α {zipf:g}" for zipf in PAPER_2B)], rows)


def by_pretraining(tables: dict[str, pd.DataFrame]) -> str:
    last = _last(tables["gaps"]).query("world == 'several'")
    steps = sorted(last["pretraining"].unique())
    rows = []
    for (way, zipf), own in last[last["zipf"].isin([1.0, 1.5])].groupby(["finetuning", "zipf"], sort=False):
        at = own.set_index("pretraining")
        rows.append(
            [way, f"{zipf:g}", *(f"{_gap(at.loc[step])}, recall {at.loc[step, 'recall']:.2f}" for step in steps)]
        )
    return table(["fine-tuning", "α", *(f"{step} steps" for step in steps)], rows)


def patterns(tables: dict[str, pd.DataFrame]) -> str:
    counts = _last(tables["gaps"]).groupby(["pattern", "world"]).size().unstack(fill_value=0)
    worlds = ["several", "uniform", "one"]
    rows = [
        [name, *(str(counts.loc[name, world]) for world in worlds)]
        for name in PATTERNS.values()
        if name in counts.index
    ]
    return table(["training on unpopular facts, against popular ones", *worlds], rows)


def paper_cells(tables: dict[str, pd.DataFrame]) -> str:
    last = _last(tables["gaps"])
    own = last[last["pattern"] == PATTERNS[1, 1]].sort_values("accuracy", ascending=False)
    rows = []
    for of in own.itertuples():
        gaps = f"{of.accuracy:+.2f} [{of.accuracy_low:+.2f}, {of.accuracy_high:+.2f}]"
        more = f"{of.attention:+.2f} [{of.attention_low:+.2f}, {of.attention_high:+.2f}]"
        about = [of.world, of.finetuning, f"{of.zipf:g}", f"{of.pretraining:,}", f"{of.recall:.2f}"]
        rows.append([*about, f"{of.n_facts:.0f}", gaps, more])
    head = ["world", "fine-tuning", "α", "pre-training", "recall", "facts an arm", "accuracy gap", "attention gap"]
    return table(head, rows)


def errors(tables: dict[str, pd.DataFrame]) -> str:
    values = tables["values"].query("world == 'several' and pretraining == 4000 and zipf == 1")
    rows = []
    for way in ("empty-adam", "copied-adam", "empty-sgd", "copied-sgd"):
        for arm in ("top", "bottom"):
            own = values[(values["finetuning"] == way) & (values["arm"] == arm)]
            at = own[own["step"] == own["step"].max()].mean(numeric_only=True)
            rows.append([way, arm, *(f"{at[name]:.2f}" for name in ("accuracy", "subject", "relation", "attention"))])
    head = ["fine-tuning", "arm", "right", "the subject's other answer", "the relation's other answer", "attention"]
    return table(head, rows)


def long(tables: dict[str, pd.DataFrame]) -> str:
    steps = [100, 300, 1000, 2000, 4000, 6300, 9000, 20000]
    rows = []
    for (world, training), own in tables["along"].groupby(["world", "training"], sort=False):
        at = own.groupby("step")[["accuracy", "attention"]].mean()
        cells = [f"{at.loc[s, 'accuracy']:.2f} / {at.loc[s, 'attention']:.2f}" if s in at.index else "" for s in steps]
        rows.append([world, training, *cells])
    return table(["world", "training", *map("{:,}".format, steps)], rows)


def _last(gaps: pd.DataFrame) -> pd.DataFrame:
    return gaps[gaps["step"] == gaps.groupby("finetuning")["step"].transform("max")]


def _gap(row: pd.Series) -> str:
    return f"{row['accuracy']:+.2f} [{row['accuracy_low']:+.2f}, {row['accuracy_high']:+.2f}] / {row['attention']:+.2f}"


def _accuracy(row: pd.Series) -> str:
    return f"{row['mean']:.2f} [{max(0, row['low']):.2f}, {min(1, row['high']):.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return re.sub(r"(?<![\w.])[-+]0\.00(?!\d)", "0.00", text)


def put(parts: Mapping[str, str]) -> None:
    """Write tables between their marks."""
    text = DOC.read_text(encoding="utf-8")
    for name, part in parts.items():
        marked = re.compile(rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->", re.DOTALL)
        text, n = marked.subn(lambda _, name=name, part=part: f"<!-- {name} -->\n{part}\n<!-- end -->", text)
        if n != 1:
            raise SystemExit(f"{DOC} has {n} places for {name!r}")
    DOC.write_text(text, encoding="utf-8")


def main(gap: Path, along: Path) -> None:
    _, summary, tables = open_theory(gap)
    _, _, further = open_theory(along)
    parts = {
        "statements": statements(summary),
        "fig. 2a": percentiles(tables),
        "fig. 2b": by_popularity(tables),
        "fig. 2c": by_pretraining(tables),
        "patterns": patterns(tables),
        "cells": paper_cells(tables),
        "errors": errors(tables),
        "fig. 6": long(further),
    }
    put(parts)
    chosen = "world == 'several' and zipf == 1.5 and finetuning == 'copied-sgd' and pretraining == 2000"
    figures = {
        "map": plot_map(tables["gaps"]),
        "long": plot_along(further["along"].query("world == 'several'")),
        "attention": plot_attention(tables["values"].query(chosen)),
    }
    for name, figure in figures.items():
        figure.write_image(DOC.parent / f"theory-{name}.png", width=900)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gap", type=Path, default=Path("runs/theory_gap"))
    parser.add_argument("--long", type=Path, default=Path("runs/theory_long"))
    given = parser.parse_args()
    main(given.gap, given.long)
