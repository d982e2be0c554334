"""What `run`, `plan` and `check` do where a study is one of worlds instead of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from subjattn import tables
from subjattn.errors import BadInput


def asked_for(study: Path) -> bool:
    """Whether a YAML is of a study of worlds: it says `theory`; False where it cannot be read."""
    from subjattn.study.read import read_raw

    try:
        return "theory" in read_raw(study, ())[0]
    except BadInput:
        return False


def run(
    study: Path,
    settings: Sequence[str],
    out: Path | None,
    workers: int | None,
    on: str | None,
    *,
    replace: bool = False,
) -> None:
    from subjattn.theory.read import load_theory
    from subjattn.theory.run import SUMMARY, run_theory

    config = load_theory(study, settings)
    target = out or Path("runs") / config.name
    found = run_theory(config, target, workers=workers, on=on, replace=replace)
    for of in json.loads((target / SUMMARY).read_text())["statements"]:
        typer.echo(
            f"{'holds' if of['holds'] else 'FAILS'}  {of['statement']} ({of['violations']} of {of['n']} violated)"
        )
    if "gaps" in found:
        Console().print("", _patterns(found["gaps"]))
    typer.echo(target / "report.html")


def foresee(study: Path, settings: Sequence[str], out: Path | None, workers: int | None) -> dict[str, Any]:
    from subjattn.theory.read import load_theory
    from subjattn.theory.run import foresee_theory

    config = load_theory(study, settings)
    return foresee_theory(config, out or Path("runs") / config.name, workers)


def checked(study: Path, settings: Sequence[str]) -> str:
    """A valid study in a line."""
    from subjattn.theory.read import load_theory

    config = load_theory(study, settings)
    cells = sum(len(world.zipf) * len(config.ways_of(name)) for name, world in config.worlds.items())
    return f"{config.name}: worlds of the one-layer model, {cells} cells × {config.replicates} replicates; it is valid"


def _patterns(gaps: Any) -> Any:
    """In how many cells of each world which gaps appear, at the last step."""
    last = gaps[gaps["step"] == gaps.groupby("finetuning")["step"].transform("max")]
    counts = last.groupby(["pattern", "world"]).size().unstack(fill_value=0)
    made = tables.table("training on unpopular facts, against popular ones: cells of each world")
    made.add_column("pattern")
    for world in counts.columns:
        made.add_column(Text(str(world)), justify="right")
    for pattern, row in counts.iterrows():
        made.add_row(Text(str(pattern)), *map(str, row))
    return made
