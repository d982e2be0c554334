"""Records found by themselves: in the modules of one of our packages, and in those of others by entry point.

A measure, a training method or a figure is one file that defines a record under an agreed name; nothing else
lists it. A package of yours adds one with an entry point:

    [project.entry-points."subjattn.measures"]
    mine = "my_package.my_measure:MEASURE"
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from subjattn.errors import BadInput


@cache
def discover(package: str, attribute: str, group: str) -> dict[str, Any]:
    """Records by name: `attribute` of each module of `package`, then entry points of `group`.

    Raises:
        BadInput: two records have one name, or an entry point cannot be loaded.
    """
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(import_module(package).__path__):
        record = getattr(import_module(f"{package}.{module.name}"), attribute, None)
        for one in record if isinstance(record, tuple) else (record,):
            if one is not None:
                _add(found, one, f"{package}.{module.name}")
    for point in entry_points(group=group):
        try:
            record = point.load()
        except Exception as error:
            raise BadInput(f"entry point {point.value!r} of {group!r} cannot be loaded: {error}") from None
        _add(found, record, point.value)
    return found


def _add(found: dict[str, Any], record: Any, where: str) -> None:
    if record.name in found:
        raise BadInput(f"{where} defines {record.name!r}, which is there already: give it another name")
    found[record.name] = record


def named(records: dict[str, Any], name: str, what: str) -> Any:
    """The record of this name; BadInput, with the nearest name, where there is none."""
    import difflib

    if name not in records:
        close = difflib.get_close_matches(name, records, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"there is no {what} {name!r}{hint}; there are {', '.join(records)}")
    return records[name]
