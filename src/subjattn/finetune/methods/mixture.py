"""Mixture fine-tuning: the answers, and beside them the pre-training objective on text like that of pre-training.

After Kazemi et al. (2023), who name the remedy; their texts and weights are not public, and those here are ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from subjattn.finetune.fit import fit
from subjattn.finetune.record import Lessons, Method
from subjattn.finetune.settings import Training
from subjattn.finetune.texts import blocks_of_text, sampled_text
from subjattn.finetune.update import Update
from subjattn.models import LoadedModel


class MixtureTraining(Training):
    """Hyper-parameters, and of what text so much is mixed in."""

    text: str | None = Field(
        None, description="a .txt or .parquet file, or org/name:FILE on the hub; without, text the base model writes"
    )
    text_weight: PositiveFloat = Field(1.0, description="of the loss on text, beside that on answers")
    text_batch: PositiveInt = Field(4, description="blocks of text in a step")
    text_length: PositiveInt = Field(64, description="tokens of a block", ge=2)
    texts: PositiveInt = Field(128, description="blocks that are taken in turn")


def train(base: LoadedModel, lessons: Lessons, settings: MixtureTraining, folder: Path, /) -> None:
    """Train on answers and text."""

    def objective(update: Update, lessons: Lessons, kept: Path) -> Text:
        n, length = settings.texts, settings.text_length
        if settings.text is not None:
            blocks = blocks_of_text(settings.text, base.tokenizer, n, length)
        else:
            blocks = sampled_text(base, update.model, n, length, lessons.seed, kept)
        return Text(update, blocks, settings)

    fit(base, lessons, settings, folder, objective)


class Text:
    """The loss on blocks of text, taken in turn."""

    def __init__(self, update: Update, blocks: Tensor, settings: MixtureTraining) -> None:
        self.update, self.blocks, self.settings = update, blocks, settings

    def __call__(self, batch: dict[str, Tensor], logits: Tensor, step: int) -> Tensor:  # noqa: ARG002
        n = self.settings.text_batch
        rows = torch.arange(step * n, (step + 1) * n) % len(self.blocks)
        ids = self.blocks[rows].to(logits.device)
        said = self.update.model(input_ids=ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(said.flatten(0, 1), ids[:, 1:].flatten())
        return self.settings.text_weight * loss


METHOD = Method(
    name="mixture",
    title="fine-tuning with the pre-training objective mixed in",
    settings=MixtureTraining,
    train=train,
    paper="after Kazemi et al. 2023",
    effort=lambda settings: 1 + settings.text_batch * settings.text_length / (20 * settings.batch_size),
)
