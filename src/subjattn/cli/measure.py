"""`subjattn measure NAME`: a command for every measure of the registry, its settings as options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from subjattn.cli.app import (
    AdapterOption,
    ColumnsOption,
    DtypeOption,
    FactsOption,
    KnowledgeOption,
    LeaveOutOption,
    MemoryOption,
    ModelOption,
    SeedOption,
    TemplateOption,
    ThreadsOption,
    WhereOption,
    app,
    columns_of,
    use_threads,
    write_json,
)
from subjattn.cli.asking import ask, check_files, model_or_arms
from subjattn.cli.described import Described, described
from subjattn.errors import BadInput
from subjattn.registry import named


USUAL = 50
"""Facts that are measured where there are as many and nothing else is said."""
Backend = Literal["engine", "hooks", "transformer-lens", "nnsight"]


class _Measures(TyperGroup):
    """Finds its commands among what is written down of the measures, which are imported when one of them runs."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(described())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        found = named(described(), cmd_name, "measure")
        info = CommandInfo(name=found.name, callback=_command(found), help=found.help)
        return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="markdown")


measure_app = typer.Typer(cls=_Measures, invoke_without_command=True)
app.add_typer(measure_app, name="measure")


@measure_app.callback()
def measure(
    context: typer.Context,
    list_: Annotated[bool, typer.Option("--list", help="List the measures and what they give.")] = False,
) -> None:
    """Measure one thing on one model, without a study.

    Example: `subjattn measure knockout --model smollm2-135m --facts cities --n 20 --json knockout.json`
    """
    if list_:
        for found in described().values():
            typer.echo(found.line)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _command(found: Described) -> Callable[..., None]:
    """The function that typer reads a measure's options from."""
    shared = inspect.signature(_shared, eval_str=True).parameters
    own = {f"own_{one.name}" if one.name in shared else one.name: one for one in found.settings}

    def run(**given: Any) -> None:
        from subjattn.measures.record import measure_of

        settings = {own[key].name: given.pop(key) for key in list(given) if key in own}
        _run(measure_of(found.name), settings, **given)

    parameters = list(shared.values())
    for key, one in own.items():
        flags = [f"--{found.name}-{one.name}".replace("_", "-")] if key != one.name else []
        annotation = Annotated.__class_getitem__((one.type, typer.Option(*flags, help=one.description)))  # type: ignore[attr-defined]
        parameters.append(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=annotation)
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _shared(
    model: ModelOption = "smollm2-135m",
    adapter: AdapterOption = None,
    facts: FactsOption = "cities",
    columns: ColumnsOption = "",
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many facts, drawn at random; else all, up to 50.")
    ] = None,
    template: TemplateOption = None,
    where: WhereOption = None,
    knowledge: KnowledgeOption = None,
    leave_out_given: LeaveOutOption = False,
    training: Annotated[
        str | None, typer.Option(help="Facts that the model was trained on, for measures that compare with them.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the numbers per fact to this file.")] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    backend: Annotated[Backend, typer.Option(help="What computes it; all but the engine are slow.")] = "engine",
    memory_budget: MemoryOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Options that every measure has."""


def _run(
    found: Any,
    settings: dict[str, Any],
    model: str,
    adapter: str | None,
    facts: str,
    columns: str,
    n: int | None,
    template: list[str] | None,
    where: str | None,
    knowledge: Path | None,
    leave_out_given: bool,
    training: str | None,
    json_: Path | None,
    seed: int,
    dtype: str,
    backend: Backend,
    memory_budget: int | None,
    threads: int | None,
) -> None:
    from subjattn.facts import load_facts
    from subjattn.measures.alone import measure as measured
    from subjattn.prompts import make_prompts

    check_files(json_, None, where, knowledge)
    every = load_facts(facts, columns=columns_of(columns) or None)
    asking = ask(every, n, USUAL, seed, template, where, knowledge, leave_out_given)
    threads = use_threads(threads)
    if training is not None and "facts" not in found.needs:
        raise BadInput(
            f"--training: measure {found.name!r} does not look at what the model was trained on: leave it out"
        )
    if training is None and "trained" in found.needs:
        raise BadInput(f"measure {found.name!r} compares answers with those trained on: give --training")
    about: dict[str, Any] = {"facts": every, "training": training and load_facts(training)}
    computing: dict[str, Any] = {"seed": seed, "backend": backend, "memory_budget": memory_budget}
    results, loaded = {}, _loaded(found, model, adapter, dtype)
    for style, text in asking.styles.items():
        prompts = make_prompts(asking.table, loaded.tokenizer, text)
        dataset = measured(
            found.name, loaded, prompts, settings, where=where, knowledge=knowledge, **about, **computing
        )
        means = _means(found, dataset, asking.table.set_index("fact_id")["relation"])
        for name, of in means.items():
            typer.echo(f"{style}: {name} {_shown(of)}")
        if not means:
            typer.echo(f"{style}: measured")
        numbers = {key: {name: of[key] for name, of in means.items()} for key in ("mean", "low", "high", "n")}
        results[style] = {"template": text, **numbers, "arrays": plain(dataset)}
    asked: dict[str, Any] = {"model": model, "adapter": adapter, "dtype": dtype, "facts": facts}
    asked |= {"columns": columns, "threads": threads, "training": training, **asking.options}
    write_json(json_, {"measure": found.name, "settings": settings, **asked, **computing, "styles": results})


def _loaded(found: Any, model: str, adapter: str | None, dtype: str) -> Any:
    """The model, or the adapter's as an arm beside it for measures that compare the two."""
    both = "base" in found.needs
    if both and adapter is None:
        raise BadInput(f"measure {found.name!r} compares a tuned model with its base: give --adapter")
    return model_or_arms(model, adapter, dtype, both)


def _means(found: Any, dataset: Any, relations: Any) -> dict[str, dict[str, Any]]:
    """`mean`, `low`, `high`, `n` and `notes` of each quantity over facts; None where there is no mean or interval."""
    means: dict[str, dict[str, Any]] = {}
    for quantity in found.quantities:
        values = quantity.per_fact(dataset)
        if not values.sizes["fact"]:
            continue
        values = values.assign_coords(relation=("fact", relations.reindex(values["fact"].values).to_numpy(object)))
        over = None if quantity.over is None else quantity.over(dataset)
        if "part" not in values.dims:
            means[quantity.name] = mean_of(quantity, values, over)
            continue
        for part in values["part"].values:
            own = over.sel(part=part) if over is not None and "part" in over.dims else over
            means[f"{quantity.name}.{part}"] = mean_of(quantity, values.sel(part=part), own)
    return means


def mean_of(quantity: Any, values: Any, over: Any) -> dict[str, Any]:
    """Of one quantity, or of one part of it."""
    from subjattn.evidence.intervals import interval
    from subjattn.study.values import share

    n = int(values.notnull().sum())
    mean: dict[str, Any] = {"mean": float(values.mean()) if n and over is None else None, "low": None, "high": None}
    try:
        found = interval(share(values, over, "models"), bounds=None if over is not None else quantity.bounds)
    except BadInput as error:
        return mean | {"n": n, "notes": [f"no interval: {error}"]}
    low, high = found.ends()
    return {"mean": found.estimate, "low": low, "high": high, "n": found.n_facts, "notes": list(found.notes)}


def _shown(of: dict[str, Any]) -> str:
    """A mean with its interval and n, in text."""
    mean = "not defined" if of["mean"] is None else f"{of['mean']:.4g}"
    ends = "" if of["low"] is None else f" [{of['low']:.4g}, {of['high']:.4g}]"
    return "; ".join([f"{mean}{ends}, n {of['n']}", *of["notes"]])


def plain(dataset: Any) -> dict[str, Any]:
    """A dataset as JSON: its `to_dict`, with NaN as null."""
    return json.loads(json.dumps(dataset.to_dict()), parse_constant=lambda _: None)  # type: ignore[no-any-return]
