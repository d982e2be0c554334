"""Tables of docs/validation.md, from the numbers that validate.py wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from subjattn.measures.mediation import MEDIATORS


DOC = Path(__file__).parent.parent / "docs" / "validation.md"
FELL, WITHIN = 0.1, 0.02
"""What a fault has to cost in accuracy to count, and what a harmless update may cost."""


def counts(rows: pd.DataFrame) -> bool:
    """Whether one organism is what it was made to be: rows of its quantities."""
    fell = float(rows.loc[rows["quantity"] == "accuracy", "estimate"].iloc[0])
    return {"nothing": fell == 0, "random": fell >= -WITHIN}.get(rows["organism"].iloc[0], fell <= -FELL)


def differences(rows: pd.DataFrame, shown: tuple[str, ...]) -> list[str]:
    """Mean differences from the base over seeds, those outside the range of harmless updates in bold."""
    organisms = _organisms(rows)
    idle = rows[rows["organism"] == "random"].groupby("quantity")["estimate"].agg(["min", "max"])
    lines = _head(["quantity", *organisms, "harmless"])
    for name in shown:
        low, high = min(0.0, idle.loc[name, "min"]), max(0.0, idle.loc[name, "max"])
        cells = []
        for organism in organisms:
            its = rows[(rows["organism"] == organism) & (rows["quantity"] == name)]
            found = int(((its["low"] > high) | (its["high"] < low)).sum())
            mean = f"{its['estimate'].mean():+.3f}"
            cells.append("not defined" if its.empty else f"**{mean}** ({found}/{len(its)})" if found else mean)
        lines.append(f"| `{name}` | {' | '.join(cells)} | {low:+.3f} to {high:+.3f} |")
    return lines


def shares(rows: pd.DataFrame) -> list[str]:
    """Accuracy, and of the margin lost what each thing carries, means over seeds; surely most in bold."""
    names = ["accuracy", *(f"mediated.{name}" for name in MEDIATORS)]
    lines = _head(["organism", "accuracy", *MEDIATORS])
    for organism in [*_organisms(rows), "random"]:
        cells = []
        for name in names:
            its = rows[(rows["organism"] == organism) & (rows["quantity"] == name)]
            defined = its["estimate"].dropna()
            surely = int((its["low"] > 0.5).sum()) if name != names[0] else 0
            text = "not defined" if defined.empty else f"{defined.mean():+.2f}"
            cells.append(f"**{text}** ({surely}/{len(its)})" if surely else text)
        lines.append(f"| {'harmless' if organism == 'random' else organism} | {' | '.join(cells)} |")
    return lines


def heads(rows: pd.DataFrame, names: tuple[str, ...]) -> list[str]:
    """What is seen in the very heads that were made to look away."""
    lines = _head(["models that look away", *(f"seed {seed}" for seed in sorted(set(rows["seed"])))])
    for name in names:
        its = rows[rows["quantity"] == name].sort_values("seed")
        cells = (f"{of.estimate:+.3f} [{of.low:+.3f}, {of.high:+.3f}]" for of in its.itertuples())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def planted(rows: pd.DataFrame) -> list[str]:
    """What was planted, what it cost, and what the diagnosis says of it."""
    lines = _head(["organism", "seed", "strength", "places", "norm", "accuracy", "counts", "diagnosis"])
    for (organism, seed, norm), its in rows.groupby(["organism", "seed", "norm"], sort=False):
        first = its.iloc[0]
        places = json.loads(first["places"])
        shown = f"{len(places)}" if len(places) > 3 else ", ".join(map(str, places)) or "none"
        fell = float(its.loc[its["quantity"] == "accuracy", "estimate"].iloc[0])
        lines.append(
            f"| {organism} | {seed} | {first['strength']:.3g} | {shown} | {norm:.1f} | {fell:+.2f} "
            f"| {'yes' if counts(its) else 'no'} | {_named(its) or 'none'} |"
        )
    return lines


def diagnoses(rows: pd.DataFrame, right: Mapping[str, str]) -> list[str]:
    """How often the diagnosis names what was planted, of organisms that count."""
    lines = _head(["organism", "planted", "count", "named rightly", "another named", "none named"])
    for organism in [one for one in right if one in set(rows["organism"])]:
        each = [its for _, its in rows[rows["organism"] == organism].groupby(["seed", "norm"], sort=False)]
        named = [_named(its) for its in each if counts(its)]
        wanted = right[organism]
        rightly = "–" if not wanted else f"{sum(one == wanted for one in named)}"
        others = sum(one not in ("", "nothing lost", wanted) for one in named)
        none = sum(one in ("", "nothing lost") for one in named)
        lines.append(f"| {organism} | {len(each)} | {len(named)} | {rightly} | {others} | {none} |")
    return lines


def write(**tables: list[str]) -> None:
    """Put tables between their marks."""
    text = DOC.read_text(encoding="utf-8")
    for name, lines in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = before + "\n".join([start, *lines, end]) + after
    DOC.write_text(text, encoding="utf-8")


def _named(rows: pd.DataFrame) -> str:
    """Accounts that are supported."""
    verdict = rows.loc[rows["quantity"] == "answers_lost", "verdict"].iloc[0]
    return "" if pd.isna(verdict) else str(verdict)


def _organisms(rows: pd.DataFrame) -> list[str]:
    return [one for one in dict.fromkeys(rows["organism"]) if one != "random"]


def _head(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
