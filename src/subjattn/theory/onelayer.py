"""The one-layer transformer of Ghosal et al. (2024, sec. 4), many replicates at once, with its gradients written out.

One head, identity embeddings, no MLP, residual, norm or positions: of a subject `s` and a last token `p` (a relation
in pre-training, a relation's prompt token in fine-tuning) it gives logits over all tokens

    logits(s, p) = Att_s W_V e_s + Att_p W_V e_p,    (Att_s, Att_p) = softmax(W_KQ[s, p], W_KQ[p, p])

Trained are W_V and W_KQ. Of both only what such sequences reach is kept: columns of W_V of tokens that are read, and
columns of W_KQ of last tokens, rows of tokens that are read; the rest has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subjattn.worlds.abstract import Tokens


Facts = Int[Tensor, "replicate n"]


@dataclass(frozen=True)
class OneLayer:
    """W_V and W_KQ of every replicate; tokens are numbered by `Tokens`.

    `values[b, i]` is W_V e_i. `scores[b, i, q]` is the score of key `i` for the last token `n_subjects + q`.
    """

    tokens: Tokens
    values: Float[Tensor, "replicate read token"]
    scores: Float[Tensor, "replicate read last"]

    @classmethod
    def zeros(cls, tokens: Tokens, n: int, dtype: torch.dtype = torch.float32) -> OneLayer:
        last = 2 * tokens.n_relations
        values = torch.zeros(n, tokens.n_read, tokens.n, dtype=dtype)
        return cls(tokens, values, torch.zeros(n, tokens.n_read, last, dtype=dtype))

    @classmethod
    def normal(cls, tokens: Tokens, seeds: Sequence[int], variance: float = 0.001) -> OneLayer:
        """Weights drawn anew for every replicate (Ghosal et al. 2024, app. C.1)."""
        made = cls.zeros(tokens, len(seeds))
        for number, seed in enumerate(seeds):
            rng = torch.Generator().manual_seed(seed)
            for weights in (made.values, made.scores):
                weights[number].normal_(0, variance**0.5, generator=rng)
        return made

    def __len__(self) -> int:
        return len(self.values)

    def take(self, replicates: Sequence[int]) -> OneLayer:
        """A copy of some replicates, in this order; one may come several times."""
        index = torch.tensor(list(replicates))
        return replace(self, values=self.values[index], scores=self.scores[index])

    def copy(self) -> OneLayer:
        return replace(self, values=self.values.clone(), scores=self.scores.clone())

    def attention(self, subjects: Facts, last: Facts) -> Float[Tensor, "replicate n"]:
        """Att_s: what the last token's attention gives the subject; the rest is on the last token itself."""
        rows, query = torch.arange(len(self)).unsqueeze(1), last - self.tokens.n_subjects
        return torch.sigmoid(self.scores[rows, subjects, query] - self.scores[rows, last, query])

    def logits(
        self, subjects: Facts, last: Facts, attention: Float[Tensor, "replicate n"] | None = None
    ) -> Float[Tensor, "replicate n token"]:
        """Logits of every token; with `attention` that in place of the model's own on the subject."""
        weight = (self.attention(subjects, last) if attention is None else attention).unsqueeze(-1)
        return torch.lerp(self._values(last), self._values(subjects), weight)

    def _values(self, tokens: Facts) -> Float[Tensor, "replicate n token"]:
        flat = tokens + torch.arange(len(self)).unsqueeze(1) * self.tokens.n_read
        return self.values.flatten(0, 1).index_select(0, flat.flatten()).view(*tokens.shape, -1)


@dataclass
class Gradients:
    """Of the loss summed over facts: -log softmax(logits)[answer]. By fact, as each touches few weights."""

    of_subject: Float[Tensor, "replicate n token"]
    of_last: Float[Tensor, "replicate n token"]
    of_score: Float[Tensor, "replicate n"]
    """Of W_KQ[s, p]; that of W_KQ[p, p] is its opposite."""


def gradients(model: OneLayer, subjects: Facts, last: Facts, answers: Facts) -> Gradients:
    """Gradients of the loss by fact, written out: for W_KQ those of Ghosal et al. (2024, sec. 4.3), with the constant

    -dL/dW_KQ = Att_s Att_p (s_rel - p_rel) (e_s e_p' - e_p e_p').
    """
    on_subject = model.attention(subjects, last)
    of_last = model._values(last)
    difference, weight = model._values(subjects).sub_(of_last), on_subject.unsqueeze(-1)
    error = torch.softmax(torch.addcmul(of_last, difference, weight), dim=-1)
    error.scatter_add_(-1, answers.unsqueeze(-1), -torch.ones_like(weight))
    of_score = on_subject * (1 - on_subject) * torch.linalg.vecdot(error, difference)
    of_subject = error * weight
    return Gradients(of_subject, error.sub_(of_subject), of_score)


@dataclass
class Optimiser:
    """Plain SGD, or Adam with optional decoupled weight decay; on the loss summed over the facts of a step."""

    name: Literal["sgd", "adam"]
    learning_rate: float
    weight_decay: float = 0.0
    freeze_values: bool = False
    _moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _steps: int = field(default=0, init=False)

    def step(self, model: OneLayer, subjects: Facts, last: Facts, found: Gradients) -> None:
        """Change the model's weights in place."""
        flat = torch.arange(len(model)).unsqueeze(1) * model.tokens.n_read
        query, n_last = last - model.tokens.n_subjects, model.scores.shape[-1]
        values, scores = model.values.flatten(0, 1), model.scores.view(-1)
        places = [((flat + key) * n_last + query).flatten() for key in (subjects, last)]
        rows = [(flat + key).flatten() for key in (subjects, last)]
        parts = [(scores, places, [found.of_score.flatten(), -found.of_score.flatten()])]
        if not self.freeze_values:
            parts.append((values, rows, [found.of_subject.flatten(0, 1), found.of_last.flatten(0, 1)]))
        self._steps += 1
        for name, (weights, index, by) in zip(("scores", "values"), parts, strict=False):
            if self.weight_decay:
                weights.mul_(1 - self.learning_rate * self.weight_decay)
            if self.name == "sgd":
                for where, gradient in zip(index, by, strict=True):
                    weights.index_add_(0, where, gradient.mul(-self.learning_rate))
                continue
            total = torch.zeros_like(weights)
            for where, gradient in zip(index, by, strict=True):
                total.index_add_(0, where, gradient)
            self._adam(name, weights, total)

    def _adam(self, name: str, weights: Tensor, gradient: Tensor) -> None:
        first, second = self._moments.setdefault(name, (torch.zeros_like(weights), torch.zeros_like(weights)))
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        large = (second / (1 - BETAS[1] ** self._steps)).sqrt_().add_(EPSILON)
        weights.addcdiv_(first, large, value=-self.learning_rate / (1 - BETAS[0] ** self._steps))


BETAS, EPSILON = (0.9, 0.999), 1e-8


def train(
    model: OneLayer,
    batches: Iterable[tuple[Facts, Facts, Facts]],
    optimiser: Optimiser,
    look: Callable[[int, OneLayer], None] | None = None,
) -> OneLayer:
    """Train a copy of the model, a step for each batch of subjects, last tokens and answers.

    Args:
        model: as it is before; it stays so.
        batches: of one size, `(replicate, n)` each.
        optimiser: what it says; it has no state of its own afterwards.
        look: told before the first step (0) and after each; it may not change the model.
    """
    model, parts = model.copy(), list[tuple[slice, OneLayer, Optimiser]]()
    if look is not None:
        look(0, model)
    for number, facts in enumerate(batches, start=1):
        parts = parts or [
            (own, replace(model, values=model.values[own], scores=model.scores[own]), replace(optimiser))
            for own in _chunks(len(model), facts[0].shape[1] * model.tokens.n)
        ]
        for own, part, its in parts:
            subjects, last, answers = (of[own] for of in facts)
            its.step(part, subjects, last, gradients(part, subjects, last, answers))
        if look is not None:
            look(number, model)
    return model


def _chunks(n: int, logits: int) -> list[slice]:
    """Replicates whose logits of a batch fit a core's cache together; more at a time are slower than one by one."""
    size = max(1, CACHE // logits)
    return [slice(first, first + size) for first in range(0, n, size)]


CACHE = 160_000
"""Logits."""
