"""A study as its user states it: facts, styles, arms, training, measures, contrasts, claims."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim
from subjattn.facts.splits import parse_arm
from subjattn.finetune.record import Method, method_of
from subjattn.measures.record import Measure, measure_of, quantity_of
from subjattn.measures.where import CONDITIONS
from subjattn.models import PACKAGED
from subjattn.prompts import Style


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
MEASURED = ("accuracy", "answer_logprob", "attention_to_subject", "knockout", "patching", "token_attention")
"""What a study measures where it does not say."""


class WrongField(ValueError):
    """A field of a section whose model the section itself names."""

    def __init__(self, field: tuple[int | str, ...], error: ValidationError) -> None:
        super().__init__(str(error))
        self.field, self.error = field, error


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


class FactsConfig(_Section):
    """Which facts, how many to train each arm on and how many to hold out."""

    source: str = Field("cities", description="a source, with a local copy as NAME:PATH, or a file of your own")
    columns: dict[str, str] = Field({}, description="of a file of your own: its names for subject, answer, …")
    relations: list[str] = Field([], description="only these relations")
    leave_out_given: bool = Field(False, description="leave out facts whose name holds the answer")
    popularity: PopularityConfig | None = None
    knowledge: str | None = Field(None, description="knowledge.parquet of `subjattn knowledge`, joined by fact_id")
    where: Literal[CONDITIONS] | None = Field(  # type: ignore[valid-type]
        None,
        description="only facts that are known: by the labels (known, HighlyKnown, …); or `correct`, by the first arm "
        "not trained here, style by style, in all measures but accuracy",
    )
    trained_on: str | None = Field(None, description="facts that models brought along learnt: subjects to leave out")
    pool: PositiveInt | None = Field(None, description="draw this many at random and leave the others aside")
    n_train: PositiveInt | None = Field(640, description="facts per trained arm; null for all an arm can have")
    n_test: PositiveInt = Field(300, description="held-out facts, in no arm")
    split: SplitConfig = SplitConfig()

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if self.where not in (None, "correct") and self.knowledge is None:
            raise BadInput(
                f"where {self.where!r} needs 'facts.knowledge', which `subjattn knowledge` writes", field="where"
            )
        return self

    @property
    def scored(self) -> bool:
        """Whether the model itself must say how likely each answer is, before facts can be ranked."""
        return self.split.by == "answer_logprob" and self.knowledge is None


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


class TrainingConfig(_Section):
    """How arms are trained; the method's own fields stand beside these."""

    method: str = Field("lora", description="see subjattn.finetune")
    styles: list[Name] | None = Field(None, description="that facts are asked in; by default the first that can")
    settings: SerializeAsAny[BaseModel] = Field(description="of the method")

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, value: Any) -> Any:
        if not isinstance(value, dict) or isinstance(value.get("settings"), BaseModel):
            return value
        own = {name: value[name] for name in ("method", "styles") if name in value}
        method = method_of(own.get("method", "lora"))
        rest = {name: of for name, of in value.items() if name not in own}
        try:
            return own | {"settings": method.settings.model_validate(rest)}
        except ValidationError as error:
            raise WrongField((), error) from None

    @model_serializer
    def _beside(self) -> dict[str, Any]:
        return {"method": self.method, "styles": self.styles, **self.settings.model_dump(mode="json")}

    @property
    def record(self) -> Method:
        return method_of(self.method)


class Replicates(_Section):
    """How often an arm is trained: on other draws of its facts, and from other seeds of the training."""

    draws: PositiveInt = 1
    seeds: PositiveInt = 1
    first_only: list[str] = Field([], description="measures of the first replicate alone: figures need no more")

    @property
    def all(self) -> list[tuple[int, int]]:
        """Every (draw, seed)."""
        return [(draw, seed) for draw in range(self.draws) for seed in range(self.seeds)]


class StudyConfig(_Section):
    """A study: facts, styles, arms, how to train, what to measure, what to contrast and claim."""

    name: Name
    model: str = PACKAGED
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = Field(0, ge=0, lt=2**32)
    threads: PositiveInt = Field(1, description="CPU threads of a stage; sums differ with their number")
    facts: FactsConfig = FactsConfig()
    styles: dict[Name, Style] = Field(min_length=1)
    arms: dict[Name, Arm] = Field(min_length=1, description="the first is the reference of the others")
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig.model_validate({}))
    replicates: Replicates = Replicates()
    measures: dict[str, SerializeAsAny[BaseModel]] = Field(
        default_factory=lambda: {name: measure_of(name).parse({}) for name in MEASURED}
    )
    contrasts: list[tuple[str, str]] = Field([], description="each the first arm minus the second")
    smallest_effects: dict[str, Annotated[PositiveFloat, AllowInfNan(False)]] = Field(
        {}, description="of quantities, in place of the measures' own: the least difference that matters"
    )
    claims: list[Claim] = []

    @field_validator("measures", mode="before")
    @classmethod
    def _of_registry(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        parsed = {"accuracy": measure_of("accuracy").parse({})}
        for name, settings in value.items():
            try:
                parsed[name] = settings if isinstance(settings, BaseModel) else measure_of(name).parse(settings or {})
            except ValidationError as error:
                raise WrongField((name,), error) from None
            except BadInput as error:
                raise BadInput(str(error), field=str(name)) from None
        return parsed

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.facts.where == "correct" and self.facts.split.held_out:
            raise BadInput(
                "'correct' chooses among the facts that are not held out: leave out facts.split.held_out, or choose by "
                "labels",
                field="facts.where",
            )
        if not self.trained and (self.facts.split.held_out or self.facts.split.controlled):
            raise BadInput(
                "facts.split holds facts out of training ('held_out', 'controlled'), and no arm is trained",
                field="facts.split",
            )
        if self.facts.split.by not in ("popularity", "answer_logprob") and self.facts.knowledge is None:
            raise BadInput(
                f"facts.split.by {self.facts.split.by!r} needs 'facts.knowledge', which `subjattn knowledge` writes",
                field="facts.split.by",
            )
        if self.trained:
            _check_training(self)
        elif len(self.replicates.all) > 1:
            raise BadInput("replicates are trained anew each, and no arm is trained here", field="replicates")
        if unknown := [name for name in self.replicates.first_only if name not in self.measures]:
            raise BadInput(
                f"replicates.first_only: no measure {unknown[0]!r} in the study", field="replicates.first_only"
            )
        check_claims(self)
        return self

    @property
    def measured(self) -> list[Measure]:
        """The measures of the study."""
        return [measure_of(name) for name in self.measures]

    @property
    def scorer(self) -> str:
        """When an answer is right."""
        return str(self.measures["accuracy"].scorer)  # type: ignore[attr-defined]

    @property
    def reference(self) -> str:
        """The arm that others are compared with by default."""
        return next(iter(self.arms))

    def is_tuned(self, arm: str) -> bool:
        """Whether an arm is a tuned version of the study's model, or a model of its own: what has a base beside it."""
        own = self.arms[arm]
        return bool(own.train or own.adapter) or own.model not in (None, self.model)

    def check_arm(self, arm: str) -> None:
        if arm not in self.arms:
            raise ValueError(f"arm {arm!r} is compared but not defined; the arms are {', '.join(self.arms)}")

    @property
    def untrained(self) -> str:
        """The arm that says which facts are known and chooses cells: the first not trained here, else the first."""
        return next((name for name, arm in self.arms.items() if not arm.train), self.reference)

    @property
    def n_replicates(self) -> int:
        """Units that intervals count: draws, or the seeds of one draw."""
        return self.replicates.draws if self.replicates.draws > 1 else self.replicates.seeds

    def replicates_of(self, arm: str, measure: str = "") -> list[tuple[int, int] | None]:
        """The replicates of an arm (in which a measure is made); one without a number where it is not trained here."""
        if not self.arms[arm].train:
            return [None]
        return [*self.replicates.all[: 1 if measure in self.replicates.first_only else None]]

    @property
    def training_styles(self) -> dict[str, Style]:
        """Styles that arms are trained in: those named, or the first that shows no facts and lets answer at once."""
        able = [name for name, style in self.styles.items() if not style.shots and not style.chain_of_thought]
        return {name: self.styles[name] for name in (self.training.styles or able[:1])}

    @property
    def trained(self) -> dict[str, str]:
        """Split of each arm that is trained here."""
        return {name: arm.train for name, arm in self.arms.items() if arm.train}


def check_claims(study: StudyConfig) -> None:
    """Refuse contrasts and claims of what the study does not have, or that it could never decide."""
    for number, pair in enumerate(study.contrasts):
        with _within(f"contrasts.{number}"):
            for arm in pair:
                study.check_arm(arm)
    for quantity in study.smallest_effects:
        with _within(f"smallest_effects.{quantity}"):
            quantity_of(quantity, study.measured)
    for number, claim in enumerate(study.claims):
        with _within(f"claims.{number}"):
            _check_claim(study, claim)
    ids = [claim.id for claim in study.claims]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        last = len(ids) - 1 - ids[::-1].index(twice)
        raise BadInput(f"two claims have the id {twice!r}", field=f"claims.{last}.id")
    primary = [number for number, claim in enumerate(study.claims) if claim.primary]
    if len(primary) > 1:
        first, second = (ids[number] for number in primary[:2])
        raise BadInput(
            f"claims {first!r} and {second!r} are both primary: at most one is", field=f"claims.{primary[1]}.primary"
        )


@contextmanager
def _within(field: str) -> Iterator[None]:
    """Say which field an error is about."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error), field=field) from None


def _check_claim(study: StudyConfig, claim: Claim) -> None:
    where = f"claim {claim.id!r}"
    for _, measure, arms, style, _cells in claim.sides:
        quantity_of(measure.partition(".")[0], study.measured)
        for arm in arms:
            study.check_arm(arm)
        for name in (style, claim.style):
            if name is not None and name not in study.styles:
                raise ValueError(f"{where}: no style {name!r}; the styles are {', '.join(study.styles)}")
    measured = [quantity_of(side[1].partition(".")[0], study.measured)[0].name for side in claim.sides]
    if len({name in study.replicates.first_only for name in measured}) > 1:
        raise ValueError(f"{where}: of {' and '.join(measured)} one is made of the first replicate only")
    involved = {arm for side in claim.sides for arm in side[2]}
    if study.facts.where == "correct" and study.untrained in involved and set(measured) != {"accuracy"}:
        raise ValueError(
            f"{where} compares with arm {study.untrained!r}, whose right answers chose the facts (facts.where), so it "
            "would fall by chance: claim it of other arms, or choose facts by labels"
        )
    trained = involved & set(study.trained)
    if claim.scope == "training" and (not trained or len(study.replicates.all) < 2):
        raise ValueError(
            f"{where} is about a way of training, which takes an arm trained here and replicates: {{draws: 3}} or more"
        )
    if claim.select is not None:
        _check_select(study, claim, involved)


def _check_select(study: StudyConfig, claim: Claim, arms: set[str]) -> None:
    on = claim.select.on if claim.select else None
    where = f"claim {claim.id!r} chooses cells"
    if len(claim.arms) < 2 or (claim.minus and (claim.minus.measure or claim.minus.where)):
        raise ValueError(f"{where}, which it can for a difference of two arms in one measure: name the cells instead")
    if isinstance(on, int) and (given := arms - set(study.trained)):
        raise ValueError(f"{where} on draws, of which arm {min(given)!r} has none: it would be tested where it chose")
    if isinstance(on, int) and on >= study.replicates.draws:
        raise ValueError(f"claim {claim.id!r} chooses cells on {on} draws and leaves none of {study.replicates.draws}")
    if on == "reference" and study.untrained in arms:
        raise ValueError(
            f"claim {claim.id!r} chooses cells on arm {study.untrained!r} and compares with it: where it is largest by "
            "chance, it falls by chance; choose on draws, or name the cells"
        )


def _check_training(study: StudyConfig) -> None:
    if unknown := [name for name in study.training.styles or [] if name not in study.styles]:
        raise BadInput(
            f"training.styles: no style {unknown[0]!r}; the styles are {', '.join(study.styles)}",
            field="training.styles",
        )
    styles = study.training_styles
    if not styles or any(style.shots or style.chain_of_thought for style in styles.values()):
        raise BadInput(
            "arms are trained in styles without shots and chain of thought, and there is none", field="styles"
        )
