"""What `subjattn measure` says of each measure, written down: help and mistakes wait for no import of the measures.

`measures.json` is made from the records of the registry by `python tests/measures_page.py`. Where a package of yours
adds measures by entry point, the registry itself is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args


WRITTEN = Path(__file__).with_name("measures.json")
_TYPES: dict[str, Any] = {of.__name__: of for of in (bool, int, float, str)}


@dataclass(frozen=True)
class Setting:
    """A setting as an option: what typer is to read, its usual value, and what it is."""

    name: str
    kind: str | list[Any]
    optional: bool
    default: Any
    description: str

    @property
    def type(self) -> Any:
        """For typer; a list stands for a choice among its values."""
        plain = _TYPES[self.kind] if isinstance(self.kind, str) else Literal[tuple(self.kind)]
        return plain | None if self.optional else plain


@dataclass(frozen=True)
class Described:
    """A measure: its line in a list, its help, its settings."""

    name: str
    line: str
    help: str
    settings: tuple[Setting, ...]


def described() -> dict[str, Described]:
    """Every measure by name."""
    if entry_points(group="subjattn.measures"):
        from subjattn.measures.record import measures

        return {name: _read(describe(found)) for name, found in measures().items()}
    return {one["name"]: _read(one) for one in json.loads(WRITTEN.read_text())}


def _read(plain: Mapping[str, Any]) -> Described:
    return Described(**{**plain, "settings": tuple(Setting(**one) for one in plain["settings"])})


def describe(found: Any) -> dict[str, Any]:
    """A measure's record as plain data, for `described`."""
    given = ", ".join(f"{quantity.name} ({quantity.unit})" for quantity in found.quantities)
    return {
        "name": found.name,
        "line": f"{found.name}: {found.title}{f'; gives {given}' if given else ''}",
        "help": _help(found),
        "settings": [_setting(name, field) for name, field in found.settings.model_fields.items()],
    }


def _help(found: Any) -> str:
    lines = [found.title[:1].upper() + found.title[1:] + (f" ({found.paper})." if found.paper else ".")]
    lines += [f"{quantity.name}, in {quantity.unit}: {quantity.definition}." for quantity in found.quantities]
    said = {"To be read as": found.reads, "Control": found.control, "Not defined": found.undefined}
    lines += [f"{what}: {text}" for what, text in said.items() if text]
    return "\n\n".join([*lines, f"Example: `subjattn measure {found.name} --facts cities --n 20`"])


def _setting(name: str, field: Any) -> dict[str, Any]:
    """The type that typer is to read: a constrained number as a number; what it does not know as text."""
    annotation, optional = field.annotation, False
    while type(None) in get_args(annotation):
        annotation, optional = next(part for part in get_args(annotation) if part is not type(None)), True
    choice = getattr(annotation, "__origin__", None) is Literal
    kind = list(get_args(annotation)) if choice else annotation.__name__ if annotation in _TYPES.values() else "str"
    default = field.get_default(call_default_factory=True)
    described_ = {"kind": kind, "optional": optional, "default": default, "description": field.description or ""}
    return {"name": name, **described_}
