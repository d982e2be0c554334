"""Commands for studies: `run`, `plan`, `power`, `check`, `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from subjattn import change_tables, tables
from subjattn.cli import worlds
from subjattn.cli.app import app, note
from subjattn.errors import BadInput


StudyArgument = Annotated[Path, typer.Argument(help="The study's YAML.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the YAML; may be repeated."),
]


WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Stages at a time; by default as many as cores, GPUs and memory allow."),
]
OnOption = Annotated[str | None, typer.Option("--on", help="`ray` for a local Ray, `ray://HOST:PORT` for a cluster.")]


@app.command()
def run(
    study: StudyArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of results; by default `runs/NAME`.")] = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    on: OnOption = None,
    random_init: Annotated[
        bool,
        typer.Option("--random-init", help="Random weights of the model's shape: tries the road, its time and memory."),
    ] = False,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Make the finished results of a changed study anew; until then they lie in the folder `previous`.",
        ),
    ] = False,
) -> None:
    """Run a study, or finish one that was stopped; finished stages are reused.

    Example: `subjattn run experiments/cities.yaml --set facts.n_test=60 --set facts.n_train=64 --out runs/small`
    """
    from subjattn.study.read import load_study

    if worlds.asked_for(study):
        if random_init:
            raise BadInput("--random-init is for studies of a model: those of worlds train theirs from nothing")
        worlds.run(study, set_ or [], out, workers, on, replace=replace)
        return
    config = load_study(study, set_ or [])
    target = out or Path("runs") / (f"{config.name}-random" if random_init else config.name)
    if random_init:
        from subjattn.models.random import random_folder
        from subjattn.study.spent import spent

        if any(arm.model for arm in config.arms.values()):
            raise BadInput("--random-init draws the study's own model: leave out arms that bring another")
        config = config.model_copy(update={"model": str(random_folder(config.model, config.seed))})
        note("random weights: times and memory are the shape's, the numbers mean nothing")
    _run(config, target, workers, on, replace=replace)
    if random_init:
        for line in spent(target):
            typer.echo(line)


@app.command()
def plan(
    study: StudyArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of results; by default `runs/NAME`.")] = None,
    set_: SetOption = None,
    workers: WorkersOption = None,
    pilot: Annotated[
        Path | None, typer.Option(help="A finished run, by whose variances to say what each claim can come to.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the stages as JSON.")] = False,
) -> None:
    """Show a study's stages: what is finished, what would run, and what that takes. Nothing is written.

    Example: `subjattn plan experiments/cities.yaml`
    """
    from subjattn.study.foresee import foresee
    from subjattn.study.read import load_study

    if worlds.asked_for(study):
        if pilot is not None:
            raise BadInput("--pilot is for studies that state claims: those of worlds state none")
        found = worlds.foresee(study, set_ or [], out, workers)
    else:
        config = load_study(study, set_ or [])
        found = foresee(config, out or Path("runs") / config.name, workers)
    if pilot is not None:
        from subjattn.study.deciding import foreseen
        from subjattn.study.files import open_run

        found["claims"] = foreseen(config, open_run(pilot))
    if json_:
        typer.echo(json.dumps(found, indent=1))
        return
    console = Console()
    console.print(tables.plan_tree(found))
    if pilot is not None:
        console.print("", tables.foreseen_table(found["claims"]))


@app.command()
def power(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the shares as JSON.")] = False,
) -> None:
    """Show for each claim of a run the share of studies of other sizes that would decide it, and what it would take.

    The variances, and the effect, are those that the run has seen.

    Example: `subjattn power runs/cities`
    """
    from subjattn.study.deciding import power_of
    from subjattn.study.files import open_run

    rows = power_of(open_run(folder))
    if not rows:
        raise BadInput(f"{str(folder)!r} has no claim with a value: state claims in its study, and run it again")
    if json_:
        typer.echo(json.dumps(rows, indent=1))
        return
    for made in tables.power_tables(rows):
        Console().print(made, "")


@app.command()
def check(study: StudyArgument, set_: SetOption = None) -> None:
    """Check a study without loading a model; where its facts lie at hand they are split and asked in every style.

    Example: `subjattn check experiments/popqa.yaml`
    """
    from subjattn.study.checking import check_study
    from subjattn.study.read import load_study, located

    if worlds.asked_for(study):
        typer.echo(worlds.checked(study, set_ or []))
        return
    config = load_study(study, set_ or [])
    with located(study, set_ or []):
        lines = check_study(config)
    for line in lines:
        typer.echo(line)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")]) -> None:
    """Write a finished study's report anew from its files.

    Example: `subjattn report runs/cities`
    """
    if worlds.asked_for(folder / "study.yaml"):
        from subjattn.theory.page import write
    else:
        from subjattn.report.page import write

    typer.echo(write(folder))


def _run(config: Any, out: Path, workers: int | None = None, on: str | None = None, *, replace: bool = False) -> None:
    from subjattn.study.files import open_run
    from subjattn.study.known_before import known_before
    from subjattn.study.run import run_study

    summary = run_study(config, out, workers=workers, on=on, replace=replace)
    console = Console()
    if summary["overview"]:
        console.print(tables.overview_table(summary["overview"]), "")
    elif summary["contrasts"] and not summary["claims"]:
        console.print(*change_tables.conclusion(summary), sep="\n")
    else:
        for style in config.styles:
            console.print(tables.arms_table(summary, style), "")
    if summary["claims"]:
        console.print(tables.claims_table(summary), "")
    finished = open_run(out)
    show_gap(finished)
    if said := known_before(finished):
        console.print(Text(said), "")
    typer.echo(out / "report.html")


def show_gap(run: Any) -> None:
    """Print the factuality gap of a study that asks for it: arms of known and of unknown facts, several prompts."""
    from subjattn.study.gaps import factuality_gap, has_gap

    if not has_gap(run):
        return
    made = tables.table("factuality gap: accuracy, known − unknown")
    for heading in ("prompt", "facts", "known", "unknown", "gap", "95 % interval"):
        made.add_column(heading, justify="left" if heading in ("prompt", "facts") else "right")
    for row in factuality_gap(run).itertuples():
        ends = f"[{row.low:+.3f}, {row.high:+.3f}]" if not row.reason else "–"
        numbers = f"{row.known:.3f}", f"{row.unknown:.3f}", f"{row.gap:+.3f}", ends
        made.add_row(Text(str(row.prompt)), str(row.distribution), *map(Text, numbers))
    made.caption, made.caption_justify = "in: relations that were trained on; out: relations held out", "left"
    Console().print(made, "")
