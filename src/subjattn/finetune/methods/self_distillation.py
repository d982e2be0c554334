"""Self-distillation: nearness to a teacher, the same model trained on known facts for an epoch.

After Kaplan et al. (2604.15574), temperature 0.5 and weight 1; the teacher's epoch has the student's settings.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from subjattn.errors import BadInput
from subjattn.finetune.examples import IGNORED
from subjattn.finetune.fit import fit, train
from subjattn.finetune.record import Lessons, Method
from subjattn.finetune.settings import Training
from subjattn.finetune.update import Update
from subjattn.models import LoadedModel
from subjattn.run.folder import replacing


class DistillationTraining(Training):
    """Hyper-parameters, and how near the teacher is kept."""

    distillation_weight: PositiveFloat = Field(1.0, description="of the divergence from the teacher")
    temperature: PositiveFloat = Field(0.5, description="of both distributions in it")


def train_distilled(base: LoadedModel, lessons: Lessons, settings: DistillationTraining, folder: Path, /) -> None:
    """Train the teacher, then the student."""
    if not lessons.known:
        raise BadInput("self_distillation trains its teacher on known facts, and there are none")

    def objective(update: Update, lessons: Lessons, kept: Path) -> Teacher:
        file, before = kept / "teacher.safetensors", update.state()
        if not file.is_file():
            alone = Training(**_shared(settings) | {"epochs": 1, "steps": None, "stop": "end", "checkpoints": ()})
            train(update, Lessons(lessons.known, seed=lessons.seed, kept=None), alone, kept / "teacher")
            with replacing(file) as path:
                update.write(path)
            update.put(before)
        return Teacher(update, update.read(file), settings)

    fit(base, lessons, settings, folder, objective)


def _shared(settings: DistillationTraining) -> dict[str, object]:
    """The settings that plain training has too, but those that say when it stops."""
    own = settings.model_dump(exclude_unset=True)
    return {name: of for name, of in own.items() if name in Training.model_fields and name not in ("target_loss",)}


class Teacher:
    """KL(teacher ‖ student) of the next token at the positions of the answers, mean over them, in nats."""

    def __init__(self, update: Update, state: dict[str, Tensor], settings: DistillationTraining) -> None:
        self.update, self.state, self.settings = update, state, settings

    def __call__(self, batch: dict[str, Tensor], logits: Tensor, step: int) -> Tensor:  # noqa: ARG002
        tau, at = self.settings.temperature, batch["labels"][:, 1:] != IGNORED
        with self.update.being(self.state):
            taught = self.update.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        theirs, ours = ((of[:, :-1][at].float() / tau).log_softmax(-1) for of in (taught, logits))
        divergence = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum") / at.sum()
        return self.settings.distillation_weight * divergence


METHOD = Method(
    name="self_distillation",
    title="nearness to a teacher trained on known facts for an epoch",
    settings=DistillationTraining,
    train=train_distilled,
    paper="after Kaplan et al., arXiv:2604.15574",
    needs=frozenset({"known"}),
    effort=lambda _: 1.4,
)
