"""What a training method is: a record, found as measures are (entry points of the group `subjattn.methods`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from subjattn.registry import discover, named


if TYPE_CHECKING:
    from subjattn.models import LoadedModel
    from subjattn.prompts import Prompt


class Train(Protocol):
    """Trains on prompts and saves what `load_model(adapter=…)` reads."""

    def __call__(
        self,
        base: LoadedModel,
        prompts: Sequence[Prompt],
        settings: Any,
        folder: Path,
        /,
        *,
        seed: int,
        on_step: Callable[[], None],
    ) -> None: ...


@dataclass(frozen=True)
class Method:
    """Everything about one way to train an arm.

    Attributes:
        name: in studies, as `training.method`.
        settings: a pydantic model: its fields stand beside `method` in a study.
        train: does it.
        n_steps: optimiser steps for so many facts.
        rows: prompts of one step, for time estimates.
        version: raised when it trains otherwise.
    """

    name: str
    settings: type[BaseModel]
    train: Train
    n_steps: Callable[[Any, int], int]
    rows: Callable[[Any], int]
    version: int = 1


def methods() -> dict[str, Method]:
    """All training methods by name."""
    return discover("subjattn.finetune", "METHOD", "subjattn.methods")


def method_of(name: str) -> Method:
    """One method; BadInput where there is none of that name."""
    return named(methods(), name, "training method")  # type: ignore[no-any-return]
