"""`subjattn measure NAME`: a command for every measure of the registry, its settings as options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from pydantic import BaseModel
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from subjattn.cli.app import (
    ColumnsOption,
    DtypeOption,
    FactsOption,
    MemoryOption,
    NumberOption,
    SeedOption,
    TemplateOption,
    app,
    check_output,
    columns_of,
    styles_of,
    write_json,
)


Backend = Literal["engine", "hooks", "transformer-lens", "nnsight"]


class _Measures(TyperGroup):
    """Finds its commands in the registry, when asked for one."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        from subjattn.measures.record import measures

        return list(measures())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        from subjattn.measures.record import measure_of

        found = measure_of(cmd_name)
        info = CommandInfo(name=found.name, callback=_command(found), help=_help(found))
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
        from subjattn.measures.record import measures

        for found in measures().values():
            given = ", ".join(f"{quantity.name} ({quantity.unit})" for quantity in found.quantities)
            typer.echo(f"{found.name}: {found.title}{f'; gives {given}' if given else ''}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _help(found: Any) -> str:
    lines = [found.title[:1].upper() + found.title[1:] + (f" ({found.paper})." if found.paper else ".")]
    lines += [f"{quantity.name}, in {quantity.unit}: {quantity.definition}." for quantity in found.quantities]
    return "\n\n".join([*lines, f"Example: `subjattn measure {found.name} --facts cities --n 20`"])


def _command(found: Any) -> Callable[..., None]:
    """The function that typer reads a measure's options from."""
    own = {_option(name, _shared): name for name in found.settings.model_fields}

    def run(**given: Any) -> None:
        _run(found, {own[key]: given.pop(key) for key in list(given) if key in own}, **given)

    parameters = list(inspect.signature(_shared, eval_str=True).parameters.values())
    for key, name in own.items():
        parameters.append(_parameter(key, found.settings, name, f"--{found.name}-{name}" if key != name else None))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(name: str, shared: Callable[..., None]) -> str:
    """A setting's parameter; one that is called like a shared option gets another name."""
    return f"own_{name}" if name in inspect.signature(shared).parameters else name


def _parameter(key: str, settings: type[BaseModel], name: str, flag: str | None) -> inspect.Parameter:
    field = settings.model_fields[name]
    flags = [flag.replace("_", "-")] if flag else []
    option = typer.Option(*flags, help=field.description or "")
    annotation = Annotated.__class_getitem__((_plain_type(field.annotation), option))  # type: ignore[attr-defined]
    default = field.get_default(call_default_factory=True)
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """The type that typer is to read: a constrained number as a number; what it does not know as text."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if type(None) in get_args(annotation):
        return _plain_type(parts[0]) | None
    if annotation in (bool, int, float, str) or getattr(annotation, "__origin__", None) is Literal:
        return annotation
    return str


def _shared(
    model: Annotated[str, typer.Option(help="`smollm2-135m`, a hub id or a local folder.")] = "smollm2-135m",
    adapter: Annotated[str | None, typer.Option(help="Folder or hub id of a PEFT adapter on that model.")] = None,
    facts: FactsOption = "cities",
    columns: ColumnsOption = "",
    n: NumberOption = 50,
    template: TemplateOption = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the numbers per fact to this file.")] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    backend: Annotated[Backend, typer.Option(help="What computes it; all but the engine are slow.")] = "engine",
    memory_budget: MemoryOption = None,
) -> None:
    """Options that every measure has."""


def _run(
    found: Any,
    settings: dict[str, Any],
    model: str,
    adapter: str | None,
    facts: str,
    columns: str,
    n: int,
    template: list[str] | None,
    json_: Path | None,
    seed: int,
    dtype: str,
    backend: Backend,
    memory_budget: int | None,
) -> None:
    from subjattn.facts import load_facts
    from subjattn.measures.alone import measure as measured
    from subjattn.models import load_model
    from subjattn.prompts import make_prompts

    check_output(json_)
    table = load_facts(facts, n, seed, columns_of(columns) or None)
    styles, loaded = styles_of(table, template), None
    results = {}
    for style, text in styles.items():
        loaded = loaded or load_model(model, adapter=adapter, dtype=dtype)
        prompts = make_prompts(table, loaded.tokenizer, text)
        dataset = measured(
            found.name, loaded, prompts, settings, seed=seed, backend=backend, memory_budget=memory_budget
        )
        means = _means(found, dataset)
        typer.echo(f"{style}: " + (", ".join(f"{name} {_shown(of)}" for name, of in means.items()) or "measured"))
        results[style] = {"template": text, "mean": means, "arrays": _plain(dataset)}
    asked = {"model": model, "adapter": adapter, "dtype": dtype, "facts": facts, "columns": columns, "n": n}
    asked |= {"seed": seed, "backend": backend, "memory_budget": memory_budget}
    write_json(json_, {"measure": found.name, "settings": settings, **asked, "styles": results})


def _means(found: Any, dataset: Any) -> dict[str, float | None]:
    """Means of the quantities over facts, ratios of means where they are shares; None where not defined."""
    import math

    means: dict[str, float | None] = {}
    for quantity in found.quantities:
        array = quantity.per_fact(dataset)
        if not array.sizes["fact"]:
            continue
        mean = array.mean("fact")
        if quantity.over is not None:
            mean = mean / quantity.over(dataset).where(array.notnull()).mean("fact")
        named = {f"{quantity.name}.{part}": mean.sel(part=part) for part in array["part"].values} if mean.dims else None
        for name, value in (named or {quantity.name: mean}).items():
            means[name] = None if math.isnan(value) else float(value)
    return means


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4g}"


def _plain(dataset: Any) -> dict[str, Any]:
    """A dataset as JSON: its `to_dict`, with NaN as null."""
    return json.loads(json.dumps(dataset.to_dict()), parse_constant=lambda _: None)  # type: ignore[no-any-return]
