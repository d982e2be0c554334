"""Hyper-parameters that all training methods share: what is trained, on what batches, how fast and how long."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator


LORA = ("lora_rank", "lora_alpha", "lora_dropout", "four_bit")
"""Fields of low-rank adapters, which full fine-tuning does not have."""


class Training(BaseModel):
    """Hyper-parameters of an arm.

    The grid of Ghosal et al. (2024, table 4) is of `learning_rate`, `weight_decay`, `lora_rank` (with twice the rank as
    `lora_alpha`) and `weights`; they do not state the rest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: PositiveFloat = Field(1, description="passes over the arm's facts")
    steps: PositiveInt | None = Field(None, description="optimiser steps, the same for arms of any size; over epochs")
    stop: Literal["end", "validation", "loss", "convergence"] = Field(
        "end",
        description="`end`: after these epochs or steps. Or earlier, looked at after each epoch: `validation`, when "
        "the loss on validation facts has not fallen for `patience` epochs (the weights of the lowest are kept); "
        "`loss`, when an epoch's mean loss is `target_loss` or less; `convergence`, when an epoch's mean loss has not "
        "fallen by a hundredth of the first's for `patience` epochs",
    )
    patience: PositiveInt = Field(2, description="epochs, of `validation` and `convergence`")
    target_loss: PositiveFloat | None = Field(
        None, description="nats a token, of `loss`: the same for arms of any kind"
    )
    checkpoints: Literal["log"] | tuple[PositiveInt, ...] = Field(
        (), description="steps whose weights are kept too, such as [1, 2, 4, 8]; `log`: the powers of 2"
    )
    learning_rate: PositiveFloat = Field(5e-4, description="of AdamW, falling linearly to 0 over the longest run")
    weight_decay: float = Field(0.0, ge=0)
    batch_size: PositiveInt = 32
    known: Literal["mixed", "first", "last"] = Field(
        "mixed",
        description="where known facts stand in an epoch; 5 to 20 % of them last: KnownPatch (Dang et al. 2025)",
    )
    weights: Literal["lora", "full"] = Field("lora", description="a low-rank adapter, or the weights themselves")
    modules: Literal["all", "attention", "qk", "vo", "mlp"] = Field("all", description="which matrices are trained")
    layers: str | None = Field(None, description="only these, such as 8-15 or 0,2,4")
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt | None = Field(None, description="twice the rank, where it is not given")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    four_bit: bool = Field(False, description="over a base in 4 bits, by bitsandbytes (QLoRA)")

    @field_validator("checkpoints")
    @classmethod
    def _in_order(cls, value: Any) -> Any:
        return value if value == "log" else tuple(sorted(set(value)))

    @field_validator("layers", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = ",".join(map(str, value))
        return str(value) if layer_numbers(value) else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.stop == "loss") != (self.target_loss is not None):
            raise ValueError("'target_loss' goes with stop: loss, and with nothing else")
        if self.steps and self.checkpoints not in ("log", ()) and int(self.checkpoints[-1]) > self.steps:
            raise ValueError(f"checkpoints: step {self.checkpoints[-1]} is beyond the last, {self.steps}")
        if self.weights == "full":
            for name in LORA:  # settings that change nothing do not make another arm
                object.__setattr__(self, name, type(self).model_fields[name].default)
        return self

    @property
    def alpha(self) -> int:
        """LoRA's alpha: twice the rank, where it is not given."""
        return self.lora_alpha or 2 * self.lora_rank

    def n_steps(self, n_facts: int) -> int:
        """Optimiser steps of a run, at most."""
        return self.steps or max(1, math.ceil(self.epochs * self.steps_of_epoch(n_facts)))

    def steps_of_epoch(self, n_facts: int) -> int:
        """Optimiser steps in which each fact is seen once."""
        return math.ceil(n_facts / self.batch_size)

    def kept(self, n_steps: int) -> tuple[int, ...]:
        """Steps of a run whose weights are kept beside the last's."""
        asked = [2**power for power in range(n_steps.bit_length())] if self.checkpoints == "log" else self.checkpoints
        return tuple(int(step) for step in asked if int(step) < n_steps)


def layer_numbers(text: str | int | None) -> tuple[int, ...]:
    """Layers from a text such as `8-15` or `0,2,4`; none where there is none.

    Raises:
        ValueError: the text is no such list.
    """
    numbers: list[int] = []
    for part in filter(None, str("" if text is None else text).replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise ValueError(f"layers {text!r} cannot be read: write 8-15, or 0,2,4")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(numbers)))
