"""The YAML of a study, checked field by field before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim
from subjattn.facts.splits import parse_arm
from subjattn.finetune.lora import Training
from subjattn.measures.scoring import ScorerName
from subjattn.models import PACKAGED
from subjattn.prompts import Style


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PopularityConfig(_Section):
    """A table that says how popular subjects are, for a source that does not."""

    path: str
    subject: str = Field("subject", description="its column of names")
    popularity: str = Field("popularity", description="its column of numbers")


class HeldOut(_Section):
    """Relations that no arm trains on, to test out of distribution."""

    relations: list[str] = []
    farthest: NonNegativeInt = Field(0, description="or this many, farthest from the others by embedding")
    n_test: PositiveInt = Field(description="test facts from them, besides the others")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.relations) == bool(self.farthest):
            raise ValueError("held_out needs either 'relations' or 'farthest'")
        return self


class SplitConfig(_Section):
    """How facts are ranked and what arms must have in common; see `subjattn.facts.splits`."""

    by: Literal["popularity", "category", "p_greedy", "p_sampled", "confidence", "answer_logprob"] = "popularity"
    within: list[Literal["relation", "answer"]] = ["relation", "answer"]
    match: list[Literal["relation", "answer", "n_tokens"]] = ["relation", "answer", "n_tokens"]
    controlled: bool = False
    held_out: HeldOut | None = None

    @property
    def needs_model(self) -> bool:
        """Whether the model's own numbers decide the split."""
        return self.by == "answer_logprob" or bool(self.held_out and self.held_out.farthest)


class FactsConfig(_Section):
    """Which facts, how many to train each arm on and how many to hold out."""

    source: str = Field("cities", description="a source, with a local copy as NAME:PATH, or a file of your own")
    columns: dict[str, str] = Field({}, description="of a file of your own: its names for subject, answer, …")
    relations: list[str] = Field([], description="only these relations")
    popularity: PopularityConfig | None = None
    knowledge: str | None = Field(None, description="knowledge.parquet of `subjattn knowledge`, joined by fact_id")
    n_train: PositiveInt | None = Field(640, description="facts per trained arm; null for all an arm can have")
    n_test: PositiveInt = Field(300, description="held-out facts, in no arm")
    split: SplitConfig = SplitConfig()


class Arm(_Section):
    """One model of a study: trained here, or brought along; empty for the study's own model."""

    train: str | None = Field(
        None, description="which facts: known, top, top-30%, mixed-25%, … (subjattn.facts.splits)"
    )
    model: str | None = Field(None, description="hub id or folder of a full checkpoint")
    adapter: str | None = Field(None, description="folder or hub id of a PEFT adapter")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.train and self.adapter:
            raise ValueError("an arm is either trained here ('train') or brings an 'adapter', not both")
        if self.train:
            parse_arm(self.train)
        return self


class MeasureConfig(_Section):
    """How much of the costlier measures to do."""

    by_layer_facts: NonNegativeInt = Field(12, description="facts whose knock-out is repeated layer by layer")
    patching_pairs: NonNegativeInt = Field(8, description="clean and corrupt pairs of the patching grid")
    example_prompts: NonNegativeInt = Field(4, description="prompts whose attention is shown token by token")


class StudyConfig(_Section):
    """A study: facts, styles, arms, how to train, what to measure, what to contrast and claim."""

    name: Name
    model: str = PACKAGED
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = Field(0, ge=0, lt=2**32)
    facts: FactsConfig = FactsConfig()
    styles: dict[Name, Style] = Field(min_length=1)
    scorer: ScorerName = Field("answer_start", description="when an answer is right; see subjattn.measures.scoring")
    arms: dict[Name, Arm] = Field(min_length=1, description="the first is the reference of the others")
    training: Training = Training()
    measures: MeasureConfig = MeasureConfig()
    contrasts: list[tuple[str, str]] = Field([], description="each the first arm minus the second")
    claims: list[Claim] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.trained and (self.facts.split.held_out or self.facts.split.controlled):
            raise ValueError(
                "facts.split holds facts out of training ('held_out', 'controlled'), and no arm is trained"
            )
        if self.trained and not self.training_styles:
            raise ValueError("arms are trained in styles without shots and chain of thought, and there is none")
        named = [*self.contrasts, *(claim.arms for claim in self.claims)]
        for arm in (arm for pair in named for arm in pair):
            if arm not in self.arms:
                raise ValueError(f"arm {arm!r} is compared but not defined; the arms are {', '.join(self.arms)}")
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"two claims have the id {next(i for i in ids if ids.count(i) > 1)!r}")
        return self

    @property
    def reference(self) -> str:
        """The arm that picks patching pairs, and that others are compared with by default."""
        return next(iter(self.arms))

    @property
    def training_styles(self) -> dict[str, Style]:
        """Styles that arms are trained in: those that show the model no other facts and let it answer at once."""
        return {name: s for name, s in self.styles.items() if not s.shots and not s.chain_of_thought}

    @property
    def training_style(self) -> str:
        """The first style that arms are trained in, in which the reference arm's knowledge of their facts is shown."""
        return next(iter(self.training_styles))

    @property
    def trained(self) -> dict[str, str]:
        """Split of each arm that is trained here."""
        return {name: arm.train for name, arm in self.arms.items() if arm.train}


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
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "study"
        if first["type"] == "extra_forbidden":
            reason = f"no such field{_suggestion(first['loc'])}"
        else:
            reason = first["msg"].removeprefix("Value error, ")
            if not isinstance(first["input"], dict):
                reason += f", not {str(first['input'])[:80]!r}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadInput(f"{where}: {field}: {reason}{more}") from None


def _suggestion(location: tuple[int | str, ...]) -> str:
    import difflib

    sections = (
        StudyConfig,
        FactsConfig,
        SplitConfig,
        HeldOut,
        PopularityConfig,
        Style,
        Arm,
        MeasureConfig,
        Training,
        Claim,
    )
    known = sorted({name for section in sections for name in section.model_fields})
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _apply(raw: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise BadInput(f"--set {setting!r} is not key=value, such as facts.n_test=50")
    *path, last = key.split(".")
    target = raw
    for part in path:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise BadInput(f"--set {setting!r}: {part!r} has no fields")
    try:
        target[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise BadInput(f"--set {setting!r}: the value is not YAML") from None
