"""`subjattn models`: which models are at hand without a hub, and their terms."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from subjattn import tables
from subjattn.cli.app import app
from subjattn.errors import BadInput


@app.command()
def models(
    accept: Annotated[
        str | None, typer.Option(metavar="NAME", help="Accept the terms of this model, which you have read.")
    ] = None,
) -> None:
    """List the models that need no hub: what they are, what they take, whether they are ready.

    Example: `subjattn models`
    """
    from subjattn.models import PACKAGES
    from subjattn.registry import named
    from subjattn.worlds.record import PREFIX, WORLDS

    if accept is not None:
        chosen = named(PACKAGES, accept, "packaged model")
        if chosen.terms is None:
            raise BadInput(f"{accept} is under {chosen.licence}: there are no terms to accept")
        chosen.accept()
        typer.echo(f"{accept}: {chosen.licence} ({chosen.terms}) accepted")
    shown, wanted = tables.table("models that need no hub"), []
    shown.padding = (0, 1, 0, 0)
    for heading in ("name", "model", "stored", "kind", "MB", "licence", "state"):
        shown.add_column(heading, justify="right" if heading == "MB" else "left")
    for one in PACKAGES.values():
        try:
            _, stored, _ = one.origin()
            state = "ready" if one.accepted else "to accept"
        except BadInput:
            stored, state = "", "to install"
        if state == "to install":
            wanted.append(f"{one.name}: {one.install}")
        if not one.accepted:
            wanted.append(f"{one.name}: read {one.terms}, then subjattn models --accept {one.name}")
        shown.add_row(one.name, one.full_name, stored, one.kind, f"{one.megabytes}", one.licence, state)
    console = Console()
    console.print(shown)
    for line in wanted:
        console.print(Text(line), soft_wrap=True)
    typer.echo(f"trained here from nothing, once: {', '.join(PREFIX + name for name in WORLDS)}")
    typer.echo("any other: a hub id such as org/name, or a folder saved by save_pretrained()")
