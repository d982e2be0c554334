"""The command line: one thin function per command over the Python API.

Bad input ends with status 2 and one line on standard error.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from subjattn.errors import BadInput, SubjattnError


# Typer carries a click of its own; this is its UsageError, whichever click that is.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="How a language model uses a subject's name when it recalls a fact, and what fine-tuning does to that.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

FactsOption = Annotated[
    str, typer.Option("--facts", help="`cities`, or a CSV, TSV, JSONL or parquet file with `subject` and `answer`.")
]
NumberOption = Annotated[int, typer.Option("--n", min=1, help="How many facts, drawn at random.")]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="A prompt with `{subject}`, such as 'The capital of {subject} is'; repeatable. Cities have their own.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


class MeasureName(StrEnum):
    """What `subjattn measure` can measure."""

    attention = "attention"
    knockout = "knockout"
    patch = "patch"


def main() -> None:
    """Run the command line; known errors become one line and status 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except SubjattnError as error:
        status = _fail(str(error))
    except _UsageError as error:
        status = _fail(f"{error.format_message().rstrip('.')} (see --help)")
    except OSError as error:
        status = _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = _fail("interrupted; finished stages are kept", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2) -> int:
    Console(stderr=True).print(Text(f"error: {' '.join(message.split())}"), soft_wrap=True)
    return status


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="The study's YAML.")],
    out: Annotated[Path | None, typer.Option(help="Folder of results; by default `runs/NAME`.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the YAML; may be repeated."),
    ] = None,
) -> None:
    """Run a study, or finish one that was stopped; finished stages are reused.

    Example: `subjattn run experiments/cities.yaml --set facts.n_test=60 --set facts.n_train=64 --out runs/small`
    """
    from subjattn.study.config import load_study

    config = load_study(study, set_ or [])
    _run(config, out or Path("runs") / config.name)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")]) -> None:
    """Write a finished study's report anew from its files.

    Example: `subjattn report runs/cities`
    """
    from subjattn.plots.report import write

    typer.echo(write(folder))


@app.command()
def facts(
    name: Annotated[str, typer.Argument(help="`cities`, or a CSV, TSV, JSONL or parquet file.")],
    n: NumberOption = 5,
    template: TemplateOption = None,
    model: Annotated[str, typer.Option(help="Whose tokenizer to show.")] = "smollm2-135m",
    seed: SeedOption = 0,
) -> None:
    """Preview facts as prompts, the subject's tokens marked.

    Example: `subjattn facts cities --n 5`
    """
    from subjattn.facts import draw, load_facts
    from subjattn.models import load_tokenizer
    from subjattn.prompts import make_prompts

    every = load_facts(name)
    table = draw(every, n, seed)
    tokenizer, console = load_tokenizer(model), Console()
    console.print(Text(f"{len(every)} facts in {name}; {n} of them, tokens of {model}, subject marked, answer after →"))
    for style, text in _styles(table, template).items():
        console.print(Text(f"\n{style}", style="bold"))
        for prompt in make_prompts(table, tokenizer, text):
            line = Text()
            for position, token in enumerate(prompt.tokens[: prompt.prediction + 1]):
                inside = position in prompt.subject_positions
                shown = repr(token)[1:-1]
                line.append(f"[{shown}]" if inside else shown, "bold reverse" if inside else "")
            line.append(f"  →{''.join(prompt.tokens[prompt.prediction + 1 :])}", "green")
            console.print(line, soft_wrap=True)


@app.command()
def measure(
    what: Annotated[MeasureName, typer.Argument(help="Which measure.")],
    model: Annotated[str, typer.Option(help="`smollm2-135m`, a hub id or a local folder.")] = "smollm2-135m",
    adapter: Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter on that model.")] = None,
    facts: FactsOption = "cities",
    n: NumberOption = 50,
    template: TemplateOption = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the numbers per fact to this file.")] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
) -> None:
    """Measure one thing on one model, without a study.

    Example: `subjattn measure knockout --model smollm2-135m --facts cities --n 20 --json knockout.json`
    """
    from subjattn.facts import load_facts
    from subjattn.models import load_model

    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        if json_.is_dir():
            raise BadInput(f"--json {str(json_)!r} is a folder: name a file in it")
    table = load_facts(facts, n, seed)
    styles = _styles(table, template)
    loaded = load_model(model, adapter=adapter, dtype=dtype)
    found = {style: _measure(what, loaded, table, text, seed) for style, text in styles.items()}
    for style, result in found.items():
        typer.echo(f"{style}: " + ", ".join(f"{name} {value:.4g}" for name, value in result["mean"].items()))
    if json_ is not None:
        content = {
            "measure": what.value,
            "model": model,
            "adapter": adapter,
            "facts": facts,
            "n": n,
            "seed": seed,
            "styles": found,
        }
        json_.write_text(json.dumps(content, indent=1))
        typer.echo(json_)


def _measure(what: MeasureName, model: Any, table: Any, template: str, seed: int) -> dict[str, Any]:
    """Means and array of one measure in one style, as plain data."""
    import numpy as np

    from subjattn.measures.attention import subject_attention
    from subjattn.measures.knockout import knockout
    from subjattn.measures.patching import patch_grid, recovery
    from subjattn.prompts import make_prompts, swap_subjects

    prompts = make_prompts(table, model.tokenizer, template)
    if what is MeasureName.attention:
        array = subject_attention(model, prompts)
        mean = {array.name: float(array.mean())}
    elif what is MeasureName.knockout:
        array = knockout(model, prompts)
        by_route = array.mean("fact")
        mean = {
            "knockout_drop": float(by_route.sel(route="direct")),
            "knockout_drop_total": float(by_route.sel(route="total")),
        }
    else:
        pairs = swap_subjects(prompts, np.random.default_rng(seed))
        array = patch_grid(model, pairs)
        share = recovery(array)
        best = share.isel(share.argmax(...))  # type: ignore[arg-type]
        mean = {
            "pairs": len(pairs),
            f"largest recovery (layer {int(best['layer'])}, {best['role'].values!s})": float(best),
        }
    return {"template": template, "mean": mean, "array": _plain(array)}


def _plain(array: Any) -> dict[str, Any]:
    """An xarray as JSON: its `to_dict`, with NaN as null."""
    return json.loads(json.dumps(array.to_dict()), parse_constant=lambda _: None)  # type: ignore[no-any-return]


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
        "styles": _styles(load_facts(facts, n, seed), template),
        "arms": {"base": {}, "tuned": {"model": tuned} if tuned else {"adapter": adapter}},
        "contrasts": [["tuned", "base"]],
    }
    _run(parse_study(raw, "compare"), out)


def _run(config: Any, out: Path) -> None:
    from subjattn.study.run import run_study

    summary = run_study(config, out)
    console = Console()
    for style in config.styles:
        console.print(_arms_table(summary, style), "")
    if summary["claims"]:
        console.print(_claims_table(summary), "")
    typer.echo(out / "report.html")


def _arms_table(summary: dict[str, Any], style: str) -> Table:
    table = _table(f"arms, style “{style}”")
    for heading in ("arm", "accuracy", "log-prob.", "attention", "direct drop", "total drop", "route"):
        table.add_column(heading, justify="left" if heading in ("arm", "route") else "right")
    for name, arm in summary["arms"].items():
        found = arm["styles"][style]
        numbers = (found["accuracy"], found["answer_logprob"], found["attention_to_subject"])
        drops = (found["knockout_drop"], found["knockout_drop_total"])
        table.add_row(Text(name), *(f"{value:.3f}" for value in (*numbers, *drops)), found["route"]["reading"])
    return table


def _table(title: str) -> Table:
    """A table that fits a terminal of 80 columns."""
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)


def _claims_table(summary: dict[str, Any]) -> Table:
    table = _table(f"claims ({summary['caveat']})")
    for heading in ("claim", "style", "verdict", "estimate", "95 % interval"):
        table.add_column(heading, justify="right" if heading == "estimate" else "left", no_wrap=True)
    for claim in summary["claims"]:
        for style, found in claim["styles"].items():
            interval = f"[{found['ci_low']:+.4f}, {found['ci_high']:+.4f}]"
            table.add_row(Text(claim["id"]), Text(style), found["verdict"], f"{found['estimate']:+.4f}", interval)
    return table


def _styles(table: Any, templates: list[str] | None) -> dict[str, str]:
    """The user's templates, or those built in for the facts' relation."""
    from subjattn.prompts import TEMPLATES, check_template

    if templates:
        return {f"style{i}": check_template(text) for i, text in enumerate(templates, 1)}
    relations = set(table["relation"])
    if len(relations) == 1 and (relation := relations.pop()) in TEMPLATES:
        return dict(TEMPLATES[relation])
    raise BadInput("these facts have no built-in prompt: give one with --template 'The capital of {subject} is'")
