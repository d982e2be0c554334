"""Train a LoRA adapter on prompts with transformers' Trainer; the loss is on the answer's tokens alone.

Every example ends with the end-of-text token, so a tuned model stops after its answer. The seed fixes
the adapter's initial weights and the order of facts; on one machine a run repeats exactly.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from subjattn.errors import BadInput
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
        seed: of initial weights and order.
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

    with quiet(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
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
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=training.epochs,
                max_steps=training.n_steps(len(prompts)),
                per_device_train_batch_size=training.batch_size,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                seed=seed,
                use_cpu=base.model.device.type == "cpu",
                save_strategy="no",
                logging_steps=1,
                train_sampling_strategy="group_by_length",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                log_level="error",
            ),
            train_dataset=[_example(prompt, base.tokenizer.eos_token_id) for prompt in prompts],
            data_collator=_collate,
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
