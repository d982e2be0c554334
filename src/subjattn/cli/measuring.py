"""Commands that look at the engine itself: `verify`, `bench`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from subjattn import bench_tables, tables
from subjattn.cli.app import (
    AdapterOption,
    DtypeOption,
    FactsOption,
    MemoryOption,
    ModelOption,
    NumberOption,
    SeedOption,
    TemplateOption,
    ThreadsOption,
    app,
    check_output,
    show_styles,
    styles_of,
    use_threads,
    write_json,
)
from subjattn.cli.compare import refuse_same
from subjattn.errors import BadInput


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
    arms = "arms"
    transfer = "transfer"
    training = "training"
    spans = "spans"
    slick = "slick"
    worlds = "worlds"


@app.command()
def verify(
    model: ModelOption = "smollm2-135m",
    adapter: AdapterOption = None,
    tuned: Annotated[str | None, typer.Option(help="Or a full checkpoint tuned from it.")] = None,
    facts: FactsOption = "cities",
    template: TemplateOption = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all comparisons to this file.")] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = None,
) -> int:
    """Compare the engine with plain hooks, TransformerLens and nnsight on your model; status 1 unless all agree.

    Tracing and scaled attention scores are among it. With an adapter or a tuned checkpoint, which is then what is
    verified, also base and tuned model in one batch, transfers between them, parts of the update, and
    attention scores split, against each model by itself. The table lists what was compared and what was skipped, with
    the reason. Numbers that no reference computes are no agreement.

    Example: `subjattn verify --model smollm2-135m --json verify.json`
    """
    from subjattn import verify as verification
    from subjattn.facts import load_facts
    from subjattn.models import load_model
    from subjattn.verify_inside import with_inside

    check_output(json_)
    if adapter is not None and tuned is not None:
        raise BadInput("verify compares one tuned model with its base: give --tuned or --adapter, not both")
    if tuned is not None:
        refuse_same(model, tuned)
    table = load_facts(facts)
    name, style = next(iter(styles_of(table, template).items()))
    show_styles({name: style}, table)
    use_threads(threads)
    loaded = load_model(tuned or model, adapter=adapter, dtype=dtype)
    prompts, pairs = verification.verify_facts(loaded, table, style, seed)
    found = with_inside(verification.verify(loaded, prompts, pairs), loaded, prompts)
    if adapter is not None or tuned is not None:
        from subjattn.verify_arms import with_arms

        found = with_arms(found, loaded, load_model(model, dtype=dtype), prompts)
    shown = tables.table(f"largest differences from the engine: {model}, {dtype}")
    for heading in verification.HEADINGS:
        shown.add_column(heading, justify="right" if heading in verification.HEADINGS[2:6] else "left")
    for row in found.rows():
        shown.add_row(*map(Text, row))
    console = Console()
    console.print(shown)
    console.print(Text(found.verdict), soft_wrap=True)
    write_json(json_, found.to_dict())
    return 0 if found.passed else 1


@app.command()
def bench(
    grid: Annotated[
        GridName,
        typer.Option(
            help="Which cells; `arms` or `transfer`, base and adapters beside one model; `training`, beside a bare "
            "loop; `spans` of all facts, or `slick`, labelling --n facts; `worlds`, replicates of one-layer models."
        ),
    ],
    model: ModelOption = "smollm2-135m",
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
    """Time a grid by the engine, by other libraries and against the arithmetic floor; or what is done with facts.

    Example: `subjattn bench --grid resid --n 8 --peers transformer-lens --json bench.json`
    """
    from subjattn import bench as benches
    from subjattn.facts import load_facts
    from subjattn.models import best_device, load_model

    check_output(json_)
    if grid is GridName.worlds:
        from subjattn.bench_worlds import time_worlds

        rows = time_worlds()
        for row in rows:
            shown = (f"{name} {of:.3g}" if isinstance(of, float) else f"{name} {of}" for name, of in row.items())
            typer.echo("  ".join(shown))
        write_json(json_, {"grid": grid.value, "rows": rows})
        return
    if grid in (GridName.spans, GridName.slick):
        _bench_facts(grid, model, facts, n, seed, dtype, json_)
        return
    if random_init is None:
        loaded = load_model(model, dtype=dtype)
        table = load_facts(facts, 20 * n + shots + 1, seed)
        style = next(iter(styles_of(table, template).values()))
        hf, pairs = loaded.model, benches.bench_pairs(loaded.tokenizer, table, style, n, shots, seed)
    else:
        hf = benches.random_model(random_init, dtype, best_device())
        pairs = benches.random_pairs(hf, n, 20, seed)
    if grid in (GridName.arms, GridName.transfer, GridName.training):
        if random_init is not None:
            raise BadInput(f"--grid {grid.value} puts adapters on a model: give --model, and no --random-init")
        _bench_arms(grid, model, pairs, dtype, json_)
        return
    names: list[Any] = [name for name in peers.split(",") if name]
    found = benches.bench(
        hf,
        pairs,
        grid.value,  # type: ignore[arg-type]
        metric=metric.value,
        peers=names,
        memory_budget=memory_budget,  # type: ignore[arg-type]
    )
    found = {"model": random_init or model, "shots": shots, **found}
    Console().print(bench_tables.bench_table(found))
    write_json(json_, found)


def _bench_arms(grid: GridName, model: str, pairs: Any, dtype: str, json_: Path | None) -> None:
    from subjattn.bench_arms import time_arms, time_transfer
    from subjattn.bench_training import time_training

    if grid is GridName.training:
        found = time_training(model, [one for pair in pairs for one in pair], dtype)
    elif grid is GridName.arms:
        found = time_arms(model, [one for pair in pairs for one in pair], dtype)
    else:
        found = time_transfer(model, pairs, dtype)
    for name, value in found.items():
        typer.echo(f"{name}: {value}")
    write_json(json_, {"model": model, "dtype": dtype, **found})


def _bench_facts(grid: GridName, model: str, facts: str, n: int, seed: int, dtype: str, json_: Path | None) -> None:
    from subjattn.bench_facts import time_slick, time_spans
    from subjattn.facts import draw, load_facts
    from subjattn.knowledge.slick import Budget
    from subjattn.models import load_model

    if grid is GridName.spans:
        found = time_spans(facts, model)
        for line in bench_tables.spans_lines(found):
            typer.echo(line)
    else:
        pool = load_facts(facts)
        found = time_slick(load_model(model, dtype=dtype), draw(pool, n, seed), pool, Budget(seed=seed))
        for line in bench_tables.slick_lines(found):
            typer.echo(line)
    write_json(json_, {"model": model, "facts": facts, "dtype": dtype, **found})
