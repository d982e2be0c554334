"""transformers' Trainer with batches in an order of our own, stopping rules, and checkpoints that a kill cannot tear.

Training takes one device of a process, whatever there are; several processes share out each batch, so that a step is
the same on any number of them. A run that goes on from a checkpoint ends with the bits of one that was never killed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from subjattn.errors import TrainingDiverged
from subjattn.finetune import checkpoints
from subjattn.finetune.examples import IGNORED, Example, batches, collate, share_of
from subjattn.finetune.fit import BEST, kept_weights
from subjattn.finetune.record import Extra, Lessons
from subjattn.finetune.settings import Training
from subjattn.finetune.stopping import Log, best_step, reason_to_stop
from subjattn.finetune.update import Update
from subjattn.run.folder import replacing


SAVE_EVERY = 300.0
"""Seconds between two checkpoints to go on from, or twenty times what one takes where that is more."""
_WEIGHTS = "weights.safetensors"


def run(update: Update, lessons: Lessons, settings: Training, kept: Path, extra: Extra | None) -> Log:
    """Train a model's weights in place, from the newest checkpoint in `kept` if there is one."""
    n_steps = settings.n_steps(len(lessons.examples))
    order = batches(lessons.examples, settings.batch_size, n_steps, lessons.seed, settings.known)
    trainer = _Trainer(update, lessons, settings, order, kept, extra)
    trainer.remove_callback(PrinterCallback)
    found = checkpoints.newest(kept) if trainer.args.world_size == 1 else None
    update.model.train()
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    update.model.eval()
    return trainer.read_log()


class _OneDevice(TrainingArguments):
    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))


class _Trainer(Trainer):
    """Trainer with our order of batches, our loss, our checkpoints."""

    def __init__(
        self,
        update: Update,
        lessons: Lessons,
        settings: Training,
        order: list[list[int]],
        kept: Path,
        extra: Extra | None,
    ) -> None:
        self.update, self.lessons, self.settings = update, lessons, settings
        self.order, self.kept, self.extra = order, kept, extra
        self._parts: dict[str, float] = {}
        self._saved_at, self._saving_took = time.monotonic(), 0.0
        super().__init__(
            model=update.model,
            args=_OneDevice(
                output_dir=str(kept),
                max_steps=len(order),
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                seed=lessons.seed,
                use_cpu=update.base.model.device.type == "cpu",
                save_strategy="no",
                logging_steps=1,
                logging_nan_inf_filter=False,
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                log_level="error",
            ),
            train_dataset=list(lessons.examples),  # type: ignore[arg-type]
            callbacks=[_EachStep(self)],
        )

    def get_train_dataloader(self) -> DataLoader:
        rank, n_processes = self.args.process_index, self.args.world_size

        def made(examples: Sequence[Example]) -> dict[str, Tensor]:
            return share_of(collate(examples), rank, n_processes)

        return DataLoader(list(self.lessons.examples), batch_sampler=self.order, collate_fn=made)  # type: ignore[arg-type]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.extra is not None:
            self._parts["answer_loss"] = float(loss.detach())
            loss = loss + self.extra(inputs, outputs.logits, self.state.global_step)
        if not torch.isfinite(loss):
            why = f"the loss of step {self.state.global_step + 1} is {float(loss)}"
            raise TrainingDiverged(
                f"training diverged: {why}: lower learning_rate (now {self.settings.learning_rate:g})"
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | (self._parts if "loss" in logs else {}), start_time)

    def read_log(self) -> Log:
        """What was logged so far, of steps before a kill too."""
        per_epoch = self.settings.steps_of_epoch(len(self.lessons.examples))
        return Log.read(self.state.log_history, per_epoch, self.settings)

    @torch.inference_mode()
    def validation_loss(self) -> float:
        """Nats a token over the validation facts."""
        total, tokens, model = 0.0, 0, self.update.model
        model.eval()
        examples = sorted(self.lessons.validation, key=lambda one: len(one.ids))
        for at in range(0, len(examples), self.settings.batch_size):
            batch = self._prepare_inputs(collate(examples[at : at + self.settings.batch_size]))  # type: ignore[arg-type]
            labels = batch["labels"][:, 1:]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            tokens += int((labels != IGNORED).sum())
        model.train()
        return total / tokens

    def is_time_to_save(self) -> bool:
        """Whether a kill would lose more than a checkpoint costs."""
        return (
            time.monotonic() - self._saved_at >= max(SAVE_EVERY, 20 * self._saving_took) and self.args.world_size == 1
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        begun = time.monotonic()
        with checkpoints.writing(self.kept, self.state.global_step) as folder:
            self._folder = folder
            super()._save_checkpoint(model, trial)
            written = folder / f"checkpoint-{self.state.global_step}"
            for path in written.iterdir():
                path.rename(folder / path.name)
            written.rmdir()
        self._saved_at, self._saving_took = time.monotonic(), time.monotonic() - begun

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002
        return str(getattr(self, "_folder", self.kept))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        target = Path(output_dir or self.kept)
        target.mkdir(parents=True, exist_ok=True)
        self.update.write(target / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self.update.put(self.update.read(Path(resume_from_checkpoint) / _WEIGHTS))


class _EachStep(TrainerCallback):
    """After each step: weights to keep, validation, whether to stop, a checkpoint where it is time."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.trainer.lessons.on_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        trainer = self.trainer
        settings, step = trainer.settings, state.global_step
        if "loss" not in (logs or {}):
            return
        if step in settings.kept(state.max_steps):
            self._write(kept_weights(step))
        per_epoch = settings.steps_of_epoch(len(trainer.lessons.examples))
        if settings.stop != "end" and (step % per_epoch == 0 or step == state.max_steps):
            if settings.stop == "validation":
                state.log_history.append({"step": step, "validation_loss": trainer.validation_loss()})
                if best_step(trainer.read_log().validation) == step:
                    self._write(BEST)
            control.should_training_stop |= reason_to_stop(trainer.read_log(), settings) is not None
        control.should_save = trainer.is_time_to_save()

    def _write(self, name: str) -> None:
        with replacing(self.trainer.kept / name) as path:
            self.trainer.update.write(path)
