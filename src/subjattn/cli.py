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
from rich.text import Text

from subjattn import tables
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
MemoryOption = Annotated[
    int | None, typer.Option(min=1, help="Bytes of working memory beyond the weights; the numbers stay the same.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


class BackendChoice(StrEnum):
    """What `subjattn measure` can be computed by."""

    engine = "engine"
    hooks = "hooks"
    transformer_lens = "transformer-lens"
    nnsight = "nnsight"


class MetricChoice(StrEnum):
    """What `subjattn bench` can measure cells by."""

    logit_diff = "logit_diff"
    answer_logprob = "answer_logprob"


class GridName(StrEnum):
    """What `subjattn bench` can time."""

    resid = "resid"
    attn = "attn"
    mlp = "mlp"
    heads = "heads"
    window = "window"
    head_knockout = "head-knockout"
    attention = "attention"


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
    backend: Annotated[BackendChoice, typer.Option(help="What computes it; all but the engine are slow.")] = (
        BackendChoice.engine
    ),
    memory_budget: MemoryOption = None,
) -> None:
    """Measure one thing on one model, without a study.

    Example: `subjattn measure knockout --model smollm2-135m --facts cities --n 20 --json knockout.json`
    """
    from subjattn.facts import load_facts
    from subjattn.models import load_model

    _check_output(json_)
    table = load_facts(facts, n, seed)
    styles = _styles(table, template)
    loaded = load_model(model, adapter=adapter, dtype=dtype)
    settings = {"backend": backend.value, "memory_budget": memory_budget}
    found = {style: _measure(what, loaded, table, text, seed, settings) for style, text in styles.items()}
    for style, result in found.items():
        typer.echo(f"{style}: " + ", ".join(f"{name} {value:.4g}" for name, value in result["mean"].items()))
    _write_json(
        json_,
        {
            "measure": what.value,
            "model": model,
            "adapter": adapter,
            "facts": facts,
            "n": n,
            "seed": seed,
            "backend": backend.value,
            "styles": found,
        },
    )


def _check_output(path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise BadInput(f"--json {str(path)!r} is a folder: name a file in it")


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1))
        typer.echo(path)


def _measure(
    what: MeasureName, model: Any, table: Any, template: str, seed: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Means and array of one measure in one style, as plain data."""
    import numpy as np

    from subjattn.measures.attention import subject_attention
    from subjattn.measures.knockout import knockout
    from subjattn.measures.patching import patch_grid, recovery
    from subjattn.prompts import make_prompts, swap_subjects

    prompts = make_prompts(table, model.tokenizer, template)
    if what is MeasureName.attention:
        array = subject_attention(model, prompts, **settings)
        mean = {array.name: float(array.mean())}
    elif what is MeasureName.knockout:
        array = knockout(model, prompts, **settings)
        by_route = array.mean("fact")
        mean = {
            "knockout_drop": float(by_route.sel(route="direct")),
            "knockout_drop_total": float(by_route.sel(route="total")),
        }
    else:
        pairs = swap_subjects(prompts, np.random.default_rng(seed))
        array = patch_grid(model, pairs, **settings)
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
def verify(
    model: Annotated[str, typer.Option(help="`smollm2-135m`, a hub id or a local folder.")] = "smollm2-135m",
    adapter: Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter on that model.")] = None,
    facts: FactsOption = "cities",
    template: TemplateOption = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all comparisons to this file.")] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
) -> int:
    """Compare the engine with plain hooks, TransformerLens and nnsight on your model; status 1 if they differ.

    Example: `subjattn verify --model smollm2-135m --json verify.json`
    """
    from subjattn import verify as verification
    from subjattn.facts import load_facts
    from subjattn.models import load_model

    _check_output(json_)
    table = load_facts(facts)
    style = next(iter(_styles(table, template).values()))
    loaded = load_model(model, adapter=adapter, dtype=dtype)
    found = verification.verify(loaded, *verification.verify_facts(loaded, table, style, seed))
    shown = tables.table(f"largest differences from the engine: {model}, {dtype}")
    for heading in verification.HEADINGS:
        shown.add_column(heading, justify="right" if heading in ("differs", "tolerance", "scale") else "left")
    for row in found.rows():
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for refusal in found.refusals:
        what = f" {refusal.quantity}" if refusal.quantity else ""
        console.print(Text(f"{refusal.backend} does not take this model's{what}: {refusal.reason}"), soft_wrap=True)
    console.print(Text(found.verdict), soft_wrap=True)
    _write_json(json_, found.to_dict())
    return 0 if found.passed else 1


@app.command()
def bench(
    grid: Annotated[GridName, typer.Option(help="Which cells.")],
    model: Annotated[str, typer.Option(help="`smollm2-135m`, a hub id or a local folder.")] = "smollm2-135m",
    random_init: Annotated[
        str | None,
        typer.Option(help="Time a shape with random weights instead: `llama-2-7b`, on prompts of 20 tokens."),
    ] = None,
    facts: FactsOption = "cities",
    n: NumberOption = 8,
    template: TemplateOption = None,
    shots: Annotated[int, typer.Option(min=0, help="Demonstrations before each prompt.")] = 0,
    metric: Annotated[MetricChoice, typer.Option(help="What a cell is measured by.")] = MetricChoice.logit_diff,
    peers: Annotated[str, typer.Option(help="Comma-separated: `transformer-lens`, `nnsight`, `hooks`.")] = "",
    memory_budget: MemoryOption = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
) -> None:
    """Time a grid by the engine, by other libraries and against the arithmetic floor.

    Example: `subjattn bench --grid resid --n 8 --peers transformer-lens --json bench.json`
    """
    from subjattn import bench as benches
    from subjattn.facts import load_facts
    from subjattn.models import best_device, load_model

    _check_output(json_)
    if random_init is None:
        loaded = load_model(model, dtype=dtype)
        table = load_facts(facts, 20 * n + shots + 1, seed)
        style = next(iter(_styles(table, template).values()))
        hf, pairs = loaded.model, benches.bench_pairs(loaded.tokenizer, table, style, n, shots, seed)
    else:
        hf = benches.random_model(random_init, dtype, best_device())
        pairs = benches.random_pairs(hf, n, 20, seed)
    names: list[Any] = [name for name in peers.split(",") if name]
    found = benches.bench(
        hf,
        pairs,
        grid.value,
        metric=metric.value,
        peers=names,
        memory_budget=memory_budget,  # type: ignore[arg-type]
    )
    found = {"model": random_init or model, "shots": shots, **found}
    Console().print(tables.bench_table(found))
    _write_json(json_, found)


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
        console.print(tables.arms_table(summary, style), "")
    if summary["claims"]:
        console.print(tables.claims_table(summary), "")
    typer.echo(out / "report.html")


def _styles(table: Any, templates: list[str] | None) -> dict[str, str]:
    """The user's templates, or those the facts bring."""
    from subjattn.prompts import default_styles

    return {f"style{i}": text for i, text in enumerate(templates, 1)} if templates else default_styles(table)
