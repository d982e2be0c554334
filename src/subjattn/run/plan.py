"""A plan: stages as pure data, each naming its work, its settings and what it is made from.

A stage is a folder of files made by one function, `work(settings, inputs, out, context)`. What went into it is
its **recipe** (work, version, settings, digests of what lies outside the run, threads) and the **ids** of its
inputs, which are digests of their content and not of how they were made: a stage whose inputs come out as
they were is not made again, and one whose input was replaced is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from subjattn.digest import digest_of
from subjattn.errors import BadInput


if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 4
"""Of plans and stage records. Raised when their meaning changes."""
_WROTE = {3: "0.4"}
"""Earlier schemas by the version that wrote them; 1 and 2 named none."""


class Context(Protocol):
    """What a stage's work is told, and what it may tell."""

    memory_share: float
    """Of the usual working memory; halved after a device ran out of it."""
    kept: Path
    """A folder that outlives a stage that is killed or fails, until the same is made of the same; to go on from."""

    def tell(self, units: float) -> None:
        """Report work done just now, in the unit of `Stage.cost`."""
        ...


class Work(Protocol):
    """What a stage does: read `inputs`, write files into `out`."""

    def __call__(
        self, settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Context, /
    ) -> None: ...


@dataclass(frozen=True)
class Stage:
    """One folder of results and how it is made.

    Attributes:
        name: its folder under the run's.
        work: the function that makes it, as `package.module:function`.
        version: raised when the work's results change meaning.
        settings: plain data, all that the work depends on beside its inputs.
        inputs: role → stage, or `stage:file` for one of its files.
        external: role → digest, or hub commit, of what lies outside the run.
        where: settings that say where that lies; another place with the same content is the same stage.
        cost: forward passes of a prompt, roughly.
        memory: bytes that the process needs, roughly.
        device: whether it wants the accelerator.
        group: stages of one group share what is costly to load.
    """

    name: str
    work: str
    version: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    external: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 0.0
    memory: float = 0.0
    device: bool = False
    group: str = ""

    @property
    def made_from(self) -> list[str]:
        """Stages that it takes something from."""
        return list(dict.fromkeys(source.partition(":")[0] for source in self.inputs.values()))

    def recipe(self, threads: int) -> str:
        """A digest of what makes the stage, its inputs' content aside."""
        parts = {"work": self.work, "version": self.version, "settings": self.settings, "external": self.external}
        return digest_of({**parts, "roles": sorted(self.inputs), "threads": threads if self.device else None})

    def resolve(self) -> Work:
        """The function that `work` names."""
        module, _, name = self.work.partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Plan:
    """Stages in an order in which they can be made."""

    stages: Sequence[Stage]
    threads: int = 1
    """Of every stage that computes; sums differ with their number, so it is the same wherever a stage runs."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise BadInput(f"two stages are called {stage.name!r}")
            if missing := [source for source in stage.made_from if source not in seen]:
                raise BadInput(f"stage {stage.name!r} is made from {missing[0]!r}, which does not come before it")
            seen.add(stage.name)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def before_models(self) -> Plan:
        """The stages that need no model, nor anything made by one: made first, since they take seconds to fail."""
        chosen: dict[str, Stage] = {}
        for stage in self.stages:
            if not stage.device and all(name in chosen for name in stage.made_from):
                chosen[stage.name] = stage
        return Plan(list(chosen.values()), self.threads)

    def to_json(self) -> str:
        """The plan as text, read back by `Plan.from_json`."""
        content = {"schema": SCHEMA, "threads": self.threads, "stages": [asdict(stage) for stage in self.stages]}
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from its text; BadInput where it is of a schema that this version does not read."""
        content = json.loads(text)
        if content.get("schema") != SCHEMA:
            raise BadInput(wrong_schema("plan.json", content.get("schema")))
        return cls([Stage(**stage) for stage in content["stages"]], content["threads"])


def wrong_schema(what: str, schema: Any) -> str:
    """Why a file of another schema is not read, in one line."""
    if isinstance(schema, int) and schema > SCHEMA:
        return f"{what} was written by a newer subjattn (schema {schema}, this one reads {SCHEMA}): update subjattn"
    wrote = _WROTE.get(schema, "0.3 or older")
    return f"{what} was written by subjattn {wrote}, which this version does not read: run the study anew"
