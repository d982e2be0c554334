"""What layers and heads add to the residual stream, against parts named and multiplied by hand."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.contributions import Added, contributions, reading
from subjattn.engine.frozen import Frozen
from subjattn.errors import UnsupportedModel
from subjattn.measures import hf_model
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt


BEHIND = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}
"""Norms behind attention and MLP, by name."""
MORE = ("granite", "glm4", "cohere", "phi", "stablelm", "nemotron")


def prompt(length: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(2, 500, (length,), generator=generator).tolist())
    return Prompt(str(seed), "s", "t", ("a",), ids, tuple(map(str, ids)), (2, 4), length - 2)


PROMPTS = [prompt(6, 1), prompt(9, 2), prompt(9, 3), prompt(14, 4)]


@pytest.fixture(scope="module", params=[*zoo.CONFIGS, *MORE])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(arch: str) -> PreTrainedModel:
    return made(arch)


def made(arch: str) -> PreTrainedModel:
    """A random model whose norms and biases are not ones and zeros, so that leaving them out would show."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(zoo.config(arch)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter.data, 0.3, 1.2)
    return model


def all_of(model: PreTrainedModel, prompts: list[Prompt] = PROMPTS) -> tuple[Added, list[Prompt]]:
    (added,) = contributions(model, prompts)
    return added, [prompts[i] for i in added.index]


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    inner = model.base_model
    return list(getattr(inner, "h", None) or inner.layers)


def returned(model: PreTrainedModel, asked: Prompt, module: nn.Module) -> Tensor:
    """What a module returns at the prediction position, by a plain hook in a plain pass."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(torch.tensor([asked.ids[: asked.prediction + 1]]), use_cache=False)
    handle.remove()
    return kept[0].reshape(-1, kept[0].shape[-1])[-1]


def test_the_stream_is_the_sum_of_contributions(model: PreTrainedModel) -> None:
    added, asked = all_of(model)
    for row, one in enumerate(asked):
        with torch.no_grad():
            states = model(torch.tensor([one.ids[: one.prediction + 1]]), output_hidden_states=True).hidden_states
        stream = added.embed[row]
        torch.testing.assert_close(stream.float(), states[0][0, -1], rtol=1e-4, atol=1e-5)
        for layer in range(len(states) - 2):  # the last of hidden_states is behind the final norm
            stream = stream + added.attn[layer, row] + added.mlp[layer, row]
            torch.testing.assert_close(stream.float(), states[layer + 1][0, -1], rtol=1e-4, atol=1e-4)


def test_what_is_added_lies_behind_the_norms_of_the_architecture(arch: str, model: PreTrainedModel) -> None:
    added, asked = all_of(model)
    attention, mlp, _ = zoo.parts(arch)
    factor = 0.22 if arch == "granite" else 1.0
    for name, its, number in ((attention, added.attn, 0), (mlp, added.mlp, 1)):
        for row, one in enumerate(asked[:2]):
            module = layers_of(model)[1].get_submodule(name)
            plain = returned(model, one, module)
            if arch in BEHIND:
                behind = returned(model, one, layers_of(model)[1].get_submodule(BEHIND[arch][number]))
                assert (behind - plain).norm() > 0.1 * plain.norm()  # the two tensors really differ
                plain = behind
            torch.testing.assert_close(its[1, row].float(), factor * plain, rtol=1e-4, atol=1e-4)


def test_heads_embedding_and_mlps_add_up_to_the_logit(arch: str, model: PreTrainedModel) -> None:
    """Of a token minus the mean of the vocabulary, by the model's own forward."""
    added, asked = all_of(model)
    weights = torch.full((len(asked), zoo.VOCAB), -1 / zoo.VOCAB)
    weights[:, 7] += 1
    read = reading(model, added.last, weights)
    total = (added.embed * read.direction).sum(-1) + (added.mlp * read.direction).sum((0, 2)) + read.offset
    for heads in added.heads:
        by_source, bias = heads.towards(read.direction)
        total = total + by_source.double().sum((1, 2)) + bias
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([one.ids[: one.prediction + 1]])).logits[0, -1] for one in asked])
    cap = getattr(model.config, "final_logit_softcapping", None)
    assert read.capped == (cap is not None)
    if cap is not None:
        logits = cap * torch.atanh(logits / cap)
    torch.testing.assert_close(total.float(), (logits * weights).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3"])
def test_a_heads_part_is_pattern_times_value_through_its_columns(
    name: str, tiny_models: dict[str, LoadedModel]
) -> None:
    """By source token, written out: weight · value · W_O of this head, through the norm behind it at its own scale."""
    model = tiny_models[name].model
    added, asked = all_of(model)
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(len(asked), added.last.shape[-1], generator=generator)
    attention, _, output = zoo.parts(name)
    for layer in (0, 2):
        by_source, _ = added.heads[layer].towards(directions)
        projection = layers_of(model)[layer].get_submodule(output)
        matrix = projection.weight if name == "gpt2" else projection.weight.T
        for row, one in enumerate(asked):
            short = Prompt(**{**vars(one), "ids": one.ids[: one.prediction + 1]})
            pattern = oracles.seen_inside(model, short, "pattern", layer)[:, -1]
            values = oracles.seen_inside(model, short, "v", layer)
            direction = directions[row]
            if name == "gemma2":
                norm = layers_of(model)[layer].post_attention_layernorm
                out = returned(model, one, layers_of(model)[layer].get_submodule(attention))
                direction = direction * (1 + norm.weight) / (out.square().mean() + norm.eps).sqrt()
            width = values.shape[-1]
            for head in range(4):
                columns = matrix[head * width : (head + 1) * width]
                for source in range(one.prediction + 1):
                    value = values[head // (4 // len(values)), source]
                    expected = float(pattern[head, source] * (value @ columns) @ direction)
                    assert float(by_source[row, head, source]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_batches_and_a_live_adapter_are_in_the_numbers(tuned: Any) -> None:
    _, apart = tuned("llama")
    model = hf_model(apart["one"])
    together, asked = all_of(model)
    for row, one in enumerate(asked):
        (alone,) = contributions(model, [one])
        torch.testing.assert_close(alone.attn[:, 0], together.attn[:, row], rtol=1e-4, atol=1e-5)
    weights = torch.zeros(len(asked), model.config.vocab_size)
    weights[:, 9] = 1
    read = reading(model, together.last, weights)
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([one.ids[: one.prediction + 1]])).logits[0, -1, 9] for one in asked])
    total = (together.embed * read.direction).sum(-1) + (together.mlp * read.direction).sum((0, 2)) + read.offset
    for heads in together.heads:
        by_source, bias = heads.towards(read.direction)
        total = total + by_source.double().sum((1, 2)) + bias
    torch.testing.assert_close(total.float(), logits, rtol=1e-4, atol=1e-4)


def test_a_stream_that_is_no_sum_is_refused() -> None:
    """A layer whose output is normed as a whole, as in models with the norm behind the addition."""
    model = made("llama")
    layers_of(model)[1].register_forward_hook(lambda _module, _args, output: output / output.norm(dim=-1, keepdim=True))
    with pytest.raises(UnsupportedModel, match="layer 1 gives is not"):
        all_of(model)


def test_a_gate_between_heads_and_their_projection_is_refused() -> None:
    model = made("llama")
    projection = layers_of(model)[2].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _module, args: (args[0] * args[0].sigmoid(),))
    with pytest.raises(UnsupportedModel, match="attention of layer 2 adds is not the sum"):
        all_of(model)


def test_what_is_no_norm_is_not_frozen() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(4, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    with pytest.raises(UnsupportedModel, match="no norm"), torch.no_grad():
        Frozen.of(module, x, module(x))


def test_half_precision_gives_the_same_to_its_rounding() -> None:
    full, half = made("gemma2"), made("gemma2").bfloat16()
    exact, _ = all_of(full)
    rounded, _ = all_of(half)
    assert float((exact.last - rounded.last).norm() / exact.last.norm()) < 0.05
