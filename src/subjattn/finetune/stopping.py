"""When training ends: rules over the losses logged so far, so that a kill does not change where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from subjattn.finetune.settings import Training


HUNDREDTH = 0.01
"""Of the first epoch's loss: an epoch that falls by less does not count as falling."""
ABOVE = 1.0
"""Nats that a run may end above its first step's loss before it counts as diverged."""
LAST = 8
"""Steps that a run's end is judged by."""


@dataclass(frozen=True)
class Log:
    """Losses of a run.

    Attributes:
        losses: of each step in nats a token, what a method adds included.
        validation: loss over validation facts by step, where it was looked at.
        per_epoch: steps of an epoch.
        stopped: why training ended before its last step, if it did.
        parts: further losses by step, of methods that add to the answers'.
    """

    losses: list[float]
    validation: dict[int, float]
    per_epoch: int
    stopped: str | None = None
    parts: tuple[dict[str, float], ...] = ()

    @classmethod
    def read(cls, history: Sequence[dict[str, Any]], per_epoch: int, settings: Training) -> Self:
        """From what Trainer logged."""
        steps = [entry for entry in history if "loss" in entry]
        parts = tuple({"answer_loss": entry["answer_loss"]} for entry in steps if "answer_loss" in entry)
        losses = [float(entry["loss"]) for entry in steps]
        validation = {int(one["step"]): float(one["validation_loss"]) for one in history if "validation_loss" in one}
        log = cls(losses, validation, per_epoch, parts=parts)
        return cls(losses, validation, per_epoch, reason_to_stop(log, settings), parts)

    @property
    def n_steps(self) -> int:
        return len(self.losses)

    @property
    def epochs(self) -> list[float]:
        """Mean loss of every whole epoch."""
        whole = len(self.losses) // self.per_epoch
        return [float(np.mean(self.losses[i * self.per_epoch : (i + 1) * self.per_epoch])) for i in range(whole)]

    def to_dict(self) -> dict[str, Any]:
        """As `training.json` holds it."""
        parts = self.parts or ({},) * len(self.losses)
        found: dict[str, Any] = {
            "losses": [
                {"step": i + 1, "loss": loss, **own}
                for i, (loss, own) in enumerate(zip(self.losses, parts, strict=True))
            ],
            "stopped": self.stopped,
        }
        if self.validation:
            losses = [{"step": step, "loss": loss} for step, loss in self.validation.items()]
            found |= {"validation": losses, "best_step": best_step(self.validation)}
        return found


def reason_to_stop(log: Log, settings: Training) -> str | None:
    """Why training stops after the last step of the log, as the settings have it."""
    epochs, patience = log.epochs, settings.patience
    if settings.stop == "loss" and epochs and settings.target_loss is not None and epochs[-1] <= settings.target_loss:
        return f"the loss of epoch {len(epochs)} was {epochs[-1]:.3g}, at most {settings.target_loss:g}"
    if settings.stop == "validation" and log.validation:
        looked = list(log.validation)
        since = len(looked) - 1 - looked.index(best_step(log.validation))
        if since >= patience:
            return f"the validation loss was least at step {best_step(log.validation)}, {patience} epochs before"
    if settings.stop == "convergence" and len(epochs) > patience:
        before, since_then = min(epochs[:-patience]), min(epochs[-patience:])
        if before - since_then < HUNDREDTH * epochs[0]:
            return f"the loss has not fallen for {patience} epochs"
    return None


def best_step(validation: dict[int, float]) -> int:
    """The first step of the least validation loss."""
    return min(validation, key=lambda step: (validation[step], step))


def diverged(losses: Sequence[float]) -> str | None:
    """Why a run's losses are no training: they end well above where they began."""
    end = float(np.mean(losses[-LAST:]))
    if len(losses) > 1 and end > losses[0] + ABOVE:
        return f"the loss ended at {end:.3g} nats a token, from {losses[0]:.3g} before the first step"
    return None
