"""`subjattn init`: a study to begin with, for facts of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from subjattn.cli.app import ColumnsOption, ModelOption, SeedOption, TemplateOption, app, columns_of, note, styles_of


@app.command()
def init(
    facts: Annotated[str, typer.Argument(help="A file of your own, `cities`, `popqa`, `popqa:PATH`, …")],
    model: ModelOption = "smollm2-135m",
    adapter: Annotated[
        str | None, typer.Option(help="A PEFT adapter tuned elsewhere, to compare; without, arms are trained.")
    ] = None,
    columns: ColumnsOption = "",
    template: TemplateOption = None,
    seed: SeedOption = 0,
) -> None:
    """Print a commented study that fits these facts: sizes that they can give, ways to ask them, arms.

    Example: `subjattn init experiments/capitals.csv --template 'The capital of {subject} is' > study.yaml`
    """
    from subjattn.facts import load_facts
    from subjattn.study.checking import check_study
    from subjattn.study.draft import draft
    from subjattn.study.read import parse_study

    named = columns_of(columns)
    table = load_facts(facts, columns=named or None)
    text = draft(table, facts, styles_of(table, template), model=model, adapter=adapter, columns=named, seed=seed)
    for line in check_study(parse_study(yaml.safe_load(text), "init")):
        if line.startswith("style "):
            note(line)
    for place in (model, adapter):
        if place and Path(place).is_dir() and not Path(place).is_absolute():
            note(f"{place} is found from the folder in which the study is run")
    typer.echo(text, nl=False)
