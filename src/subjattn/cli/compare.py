"""`subjattn compare`: what changed in a model that was tuned elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from subjattn import change_tables, tables
from subjattn.cli.app import (
    ColumnsOption,
    DtypeOption,
    FactsOption,
    KnowledgeOption,
    LeaveOutOption,
    SeedOption,
    TemplateOption,
    WhereOption,
    app,
    columns_of,
    how_many,
    note_given,
    show_styles,
    styles_of,
)
from subjattn.errors import BadInput


USUAL_N = 100
"""Facts that are asked where there are as many and nothing else is said."""
QUICK = ("accuracy", "answer_logprob", "attention_to_subject")
"""Measures made first, in both models, and shown."""
USUAL: dict[str, dict[str, Any]] = {**{name: {} for name in QUICK}, "knockout": {}}
ANSWERED = ["pattern", "z", "mlp_out at prediction"]
"""What is put back while the tuned model answers; `subjattn transfer` puts back all."""
USUAL |= {"mediation": {}, "swap_weights": {}, "transfer_accuracy": {"components": ANSWERED}}
DEEP: dict[str, dict[str, Any]] = {"patching": {}, "token_attention": {}, "transfer": {}, "transfer_by_layer": {}}
"""What `--deep` adds."""


@app.command()
def compare(
    base: Annotated[str, typer.Option(help="`smollm2-135m`, a hub id or a local folder.")],
    out: Annotated[Path, typer.Option(help="Folder of results.")],
    tuned: Annotated[str | None, typer.Option(help="The tuned model, a full checkpoint.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Or a PEFT adapter on the base model.")] = None,
    facts: FactsOption = "cities",
    columns: ColumnsOption = "",
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many facts, drawn at random; else all, up to 100.")
    ] = None,
    template: TemplateOption = None,
    trained_on: Annotated[
        Path | None,
        typer.Option(help="Facts that the model was tuned on (CSV, TSV, JSONL, parquet); their subjects are left out."),
    ] = None,
    where: WhereOption = None,
    knowledge: KnowledgeOption = None,
    leave_out_given: LeaveOutOption = False,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also patch the residual stream and put the base's states back by layer; attention by token.",
        ),
    ] = False,
    smallest: Annotated[
        list[str] | None,
        typer.Option(metavar="QUANTITY=VALUE", help="The least difference that matters, in its unit; repeatable."),
    ] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
) -> None:
    """Compare a model before and after tuning that was done elsewhere: what changed, by how much, in which facts.

    Example: `subjattn compare --base smollm2-135m --adapter runs/cities/arms/unknown/draw0-seed0/adapter --n 60 --out
    runs/pair`
    """
    from subjattn.models import check_adapter, load_model, resolve_adapter, resolve_model
    from subjattn.run.changes import replaced
    from subjattn.run.folder import Folder
    from subjattn.study.foresee import foresee
    from subjattn.study.plan import plan_study
    from subjattn.study.read import parse_study
    from subjattn.study.run import run_study

    if (tuned is None) == (adapter is None):
        raise BadInput("compare needs the tuned model: give either --tuned or --adapter")
    resolve_model(base)
    if adapter is not None:
        resolve_adapter(adapter)
    if tuned is not None:
        refuse_same(base, tuned)
    raw: dict[str, Any] = {
        "name": "compare",
        "model": base,
        "dtype": dtype,
        "seed": seed,
        "facts": {
            "source": facts,
            "columns": columns_of(columns),
            "trained_on": None if trained_on is None else str(trained_on),
            "where": where,
            "knowledge": None if knowledge is None else str(knowledge),
            "leave_out_given": leave_out_given,
        },
        "arms": {"base": {}, "tuned": {"model": tuned} if tuned else {"adapter": adapter}},
        "contrasts": [["tuned", "base"]],
        "smallest_effects": effects_of(smallest or []),
        "measures": USUAL | (DEEP if deep else {}),
    }
    config, console = parse_study(raw | _asked(raw, n, template), "compare"), Console()
    if adapter is not None and not check_adapter(base, adapter):
        load_model(base, adapter=adapter, dtype=dtype)  # what such adapters do shows once they are loaded
    foreseen = foresee(config, out)
    if out.is_dir() and (made := replaced(plan_study(config), Folder(out))):
        raise BadInput(f"--out {str(out)!r} holds a comparison of its own ({made[0]}): choose another folder")
    console.print(Text(tables.foreseen_line(foreseen, config.facts.n_test)), soft_wrap=True)

    def show(summary: dict[str, Any]) -> None:
        console.print(*change_tables.changes(summary, "so far", judged=False), sep="\n")

    early = [] if foreseen["finished"] == len(foreseen["stages"]) else list(QUICK)
    summary = run_study(config, out, first=early, show=show)
    _refuse_equal(out, tuned)
    console.print(*change_tables.conclusion(summary, "--smallest changes them"), sep="\n")
    typer.echo(out / "report.html")


def _asked(raw: dict[str, Any], n: int | None, template: list[str] | None) -> dict[str, Any]:
    """The fields of a study that the facts decide: how many, asked how, judged by what; shown before anything runs."""
    from subjattn.facts import draw
    from subjattn.study.read import parse_study
    from subjattn.study.stages.pool import load_pool

    stated = parse_study(raw | {"styles": {"any": "{subject}:"}}, "compare")
    pool = load_pool(stated.facts, stated.model, stated.seed)
    asked = how_many(n, USUAL_N, pool)
    table = draw(pool, asked, stated.seed)
    styles = styles_of(table, template)
    show_styles(styles, table)
    note_given(table)
    scorer = "letters" if table["choices"].notna().any() else "answer_start"
    return {
        "facts": raw["facts"] | {"pool": asked, "n_test": asked},
        "styles": styles,
        "measures": {
            name: of | ({"scorer": scorer} if name in ("accuracy", "transfer_accuracy") else {})
            for name, of in raw["measures"].items()
        },
    }


def effects_of(given: list[str]) -> dict[str, float]:
    """Smallest effects such as `knockout_drop=0.5`."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise BadInput(f"--smallest: {text!r} is not QUANTITY=VALUE, such as knockout_drop=0.5") from None
    return found


def _refuse_equal(out: Path, tuned: str | None) -> None:
    """Refuse a checkpoint that turns out to be the base model saved anew."""
    from subjattn.study.files import open_run

    run = open_run(out)
    if tuned is not None and run.provenance("base")["weights_sha256"] == run.provenance("tuned")["weights_sha256"]:
        raise BadInput(f"--tuned {tuned!r} has the same weights as the base model: nothing was compared")


def refuse_same(base: str, tuned: str) -> None:
    """Refuse a tuned model that is the base by another name."""
    from subjattn.models import identity, resolve_model

    if identity(resolve_model(base)) == identity(resolve_model(tuned)):
        raise BadInput(f"--tuned {tuned!r} is the same model as --base {base!r}: there is nothing to compare")
