"""Train a model on an arm's facts, and save what the rest of this package loads.

The loss is on the answer's tokens alone (see examples.py), a mean over those of a batch; a method may add to it. The
seed fixes initial weights and the order of facts; on one device a run repeats exactly, killed or not. Random numbers of
the process go on afterwards as if there had been none.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from subjattn.errors import BadInput, TrainingDiverged
from subjattn.finetune.record import Extra, Lessons
from subjattn.finetune.settings import Training
from subjattn.finetune.stopping import Log, diverged
from subjattn.finetune.update import Update
from subjattn.models import LoadedModel, quiet


BEST = "best.safetensors"
"""Weights of the lowest validation loss, in the folder that outlives a kill."""


def kept_weights(step: int) -> str:
    """Weights of a step that is kept, in that folder."""
    return f"step-{step}.safetensors"


def fit(
    base: LoadedModel,
    lessons: Lessons,
    settings: Training,
    folder: Path,
    objective: Callable[[Update, Lessons, Path], Extra] | None = None,
) -> None:
    """Train on examples and save what `load_model` reads, with losses by step in `training.json`.

    Args:
        base: the model to tune; it must carry no adapter, and must not be used afterwards.
        lessons: what to train on.
        settings: hyper-parameters.
        folder: where the adapter or checkpoint goes; weights of earlier steps go to `steps/N` in it.
        objective: makes what a method adds to the loss, of the model, the lessons, and a folder that outlives a kill.

    Raises:
        BadInput: no examples, a base that carries an adapter, no validation facts where training is to stop by them.
        TrainingDiverged: a loss that is no number, or ends well above where it began.
    """
    if base.adapter is not None:
        raise BadInput(f"model {base.name!r} already carries the adapter {base.adapter!r}: train from its base")
    if not lessons.examples:
        raise BadInput("there are no prompts to train on")
    if settings.stop == "validation" and not lessons.validation:
        raise BadInput("stop: validation needs validation facts, and there are none")
    with quiet(), _random_states_kept(), _kept(lessons.kept if is_first_process() else None) as kept:
        torch.manual_seed(lessons.seed)
        update = Update(base, settings)
        extra = None if objective is None else objective(update, lessons, kept)
        log = train(update, lessons, settings, kept, extra)
        if not is_first_process():
            return
        for step in settings.kept(log.n_steps):
            with update.being(update.read(kept / kept_weights(step))):
                update.save(folder / "steps" / str(step))
        update.save(folder)
    said = log.to_dict() | {"n_facts": len(lessons.examples), "seed": lessons.seed}
    (folder / "training.json").write_text(json.dumps(said, indent=1))


def is_first_process() -> bool:
    """Whether this process is the one of several, as torchrun and accelerate start them, that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def leave_as_it_is(base: LoadedModel, settings: Training, folder: Path) -> None:
    """Save what `fit` saves, of a model that is taught nothing: a control for all that is not teaching."""
    with quiet(), _random_states_kept():
        torch.manual_seed(0)
        Update(base, settings).save(folder)
    (folder / "training.json").write_text(json.dumps({"losses": [], "n_facts": 0}, indent=1))


def train(update: Update, lessons: Lessons, settings: Training, kept: Path, extra: Extra | None = None) -> Log:
    """Train a model's weights in place; `fit` without the saving.

    Raises:
        TrainingDiverged: as `fit`.
    """
    from subjattn.finetune.trainer import run

    log = run(update, lessons, settings, kept, extra)
    if why := diverged(log.losses):
        raise TrainingDiverged(f"training diverged: {why}: lower learning_rate (now {settings.learning_rate:g})")
    if settings.stop == "validation":
        update.put(update.read(kept / BEST))
    return log


@contextmanager
def _kept(folder: Path | None) -> Iterator[Path]:
    """The folder that outlives a kill, or one for this process."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The process's random numbers, of Python, numpy and torch, go on afterwards where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
