"""What a training method is: a record, found as measures are (entry points of the group `subjattn.methods`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from subjattn.finetune.settings import Training
from subjattn.registry import discover, named


if TYPE_CHECKING:
    from torch import Tensor

    from subjattn.finetune.examples import Example
    from subjattn.models import LoadedModel

Need = Literal["known"]
"""`known`: the facts of the arm `known` of the same draw, beside those trained on."""


@dataclass(frozen=True)
class Lessons:
    """What an arm is trained on.

    Attributes:
        examples: a fact each, prompt and first accepted answer.
        known: facts that the model knows, for methods that need them.
        validation: facts on which training may be judged; none of them is trained on or tested.
        seed: of initial weights and of the order of facts, each epoch's being another.
        kept: a folder that outlives the process, so that a killed training goes on; None: it begins anew.
        on_step: called after every optimiser step.
    """

    examples: Sequence[Example]
    known: Sequence[Example] = ()
    validation: Sequence[Example] = ()
    seed: int = 0
    kept: Path | None = None
    on_step: Callable[[], None] = field(default=lambda: None)


class Extra(Protocol):
    """What a method adds to the loss of a step."""

    def __call__(self, batch: dict[str, Tensor], logits: Tensor, step: int) -> Tensor:
        """A scalar, in nats; `step` counts from 0."""
        ...


class Train(Protocol):
    """Trains and saves what `load_model` reads: an adapter, or a whole model."""

    def __call__(self, base: LoadedModel, lessons: Lessons, settings: Any, folder: Path, /) -> None: ...


@dataclass(frozen=True)
class Method:
    """Everything about one way to train an arm.

    Attributes:
        name: in studies, as `training.method`, and on the command line.
        title: for a reader, in a few words.
        settings: a `Training`, or a model with more fields: they stand beside `method` in a study.
        train: does it.
        paper: where it comes from.
        needs: without which it cannot train.
        effort: what a step takes, in steps of plain training on as many facts.
        version: raised when it trains otherwise.
    """

    name: str
    title: str
    settings: type[Training]
    train: Train
    paper: str = ""
    needs: frozenset[Need] = frozenset()
    effort: Callable[[Any], float] = field(default=lambda _settings: 1.0)
    version: int = 1


def methods() -> dict[str, Method]:
    """All training methods by name."""
    return discover("subjattn.finetune.methods", "METHOD", "subjattn.methods")


def method_of(name: str) -> Method:
    """One method; BadInput where there is none of that name."""
    return named(methods(), name, "training method")  # type: ignore[no-any-return]
