"""The application that commands are added to, and what several of them share: options, and files of results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from subjattn.errors import BadInput


app = typer.Typer(
    help="How a language model uses a subject's name when it recalls a fact, and what fine-tuning does to that.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _show_version(asked: bool) -> None:
    if asked:
        from subjattn import __version__

        typer.echo(f"subjattn {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """How a language model uses a subject's name when it recalls a fact, and what fine-tuning does to that."""


ModelOption = Annotated[str, typer.Option("--model", help="`smollm2-135m`, a hub id or a local folder.")]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="Folder or hub id of a PEFT adapter on that model.")
]
FactsOption = Annotated[
    str,
    typer.Option(
        "--facts",
        help="`cities`, `popqa`, `mmlu`, … (with a local copy as `popqa:PATH`), or a CSV, TSV, JSONL or parquet file.",
    ),
]
ColumnsOption = Annotated[
    str,
    typer.Option("--columns", help="Of a file of your own: its column names, as `subject=name,answer=country`."),
]
LeaveOutOption = Annotated[
    bool,
    typer.Option("--leave-out-given", help="Leave out facts whose name holds the answer (Guinea-Bissau → Bissau)."),
]
NumberOption = Annotated[int, typer.Option("--n", min=1, help="How many facts, drawn at random.")]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="A prompt with `{subject}`, such as 'The capital of {subject} is' (`\\n` is a line break), or the name "
        "of a built-in one, such as `late`; repeatable.",
    ),
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where",
        help="Only facts that the model knows: `correct`, answered rightly in the style; `known` or a SliCK category, "
        "such as `HighlyKnown`, by `--knowledge`.",
    ),
]
KnowledgeOption = Annotated[
    Path | None,
    typer.Option("--knowledge", help="Labels for `--where`: knowledge.parquet of `subjattn knowledge`, or world:NAME."),
]
NumbersOption = Annotated[Path | None, typer.Option("--json", help="Write all numbers, per fact too, to this file.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
MemoryOption = Annotated[
    int | None, typer.Option(min=1, help="Bytes of working memory beyond the weights; the numbers stay the same.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads; by default half of the cores, which a busy neighbour slows little."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def use_threads(number: int | None) -> int:
    """Compute in so many CPU threads, or in half of the cores; how many."""
    import torch

    from subjattn.study.places import cores

    chosen = number or max(1, cores() // 2)
    torch.set_num_threads(chosen)
    return chosen


def check_output(path: Path | None, option: str = "--json") -> None:
    """Refuse a file that could not be written, before anything runs; no folder is made."""
    if path is None:
        return
    if path.is_dir():
        raise BadInput(f"{option} {str(path)!r} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise BadInput(f"{option} {str(path)!r}: there is no folder {str(path.parent)!r}: make it first")


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1))
        typer.echo(path)


def columns_of(text: str) -> dict[str, str]:
    """A column map such as `subject=name,answer=country`."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
        raise BadInput(f"--columns: {wrong[0]!r} is not FIELD=COLUMN, such as subject=name")
    return {field.strip(): column.strip() for field, _, column in pairs}


def styles_of(table: Any, templates: list[str] | None) -> dict[str, str]:
    """The user's templates, or those the facts bring."""
    from subjattn.prompts import default_styles

    if not templates:
        return default_styles(table)
    return {f"style{i}": decoded(text) for i, text in enumerate(templates, 1)}


_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def decoded(template: str) -> str:
    r"""A template as a shell gives it, with `\n` and `\t` as line break and tab, and `\\` as one backslash."""
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[0]), template)


def show_styles(styles: Mapping[str, Any], table: Any) -> None:
    """Each style as the model sees it, the first fact filled in; notes where it cannot fit all facts."""
    from subjattn.prompts import example, notice_first, notice_relations

    for name, style in styles.items():
        typer.echo(f"asked as {name}: {example(style, table)}")
        notice_relations(style, table)
        notice_first(style, table)


def some_of(table: Any, n: int | None, usual: int | None, seed: int, leave_out_given: bool = False) -> Any:
    """Facts that a command takes: `--n`, or all up to its usual number, drawn at random; notes what a user should know.

    Args:
        table: all facts.
        n: how many; None: the usual number.
        usual: of the command; None: all.
        seed: of the draw.
        leave_out_given: leave out facts whose name holds the answer, before the draw.
    """
    from subjattn.facts import draw
    from subjattn.facts.given import without_given

    if leave_out_given:
        found, table = len(table), without_given(table)
        note(f"{found - len(table)} of {found} facts have their answer in the name and are left out")
    wanted = how_many(n, usual, table)
    chosen = draw(table, wanted, seed) if wanted < len(table) else table
    note_given(chosen)
    return chosen


def how_many(n: int | None, usual: int | None, table: Any) -> int:
    """As many facts as were asked for, or the usual number; all where there are fewer, which is said."""
    if n is not None and n > len(table):
        note(f"the facts are fewer than {n}: all {len(table)} are taken")
    return min(n or usual or len(table), len(table))


def note_given(table: Any) -> None:
    """Say how many facts have their answer in the name."""
    from subjattn.facts.given import answer_in_subject

    given = table[answer_in_subject(table)]
    if len(given):
        such = f"{given['subject'].iloc[0]} → {given['answers'].iloc[0][0]}"
        note(f"{len(given)} of {len(table)} facts have their answer in the name ({such}): see --leave-out-given")


def note(text: str) -> None:
    """A line on standard error that a user should know of, and that stops nothing."""
    typer.echo(f"note: {text}", err=True)
