"""Whole forward passes with plain hooks, on the model itself: the oracle of the engine.

Value norms are read off without the engine: values from transformers' own cache, as attention sees them, times
the weights of W_O, which is known by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from subjattn.engine import forward
from subjattn.engine.checks import check_model, eager
from subjattn.engine.interventions import Output, Row, wide
from subjattn.errors import UnsupportedModel
from subjattn.prompts import Prompt


_W_O = ("o_proj", "c_proj", "dense", "out_proj")
"""Output projections inside an attention module, as architectures call them."""


class Hooks:
    """See engine/forward.py."""

    name = "hooks"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:  # noqa: ARG002
        return forward.forward(self.model, rows)

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        """Rows of the model's own `output_attentions`, one prompt at a time, and norms from its own cache."""
        check_model(self.model)
        matrices = _output_matrices(self.model) if value_norms else []
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt.ids[: prompt.prediction + 1]], device=self.model.device)
            cache = DynamicCache() if value_norms else None  # without a configuration it keeps what a window would drop
            with eager(self.model), torch.inference_mode():
                patterns = self.model(
                    input_ids=ids, output_attentions=True, use_cache=value_norms, past_key_values=cache
                ).attentions
                rows = {layer: wide(pattern)[:, :, -1:] for layer, pattern in enumerate(patterns)}
                output = Output([i], [Row(prompt)], torch.empty(0), attention=rows)
                if cache is not None:
                    output.value_norms = {
                        layer: _norms(cache.layers[layer].values, matrix, patterns[layer].shape[1])  # type: ignore[union-attr, arg-type]
                        for layer, matrix in enumerate(matrices)
                    }
            yield output


def _norms(
    values: Float[Tensor, "one kv_head key d_head"], matrix: Float[Tensor, "d_model width"], n_heads: int
) -> Float[Tensor, "one head key"]:
    """‖value·W_O‖ of every query head, each head's columns of W_O times its values."""
    read = wide(values).repeat_interleave(n_heads // values.shape[1], 1)
    by_head = matrix.unflatten(1, (n_heads, -1))
    return torch.stack([(read[:, head] @ by_head[:, head].T).norm(dim=-1) for head in range(n_heads)], 1)


@torch.inference_mode()
def _output_matrices(model: PreTrainedModel) -> list[Float[Tensor, "d_model width"]]:
    """W_O of every layer as a matrix, live adapters in it and its bias left out.

    Raises:
        UnsupportedModel: there is no such module, or it is none that is known.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        name = next((name for name in _W_O if isinstance(getattr(module, name, None), nn.Module)), None)
        if name is not None and hasattr(module, "layer_idx"):
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            found[layer] = _matrix(getattr(module, name), layer)
    n_layers = model.config.get_text_config().num_hidden_layers
    if sorted(found) != list(range(n_layers)):
        raise UnsupportedModel(
            f"backend hooks does not weigh {type(model).__name__} by values: its attention has no module named "
            f"{', '.join(_W_O)} in every layer; use 'engine'"
        )
    return [found[layer] for layer in range(n_layers)]


def _matrix(module: nn.Module, layer: int) -> Float[Tensor, "d_model width"]:
    plain = getattr(module, "base_layer", module)
    if not isinstance(plain, nn.Linear | Conv1D):
        raise UnsupportedModel(
            f"backend hooks does not weigh by values: the output projection of layer {layer} is a "
            f"{type(plain).__name__}, whose matrix it does not know; use 'engine'"
        )
    matrix = wide(plain.weight.T if isinstance(plain, Conv1D) else plain.weight)
    if plain is module or module.disable_adapters or module.merged:
        return matrix
    for name in module.active_adapters:  # type: ignore[union-attr]
        if name not in getattr(module, "lora_A", {}):
            continue
        if name in module.lora_variant:  # type: ignore[operator]
            raise UnsupportedModel(
                f"backend hooks does not weigh by values: adapter {name!r} on layer {layer} is no plain LoRA; "
                "use 'engine'"
            )
        down, up = (wide(of[name].weight) for of in (module.lora_A, module.lora_B))  # type: ignore[index, union-attr]
        matrix = matrix + module.scaling[name] * up @ down  # type: ignore[index]
    return matrix
