"""Fine-tuning whose attention outputs on known facts are held to the base's, by their divergence.

After Dang et al. (2025), who add the divergence of the attention modules' outputs with weight 25. What makes a
distribution of an output is not stated there: here a softmax over its features.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from subjattn.engine.anatomy import decoder_layers, on_component
from subjattn.errors import BadInput
from subjattn.finetune.examples import collate
from subjattn.finetune.fit import fit
from subjattn.finetune.record import Lessons, Method
from subjattn.finetune.settings import Training
from subjattn.finetune.update import Update
from subjattn.models import LoadedModel


class AttentionKLTraining(Training):
    """Hyper-parameters, and how much the attention outputs are held."""

    kl_weight: PositiveFloat = Field(25.0, description="of the divergence from the base's attention outputs")
    kl_batch: PositiveInt = Field(8, description="known facts in a step")


def train(base: LoadedModel, lessons: Lessons, settings: AttentionKLTraining, folder: Path, /) -> None:
    """Train on answers, attention outputs on known facts held to the base's."""
    if not lessons.known:
        raise BadInput("attention_kl holds attention on known facts, and there are none")

    def objective(update: Update, lessons: Lessons, _kept: Path) -> Divergence:
        return Divergence(update, lessons, settings)

    fit(base, lessons, settings, folder, objective)


class Divergence:
    """KL(base ‖ tuned) of every layer's attention output on known facts, mean over layers and tokens, in nats."""

    def __init__(self, update: Update, lessons: Lessons, settings: AttentionKLTraining) -> None:
        self.update, self.known, self.settings = update, lessons.known, settings
        self.before = update.state()

    def __call__(self, batch: dict[str, Tensor], logits: Tensor, step: int) -> Tensor:  # noqa: ARG002
        n = self.settings.kl_batch
        some = collate([self.known[i % len(self.known)] for i in range(step * n, (step + 1) * n)])
        ids, mask = (some[name].to(logits.device) for name in ("input_ids", "attention_mask"))
        with self.update.being(self.before):
            theirs = self._outputs(ids, mask)
        ours = self._outputs(ids, mask)
        counted = mask.bool()
        each = [
            torch.nn.functional.kl_div(own[counted], base[counted], log_target=True, reduction="sum") / counted.sum()
            for own, base in zip(ours, theirs, strict=True)
        ]
        return self.settings.kl_weight * torch.stack(each).mean()

    def _outputs(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Of every layer, the attention output as log-probabilities over features."""
        found: dict[int, Tensor] = {}

        def keep(layer: int, state: Tensor) -> None:
            found[layer] = state.float().log_softmax(-1)

        with ExitStack() as stack:
            for i, layer in enumerate(decoder_layers(self.update.base.model)):
                stack.enter_context(on_component("attn_out", layer, partial(keep, i)))
            self.update.model(input_ids=ids, attention_mask=mask)
        return [found[i] for i in sorted(found)]


METHOD = Method(
    name="attention_kl",
    title="attention outputs on known facts held to the base's",
    settings=AttentionKLTraining,
    train=train,
    paper="after Dang et al. 2025",
    needs=frozenset({"known"}),
    effort=lambda settings: 1 + 1.3 * settings.kl_batch / settings.batch_size,
)
