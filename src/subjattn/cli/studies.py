"""Commands for studies: `run`, `check`, `report`, and `compare` for a model tuned elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from subjattn import tables
from subjattn.cli.app import DtypeOption, FactsOption, NumberOption, SeedOption, TemplateOption, app, styles_of
from subjattn.errors import BadInput


StudyArgument = Annotated[Path, typer.Argument(help="The study's YAML.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the YAML; may be repeated."),
]


@app.command()
def run(
    study: StudyArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of results; by default `runs/NAME`.")] = None,
    set_: SetOption = None,
) -> None:
    """Run a study, or finish one that was stopped; finished stages are reused.

    Example: `subjattn run experiments/cities.yaml --set facts.n_test=60 --set facts.n_train=64 --out runs/small`
    """
    from subjattn.study.config import load_study

    config = load_study(study, set_ or [])
    _run(config, out or Path("runs") / config.name)


@app.command()
def check(study: StudyArgument, set_: SetOption = None) -> None:
    """Check a study without a model: its fields, and where its facts lie at hand, that every style can ask them.

    Example: `subjattn check experiments/popqa-llama-2-7b.yaml`
    """
    from subjattn.study.checking import check_study
    from subjattn.study.config import load_study

    config = load_study(study, set_ or [])
    for line in check_study(config):
        typer.echo(line)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")]) -> None:
    """Write a finished study's report anew from its files.

    Example: `subjattn report runs/cities`
    """
    from subjattn.plots.report import write

    typer.echo(write(folder))


@app.command()
def compare(
    base: Annotated[str, typer.Option(help="`smollm2-135m`, a hub id or a local folder.")],
    out: Annotated[Path, typer.Option(help="Folder of results.")],
    tuned: Annotated[str | None, typer.Option(help="The tuned model, a full checkpoint.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Or a PEFT adapter on the base model.")] = None,
    facts: FactsOption = "cities",
    n: NumberOption = 100,
    template: TemplateOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
) -> None:
    """Compare a model before and after tuning that was done elsewhere: measures, contrasts, report.

    Example: `subjattn compare --base smollm2-135m --adapter runs/cities/arms/unknown/adapter --n 60 --out runs/pair`
    """
    from subjattn.facts import load_facts
    from subjattn.study.config import parse_study

    if (tuned is None) == (adapter is None):
        raise BadInput("compare needs the tuned model: give either --tuned or --adapter")
    raw = {
        "name": "compare",
        "model": base,
        "dtype": dtype,
        "seed": seed,
        "facts": {"source": facts, "n_test": n},
        "styles": styles_of(load_facts(facts, n, seed), template),
        "arms": {"base": {}, "tuned": {"model": tuned} if tuned else {"adapter": adapter}},
        "contrasts": [["tuned", "base"]],
    }
    _run(parse_study(raw, "compare"), out)


def _run(config: Any, out: Path) -> None:
    from subjattn.study.run import run_study

    summary = run_study(config, out)
    console = Console()
    for style in config.styles:
        console.print(tables.arms_table(summary, style), "")
    if summary["claims"]:
        console.print(tables.claims_table(summary), "")
    typer.echo(out / "report.html")
