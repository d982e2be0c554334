"""Greedy and sampled answers to many prompts that begin alike, without computing anything twice.

What the prompts have in common is computed once. Behind each prompt the samples form a tree: those that agree so
far are one branch, computed once, with a count. Drawing from a branch's distribution once per sample is exactly
independent sampling; at a low temperature most samples agree and cost what one does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
BLOCK = 256
"""Tokens of the vocabulary whose probabilities are summed before one of them is drawn."""
SMALL_BATCH = 32
"""Prompts of the next length are padded into a batch that has fewer than this many."""


@dataclass
class Drawn:
    """Answers to one prompt, as tokens."""

    greedy: tuple[int, ...] = ()
    confidence: float = 0.0
    """Probability of the greedy answer: the product over its tokens, the ending one included."""
    samples: dict[tuple[int, ...], int] = field(default_factory=dict)
    """How often each answer was sampled."""
    given_up: int = 0
    """Samples that were not drawn to their end, being wrong whatever their end."""


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
    """

    model: PreTrainedModel
    ends: frozenset[int]
    newlines: Container[int]
    n_samples: int
    temperature: float

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        new_tokens: Sequence[int],
        *,
        hopeless: Callable[[int, tuple[int, ...]], bool] = lambda _prompt, _tokens: False,
        share: bool = True,
    ) -> list[Drawn]:
        """One greedy and `n_samples` sampled answers to each prompt.

        Args:
            prompts: facts asked; their answers are not used.
            seeds: one seed (a list of numbers, of one length) per prompt, which alone decides its samples: not the
                batch.
            new_tokens: of the longest answer to each prompt.
            hopeless: whether the answer to the prompt of this number that begins with these tokens is wrong whatever
                follows; its samples are then given up. The greedy answer is drawn to its end all the same.
            share: compute what the prompts begin with once; False computes every prompt whole, for comparison.
        """
        check_model(self.model)
        self._drawn = [Drawn() for _ in prompts]
        self._seeds, self._hopeless, self._most = seeds, hopeless, new_tokens
        self._shared = shared_tokens(list(prompts)) if share and len(prompts) > 1 else 0
        cache = None
        if self._shared:
            start = torch.tensor([prompts[0].ids[: self._shared]])
            cache = self._run(start, None, torch.zeros(1, dtype=torch.long))[1]
        lengths = [prompt.prediction + 1 for prompt in prompts]
        may_pad = self._may_pad(max(lengths) + max(new_tokens))
        for index in _batches(lengths, max(new_tokens), SMALL_BATCH if may_pad else 1):
            longest = max(lengths[i] for i in index)
            pads = torch.tensor([longest - lengths[i] for i in index])
            ids = [[0] * (longest - lengths[i]) + list(prompts[i].ids[self._shared : lengths[i]]) for i in index]
            roots = [_Branch(i, (), self.n_samples, True, 0.0) for i in index]
            own = None if cache is None else _select(cache, torch.zeros(len(index), dtype=torch.long))
            self._grow(roots, *self._run(torch.tensor(ids), own, pads), pads)
        return self._drawn

    def _may_pad(self, longest: int) -> bool:
        """Whether padding goes unseen: a sliding window would count it among the tokens it holds."""
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        return window is None or window > longest

    def _run(self, ids: Tensor, cache: Any, pads: Tensor) -> tuple[Tensor, Any]:
        """Logits at the last token of each row, and the cache that holds it.

        Behind the shared tokens a row has `pads` tokens of padding, which no token sees and no position counts.
        """
        before, device = cache.get_seq_length() if cache else 0, self.model.device
        slot = torch.arange(before + ids.shape[1])
        padded = (slot >= self._shared) & (slot < self._shared + pads[:, None])
        positions = (~padded).long().cumsum(1).sub(1).clamp(min=0)[:, before:]
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=(~padded).long().to(device) if padded.any() else None,
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float(), output.past_key_values

    def _grow(self, branches: list[_Branch], logits: Tensor, cache: Any, pads: Tensor) -> None:
        """Draw the next token of every branch, and go on with those whose answer has not ended."""
        going: list[tuple[int, _Branch]] = []
        for row, children in enumerate(self._children(branches, logits)):
            for child in children:
                last = child.tokens[-1]
                ended = last in self.ends or (len(child.tokens) > 1 and last in self.newlines)
                if ended or len(child.tokens) == self._most[child.prompt]:
                    self._keep(child)
                elif child.count and self._hopeless(child.prompt, child.tokens):
                    self._drawn[child.prompt].given_up += child.count
                    if child.greedy:
                        going.append((row, replace(child, count=0)))
                else:
                    going.append((row, child))
        step = max(1, CACHED_TOKENS // (cache.get_seq_length() + 1))
        for part in (going[i : i + step] for i in range(0, len(going), step)):
            rows = torch.tensor([row for row, _ in part])
            ids = torch.tensor([[child.tokens[-1]] for _, child in part])
            own = pads[rows]
            self._grow([child for _, child in part], *self._run(ids, _select(cache, rows), own), own)

    def _children(self, branches: list[_Branch], logits: Tensor) -> list[list[_Branch]]:
        best, log_total = logits.argmax(-1).tolist(), logits.logsumexp(-1)
        drawn = self._sample(branches, logits)
        tokens = [sorted({*counts, best[row]} if branches[row].greedy else counts) for row, counts in enumerate(drawn)]
        rows = [row for row, own in enumerate(tokens) for _ in own]
        flat = [token for own in tokens for token in own]
        logprobs = iter((logits[rows, flat] - log_total[rows]).tolist())
        return [
            [
                _Branch(
                    branch.prompt,
                    (*branch.tokens, token),
                    counts.get(token, 0),
                    branch.greedy and token == best[row],
                    branch.logprob + next(logprobs),
                )
                for token in tokens[row]
            ]
            for row, (branch, counts) in enumerate(zip(branches, drawn, strict=True))
        ]

    def _sample(self, branches: list[_Branch], logits: Tensor) -> list[dict[int, int]]:
        """How often each branch's samples take each token: inverse transform sampling, first of a block of tokens."""
        vocab = logits.shape[1]
        probabilities = torch.nn.functional.pad((logits / self.temperature).softmax(-1), (0, -vocab % BLOCK))
        blocks = probabilities.unflatten(1, (-1, BLOCK))
        sums = blocks.sum(-1).double().cumsum(-1).cpu().numpy()
        found = []
        for row, branch in enumerate(branches):
            counts: dict[int, int] = {}
            # its length too: a list is padded with zeros, and zero may be a token
            rng = np.random.default_rng([*self._seeds[branch.prompt], len(branch.tokens), *branch.tokens])
            draws = rng.random(branch.count) * sums[row, -1]
            for block, draw in zip(np.searchsorted(sums[row], draws, side="right"), draws, strict=True):
                within = blocks[row, block].double().cumsum(0).cpu().numpy()
                # The block's sum was taken in another order: what rounding leaves over goes to its last likely token.
                left = min(draw - (sums[row, block - 1] if block else 0.0), np.nextafter(within[-1], 0))
                token = int(block) * BLOCK + int(np.searchsorted(within, left, side="right"))
                counts[token] = counts.get(token, 0) + 1
            found.append(counts)
        return found

    def _keep(self, branch: _Branch) -> None:
        drawn = self._drawn[branch.prompt]
        if branch.greedy:
            drawn.greedy, drawn.confidence = branch.tokens, float(np.exp(branch.logprob))
        if branch.count:
            drawn.samples[branch.tokens] = branch.count


def _batches(lengths: Sequence[int], new_tokens: int, enough: int) -> Iterator[list[int]]:
    """Prompts to be run together, by number: of one length where they are `enough`, else of neighbouring ones."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = (len(batch) + 1) * (lengths[i] + new_tokens) > CACHED_TOKENS
        if batch and (full or (len(batch) >= enough and lengths[i] > lengths[batch[-1]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _select(cache: Any, rows: Tensor) -> Any:
    """A cache of some rows of another, which stays as it is."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_select_indices(rows.to(own.layers[0].keys.device))
    return own
