"""A mixture of two models: what each gives the next token, averaged. It answers, and has no activations.

Model mixing after Kazemi et al. (2023), whose formula is not public: here λ·p_tuned + (1 − λ)·p_base, or the same of
their logarithms and renormalised, at every token. The base may be shown demonstrations that the tuned model is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.errors import NoActivations
from subjattn.prompts import Prompt


MixtureForm = Literal["linear", "log"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Two models whose next-token distributions are mixed.

    Attributes:
        tuned, base: causal language models in eval mode with one vocabulary.
        weight: λ, the tuned model's share.
        form: `linear`, of probabilities, or `log`, of their logarithms.
        shown: by fact id, tokens that the base reads before the prompt, behind its first token if that begins a text.
        n_first: tokens that begin every text.
    """

    tuned: PreTrainedModel
    base: PreTrainedModel
    weight: float
    form: MixtureForm = "linear"
    shown: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    n_first: int = 0

    def __getattr__(self, name: str) -> Any:
        """Device, configuration and the like are the tuned model's."""
        if name in ("device", "dtype", "config", "generation_config"):
            return getattr(self.tuned, name)
        raise NoActivations(f"a mixture of two models has no {name}: only its answers are its own")

    def mixed(self, tuned: Float[Tensor, "... vocab"], base: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """Log-probabilities of the mixture from two models' logits."""
        ours, theirs = tuned.float().log_softmax(-1), base.float().log_softmax(-1)
        if self.form == "log":
            return (self.weight * ours + (1 - self.weight) * theirs).log_softmax(-1)
        weights = torch.tensor([self.weight, 1 - self.weight], dtype=torch.float64).log().to(ours)
        return torch.logaddexp(ours + weights[0], theirs + weights[1])

    def before(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts as the base is asked them."""
        return [self._shown(prompt) for prompt in prompts] if self.shown else list(prompts)

    def _shown(self, prompt: Prompt) -> Prompt:
        more = self.shown[prompt.fact_id]
        first, span = self.n_first, prompt.span
        return replace(
            prompt,
            ids=(*prompt.ids[:first], *more, *prompt.ids[first:]),
            tokens=(*prompt.tokens[:first], *[""] * len(more), *prompt.tokens[first:]),
            span=None if span is None else (span[0] + len(more), span[1] + len(more)),
            prediction=prompt.prediction + len(more),
        )


class Decoding:
    """A model that is read token by token, with its own cache; or two of them, mixed."""

    def __init__(self, model: PreTrainedModel | Mixture) -> None:
        self.model = model
        self.parts = [Decoding(model.tuned), Decoding(model.base)] if isinstance(model, Mixture) else []
        self._cache: Any = None

    def begin(self, prompts: Sequence[Prompt]) -> Float[Tensor, "prompt vocab"]:
        """Logits behind prompts of one length, their answers left out."""
        if isinstance(self.model, Mixture):
            return self.model.mixed(self.parts[0].begin(prompts), self.parts[1].begin(self.model.before(prompts)))
        ids = [prompt.ids[: prompt.prediction + 1] for prompt in prompts]
        return self._read(torch.tensor(ids, device=self.model.device), logits_to_keep=1)

    def go_on(self, new: Tensor) -> Float[Tensor, "prompt vocab"]:
        """Logits behind one more token of each."""
        if isinstance(self.model, Mixture):
            return self.model.mixed(*(part.go_on(new) for part in self.parts))
        return self._read(new[:, None], past_key_values=self._cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of them alone."""
        for part in self.parts:
            part.keep(rows)
        if self._cache is not None:
            self._cache.batch_select_indices(rows)

    def _read(self, ids: Tensor, **how: Any) -> Float[Tensor, "prompt vocab"]:
        output = self.model(input_ids=ids, use_cache=True, **how)  # type: ignore[operator]
        self._cache = output.past_key_values
        return output.logits[:, -1]  # type: ignore[no-any-return]


def lengths_of(model: PreTrainedModel | Mixture, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Tokens of each prompt without its answer, as each model that is asked has it."""
    asked = [prompts, model.before(prompts)] if isinstance(model, Mixture) else [prompts]
    return [*zip(*([prompt.prediction + 1 for prompt in its] for its in asked), strict=True)]
