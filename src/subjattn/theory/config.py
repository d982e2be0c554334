"""A study of one-layer worlds as its user states it: which worlds, how they are trained, on how many replicates."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, StringConstraints, model_validator

from subjattn.errors import BadInput
from subjattn.theory.gap import Finetuning, Pretraining, Section, WorldSettings


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class WorldOf(WorldSettings):
    """A world's size, how long it is pre-trained and how it is then fine-tuned."""

    zipf: Annotated[list[NonNegativeFloat], Field(min_length=1)] = Field(description="exponents of popularity")
    pretraining: Pretraining = Pretraining()
    finetuning: list[Name] | None = Field(None, description="by default every way of the study")


class TheoryConfig(Section):
    """Worlds × popularity × pre-training × fine-tuning, each over the same number of replicates."""

    name: Name
    theory: Literal["one-layer"]
    seed: int = Field(0, ge=0, lt=2**32)
    replicates: Annotated[int, Field(ge=2)] = Field(5, description="worlds drawn anew, of each setting")
    statements: bool = Field(True, description="check the paper's definitions and theorems too")
    worlds: Annotated[dict[Name, WorldOf], Field(min_length=1)]
    finetuning: dict[Name, Finetuning] = Field({}, description="ways of fine-tuning, by name")
    along: dict[Name, Pretraining] = Field({}, description="pre-trainings looked at on the way (fig. 6), in each world")

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name, world in self.worlds.items():
            try:
                world.make(world.zipf[0], self.seed)
            except BadInput as error:
                raise BadInput(str(error), field=f"worlds.{name}.{error.field}") from None
            if unknown := [way for way in world.finetuning or () if way not in self.finetuning]:
                raise ValueError(
                    f"worlds.{name}.finetuning: no way {unknown[0]!r}; there are {', '.join(self.finetuning)}"
                )
        if not self.finetuning and not self.along and not self.statements:
            raise ValueError("nothing is asked for: state 'finetuning', 'along' or 'statements'")
        return self

    def ways_of(self, world: str) -> list[str]:
        """The ways of fine-tuning in a world."""
        asked = self.worlds[world].finetuning
        return list(self.finetuning) if asked is None else asked

    @property
    def seeds(self) -> list[int]:
        """Of the replicates."""
        return [self.seed * 10_000 + number for number in range(self.replicates)]
