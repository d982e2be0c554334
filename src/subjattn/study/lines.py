"""Where each field of a study's YAML stands, so that an error can name its line, or the `--set` that set it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from subjattn.errors import BadInput


Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Lines:
    """A study's text by field.

    Attributes:
        file: the YAML, or what else the study comes from.
        numbers: of every field its line, counted from 1.
        settings: by field the `--set` that set it.
    """

    file: str
    numbers: Mapping[Path, int] = field(default_factory=dict)
    settings: Mapping[Path, str] = field(default_factory=dict)

    def at(self, where: Sequence[int | str]) -> str:
        """Where a field is stated, as messages begin; where it is not, the nearest section that should hold it."""
        path = tuple(where)
        for n in range(len(path), -1, -1):
            if path[:n] in self.settings:
                return f"--set {self.settings[path[:n]]}"
            if path[:n] in self.numbers:
                return f"{self.file}:{self.numbers[path[:n]]}"
        return self.file


def lines_of(text: str, file: str) -> Lines:
    """The lines of a YAML text.

    Raises:
        BadInput: it is no YAML, or a field stands twice, of which YAML would silently take the last.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise BadInput(f"{file}:{line}: is not readable YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not readable YAML: {' '.join(str(error).split())[:200]}") from None
    numbers: dict[Path, int] = {}
    for path, line in _walk(root, ()):
        if path in numbers:
            named = ".".join(map(str, path))
            raise BadInput(f"{file}:{line}: {named}: stands on line {numbers[path]} already: keep one of them")
        numbers[path] = line
    return Lines(file, numbers)


def _walk(node: yaml.Node | None, above: Path) -> Iterator[tuple[Path, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            path = (*above, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _walk(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            path = (*above, number)
            yield path, value.start_mark.line + 1
            yield from _walk(value, path)
