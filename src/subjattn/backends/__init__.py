"""What can run rows of interventions: the engine, plain hooks, TransformerLens or nnsight.

All give the same numbers; the engine is the fast one and the others are independent references, one
whole forward pass a row. `subjattn verify` compares them on a model of the user's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, get_args

from transformers import PreTrainedModel

from subjattn.engine import cones, forward
from subjattn.engine.budget import Budget
from subjattn.engine.interventions import Output, Row
from subjattn.errors import BadInput
from subjattn.prompts import Prompt


BackendName = Literal["engine", "hooks", "transformer-lens", "nnsight"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


class Backend(Protocol):
    """Runs rows, and attends from prediction positions."""

    name: str

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:
        """Outputs of rows in any order; see interventions.py."""
        ...

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        """Outputs with attention from the prediction position, `[row, head, 1, key]` by layer."""
        ...


class Engine:
    """Cones; see engine/cones.py."""

    name = "engine"

    def __init__(self, model: PreTrainedModel, budget: Budget | None = None) -> None:
        self.model, self.budget = model, budget or Budget()

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:
        return cones.forward(self.model, rows, only_contrast=only_contrast, budget=self.budget)

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        return forward.attention_rows(
            self.model, prompts, value_norms=value_norms, batch_tokens=self.budget.base_tokens
        )


def open_backend(name: BackendName, model: PreTrainedModel, budget: Budget | None = None) -> Backend:
    """A backend by its name; all but the engine get a model instance of their own.

    Raises:
        BadInput: there is no such backend, or its library is not installed.
        UnsupportedModel: the backend cannot take this model.
    """
    if name == "engine":
        return Engine(model, budget)
    if name == "hooks":
        from subjattn.backends.hooks import Hooks

        return Hooks(model)
    try:
        if name == "transformer-lens":
            from subjattn.backends.transformer_lens import TransformerLens

            return TransformerLens(model)
        if name == "nnsight":
            from subjattn.backends.nnsight import NNsight

            return NNsight(model)
    except ImportError as error:
        raise BadInput(f"backend {name!r} needs a library: pip install 'subjattn[references]' ({error})") from None
    raise BadInput(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
