"""Read the YAML of a study; every wrong field is named in a line of its own, with the line where it stands."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from subjattn.errors import BadInput, WrongFields
from subjattn.study.arms import WrongField
from subjattn.study.config import MEASURED, StudyConfig
from subjattn.study.files import MANIFEST, STUDY
from subjattn.study.lines import Lines, lines_of


MOVED = {
    "scorer": "it is a setting of a measure now: measures.accuracy.scorer",
    "by_layer_facts": "it is a setting of a measure now: measures.knockout.facts, with measures.knockout.by: layer",
    "patching_pairs": "it is a setting of a measure now: measures.patching.pairs",
    "example_prompts": "it is a setting of a measure now: measures.token_attention.facts",
}
"""Fields of studies of 0.3, and where they have gone."""
_Field = tuple[int | str, ...]
Kind = TypeVar("Kind", bound=BaseModel)


def load_study(path: str | Path, settings: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML and apply `key=value` settings, such as `facts.n_test=50`.

    Raises:
        BadInput: no such file, no YAML, or fields with a wrong name or value; the message names each with its line.
    """
    raw, lines = read_raw(path, settings)
    return parse_study(raw, lines)


@contextmanager
def located(path: str | Path, settings: Sequence[str] = ()) -> Iterator[None]:
    """Put the line of a study before an error that names its field."""
    try:
        yield
    except BadInput as error:
        if error.field is None:
            raise
        _, lines = read_raw(path, settings)
        raise BadInput(f"{lines.at(error.field.split('.'))}: {error}", field=error.field) from None


def parse_study(raw: dict[str, Any], where: str | Lines) -> StudyConfig:
    """A study from plain data; BadInput with a line for each wrong field."""
    return parse_as(StudyConfig, raw, where if isinstance(where, Lines) else Lines(where))


def parse_as(kind: type[Kind], raw: dict[str, Any], lines: Lines) -> Kind:
    """A study of some kind from plain data; BadInput with a line for each wrong field."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        wrong = _required(dict(_wrong(error)))
        order = sorted(wrong, key=lambda field: (lines.numbers.get(field, 0), [str(part) for part in field]))
        messages = [_line(lines, field, wrong[field]) for field in order]
        raise (BadInput(messages[0]) if len(messages) == 1 else WrongFields(messages)) from None


def read_raw(path: str | Path, settings: Sequence[str]) -> tuple[dict[str, Any], Lines]:
    """The plain data of a study, settings applied, and where each field stands."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"no such study: {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not readable YAML: it is not UTF-8 text") from None
    lines = lines_of(text, str(path))
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path} holds no study: it should be a mapping with 'name', 'arms', 'styles' …")
    _rank_as_made(raw, path)
    return raw, replace(lines, settings={_apply(raw, setting): setting for setting in settings})


def _rank_as_made(raw: dict[str, Any], path: Path) -> None:
    """Rank as a run did, where this is the study in its folder: before 0.11 it left out a ranking that was the default.

    Its manifest has always said it.
    """
    beside = path.with_name(MANIFEST)
    if path.name != STUDY or not beside.is_file():
        return
    try:
        made = json.loads(beside.read_text(encoding="utf-8"))["study"]
        by, same = made["facts"]["split"]["by"], made["name"] == raw["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    facts = raw.get("facts") or {}
    if same and isinstance(facts, dict) and isinstance(split := facts.get("split") or {}, dict):
        raw["facts"] = facts | {"split": {"by": by} | split}


def _wrong(error: ValidationError, above: _Field = ()) -> Iterator[tuple[_Field, tuple[str, str]]]:
    """Wrong fields, each with the kind of mistake and what is wrong."""
    for one in error.errors():
        field = (*above, *one["loc"])
        cause = one.get("ctx", {}).get("error")
        if isinstance(cause, WrongField):
            yield from _wrong(cause.error, (*field, *cause.field))
            continue
        if isinstance(cause, BadInput) and cause.field:
            field = (*field, *(int(part) if part.isdigit() else part for part in cause.field.split(".")))
        yield field, (one["type"], _reason(one, field))


def _reason(one: Any, field: _Field) -> str:
    last = str(field[-1]) if field else ""
    if one["type"] == "missing":
        return "it is needed, and missing"
    if last in MOVED and one["type"] == "extra_forbidden":
        return f"no such field; {MOVED[last]}"
    if one["type"] == "extra_forbidden":
        return f"no such field{_suggestion(last)}"
    reason = str(one["msg"]).removeprefix("Value error, ")
    plain = isinstance(one["input"], str | int | float | bool | None) and one["type"] != "value_error"
    return f"{reason}, not {str(one['input'])[:80]!r}" if plain else reason


def _required(wrong: dict[_Field, tuple[str, str]]) -> dict[_Field, str]:
    """What is wrong by field; a missing one and an unknown one beside it that is called alike are one mistake."""
    reasons = {field: reason for field, (_, reason) in wrong.items()}
    for field in [field for field, (kind, _) in wrong.items() if kind == "missing"]:
        beside = {
            str(of[-1]): of for of, (kind, _) in wrong.items() if kind == "extra_forbidden" and of[:-1] == field[:-1]
        }
        if close := difflib.get_close_matches(str(field[-1]), list(beside), n=1, cutoff=0.5):
            reasons[beside[close[0]]] = f"no such field, and {str(field[-1])!r} is missing: did you mean that?"
            del reasons[field]
    return reasons


def _line(lines: Lines, field: _Field, reason: str) -> str:
    named = ".".join(map(str, field)) or "study"
    return f"{lines.at(field)}: {reason if field and reason.startswith(named) else f'{named}: {reason}'}"


def _suggestion(name: str) -> str:
    from subjattn.finetune.record import methods
    from subjattn.measures.record import measures

    records: list[Any] = [*measures().values(), *methods().values()]
    settings = [record.settings for record in records]
    known = sorted({name for section in (*_sections(StudyConfig), *settings) for name in section.model_fields})
    close = difflib.get_close_matches(name, known, n=1)
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


def _apply(raw: dict[str, Any], setting: str) -> _Field:
    """Change a field, and give its path."""
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
    return (*path, last)
