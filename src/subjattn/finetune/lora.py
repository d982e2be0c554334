"""Train a LoRA adapter on prompts with transformers' Trainer; the loss is on the answer's tokens alone.

Every example ends with the end-of-text token, so a tuned model stops after its answer. The seed fixes
the adapter's initial weights and the order of facts; on one machine a run repeats exactly. Training takes
one device, whatever there are, so that a batch has as many facts as it says; random numbers of the
process go on afterwards as if there had been none.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch.utils.data import DataLoader

from subjattn.errors import BadInput
from subjattn.finetune.record import Method
from subjattn.models import LoadedModel, quiet
from subjattn.prompts import Prompt


IGNORED = -100


class Training(BaseModel):
    """Hyper-parameters of an arm, the same for all arms of a study."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: PositiveFloat = Field(1, description="passes over the arm's facts")
    steps: PositiveInt | None = Field(None, description="optimiser steps, the same for arms of any size; over epochs")
    learning_rate: PositiveFloat = 5e-4
    weight_decay: float = Field(0.0, ge=0)
    batch_size: PositiveInt = 32
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt = 32

    def n_steps(self, n_facts: int) -> int:
        """Optimiser steps of a run."""
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(n_facts / self.batch_size)))


def batches(n_facts: int, batch_size: int, n_steps: int, seed: int) -> list[list[int]]:
    """Numbers of the facts of every step: epoch by epoch all of them, in an order by seed and epoch alone.

    The order is that of digests, so no library's random numbers are in it. An epoch's last batch may be smaller.
    """
    found: list[list[int]] = []
    epoch = 0
    while len(found) < n_steps:
        order = sorted(range(n_facts), key=lambda fact: _digest(seed, epoch, fact))
        found += [order[i : i + batch_size] for i in range(0, n_facts, batch_size)]
        epoch += 1
    return found[:n_steps]


def _digest(*numbers: int) -> bytes:
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()


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


def train_adapter(
    base: LoadedModel,
    prompts: Sequence[Prompt],
    training: Training,
    folder: Path,
    *,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train an adapter of `base` and save it, as safetensors, with the loss by step in `training.json`.

    Args:
        base: the model to adapt; it must carry no adapter, and must not be used afterwards.
        prompts: one example each, prompt and first accepted answer.
        training: hyper-parameters.
        folder: where peft's files go.
        seed: of initial weights and of the order of facts, each epoch's being another.
        on_step: called after every optimiser step.

    Raises:
        BadInput: no prompts, or a base that already carries an adapter.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    if not prompts:
        raise BadInput("there are no prompts to train on")
    if base.adapter is not None:
        raise BadInput(f"model {base.name!r} already carries the adapter {base.adapter!r}: train from its base")

    class Steps(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            on_step()

    class OneDevice(TrainingArguments):
        @property
        def n_gpu(self) -> int:
            return min(1, int(super().n_gpu))

    class Ordered(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(examples, batch_sampler=order, collate_fn=_collate)  # type: ignore[arg-type]

    examples = [_example(prompt, base.tokenizer.eos_token_id) for prompt in prompts]
    order = batches(len(prompts), training.batch_size, training.n_steps(len(prompts)), seed)
    with quiet(), _random_states_kept(), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=training.lora_rank,
            lora_alpha=training.lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base.model, config)
        config.base_model_name_or_path = base.name
        trainer = Ordered(
            model=model,
            args=OneDevice(
                output_dir=scratch,
                max_steps=len(order),
                per_device_train_batch_size=training.batch_size,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                seed=seed,
                use_cpu=base.model.device.type == "cpu",
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                log_level="error",
            ),
            train_dataset=examples,
            callbacks=[Steps()],
        )
        trainer.remove_callback(_printer())
        model.train()
        trainer.train()
        model.eval().save_pretrained(str(folder), save_embedding_layers=False)
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
    (folder / "training.json").write_text(
        json.dumps({"n_facts": len(prompts), "seed": seed, "losses": losses}, indent=1)
    )


def _printer() -> type:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _example(prompt: Prompt, eos: int | None) -> dict[str, list[int]]:
    ids = [*prompt.ids, *([] if eos is None else [eos])]
    start = prompt.prediction + 1
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(example["input_ids"]) for example in examples)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([example[key] + [fill] * (length - len(example[key])) for example in examples])

    ids = padded("input_ids", 0)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": padded("labels", IGNORED), "attention_mask": mask}


METHOD = Method(
    name="lora",
    settings=Training,
    train=train_adapter,
    n_steps=lambda settings, n_facts: settings.n_steps(n_facts),
    rows=lambda settings: settings.batch_size,
)
