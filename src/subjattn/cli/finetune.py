"""The command `finetune`: one arm trained, without a study, into an ordinary peft folder or a whole model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from subjattn.cli.app import (
    ColumnsOption,
    DtypeOption,
    FactsOption,
    LeaveOutOption,
    ModelOption,
    SeedOption,
    TemplateOption,
    ThreadsOption,
    app,
    columns_of,
    decoded,
    show_styles,
    styles_of,
    use_threads,
)
from subjattn.errors import BadInput


def _list(asked: bool) -> None:
    if not asked:
        return
    from subjattn.finetune.record import methods

    shared = set(methods()["sft"].settings.model_fields)
    for method in methods().values():
        typer.echo(f"{method.name}: {method.title}{f' ({method.paper})' if method.paper else ''}")
        own = {} if method.name == "sft" else dict.fromkeys(method.settings.model_fields.keys() - shared)
        for name, field in method.settings.model_fields.items():
            if method.name == "sft" or name in own:
                typer.echo(f"    {name} = {field.default}{f': {field.description}' if field.description else ''}")
    raise typer.Exit


@app.command()
def finetune(
    out: Annotated[Path, typer.Option("--out", help="A new folder for the adapter, or the whole model.")],
    model: ModelOption = "smollm2-135m",
    facts: FactsOption = "cities",
    arm: Annotated[
        str,
        typer.Option(help="Which of the facts: `known`, `unknown`, `top-30%`, `mixed-25%`, `whole`, … as in studies."),
    ] = "whole",
    by: Annotated[
        str,
        typer.Option(
            help="What says which facts are known: `answer_logprob`, by the model itself; `popularity`; or a column of "
            "`--knowledge`, such as `category`."
        ),
    ] = "answer_logprob",
    n: Annotated[int | None, typer.Option("--n", min=1, help="Facts to train on; else all the arm can have.")] = None,
    test: Annotated[int, typer.Option(min=1, help="Facts held out, written beside the weights to measure on.")] = 60,
    validation: Annotated[int, typer.Option(min=0, help="Facts held out to stop by.")] = 0,
    pool: Annotated[int, typer.Option(min=3, help="Facts that the arm is drawn from, at most.")] = 3000,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; else one pass over the facts.")] = None,
    method: Annotated[str, typer.Option(help="How to train; `--list` shows all.")] = "sft",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, as `learning_rate=1e-4`; repeatable. `--list` shows all."),
    ] = None,
    template: TemplateOption = None,
    columns: ColumnsOption = "",
    knowledge: Annotated[Path | None, typer.Option(help="Labels: knowledge.parquet of `subjattn knowledge`.")] = None,
    leave_out_given: LeaveOutOption = False,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    _listed: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show methods and their settings, and exit.")
    ] = False,
) -> None:
    """Train one arm on known, unknown or any facts; an ordinary PEFT adapter or model with a model card comes out.

    Asked for once more after it was killed, it goes on where it was. Facts held out of training are written beside the
    weights; its last line is the command that measures on them.

    Example: `subjattn finetune --facts cities --arm unknown --n 256 --steps 16 --out unknown`
    """
    from subjattn.facts import load_facts
    from subjattn.facts.table import COLUMNS
    from subjattn.finetune.alone import KEPT, check_free, fine_tune, settings_of
    from subjattn.finetune.record import method_of
    from subjattn.progress import Progress

    given = _given(settings or []) | ({} if steps is None else {"steps": steps})
    found = method_of(method)
    chosen = settings_of(found, given)
    check_free(out)
    table = load_facts(facts, columns=columns_of(columns) or None)[COLUMNS]
    styles = {name: decoded(text) for name, text in styles_of(table, template).items()}
    show_styles(styles, table)
    needed = ["known"] if "known" in found.needs else []
    use_threads(threads)
    study = {"model": model, "dtype": dtype, "seed": seed, "styles": styles}
    study["facts"] = {
        "source": facts,
        "columns": columns_of(columns),
        "leave_out_given": leave_out_given,
        "knowledge": knowledge and str(knowledge),
        "pool": min(pool, len(table)),
        "n_train": n,
        "n_test": test,
        "n_validation": validation,
        "split": {"by": by},
    }
    with Progress(Console(stderr=True)) as progress:
        drawn = _drawn(study, [arm, *needed], out / KEPT / "facts", progress)
        n_steps = chosen.n_steps(len(drawn[arm]))
        progress.note(f"training on {len(drawn[arm])} facts, {n_steps} steps")
        fine_tune(
            model,
            drawn[arm],
            out,
            style=list(styles.values()),
            method=method,
            known=drawn[needed[0]] if needed else None,
            validation=drawn["validation"] if validation else None,
            dtype=dtype,
            seed=seed,
            about=f"`{arm}` of {facts} by {by}",
            **given,
        )
    (out / "facts").mkdir()
    for name in ("train", "test", *["validation"] * bool(validation)):
        drawn[arm if name == "train" else name].to_parquet(out / "facts" / f"{name}.parquet", index=False)
    typer.echo(out)
    templates = " ".join(f"--template {shlex.quote(_typed(text))}" for text in styles.values())
    held_out = out / "facts" / "test.parquet"
    typer.echo(f"measure it: subjattn compare --base {model} --adapter {out} --facts {held_out} {templates}")


def _typed(template: str) -> str:
    r"""A template as `--template` takes it, line breaks as `\n`."""
    return template.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _drawn(study: dict[str, Any], specs: list[str], folder: Path, progress: Any) -> dict[str, Any]:
    """Facts of an arm as a study draws them; errors name options instead of a study's fields."""
    from subjattn.study.draw_arm import drawn_arm

    try:
        return drawn_arm(study, specs, folder, progress)
    except BadInput as error:
        message = str(error)
        for field, option in (("n_train", "--n"), ("n_test", "--test"), ("n_validation", "--validation")):
            message = message.replace(f"facts.{field}", option).replace(field, option.removeprefix("--"))
        raise BadInput(message) from None


def _given(settings: list[str]) -> dict[str, Any]:
    import yaml

    given = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise BadInput(f"--set {setting!r} is not name=value, such as learning_rate=1e-4")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise BadInput(f"--set {setting!r}: the value is not YAML") from None
    return given
