"""A study as its user states it: facts, styles, arms, training, measures, contrasts, claims."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AllowInfNan,
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim
from subjattn.facts.splits import parse_arm
from subjattn.measures.record import Measure, measure_of
from subjattn.measures.where import CONDITIONS
from subjattn.models import PACKAGED
from subjattn.prompts import Style
from subjattn.study.arms import Arm, Name, Replicates, Section, TrainingConfig, WrongField
from subjattn.study.consistency import check_claims, check_made, check_training
from subjattn.worlds import is_world


MEASURED = ("accuracy", "answer_logprob", "attention_to_subject", "knockout", "patching", "token_attention")
"""What a study measures where it does not say."""


class PopularityConfig(Section):
    """A table that says how popular subjects are, for a source that does not."""

    path: str
    subject: str = Field("subject", description="its column of names")
    popularity: str = Field("popularity", description="its column of numbers")


class HeldOut(Section):
    """Relations that no arm trains on, to test out of distribution."""

    relations: list[str] = Field([])
    farthest: NonNegativeInt = Field(0, description="or this many, farthest from the others by embedding")
    n_test: PositiveInt = Field(description="test facts from them, besides the others")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.relations) == bool(self.farthest):
            raise ValueError("held_out needs either 'relations' or 'farthest'")
        return self


class SplitConfig(Section):
    """How facts are ranked and what arms must have in common; see `subjattn.facts.splits`."""

    by: Literal["popularity", "category", "p_greedy", "p_sampled", "confidence", "answer_logprob"] = Field(
        "popularity",
        description="what ranks facts; by default answer_logprob, the base model's own log-probability of the answer, "
        "if an arm is trained on known, unknown or mixed facts, else popularity",
    )
    within: list[Literal["relation", "answer"]] = Field(["relation", "answer"])
    match: list[Literal["relation", "answer", "n_tokens"]] = Field(["relation", "answer", "n_tokens"])
    controlled: bool = False
    held_out: HeldOut | None = None


class FactsConfig(Section):
    """Which facts, how many to train each arm on and how many to hold out."""

    source: str = Field("cities", description="a source, with a local copy as NAME:PATH, or a file of your own")
    columns: dict[str, str] = Field({}, description="of a file of your own: its names for subject, answer, …")
    relations: list[str] = Field([], description="only these relations")
    leave_out_given: bool = Field(False, description="leave out facts whose name holds the answer")
    popularity: PopularityConfig | None = None
    knowledge: str | None = Field(
        None, description="knowledge.parquet of `subjattn knowledge`, joined by fact_id; or world:NAME"
    )
    where: Literal[CONDITIONS] | None = Field(  # type: ignore[valid-type]
        None,
        description="only facts that are known: by the labels (known, HighlyKnown, …); or `correct`, by the first arm "
        "not trained here, style by style, in all measures but accuracy",
    )
    trained_on: str | None = Field(None, description="facts that models brought along learnt: subjects to leave out")
    pool: PositiveInt | None = Field(None, description="draw this many at random and leave the others aside")
    n_train: PositiveInt | None = Field(640, description="facts per trained arm; null for all an arm can have")
    n_test: PositiveInt = Field(300, description="held-out facts, in no arm")
    n_validation: NonNegativeInt = Field(0, description="more of them, to stop training and choose settings by")
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
        return self.split.by == "answer_logprob" and (self.knowledge is None or is_world(self.knowledge))


class StudyConfig(Section):
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
    over_training: list[str] = Field(
        [], description="measures also made of the weights that training.checkpoints keeps, each arm in its first style"
    )
    overview: list[str] = Field(
        [],
        description="quantities of one table with a row for each arm; `accuracy:known` is of the upper third's facts",
    )
    contrasts: list[tuple[str, str]] = Field([], description="each the first arm minus the second")
    smallest_effects: dict[str, Annotated[PositiveFloat, AllowInfNan(False)]] = Field(
        {}, description="of quantities, in place of the measures' own: the least difference that matters"
    )
    claims: list[Claim] = Field([])

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
            check_training(self)
        elif len(self.replicates.all) > 1:
            raise BadInput("replicates are trained anew each, and no arm is trained here", field="replicates")
        if unknown := [name for name in self.over_training if name not in self.measures]:
            raise BadInput(f"over_training: no measure {unknown[0]!r} in the study", field="over_training")
        if self.over_training and not any(self.training_of(arm).settings.checkpoints for arm in self.trained):
            raise BadInput(
                "over_training: no arm keeps weights during training: give training.checkpoints, such as log",
                field="over_training",
            )
        if unknown := [name for name in self.replicates.first_only if name not in self.measures]:
            raise BadInput(
                f"replicates.first_only: no measure {unknown[0]!r} in the study", field="replicates.first_only"
            )
        check_made(self)
        check_claims(self)
        return self

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        """Say what ranks facts where the study does not, so that every record of the study says it."""
        split = self.facts.split
        if "by" not in split.model_fields_set and self.trained:
            by = "answer_logprob" if any(parse_arm(spec).by_knowledge for spec in self.specs) else split.by
            facts = self.facts.model_copy(update={"split": split.model_copy(update={"by": by})})
            object.__setattr__(self, "facts", facts)
            self.model_fields_set.add("facts")
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

    def source(self, arm: str) -> str:
        """The arm that an arm is made of: another one, or itself."""
        return self.arms[arm].of or arm

    def styles_of(self, arm: str) -> list[str]:
        """The styles that an arm is asked in."""
        return [name for name in self.styles if name in (self.arms[arm].styles or self.styles)]

    def measured_over_training(self, arm: str, style: str) -> list[str]:
        """Measures that are made of the weights of an arm that were kept during training, in a style."""
        kept = arm in self.trained and self.training_of(arm).settings.checkpoints
        taught = kept and parse_arm(self.trained[arm]).kind != "nothing"
        return self.over_training if taught and style == self.styles_of(arm)[0] else []

    def styles_of_all(self, arms: Iterable[str]) -> list[str]:
        """The styles that all of these arms are asked in."""
        return [style for style in self.styles if all(style in self.styles_of(arm) for arm in arms)]

    def styles_of_claim(self, claim: Claim) -> list[str]:
        """The styles in which a claim is judged."""
        if claim.style:
            return [claim.style]
        return self.styles_of_all({arm for _, _, arms, style, _ in claim.sides if style is None for arm in arms})

    def is_tuned(self, arm: str) -> bool:
        """Whether an arm is a tuned version of the study's model, or a model of its own: what has a base beside it."""
        own = self.arms[self.source(arm)]
        return bool(own.train or own.adapter) or own.model not in (None, self.model)

    def check_arm(self, arm: str) -> None:
        if arm not in self.arms:
            raise ValueError(f"arm {arm!r} is compared but not defined; the arms are {', '.join(self.arms)}")

    @property
    def untrained(self) -> str:
        """The arm that says which facts are known and chooses cells: the first not trained here, else the first."""
        return next((name for name, arm in self.arms.items() if not (arm.train or arm.of)), self.reference)

    @property
    def n_replicates(self) -> int:
        """Units that intervals count: draws, or the seeds of one draw."""
        return self.replicates.draws if self.replicates.draws > 1 else self.replicates.seeds

    def replicates_of(self, arm: str, measure: str = "") -> list[tuple[int, int] | None]:
        """The replicates of an arm (in which a measure is made); one without a number where it is not trained here."""
        if not self.arms[self.source(arm)].train:
            return [None]
        return [*self.replicates.all[: 1 if measure in self.replicates.first_only else None]]

    def training_styles(self, arm: str | None = None) -> dict[str, Style]:
        """Styles that an arm is trained in: those named, or the first that shows no facts and lets answer at once."""
        able = [name for name, style in self.styles.items() if not style.shots and not style.chain_of_thought]
        named = (self.training if arm is None else self.training_of(arm)).styles
        return {name: self.styles[name] for name in (named or able[:1])}

    @property
    def specs(self) -> list[str]:
        """Which facts are drawn to train on: those of the arms, and of methods that need known facts beside them."""
        needs_known = any("known" in self.training_of(arm).record.needs for arm in self.trained)
        return list(dict.fromkeys([*self.trained.values(), *["known"] * needs_known]))

    def training_of(self, arm: str) -> TrainingConfig:
        """How an arm is trained."""
        own = self.arms[arm].training
        return self.training if own is None else self.training.changed(own)

    @property
    def trained(self) -> dict[str, str]:
        """Split of each arm that is trained here."""
        return {name: arm.train for name, arm in self.arms.items() if arm.train}

    @property
    def replicated(self) -> set[str]:
        """Arms that are trained here, or made of one that is: those that have replicates."""
        return {name for name in self.arms if self.source(name) in self.trained}
