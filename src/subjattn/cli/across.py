"""`subjattn transfer`: what a tuned model regains of its base's states, and which part of the update did it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from subjattn import change_tables
from subjattn.cli.app import (
    ColumnsOption,
    DtypeOption,
    FactsOption,
    KnowledgeOption,
    LeaveOutOption,
    MemoryOption,
    NumbersOption,
    SeedOption,
    TemplateOption,
    ThreadsOption,
    WhereOption,
    app,
    columns_of,
    use_threads,
    write_json,
)
from subjattn.cli.asking import ask, check_files
from subjattn.cli.compare import refuse_same
from subjattn.cli.measure import mean_row, plain
from subjattn.errors import BadInput


if TYPE_CHECKING:
    from subjattn.measures.scoring import ScorerName

USUAL = 24
"""Facts that are asked where there are as many and nothing else is said."""
COMPONENTS = "pattern,v,mlp_out"


class Place(StrEnum):
    """Positions at which `subjattn transfer` can put states."""

    role = "role"
    prediction = "prediction"
    subject = "subject"
    all = "all"


@app.command()
def transfer(
    base: Annotated[str, typer.Option(help="`smollm2-135m`, a hub id or a local folder.")],
    tuned: Annotated[str | None, typer.Option(help="The tuned model, a full checkpoint.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Or a PEFT adapter on the base model.")] = None,
    facts: FactsOption = "cities",
    columns: ColumnsOption = "",
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many facts, drawn at random; else all, up to 24.")
    ] = None,
    template: TemplateOption = None,
    components: Annotated[
        str,
        typer.Option(
            help="What is put, comma-separated: `resid_pre`, `resid_post`, `attn_out`, `mlp_out`; of all heads `q`, "
            "`k`, `v`, `pattern`, `z`."
        ),
    ] = COMPONENTS,
    at: Annotated[
        Place | None,
        typer.Option(
            help="Where: at each `role` of positions by itself, at the `prediction`, the `subject`, or `all`; without, "
            "each where it is made or read: `k` and `v` at the subject, `mlp_out` there and at the prediction, others "
            "at the prediction."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Layers put together around each.")] = 1,
    hold: Annotated[
        bool, typer.Option("--hold", help="Keep what is off the route at the receiving model's own values.")
    ] = False,
    where: WhereOption = None,
    knowledge: KnowledgeOption = None,
    leave_out_given: LeaveOutOption = False,
    json_: NumbersOption = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the shares by layer into this file: .html, .svg, .pdf or .png.")
    ] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    memory_budget: MemoryOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Put states of a model before tuning into the tuned one, and the reverse: what of the gap between them returns?

    Beside every share stands its placebo: as many other positions of the same prompt. Before that comes what each part
    of the update changes: Shapley values over all combinations of base and tuned weights; behind it, how many answers
    return with the base's states of all layers (not by role, and not with `--hold`).

    Example: `subjattn transfer --base smollm2-135m --adapter runs/cities/arms/unknown/draw0-seed0/adapter --n 24
    --components mlp_out,pattern`
    """
    from subjattn.facts import load_facts
    from subjattn.measures.put_back import CELL, TOGETHER, places_of
    from subjattn.measures.put_back_accuracy import PASSES
    from subjattn.models import model_shape
    from subjattn.models.arms import load_arms
    from subjattn.progress import clock
    from subjattn.prompts import ROLES
    from subjattn.study.foresee import seconds_of_a_pass

    check_files(json_, figure, where, knowledge)
    if (tuned is None) == (adapter is None):
        raise BadInput("transfer needs the tuned model: give either --tuned or --adapter")
    if tuned is not None:
        refuse_same(base, tuned)
    places = places_of(_components(components), None if at is None else at.value)
    every = load_facts(facts, columns=columns_of(columns) or None)
    asking = ask(every, n, USUAL, seed, template, where, knowledge, leave_out_given)
    threads = use_threads(threads)
    cells = len(places) * (len(ROLES) if at is Place.role else 1)
    asked_of = len(asking.table) * len(asking.styles)
    passes = asked_of * (8 + cells * (TOGETHER + 4 * CELL * model_shape(base)[0]))
    answering = at is not Place.role and not hold
    passes += asked_of * len(places) * PASSES * answering
    time = clock(passes * seconds_of_a_pass(base, dtype, threads))
    typer.echo(f"{len(asking.table)} facts: about {passes:,.0f} forward passes of a prompt, {time}")

    arms = load_arms(base, {"tuned": adapter} if adapter else None, {"tuned": tuned} if tuned else None, dtype=dtype)
    relations, results, drawn = asking.table.set_index("fact_id")["relation"], {}, {}
    computing: dict[str, Any] = {"memory_budget": memory_budget}
    putting: dict[str, Any] = {"window": window, "hold": hold, "seed": seed}
    for style, text, prompts in asking.prompts(arms.base):
        parts = _parts(arms, prompts, relations, computing, style)
        made = list(_put(arms, prompts, relations, places, computing | putting, style))
        results[style] = {"template": text, "n": len(prompts), "swap_weights": parts}
        results[style]["transfer"] = {one["name"]: one["content"] for one in made}
        drawn[style] = made
        if answering:
            results[style]["answers"] = _answered(
                arms, prompts, relations, places, at, computing | {"seed": seed}, style
            )
    asked: dict[str, Any] = {"base": base, "tuned": tuned, "adapter": adapter, "dtype": dtype, "facts": facts}
    asked |= {"columns": columns, "threads": threads, **asking.options, "components": components}
    asked |= {"at": at and at.value, **putting}
    write_json(json_, {**asked, **computing, "arms": arms.provenance(), "styles": results})
    for style, made in drawn.items():
        if figure is None:
            break
        _draw(figure if len(drawn) == 1 else figure.with_stem(f"{figure.stem}-{style}"), made)


def _components(given: str) -> list[Any]:
    from subjattn.engine.interventions import COMPONENTS as KNOWN

    found = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not found or (unknown := [name for name in found if name not in KNOWN]):
        wrong = repr(unknown[0]) if found else "nothing"
        raise BadInput(f"--components: {wrong} is not one of {', '.join(KNOWN)}")
    return found


def _parts(arms: Any, prompts: Any, relations: Any, computing: dict[str, Any], style: str) -> dict[str, Any]:
    """What each part of the update changes, shown and as plain data; by log-probability and by logit."""
    from subjattn.measures.swapping import MEASURE, swap_weights

    found = swap_weights(arms, prompts, metric=["answer_logprob", "answer_logit"], **computing)
    means: dict[str, dict[str, Any]] = {}
    for metric in ("answer_logprob", "answer_logit"):
        combined = found[metric]
        shares = {str(part): found[f"{metric}_share"].sel(part=part) for part in found["part"].values}
        shares["all"] = combined.isel(weights=-1, drop=True) - combined.sel(weights="base", drop=True)
        means[metric] = {}
        for part, values in shares.items():
            values = values.reset_coords(drop=True)
            about = {name: ("fact", found[name].values) for name in ("answer",)}
            about |= {"relation": ("fact", relations.reindex(values["fact"].values).to_numpy(object))}
            means[metric][part] = mean_row(MEASURE.quantities[0], values.assign_coords(about), None)
    Console().print(*change_tables.parts_tables(means["answer_logprob"], style, len(prompts)), sep="\n")
    return {**means, "arrays": plain(found)}


def _put(
    arms: Any, prompts: Any, relations: Any, places: dict[str, Any], how: dict[str, Any], style: str
) -> Iterator[dict[str, Any]]:
    """Each component at its place, all layers together and layer by layer; shown as they are made."""
    from subjattn.evidence.returned import returned
    from subjattn.measures.transfer import transfer as put

    console = Console()
    whole = {name: of for name, of in how.items() if name != "window"}
    about = {"relation": ("fact", relations.reindex([prompt.fact_id for prompt in prompts]).to_numpy(object))}
    for number, (name, (component, at)) in enumerate(places.items()):
        found = {
            "all_layers": put(arms, prompts, component, at=at, by=None, **whole).assign_coords(about),
            "by_layer": put(arms, prompts, component, at=at, **how).assign_coords(about),
        }
        shares = {key: returned(of) for key, of in found.items()}
        if not number:
            for line in change_tables.gap_lines(shares["all_layers"], len(prompts)):
                console.print(Text(line), soft_wrap=True)
        console.print(*change_tables.returned_tables(f"{name}, style “{style}”", *shares.values()), sep="\n")
        content: dict[str, Any] = {"component": component, "at": at}
        for key, of in found.items():
            both = {metric: plain(returned(of, metric)) for metric in ("answer_logprob", "answer_logit")}
            content[key] = {**both, "arrays": plain(of)}
        yield {"name": name, "content": content, "cells": found["by_layer"]["answer_logprob"]}


def _answered(
    arms: Any, prompts: Any, relations: Any, places: dict[str, Any], at: Place | None, how: dict[str, Any], style: str
) -> dict[str, Any]:
    """Answers with all layers of each component put back into the tuned model, shown and as plain data."""
    from subjattn.evidence.returned import accuracy_in_rows, returned_accuracy
    from subjattn.measures.put_back_accuracy import put_back_accuracy

    scorer: ScorerName = "letters" if all(prompt.choice_ids for prompt in prompts) else "answer_start"
    components = list(dict.fromkeys(component for component, _ in places.values()))
    found = put_back_accuracy(arms, prompts, components, at=None if at is None else at.value, scorer=scorer, **how)
    about = relations.reindex([prompt.fact_id for prompt in prompts]).to_numpy(object)
    rows = accuracy_in_rows(returned_accuracy(found.assign_coords(relation=("fact", about))))
    Console().print(*change_tables.answers_tables(f"all layers put back, style “{style}”", rows), sep="\n")
    return {**rows, "scorer": scorer, "arrays": plain(found)}


def _draw(path: Path, made: Sequence[dict[str, Any]]) -> None:
    import xarray as xr

    from subjattn.plots.transfer import plot_transfer

    names = xr.DataArray([one["name"] for one in made], dims="put", name="put")
    cells = xr.concat([one["cells"] for one in made], names, combine_attrs="drop_conflicts")
    typer.echo(plot_transfer(cells).save(path))
