"""What follows a model's last layer, or precedes its first, by the model's own forward with its layers left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.anatomy import decoder_layers, on_input, only_positions, padded_ids
from subjattn.engine.arms import routed
from subjattn.engine.interventions import Row, Run, wide
from subjattn.engine.noise import noised


@torch.inference_mode()
def embed(model: PreTrainedModel, runs: list[Run]) -> Float[Tensor, "row pos d_model"]:
    """What the first layer is given, positions, scales and noise included."""
    kept: list[Tensor] = []
    layers, none = decoder_layers(model), torch.zeros(0, dtype=torch.long)
    ids = padded_ids([run.prompt for run in runs], model.device)
    nothing = torch.zeros(
        *ids.shape, model.config.get_text_config().hidden_size, dtype=model.dtype, device=model.device
    )
    with ExitStack() as stack:
        routes = stack.enter_context(routed(model, [run.arm for run in runs]))
        routes.choose(routes.of_runs(runs, ids.shape[1]), torch.zeros(1, 0, dtype=torch.long))
        stack.enter_context(on_input(layers[0], kept.append))
        stack.enter_context(layers_giving(layers, nothing))
        stack.enter_context(only_positions(model, none, none))
        stack.enter_context(noised(model, runs))
        model(input_ids=ids, use_cache=False)
    return kept[0]


def unembed(
    model: PreTrainedModel, hidden: Float[Tensor, "prediction d_model"], rows: list[Row], only_contrast: bool
) -> Tensor:
    """Final norm, unembedding and whatever the model does after its last layer, by the model's own forward."""
    contrast: Tensor | None = None
    of = [(row.run, at) for row in rows for at in row.prompt.predicting]
    if only_contrast:
        ends = list(accumulate(len(row.prompt.predicting) for row in rows))
        first = [0, *ends[:-1]]
        hidden, of = hidden[torch.tensor(first, device=hidden.device)], [of[i] for i in first]
        contrast = torch.tensor([row.contrast for row in rows], device=hidden.device)
    with ExitStack() as stack:
        routes = stack.enter_context(routed(model, [row.arm for row in rows]))
        routes.choose(routes.of_positions(of)[:, None])
        stack.enter_context(layers_giving(decoder_layers(model), hidden[:, None]))
        head = model.get_output_embeddings()
        whole = contrast is None or type(head) is not nn.Linear or routes.changes_head
        if contrast is not None and not whole:
            stack.enter_context(_only_tokens(head, contrast))
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=model.device)
        logits = wide(model(input_ids=ids, use_cache=False).logits[:, 0])
    if contrast is not None and whole:
        logits = logits.gather(1, contrast.to(logits.device))
    return logits


@contextmanager
def _only_tokens(head: nn.Linear, tokens: Tensor) -> Iterator[None]:
    """The unembedding of two tokens a row instead of the vocabulary."""

    def forward(hidden: Float[Tensor, "row one d_model"]) -> Float[Tensor, "row one two"]:
        at = tokens.to(head.weight.device)
        logits = hidden.to(at.device) @ head.weight[at].transpose(1, 2)
        return logits if head.bias is None else logits + head.bias[at][:, None]

    with _replaced([head], forward):
        yield


@contextmanager
def layers_giving(layers: nn.ModuleList, hidden: Tensor) -> Iterator[None]:
    """Every layer does nothing and the last one gives `hidden`."""
    with _replaced(layers, lambda *_args, **_kwargs: hidden):
        yield


@contextmanager
def _replaced(modules: Sequence[nn.Module] | nn.ModuleList, forward: object) -> Iterator[None]:
    """Modules with another `forward` for a while."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own
