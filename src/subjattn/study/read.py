"""Read the YAML of a study; the first wrong field is named in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from subjattn.errors import BadInput
from subjattn.study.config import MEASURED, StudyConfig, WrongField


MOVED = {
    "scorer": "it is a setting of a measure now: measures.accuracy.scorer",
    "by_layer_facts": "it is a setting of a measure now: measures.knockout.facts, with measures.knockout.by: layer",
    "patching_pairs": "it is a setting of a measure now: measures.patching.pairs",
    "example_prompts": "it is a setting of a measure now: measures.token_attention.facts",
}
"""Fields of studies of 0.3, and where they have gone."""


def load_study(path: str | Path, settings: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML and apply `key=value` settings, such as `facts.n_test=50`.

    Raises:
        BadInput: no such file, no YAML, or a field with a wrong name or value; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no such study: {str(path)!r}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path} holds no study: it should be a mapping with 'name', 'arms', 'styles' …")
    for setting in settings:
        _apply(raw, setting)
    return parse_study(raw, str(path))


def parse_study(raw: dict[str, Any], where: str) -> StudyConfig:
    """A study from plain data; BadInput with one line for the first wrong field."""
    try:
        return StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{where}: {_first(error)}") from None


def _first(error: ValidationError, above: tuple[int | str, ...] = ()) -> str:
    """The first wrong field and what is wrong with it."""
    first = error.errors()[0]
    location = (*above, *first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, WrongField):
        return _first(cause.error, (*location, *cause.field))
    field = ".".join(str(part) for part in location) or "study"
    if str(location[-1:][0] if location else "") in MOVED:
        reason = f"no such field; {MOVED[str(location[-1])]}"
    elif first["type"] == "extra_forbidden":
        reason = f"no such field{_suggestion(location)}"
    else:
        reason = first["msg"].removeprefix("Value error, ")
        if not isinstance(first["input"], dict):
            reason += f", not {str(first['input'])[:80]!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{field}: {reason}{more}"


def _suggestion(location: Sequence[int | str]) -> str:
    from subjattn.finetune.record import methods
    from subjattn.measures.record import measures

    records: list[Any] = [*measures().values(), *methods().values()]
    settings = [record.settings for record in records]
    known = sorted({name for section in (*_sections(StudyConfig), *settings) for name in section.model_fields})
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _sections(model: type[BaseModel]) -> Iterable[type[BaseModel]]:
    """A model and those of its fields, whatever holds them."""
    yield model
    for field in model.model_fields.values():
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel) and part is not BaseModel:
                yield from _sections(part)


def _parts(annotation: Any) -> Iterable[Any]:
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _parts(part)


def _apply(raw: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {setting!r} is not key=value, such as facts.n_test=50")
    *path, last = key.split(".")
    target = raw
    if path[:1] == ["measures"] and raw.get("measures") is None:
        raw["measures"] = dict.fromkeys(MEASURED)
    for part in path:
        below = target.setdefault(part, {})
        target[part] = target = {} if below is None else below
        if not isinstance(target, dict):
            raise BadInput(f"--set {setting!r}: {part!r} has no fields")
    try:
        target[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise BadInput(f"--set {setting!r}: the value is not YAML") from None
