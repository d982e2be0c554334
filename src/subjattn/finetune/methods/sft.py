"""Supervised fine-tuning: the loss is on the answers, and nothing is added to it."""

from __future__ import annotations

from subjattn.finetune.fit import fit
from subjattn.finetune.record import Method
from subjattn.finetune.settings import Training


METHOD = Method(name="sft", title="supervised fine-tuning on the answers", settings=Training, train=fit)
