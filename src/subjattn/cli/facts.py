"""Commands for facts: `facts` shows them as prompts, `knowledge` labels what a model knows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from subjattn import tables
from subjattn.cli.app import (
    AdapterOption,
    ColumnsOption,
    DtypeOption,
    FactsOption,
    LeaveOutOption,
    ModelOption,
    SeedOption,
    TemplateOption,
    ThreadsOption,
    app,
    check_output,
    columns_of,
    decoded,
    show_styles,
    some_of,
    styles_of,
    use_threads,
)
from subjattn.errors import BadInput


@app.command()
def facts(
    name: Annotated[str, typer.Argument(help="`cities`, `popqa`, `popqa:PATH`, …, or a file of your own.")],
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many facts, drawn at random; else all, up to 5.")
    ] = None,
    columns: ColumnsOption = "",
    template: TemplateOption = None,
    model: Annotated[str, typer.Option(help="Whose tokenizer to show.")] = "smollm2-135m",
    seed: SeedOption = 0,
    rejected: Annotated[
        Path | None, typer.Option(help="Write the rows that were left out to this CSV: file, row, reason.")
    ] = None,
    leave_out_given: LeaveOutOption = False,
) -> None:
    """Preview facts as prompts, the subject's tokens marked, and say what was left out.

    Example: `subjattn facts cities --n 5`
    """
    from subjattn.facts import read_facts
    from subjattn.models import load_tokenizer
    from subjattn.prompts import make_prompts, pieces

    check_output(rejected, "--rejected")
    every, left_out = read_facts(name, columns_of(columns) or None)
    styles = styles_of(every, template)
    table = some_of(every, n, 5, seed, leave_out_given)
    tokenizer, console = load_tokenizer(model), Console()
    if rejected is not None:
        left_out.to_csv(rejected, index=False)
    relations = every["relation"].nunique()
    of = f"{len(every)} facts in {name}, {relations} relation{'s' if relations > 1 else ''}"
    where = f", listed in {rejected}" if rejected else " (--rejected FILE lists them)" if len(left_out) else ""
    console.print(Text(f"{of}; {len(left_out)} rows left out{where}"), soft_wrap=True)
    marks = "subject marked, ×2 behind a character of two tokens, answer after →"
    console.print(Text(f"{len(table)} of them, tokens of {model}, {marks}"), soft_wrap=True)
    for style, text in styles.items():
        typer.echo()
        show_styles({style: text}, table)
        for prompt in make_prompts(table, tokenizer, text):
            line = Text()
            for piece in pieces(prompt, tokenizer):
                if piece.start == prompt.prediction + 1:
                    line.append("  →")
                shown = f"[{piece.text}]" if piece.inside else piece.text
                line.append(shown, "bold reverse" if piece.inside else "green" if "→" in line else "")
            console.print(line, soft_wrap=True)


@app.command()
def knowledge(
    out: Annotated[Path, typer.Option(help="Folder of results; a stopped run goes on there.")],
    model: ModelOption = "smollm2-135m",
    adapter: AdapterOption = None,
    facts: FactsOption = "cities",
    columns: ColumnsOption = "",
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Label this many facts, drawn at random; else all.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Few-shot prompts a fact is asked in.")] = 10,
    shots: Annotated[int, typer.Option(min=1, help="Demonstrations a prompt.")] = 4,
    samples: Annotated[int, typer.Option(min=0, help="Sampled answers a prompt, besides the greedy one.")] = 16,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 0.5,
    scorer: Annotated[str, typer.Option(help="exact_match, answer_start or containment.")] = "exact_match",
    template: Annotated[str, typer.Option(help="How a fact is asked.")] = "Q: {question}\nA:",
    leave_out_given: LeaveOutOption = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = None,
) -> None:
    """Label what a model knows (SliCK, Gekhman et al. 2024) and show how far other definitions agree.

    Example: `subjattn knowledge --model smollm2-135m --facts cities --n 200 --out runs/knowledge`
    """
    from subjattn.facts import load_facts
    from subjattn.knowledge.run import know
    from subjattn.knowledge.slick import Budget
    from subjattn.models import load_model
    from subjattn.prompts import Style

    asked: dict[str, Any] = {"n_prompts": prompts, "shots": shots, "n_samples": samples, "temperature": temperature}
    try:
        budget = Budget(**asked, scorer=scorer, template=decoded(template), seed=seed)  # type: ignore[arg-type]
    except ValueError as error:
        raise BadInput(f"--{str(error).splitlines()[1]}: {str(error).splitlines()[2].strip()}") from None
    pool = load_facts(facts, columns=columns_of(columns) or None)
    chosen = some_of(pool, n, None, seed, leave_out_given)
    show_styles({"question": Style(template=budget.template, shots=budget.shots)}, chosen)
    use_threads(threads)
    found = know(load_model(model, adapter=adapter, dtype=dtype), chosen, pool, out, budget)
    console = Console()
    for table in tables.knowledge_tables(found):
        console.print(table, "")
    typer.echo(out / "knowledge.parquet")
