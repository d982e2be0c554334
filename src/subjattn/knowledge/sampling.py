"""Greedy and sampled answers to many prompts that begin alike, without computing anything twice.

What the prompts have in common is computed once. Behind each prompt the samples form a tree: those that agree so
far are one branch, computed once, with a count. Drawing from a branch's distribution once per sample is exactly
independent sampling; at a low temperature most samples agree and cost what one does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.engine.checks import check_model
from subjattn.engine.prefix import shared_tokens
from subjattn.prompts import Prompt


CACHED_TOKENS = 16_384
"""Tokens, over all branches, whose keys and values are held at a time; more are computed in turns."""


@dataclass
class Drawn:
    """Answers to one prompt, as tokens."""

    greedy: tuple[int, ...] = ()
    confidence: float = 0.0
    """Probability of the greedy answer: the product over its tokens, the ending one included."""
    samples: dict[tuple[int, ...], int] = field(default_factory=dict)
    """How often each answer was sampled."""


@dataclass(frozen=True)
class _Branch:
    """Samples of one prompt that agree so far."""

    prompt: int
    tokens: tuple[int, ...]
    count: int
    greedy: bool
    logprob: float


@dataclass
class Sampler:
    """Draws answers from a model.

    Attributes:
        model: a causal model.
        ends: tokens that end the text, wherever they come.
        newlines: tokens that end the line, save as the first token.
        n_samples: sampled answers per prompt.
        temperature: of the samples.
        new_tokens: the longest answer.
    """

    model: PreTrainedModel
    ends: frozenset[int]
    newlines: frozenset[int]
    n_samples: int
    temperature: float
    new_tokens: int

    @torch.inference_mode()
    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], share: bool = True) -> list[Drawn]:
        """One greedy and `n_samples` sampled answers to each prompt.

        Args:
            prompts: facts asked; their answers are not used.
            seeds: one seed (a list of numbers) per prompt, which alone decides its samples: not the batch.
            share: compute what the prompts begin with once; False computes every prompt whole, for comparison.
        """
        check_model(self.model)
        self._drawn = [Drawn() for _ in prompts]
        self._seeds = seeds
        shared = shared_tokens(list(prompts)) if share and len(prompts) > 1 else 0
        cache = self._run(torch.tensor([prompts[0].ids[:shared]]), None)[1] if shared else None
        lengths: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            lengths.setdefault(prompt.prediction + 1, []).append(i)
        for length, members in lengths.items():
            step = max(1, CACHED_TOKENS // (length + self.new_tokens))
            for index in (members[i : i + step] for i in range(0, len(members), step)):
                ids = torch.tensor([prompts[i].ids[shared:length] for i in index])
                roots = [_Branch(i, (), self.n_samples, True, 0.0) for i in index]
                own = None if cache is None else _select(cache, torch.zeros(len(index), dtype=torch.long))
                self._grow(roots, *self._run(ids, own))
        return self._drawn

    def _run(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits at the last token of each row, and the cache that holds it."""
        output = self.model(
            input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1], output.past_key_values

    def _grow(self, branches: list[_Branch], logits: Tensor, cache: Any) -> None:
        """Draw the next token of every branch, and go on with those whose answer has not ended."""
        going: list[tuple[int, _Branch]] = []
        for row, children in enumerate(self._children(branches, logits)):
            for child in children:
                last = child.tokens[-1]
                ended = last in self.ends or (len(child.tokens) > 1 and last in self.newlines)
                if ended or len(child.tokens) == self.new_tokens:
                    self._keep(child)
                else:
                    going.append((row, child))
        if not going:
            return
        length = cache.get_seq_length() + 1
        step = max(1, CACHED_TOKENS // length)
        for part in (going[i : i + step] for i in range(0, len(going), step)):
            rows = torch.tensor([row for row, _ in part])
            ids = torch.tensor([[child.tokens[-1]] for _, child in part])
            self._grow([child for _, child in part], *self._run(ids, _select(cache, rows)))

    def _children(self, branches: list[_Branch], logits: Tensor) -> list[list[_Branch]]:
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.argmax(-1).tolist()
        cumulative = (logits.float() / self.temperature).softmax(-1).double().cumsum(-1).cpu().numpy()
        found = []
        for row, branch in enumerate(branches):
            counts: dict[int, int] = {}
            if branch.count:
                rng = np.random.default_rng([*self._seeds[branch.prompt], *branch.tokens])
                draws = rng.random(branch.count) * cumulative[row, -1]
                tokens = np.searchsorted(cumulative[row], draws, side="right")
                for token in np.minimum(tokens, cumulative.shape[1] - 1).tolist():
                    counts[token] = counts.get(token, 0) + 1
            if branch.greedy:
                counts.setdefault(best[row], 0)
            found.append(
                [
                    _Branch(
                        branch.prompt,
                        (*branch.tokens, token),
                        count,
                        branch.greedy and token == best[row],
                        branch.logprob + float(logprobs[row, token]),
                    )
                    for token, count in sorted(counts.items())
                ]
            )
        return found

    def _keep(self, branch: _Branch) -> None:
        drawn = self._drawn[branch.prompt]
        if branch.greedy:
            drawn.greedy, drawn.confidence = branch.tokens, float(np.exp(branch.logprob))
        if branch.count:
            drawn.samples[branch.tokens] = branch.count


def _select(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows of another, which stays as it is."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_select_indices(rows.to(own.layers[0].keys.device))
    return own
