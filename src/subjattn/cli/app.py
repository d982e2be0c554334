"""The application that commands are added to, and what several of them share: options, and files of results."""

from __future__ import annotations

import json
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
NumberOption = Annotated[int, typer.Option("--n", min=1, help="How many facts, drawn at random.")]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="A prompt with `{subject}`, such as 'The capital of {subject} is', or the name of a built-in one, "
        "such as `late`; repeatable.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of every draw.")]
MemoryOption = Annotated[
    int | None, typer.Option(min=1, help="Bytes of working memory beyond the weights; the numbers stay the same.")
]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def check_output(path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise BadInput(f"--json {str(path)!r} is a folder: name a file in it")


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

    return {f"style{i}": text for i, text in enumerate(templates, 1)} if templates else default_styles(table)
