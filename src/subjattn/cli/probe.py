"""`subjattn probe`: what linear probes read in a model's states, beside their controls."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from subjattn import tables
from subjattn.cli.app import (
    AdapterOption,
    ColumnsOption,
    DtypeOption,
    FactsOption,
    KnowledgeOption,
    LeaveOutOption,
    MemoryOption,
    ModelOption,
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
from subjattn.cli.asking import ask, check_files, model_or_arms
from subjattn.cli.measure import plain
from subjattn.errors import BadInput


USUAL = 400
"""Facts that are asked where there are as many and nothing else is said."""
SHOWN = 10
"""Layers in a table, evenly chosen; all are in the files."""


class SiteName(StrEnum):
    """States that `subjattn probe` can take."""

    resid_pre = "resid_pre"
    resid_post = "resid_post"
    attn_out = "attn_out"
    mlp_out = "mlp_out"
    z = "z"


class MethodName(StrEnum):
    """Kinds of probes."""

    ridge = "ridge"
    logistic = "logistic"


@app.command()
def probe(
    model: ModelOption = "smollm2-135m",
    adapter: AdapterOption = None,
    across: Annotated[
        bool,
        typer.Option("--across", help="With --adapter: train on the base, test on the tuned model, and the reverse."),
    ] = False,
    facts: FactsOption = "cities",
    columns: ColumnsOption = "",
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many facts, drawn at random; else all, up to 400.")
    ] = None,
    template: TemplateOption = None,
    target: Annotated[
        str,
        typer.Option(
            help="What is read: the `answer`; `known`, whether the model answers rightly; or a column of the table of "
            "facts, such as `relation` or one of your own."
        ),
    ] = "answer",
    site: Annotated[SiteName, typer.Option(help="Whose states; of `z` each head by itself.")] = SiteName.resid_pre,
    roles: Annotated[str, typer.Option(help="Roles of positions, comma-separated.")] = "subject_last,prediction",
    method: Annotated[MethodName, typer.Option(help="`logistic` takes many times as long.")] = MethodName.ridge,
    folds: Annotated[int, typer.Option(min=2, help="Of subjects; labels of fewer subjects are left out.")] = 5,
    twin: Annotated[bool, typer.Option("--twin", help="Probe a twin of the model with random weights too.")] = False,
    where: WhereOption = None,
    knowledge: KnowledgeOption = None,
    leave_out_given: LeaveOutOption = False,
    json_: NumbersOption = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw accuracy and selectivity into this file: .html, .svg, .pdf or .png.")
    ] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "float32",
    memory_budget: MemoryOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train linear probes of a label on a model's states, by layer and role, and test them on other subjects.

    Beside accuracy, AUROC and macro-F1 stand what a probe reads of labels drawn at random for the name's last token
    (`control`; `selectivity` is the difference), of the name's characters, of its length and of the token embeddings.

    Example: `subjattn probe --model smollm2-135m --facts cities --n 400 --target answer --figure probe.html`
    """
    from subjattn.facts import load_facts

    check_files(json_, figure, where, knowledge)
    if across and adapter is None:
        raise BadInput("--across takes a tuned model beside its base: give --adapter")
    if across and twin:
        raise BadInput("--twin is of one model: leave out --across")
    named = columns_of(columns) or None
    every = load_facts(facts, columns=named)
    labels = None if target in ("answer", "known") else _column(every, target, facts, named)
    asking = ask(every, n, USUAL, seed, template, where, knowledge, leave_out_given)
    threads = use_threads(threads)
    options: dict[str, Any] = {"site": site.value, "roles": [role.strip() for role in roles.split(",")]}
    options |= {"method": method.value, "folds": folds, "seed": seed, "memory_budget": memory_budget}
    results, drawn = {}, {}
    loaded: Any = model_or_arms(model, adapter, dtype, across)
    for style, text, prompts in asking.prompts(loaded.base if across else loaded):
        found = _probed(loaded, prompts, target, labels, options, across, twin)
        results[style] = {"template": text, **_shown(found, style)}
        drawn[style] = found
    asked: dict[str, Any] = {"model": model, "adapter": adapter, "across": across, "dtype": dtype, "facts": facts}
    asked |= {"columns": columns, "threads": threads, "target": target, "twin": twin, **asking.options, **options}
    write_json(json_, {**asked, "provenance": loaded.provenance(), "styles": results})
    for style, found in drawn.items():
        if figure is not None:
            _draw(figure if len(drawn) == 1 else figure.with_stem(f"{figure.stem}-{style}"), found)


def _column(every: Any, target: str, facts: str, columns: Any) -> Any:
    from subjattn.facts.columns import column_of

    return column_of(every, target, facts, columns)


def _probed(
    loaded: Any, prompts: Any, target: str, labels: Any, options: dict[str, Any], across: bool, twin: bool
) -> Any:
    from subjattn.measures.answers import predict
    from subjattn.measures.probe import probe as probed
    from subjattn.measures.probe import probe_across

    if target == "known":
        answered = predict(loaded.base if across else loaded, prompts)
        labels = answered.set_index("fact_id")["correct"].rename("known")
    of: Any = "answer" if labels is None else labels
    if across:
        return probe_across(loaded, prompts, of, **options)
    return probed(loaded, prompts, of, twin=twin, **options)


def _shown(found: Any, style: str) -> dict[str, Any]:
    """Tables on the terminal; all scores and arrays as plain data."""
    from subjattn.evidence.probes import probe_scores

    scores, console, about = probe_scores(found), Console(), found.attrs
    kept = found.sizes["fact"] - about["left_out"]
    left = f"; left out, with no label of enough subjects: {about['left_out']}" if about["left_out"] else ""
    baselines = {name: float(found[name].mean()) for name in ("majority", "length", "characters") if name in found}
    said = ", ".join(f"{name} {share:.2f}" for name, share in baselines.items())
    lines = [f"style “{style}”: {about['target']}, {len(about['classes'])} labels, {kept} facts{left}"]
    lines += [f"without the model: {said}"] if said else []
    recur = int(scores["n_selectivity"].max())
    lines.append(f"control and selectivity: of the {recur} facts whose name ends with a token that others' do")
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    within = [name for name in ("trained_on", "tested_on", "role") if name in scores]
    for key, some in scores.groupby(within, sort=False):
        console.print(_table(", ".join(map(str, key)), some))
    rows = [{name: _plain(value) for name, value in row.items()} for row in scores.to_dict("records")]
    return {"labels": list(about["classes"]), "left_out": about["left_out"], "scores": rows, "arrays": plain(found)}


def _table(title: str, scores: Any) -> Table:
    """A row a layer, evenly chosen; of heads their mean."""
    numbers = [name for name in scores if name not in ("trained_on", "tested_on", "role", "head", "layer")]
    heads = "head" in scores
    by_layer = scores.groupby("layer")[numbers].mean()
    step = max(1, -(-len(by_layer) // SHOWN))
    title += f"; token embeddings {scores['embedding'].iloc[0]:.2f}" if "embedding" in scores else ""
    made = tables.table(title + ("; mean over heads" if heads else ""))
    there = [name for name in ("control", "selectivity", "twin") if name in scores]
    for heading in ("layer", "accuracy", *([] if heads else ["95 %"]), "AUROC", "macro-F1", *there):
        made.add_column(heading, justify="right", no_wrap=True)
    for layer, row in by_layer.iloc[::step].iterrows():
        ends = [] if heads else [f"{row['accuracy_low']:.2f}–{row['accuracy_high']:.2f}"]
        shown = [f"{row[name]:.2f}" for name in ("accuracy", "auroc", "macro_f1", *there)]
        made.add_row(f"{layer}", shown[0], *ends, *["–" if one == "nan" else one for one in shown[1:]])
    return made


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _draw(path: Path, found: Any) -> None:
    from subjattn.plots.probes import plot_probed

    if "trained_on" in found.dims:
        pairs = [f"{a} → {b}" for a in found["trained_on"].values for b in found["tested_on"].values]
        found = found[["correct", "selectivity"]].stack(arm=("trained_on", "tested_on"), create_index=False)
        found = found.drop_vars(["trained_on", "tested_on"]).assign_coords(arm=pairs)
    typer.echo(plot_probed(found["correct"], found["selectivity"]).save(path))
