"""Models made of a tuned one and its base without training: their mixture, and part of the update undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subjattn.engine.mixture import Mixture, MixtureForm
from subjattn.errors import BadInput
from subjattn.models.load import LoadedModel
from subjattn.prompts import Prompt


Which = Literal["top", "bottom", "random"]
HALF = 16
"""Bits of a float32 that are counted at a time."""


def mixed(
    tuned: LoadedModel,
    base: LoadedModel,
    weight: float,
    form: MixtureForm = "linear",
    *,
    prompts: Sequence[Prompt] = (),
    shown: Sequence[Prompt] = (),
) -> LoadedModel:
    """The mixture λ·p_tuned + (1 − λ)·p_base of two models' next tokens (after Kazemi et al. 2023).

    Of it answers can be measured: `accuracy`, `answer_logprob`, `subject_sensitivity`, `frequency_shock` and others;
    measures of attention or states refuse it.

    Args:
        tuned: the tuned model.
        base: the model it was tuned from.
        weight: λ, 0 to 1.
        form: `linear` as above; `log` mixes the logarithms and renormalises.
        prompts: the prompts that will be asked, where the base is shown demonstrations.
        shown: the same facts asked behind demonstrations, as the base is asked.

    Raises:
        BadInput: a weight outside 0 to 1, two vocabularies, or prompts that differ by more than demonstrations.
    """
    if not 0 <= weight <= 1:
        raise BadInput(f"weight={weight} is no share of the tuned model: give 0 to 1")
    if tuned.model.config.get_text_config().vocab_size != base.model.config.get_text_config().vocab_size:
        raise BadInput(f"models {tuned.name!r} and {base.name!r} have other vocabularies: their tokens cannot be mixed")
    bos = base.tokenizer.bos_token_id
    n_first = int(bool(prompts) and prompts[0].ids[0] == bos)
    behind = {prompt.fact_id: prompt for prompt in shown}
    more = {prompt.fact_id: _before(prompt, behind, n_first) for prompt in prompts} if shown else {}
    mixture: Any = Mixture(tuned.model, base.model, float(weight), form, more, n_first)
    return LoadedModel(
        mixture, tuned.tokenizer, f"{weight:g} of {tuned.adapter or tuned.name}, the rest of {base.name}"
    )


def _before(prompt: Prompt, behind: dict[str, Prompt], n_first: int) -> tuple[int, ...]:
    """Tokens that stand before a prompt where it is asked behind demonstrations."""
    other = behind.get(prompt.fact_id)
    own = prompt.ids[n_first:]
    if other is None or other.ids[len(other.ids) - len(own) :] != own or other.ids[:n_first] != prompt.ids[:n_first]:
        raise BadInput(
            f"fact {prompt.fact_id}: the base's prompt is not the same behind demonstrations: mix with a style that "
            "has its template and 'shots'"
        )
    return other.ids[n_first : len(other.ids) - len(own)]


@torch.no_grad()
def restored(
    tuned: LoadedModel, base: LoadedModel, share: float, which: Which = "top", *, seed: int = 0
) -> LoadedModel:
    """The tuned model with a share of its changed weights put back to the base's (after Ye et al., arXiv:2509.16596).

    Weights are single numbers of all matrices, ranked by how far they were moved; an adapter is merged first.

    Args:
        tuned: the tuned model, with an adapter or without.
        base: the model it was tuned from.
        share: of the weights that were changed, 0 to 1.
        which: put back those moved most (`top`), least (`bottom`), or any (`random`).
        seed: of the random ones.

    Raises:
        BadInput: a share outside 0 to 1, or models of other shapes.
    """
    if not 0 <= share <= 1:
        raise BadInput(f"share={share} is no share of the changed weights: give 0 to 1")
    model = merged(tuned)
    own, others = dict(model.named_parameters()), dict(base.model.named_parameters())
    if {name: of.shape for name, of in own.items()} != {name: of.shape for name, of in others.items()}:
        raise BadInput(f"models {tuned.name!r} and {base.name!r} have other shapes: nothing can be put back")
    moves = [(own[name], others[name]) for name in own]

    def scores(number: int) -> Tensor:
        """Of the changed weights of one matrix, what they are ranked by."""
        a, b = moves[number]
        if which == "random":
            generator = torch.Generator().manual_seed(seed * len(moves) + number)
            return torch.rand(int((a != b).sum()), generator=generator)
        moved: Tensor = (a - b)[a != b].abs().float().cpu()
        return moved

    n_changed = sum(int((a != b).sum()) for a, b in moves)
    n_back = round(share * n_changed)
    largest = largest_of(scores, len(moves), n_changed - n_back if which == "bottom" else n_back)
    for (a, b), chosen in zip(moves, largest, strict=True):
        back = (a != b).cpu()
        back[back.clone()] = ~chosen if which == "bottom" else chosen
        a.copy_(torch.where(back.to(a.device), b, a))
    name = f"{tuned.adapter or tuned.name}, {which} {share:.3%} of its update undone"
    return LoadedModel(model, tuned.tokenizer, name)


def largest_of(scores: Callable[[int], Tensor], n_parts: int, n: int) -> Iterator[Tensor]:
    """Masks of the `n` largest of all parts' scores together, part by part; of equal ones the first.

    Counted by the bits of float32, one part in memory at a time: to sort seven billion numbers takes their indices.

    Args:
        scores: of a part, `[weight]`, none negative; asked for more than once.
        n_parts: how many parts there are.
        n: how many are the largest.
    """
    left, prefix = n, 0
    for shift in (HALF, 0):
        counts = torch.zeros(1 << HALF, dtype=torch.long)
        for part in range(n_parts):
            bits = scores(part).view(torch.int32)
            bits = bits if shift else bits[bits >> HALF == prefix]
            counts += torch.bincount(bits >> shift & (1 << HALF) - 1, minlength=1 << HALF)
        above = counts.flip(0).cumsum(0).flip(0) - counts  # of larger ones
        bin_ = int((above < max(left, 1)).nonzero()[0])
        left -= int(above[bin_])
        prefix = prefix << HALF | bin_
    for part in range(n_parts):
        bits = scores(part).view(torch.int32)
        equal = (bits == prefix).nonzero()[: max(left, 0), 0]
        left -= len(equal)
        chosen = bits > prefix
        chosen[equal] = True
        yield chosen if n else torch.zeros_like(chosen)


def merged(loaded: LoadedModel) -> Any:
    """A copy of a model with its adapter merged into its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = deepcopy(loaded.model)
    if loaded.adapter is None:
        return model
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        raise BadInput(f"adapter {loaded.adapter!r} saves whole modules beside its update, which are not merged here")
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, BaseTunerLayer) and isinstance(child, nn.Module):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model
