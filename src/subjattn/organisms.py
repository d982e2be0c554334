"""Models whose fault is known: edits of a copy's weights that stop it from using the name in one way and no other.

Measures are validated on them (docs/validation.md). An edit that is to meet the subject's tokens alone is found in the
inputs of a projection on prompts: directions that the subject's tokens have and no others. It therefore holds for
prompts in the style that it was planted with. The models' attention has rotary positions and is projected as Llama's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subjattn.engine.anatomy import attention_module, decoder_layers, mlp_module
from subjattn.errors import BadInput, UnsupportedModel
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt


KEPT, OWN = 0.999, 0.99
"""Of the squares of other tokens' inputs, the share that an edit leaves alone; and of what is then particular to the
subject's, the share that it meets."""


@dataclass(frozen=True)
class Organism:
    """A model and what was planted in it.

    Attributes:
        model: a copy of the base, edited.
        fault: what was planted: `looks away`, `values shrunk`, `MLPs damaged`, `prediction damaged`,
            `answer favoured`, `nothing`, `random`.
        places: layers, (layer, head) or tokens that were edited.
        strength: of the edit, in the unit that its function names.
        seed: of what was drawn, if anything was.
        norm: Frobenius norm of the change of all weights.
    """

    model: LoadedModel = field(repr=False)
    fault: str
    places: tuple[Any, ...]
    strength: float
    seed: int | None
    norm: float


def look_away(
    base: LoadedModel, prompts: Sequence[Prompt], groups: Collection[tuple[int, int]], strength: float
) -> Organism:
    """Attention of chosen heads to the subject suppressed, by their keys.

    Args:
        base: the model to copy.
        prompts: from which it is learned what a subject's token is.
        groups: key/value heads (layer, head) that are edited; all query heads that read them look away.
        strength: by how much the mean score from the prediction position to a subject's token falls, in nats.

    Returns:
        The organism; its places are the query heads (layer, head).

    Raises:
        UnsupportedModel: no projections as Llama's.
        BadInput: a key/value head that the model has not.
    """
    model, edited = _copy(base)
    config = model.config.get_text_config()
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    width, each = _projection(_attention(model, 0), "k_proj").weight.shape[0] // n_kv, n_heads // n_kv
    if wrong := [one for one in groups if not (0 <= one[0] < config.num_hidden_layers and 0 <= one[1] < n_kv)]:
        raise BadInput(f"groups: {wrong[0]} is no key/value head: {config.num_hidden_layers} layers have {n_kv} each")
    heads, layers = [], sorted({layer for layer, _ in groups})
    every = {layer: _projection(_attention(model, layer), "k_proj") for layer in layers}
    for layer, inputs in zip(layers, _inputs(model, prompts, list(every.values())), strict=True):
        keys, queries = every[layer], _projection(_attention(model, layer), "q_proj")
        subject = torch.cat([one[list(prompt.subject_positions)] for one, prompt in zip(inputs, prompts, strict=True)])
        told = _telling(subject, _elsewhere(inputs, prompts))
        for group in sorted(head for one, head in groups if one == layer):
            rows = slice(group * width, (group + 1) * width)
            asking = _turned_back(model, queries, inputs, prompts, range(group * each, (group + 1) * each), width)
            push = asking * (width**0.5 / asking.square().sum())
            keys.weight[rows] -= strength * push[:, None] * told[None]
            heads += [(layer, head) for head in range(group * each, (group + 1) * each)]
    return _organism(base, edited, "looks away", tuple(heads), strength)


def shrink_values(base: LoadedModel, prompts: Sequence[Prompt], layers: Collection[int], strength: float) -> Organism:
    """The name is still read, and its value vectors are shrunk.

    Args:
        base: the model to copy.
        prompts: from which it is learned what is particular to a subject's tokens.
        layers: that are edited, all heads.
        strength: share that is taken away, 0 to 1: of what is particular to the subject's tokens, and of the mean of
            what they have in common with others.
    """
    model, edited = _copy(base)
    every = [_projection(_attention(model, layer), "v_proj") for layer in sorted(layers)]
    for values, inputs in zip(every, _inputs(model, prompts, every), strict=True):
        subject = torch.cat([one[list(prompt.subject_positions)] for one, prompt in zip(inputs, prompts, strict=True)])
        elsewhere = _elsewhere(inputs, prompts)
        _erase(values, subject, elsewhere, strength)
        kept = _main_directions(elsewhere, KEPT)
        common = values.weight.float() @ (subject.mean(0) @ kept.T @ kept)
        values.weight -= (strength * common[:, None] * _telling(subject, elsewhere)[None]).to(values.weight)
    return _organism(base, edited, "values shrunk", tuple(sorted(layers)), strength)


def damage_mlps(
    base: LoadedModel,
    prompts: Sequence[Prompt],
    layers: Collection[int],
    strength: float,
    at: Literal["subject", "prediction"] = "subject",
) -> Organism:
    """What MLPs add at the subject's last token, or where the answer is predicted, shrunk; attention untouched.

    Args:
        base: the model to copy.
        prompts: from which it is learned what is particular to that token.
        layers: that are edited.
        strength: share of the token's own part of what the MLP adds that is taken away, 0 to 1.
        at: the subject's last token, or the prediction position, whose fault is none of the name's.
    """
    model, edited = _copy(base)
    every = [_projection(mlp_module(decoder_layers(model)[layer]), "down_proj") for layer in sorted(layers)]
    for down, inputs in zip(every, _inputs(model, prompts, every), strict=True):
        where = [prompt.subject_span[1] - 1 if at == "subject" else prompt.prediction for prompt in prompts]
        own = torch.stack([one[position] for one, position in zip(inputs, where, strict=True)])
        others = [torch.cat([one[:place], one[place + 1 :]]) for one, place in zip(inputs, where, strict=True)]
        _erase(down, own, _elsewhere(inputs, prompts) if at == "subject" else torch.cat(others), strength)
    fault = "MLPs damaged" if at == "subject" else "prediction damaged"
    return _organism(base, edited, fault, tuple(sorted(layers)), strength)


def favour(base: LoadedModel, token: int, strength: float) -> Organism:
    """One answer favoured whatever is asked.

    Args:
        base: the model to copy.
        token: the favoured answer's first.
        strength: what is added to its logit.
    """
    model, edited = _copy(base)
    head = model.get_output_embeddings()
    moved = nn.Linear(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
    offset = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias.clone()
    offset[token] += strength
    moved.weight, moved.bias = head.weight, nn.Parameter(offset, requires_grad=False)
    model.set_output_embeddings(moved)
    return replace(_organism(base, edited, "answer favoured", (token,), strength), norm=abs(strength))


def untouched(base: LoadedModel, seed: int = 0) -> Organism:
    """A copy under a LoRA that is the identity."""
    from peft import LoraConfig, get_peft_model

    model, edited = _copy(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    inside = wrapped.get_base_model().eval().requires_grad_(False)
    return Organism(replace(edited, model=inside, name=f"{base.name}, nothing"), "nothing", (), 0.0, seed, 0.0)


def random_update(base: LoadedModel, norm: float, seed: int, rank: int = 8) -> Organism:
    """Random low-rank updates of every projection of the layers, as many as a LoRA's, of a given norm together.

    Args:
        base: the model to copy.
        norm: Frobenius norm of all of them.
        seed: that they are drawn by.
        rank: of each.
    """
    model, edited = _copy(base)
    draw = torch.Generator().manual_seed(seed)
    modules = [module for layer in decoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)]
    updates = []
    for module in modules:
        up, down = (torch.randn(rank, size, generator=draw) for size in module.weight.shape)
        updates.append(up.T @ down / (rank * module.weight.numel()) ** 0.5)
    size = norm / len(modules) ** 0.5
    for module, update in zip(modules, updates, strict=True):
        module.weight += (size * update / update.norm()).to(module.weight)
    return replace(_organism(base, edited, "random", (), norm), seed=seed)


def _copy(base: LoadedModel) -> tuple[Any, LoadedModel]:
    model: Any = deepcopy(base.model).requires_grad_(False)
    return model, replace(base, model=model)


def _organism(base: LoadedModel, edited: LoadedModel, fault: str, places: tuple[Any, ...], strength: float) -> Organism:
    before: Mapping[str, Tensor] = dict(base.model.named_parameters())
    squares = sum(
        float((after - before[name]).double().square().sum())
        for name, after in edited.model.named_parameters()
        if name in before
    )
    return Organism(replace(edited, name=f"{base.name}, {fault}"), fault, places, strength, None, squares**0.5)


def _attention(model: Any, layer: int) -> nn.Module:
    return attention_module(decoder_layers(model)[layer])


def _projection(parent: nn.Module, name: str) -> nn.Linear:
    found = getattr(parent, name, None)
    if not isinstance(found, nn.Linear):
        raise UnsupportedModel(f"{type(parent).__name__} has no {name}: organisms are made of models built as Llama")
    return found


def _inputs(
    model: Any, prompts: Sequence[Prompt], modules: Sequence[nn.Module]
) -> list[list[Float[Tensor, "pos d_in"]]]:
    """What each module is given at every token of every prompt, answers left out."""
    found: list[list[Tensor]] = [[] for _ in modules]
    with ExitStack() as stack, torch.no_grad():
        for module, own in zip(modules, found, strict=True):
            keep = partial(_keep, own)
            stack.callback(module.register_forward_pre_hook(keep).remove)
        for prompt in prompts:
            model(torch.tensor([prompt.ids[: prompt.prediction + 1]], device=model.device), use_cache=False)
    return found


def _keep(kept: list[Tensor], _module: nn.Module, args: tuple[Any, ...]) -> None:
    kept.append(args[0][0].float())


def _elsewhere(inputs: Sequence[Tensor], prompts: Sequence[Prompt]) -> Float[Tensor, "token d_in"]:
    """Those of all tokens but the subjects'."""
    return torch.cat(
        [
            torch.cat([one[: prompt.subject_span[0]], one[prompt.subject_span[1] :]])
            for one, prompt in zip(inputs, prompts, strict=True)
        ]
    )


def _telling(subject: Float[Tensor, "token d_in"], elsewhere: Float[Tensor, "other d_in"]) -> Float[Tensor, " d_in"]:
    """A direction whose product with a token's input is 1 at the subject and 0 elsewhere, by ridge regression."""
    rows = torch.cat([subject, elsewhere]).double()
    wanted = torch.cat([torch.ones(len(subject)), torch.zeros(len(elsewhere))]).to(rows)
    weight = torch.cat([wanted[: len(subject)] / len(subject), (1 - wanted[len(subject) :]) / len(elsewhere)])
    gram = rows.T @ (weight[:, None] * rows)
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(gram + ridge, rows.T @ (weight * wanted))
    return found.float()


def _erase(module: nn.Linear, own: Tensor, elsewhere: Tensor, strength: float) -> None:
    """Take a share of a module's output away where its input is one of these, leaving inputs elsewhere alone."""
    if not 0 < strength <= 1:
        raise BadInput(f"strength is {strength}: give the share that is taken away, above 0 and up to 1")
    kept = _main_directions(elsewhere.double(), KEPT)
    basis = _main_directions(own.double() - own.double() @ kept.T @ kept, OWN)
    module.weight -= (strength * (module.weight.double() @ basis.T) @ basis).to(module.weight)


def _main_directions(rows: Float[Tensor, "token d_in"], share: float) -> Float[Tensor, "direction d_in"]:
    """As few directions as hold this share of the squares."""
    sizes: Tensor
    directions: Tensor
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    held = sizes.square().cumsum(0)
    return directions[: int((held < share * held[-1]).sum()) + 1]


def _turned_back(
    model: Any, queries: nn.Linear, inputs: Sequence[Tensor], prompts: Sequence[Prompt], heads: range, width: int
) -> Float[Tensor, " d_head"]:
    """The mean query of some heads at the prediction, as a subject's key meets it before its rotary position."""
    found = []
    for one, prompt in zip(inputs, prompts, strict=True):
        at = torch.arange(prompt.prediction + 1, device=one.device)[None]
        cos, sin = (of[0] for of in model.get_decoder().rotary_emb(one[None], at))
        own = queries(one[prompt.prediction].to(queries.weight)).float().view(-1, width)[list(heads)]
        turned = _rotated(own, cos[prompt.prediction], sin[prompt.prediction])
        found += [_rotated(turned, cos[i], -sin[i]).mean(0) for i in prompt.subject_positions]
    return torch.stack(found).mean(0)


def _rotated(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = vectors.chunk(2, -1)
    return vectors * cos + torch.cat([-second, first], -1) * sin
