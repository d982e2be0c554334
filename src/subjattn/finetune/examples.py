"""What is trained on: facts with their answers as tokens, and which of them make each batch."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from torch import Tensor

from subjattn.prompts import Prompt, Style, make_prompts
from subjattn.prompts.chat import behind_answer


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""A label that no loss is taken of."""
ALIKE = 8
"""Batches whose facts are sorted by length together, so that little is padded."""


@dataclass(frozen=True)
class Example:
    """One fact to train on; the loss is on the answer and on what ends it.

    Attributes:
        prompt: with its first accepted answer.
        end: tokens behind the answer, which a tuned model is to stop with.
        known: whether it counts as known, for arms of both kinds.
    """

    prompt: Prompt
    end: tuple[int, ...] = ()
    known: bool = False

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.ids, *self.end]

    @property
    def labels(self) -> list[int]:
        start = self.prompt.prediction + 1
        return [IGNORED] * start + self.ids[start:]


def make_examples(facts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, styles: Sequence[Style]) -> list[Example]:
    """One example a fact; which of the styles asks it depends on the fact alone.

    Facts of the upper third of their ranking (column `third`) count as known.
    """
    asked = [make_prompts(facts, tokenizer, style) for style in styles]
    ends = [end_of_answer(tokenizer, style) for style in styles]
    known = (facts["third"] == "top").tolist() if "third" in facts else [False] * len(facts)
    turns = [zlib.crc32(str(fact_id).encode()) % len(styles) for fact_id in facts["fact_id"]]
    return [Example(asked[turn][i], ends[turn], known[i]) for i, turn in enumerate(turns)]


def end_of_answer(tokenizer: PreTrainedTokenizerBase, style: Style) -> tuple[int, ...]:
    """What a tuned model is to stop with: the end of the text; in a chat, what its template puts behind an answer."""
    eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if not style.chat:
        return eos
    behind = tokenizer(behind_answer(tokenizer, style), add_special_tokens=False).input_ids
    special = [i for i, token in enumerate(behind) if token in tokenizer.all_special_ids]
    return tuple(behind[: special[0] + 1]) if special else eos


def batches(
    examples: Sequence[Example],
    batch_size: int,
    n_steps: int,
    seed: int,
    known: Literal["mixed", "first", "last"] = "mixed",
) -> list[list[int]]:
    """Numbers of the examples of every step: epoch by epoch all of them, those alike in length together.

    An epoch's order goes by digests of seed and epoch, so no library's random numbers are in it: examples are put in
    a random order, sorted by length within every `ALIKE` batches, and the batches put in a random order again. With
    `known` first or last, known examples come before or after all others of their epoch. Its last batch may be smaller.
    """
    found: list[list[int]] = []
    epoch = 0
    while len(found) < n_steps:
        order = sorted(range(len(examples)), key=lambda i: _digest("example", seed, epoch, i))
        if known != "mixed":
            order.sort(key=lambda i: examples[i].known == (known == "last"))
        found += list(_of_epoch(order, examples, batch_size, seed, epoch, keep=known != "mixed"))
        epoch += 1
    return found[:n_steps]


def _of_epoch(
    order: list[int], examples: Sequence[Example], batch_size: int, seed: int, epoch: int, *, keep: bool
) -> Iterator[list[int]]:
    """An epoch's batches; to `keep` the order, none are sorted by length."""
    if keep:
        yield from (order[at : at + batch_size] for at in range(0, len(order), batch_size))
        return
    alike = [order[at : at + ALIKE * batch_size] for at in range(0, len(order), ALIKE * batch_size)]
    by_length = [i for some in alike for i in sorted(some, key=lambda i: len(examples[i].ids))]
    cut = [by_length[at : at + batch_size] for at in range(0, len(order), batch_size)]
    yield from (cut[i] for i in sorted(range(len(cut)), key=lambda i: _digest("batch", seed, epoch, i)))


def _digest(what: str, *numbers: int) -> bytes:
    return hashlib.sha256(" ".join([what, *map(str, numbers)]).encode()).digest()


def collate(examples: Sequence[Example], pad: int = 0) -> dict[str, Tensor]:
    """A batch `[example, token]`, padded on the right: `input_ids`, `labels`, `attention_mask`."""
    length = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    ids = [example.ids for example in examples]
    return {
        "input_ids": padded(ids, pad),
        "labels": padded([example.labels for example in examples], IGNORED),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }


def share_of(batch: dict[str, Tensor], rank: int, n_processes: int) -> dict[str, Tensor]:
    """What one of several processes takes of a batch: every so manieth example, or one without labels."""
    if n_processes == 1:
        return batch
    own = {name: of[rank::n_processes] for name, of in batch.items()}
    if len(own["labels"]):
        return own
    return {name: of[:1] for name, of in batch.items()} | {"labels": torch.full_like(batch["labels"][:1], IGNORED)}
