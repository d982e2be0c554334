"""Time training against a bare peft and AdamW loop on the same batches."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from subjattn.bench import REPEATS
from subjattn.finetune.examples import Example, batches, collate
from subjattn.finetune.fit import train
from subjattn.finetune.record import Lessons
from subjattn.finetune.settings import Training
from subjattn.finetune.update import Update
from subjattn.models import load_model
from subjattn.prompts import Prompt


STEPS = 8
"""Of a repeat."""


def time_training(base: str, prompts: Sequence[Prompt], dtype: str = "float32") -> dict[str, Any]:
    """A plain LoRA of rank 16 trained by `fit` and by a bare loop, in turn, from the same weights on the same batches.

    Args:
        base: as for `load_model`.
        prompts: facts to train on.
        dtype: of the weights.

    Returns:
        `seconds` (medians of the repeats); `throughput`, the share of a bare loop's speed that `fit` makes (the
        median of the repeats' own); and `max_abs_diff` of the losses.
    """
    settings, examples = Training(steps=STEPS), [Example(prompt) for prompt in prompts]
    order = batches(examples, settings.batch_size, STEPS, 0)
    updates = {name: Update(load_model(base, dtype=dtype), settings) for name in ("fit", "loop")}
    start = updates["fit"].state()
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    losses: dict[str, list[float]] = {}
    for repeat in range(REPEATS + 1):
        for name, update in updates.items():
            update.put(start)
            with tempfile.TemporaryDirectory() as kept:
                began = time.perf_counter()
                if name == "fit":
                    losses[name] = train(update, Lessons(examples), settings, Path(kept)).losses
                else:
                    losses[name] = _loop(update, examples, order, settings)
                if repeat:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
    shares = [loop / own for own, loop in zip(seconds["fit"], seconds["loop"], strict=True)]
    return {
        "grid": "training",
        "facts": len(examples),
        "steps": STEPS,
        "seconds": {name: statistics.median(its) for name, its in seconds.items()},
        "throughput": statistics.median(shares),
        "throughputs": shares,
        "max_abs_diff": max(abs(a - b) for a, b in zip(losses["fit"], losses["loop"], strict=True)),
    }


def _loop(update: Update, examples: Sequence[Example], order: list[list[int]], settings: Training) -> list[float]:
    """The least that trains: forward, backward, clipped gradient, AdamW, a learning rate that falls to 0."""
    model, tensors = update.model, [*update.tensors.values()]
    optimizer = torch.optim.AdamW(tensors, settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(order))
    losses = []
    model.train()
    for numbers in order:
        batch = {name: of.to(update.base.model.device) for name, of in collate([examples[i] for i in numbers]).items()}
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
