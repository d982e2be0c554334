"""Gaussian noise on token embeddings (Meng et al. 2022): a noised run is a run of its own, with states of its own.

Noise is added to what the model's input embedding gives, scales that belong to it included (Gemma), positions that are
learnt not (GPT-2), so that its standard deviation is one of these outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.errors import NotFired
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.engine.interventions import Run


@dataclass(frozen=True)
class Noise:
    """One draw of Gaussian noise on the embeddings of some tokens.

    Of a fact, the same seed and draw give the same noise in any batch, order, arm and device.

    Attributes:
        std: its standard deviation, in the units of the embedding's output.
        seed: of all draws.
        draw: which of them.
        positions: of the tokens; None: the subject's.
    """

    std: float
    seed: int = 0
    draw: int = 0
    positions: tuple[int, ...] | None = None

    def at(self, prompt: Prompt) -> tuple[int, ...]:
        """Positions that get noise in a prompt."""
        return tuple(prompt.subject_positions) if self.positions is None else self.positions

    def put(self, prompt: Prompt, embedded: Float[Tensor, "pos d_model"]) -> Float[Tensor, "position d_model"]:
        """What a prompt's embeddings become at the positions that get noise.

        Raises:
            NotFired: rounding swallows the noise.
        """
        before = embedded[list(self.at(prompt))]
        noisy = (before + self.values(prompt, before.shape[-1]).to(before.device)).to(before)
        if not bool((noisy != before).any(-1).all()):
            raise NotFired(f"fact {prompt.fact_id}: noise is lost in the rounding of {before.dtype}: make it larger")
        return noisy

    def values(self, prompt: Prompt, width: int) -> Float[Tensor, "position width"]:
        """What is added to a prompt's embeddings there, in float32 on the host."""
        fact = int.from_bytes(sha256(prompt.fact_id.encode()).digest()[:8])
        rng = np.random.default_rng([self.seed, self.draw, fact])
        return self.std * torch.from_numpy(rng.standard_normal((len(self.at(prompt)), width), dtype=np.float32))


def check_noise(runs: Iterable[Run]) -> None:
    """Refuse noise that would do nothing, or less than it says.

    Raises:
        NotFired: such noise.
    """
    for run in runs:
        if (noise := run.noise) is None:
            continue
        at = noise.at(run.prompt)
        if not at or len({*at}) < len(at) or not 0 <= min(at) <= max(at) <= run.prompt.predicting[-1]:
            raise NotFired(
                f"fact {run.prompt.fact_id}: noise at positions {at} is empty, doubled or lies outside the prompt"
            )
        if not (isfinite(noise.std) and noise.std > 0) or min(noise.seed, noise.draw) < 0:
            raise NotFired(
                f"fact {run.prompt.fact_id}: noise of standard deviation {noise.std}, seed {noise.seed} and draw "
                f"{noise.draw}: give a standard deviation above 0, and a seed and a draw of 0 or more"
            )


@contextmanager
def noised(model: PreTrainedModel, runs: Sequence[Run]) -> Iterator[None]:
    """Add the noise of these runs, the rows of a batch, to what the input embedding gives in the one pass inside.

    Raises:
        NotFired: the embedding was not reached exactly once, gave other rows, or its rounding swallows the noise.
    """
    if not any(run.noise for run in runs):
        yield
        return
    reached: list[int] = []

    def add(_: object, _args: object, state: Float[Tensor, "row pos d_model"]) -> Tensor:
        reached.append(len(state))
        noisy = state.clone()
        for i, run in enumerate(runs):
            if run.noise is not None:
                noisy[i, list(run.noise.at(run.prompt))] = run.noise.put(run.prompt, state[i])
        return noisy

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if reached != [len(runs)]:
        raise NotFired(
            f"noise for {len(runs)} rows: the input embedding of {type(model).__name__} gave {reached} rows in one pass"
        )
