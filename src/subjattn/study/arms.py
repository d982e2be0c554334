"""The models of a study as its user states them: how each is trained or where it comes from, and how often."""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializeAsAny,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from subjattn.engine.mixture import MixtureForm
from subjattn.facts.splits import parse_arm
from subjattn.finetune.record import Method, method_of
from subjattn.finetune.settings import Training
from subjattn.models.derived import Which


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class WrongField(ValueError):
    """A field of a section whose model the section itself names."""

    def __init__(self, field: tuple[int | str, ...], error: ValidationError) -> None:
        super().__init__(str(error))
        self.field, self.error = field, error


class Section(BaseModel):
    """Base of a study's sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(Section):
    """Hyper-parameters that are tried out, each combination on the facts of the first draw, and chosen on validation.

    The grid of Ghosal et al. (2024, table 4) is `learning_rate: [1e-5, 1e-4, 1e-3]`, `weight_decay: [1e-6, …, 1e-2]`,
    `lora_rank: [8, 16, 32, 64]`, `weights: [lora, full]`.
    """

    values: dict[str, list[Any]] = Field(min_length=1, description="of fields of the method's settings")
    select: Literal["each", "shared"] = Field(
        "each", description="each arm takes its own best, or all the best on average"
    )

    def points(self, settings: Training) -> list[Training]:
        """Settings of every combination, each once; ValidationError where one cannot be."""
        own, kind = settings.model_dump(exclude_unset=True), type(settings)
        combinations = (dict(zip(self.values, values, strict=True)) for values in product(*self.values.values()))
        points = [kind.model_validate(own | combination) for combination in combinations]
        return [point for i, point in enumerate(points) if point not in points[:i]]


class TrainingConfig(Section):
    """How arms are trained; the method's own fields stand beside these."""

    method: str = Field("sft", description="see subjattn.finetune.methods")
    styles: list[Name] | None = Field(None, description="that facts are asked in; by default the first that can")
    grid: Grid | None = None
    settings: SerializeAsAny[Training] = Field(description="of the method")

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, value: Any) -> Any:
        if not isinstance(value, dict) or isinstance(value.get("settings"), BaseModel):
            return value
        own = {name: value[name] for name in ("method", "styles", "grid") if name in value}
        method = method_of(own.get("method", "sft"))
        rest = {name: of for name, of in value.items() if name not in own}
        try:
            return own | {"settings": method.settings.model_validate(rest)}
        except ValidationError as error:
            raise WrongField((), error) from None

    @model_validator(mode="after")
    def _grid_of_settings(self) -> Self:
        if self.grid is not None:
            if unknown := [name for name in self.grid.values if name not in type(self.settings).model_fields]:
                raise ValueError(f"grid: method {self.method!r} has no setting {unknown[0]!r}")
            self.grid.points(self.settings)
        return self

    @model_serializer
    def _beside(self) -> dict[str, Any]:
        own = {"method": self.method, "styles": self.styles, "grid": self.grid and self.grid.model_dump(mode="json")}
        return own | self.settings.model_dump(mode="json")

    @property
    def record(self) -> Method:
        return method_of(self.method)

    def changed(self, by: dict[str, Any]) -> TrainingConfig:
        """What an arm trains by that says some of it otherwise."""
        own = self.settings.model_dump(exclude_unset=True)
        known = method_of(by.get("method", self.method)).settings.model_fields
        kept = {name: of for name, of in own.items() if name in known}
        same = {"method": self.method, "styles": self.styles, "grid": self.grid}
        return TrainingConfig.model_validate(same | kept | by)


class Restore(Section):
    """Part of an arm's update put back to the base's weights (Ye et al. 2025); see `subjattn.models.derived`."""

    share: float = Field(ge=0, le=1, description="of the weights that were changed")
    which: Which = Field("top", description="those moved most, those moved least, or any")


class Mix(Section):
    """An arm's next-token distribution mixed with the base's (Kazemi et al. 2023)."""

    weight: float | None = Field(None, ge=0, le=1, description="the arm's share; without, chosen on validation facts")
    form: MixtureForm = Field("linear", description="of probabilities, or `log`: of their logarithms")
    base_style: Name | None = Field(None, description="a style with shots that the base is asked in")


class Arm(Section):
    """One model of a study: trained here, brought along, or made of another arm; empty for the study's own model."""

    train: str | None = Field(
        None, description="which facts: known, top, top-30%, mixed-25%, … (subjattn.facts.splits)"
    )
    training: dict[str, Any] | None = Field(None, description="fields of the study's `training` that are others here")
    model: str | None = Field(None, description="hub id or folder of a full checkpoint")
    adapter: str | None = Field(None, description="folder or hub id of a PEFT adapter")
    of: Name | None = Field(None, description="another arm that this one is made of, by `restore` or `mix`")
    restore: Restore | None = None
    mix: Mix | None = None
    styles: list[Name] | None = Field(None, description="that it is asked in, where not in all")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.train and self.adapter:
            raise ValueError("an arm is either trained here ('train') or brings an 'adapter', not both")
        if self.training is not None and not self.train:
            raise ValueError("'training' says how an arm is trained: say on which facts, by 'train'")
        if self.train:
            parse_arm(self.train)
        made = [name for name in ("restore", "mix") if getattr(self, name) is not None]
        if bool(self.of) != bool(made) or len(made) > 1 or (self.of and (self.train or self.model or self.adapter)):
            raise ValueError("an arm is made 'of' another by either 'restore' or 'mix', and then has no other origin")
        return self


class Replicates(Section):
    """How often an arm is trained: on other draws of its facts, and from other seeds of the training."""

    draws: PositiveInt = 1
    seeds: PositiveInt = 1
    first_only: list[str] = Field([], description="measures of the first replicate alone: figures need no more")

    @property
    def all(self) -> list[tuple[int, int]]:
        """Every (draw, seed)."""
        return [(draw, seed) for draw in range(self.draws) for seed in range(self.seeds)]
