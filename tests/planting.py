"""Adapters whose truth is known: every part carries an update of the same size, and only one moves the answer.

What moves it is found by gradient steps on that part alone. The other parts get random updates that read only
directions which no input of theirs has on the given prompts, neither in the base nor in the tuned model: there they do
nothing, to rounding, however large they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from subjattn.models import load_model
from subjattn.prompts import Prompt


PARTS = {"qk": ("q_proj", "k_proj"), "vo": ("v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
Rows = Mapping[str, range | None]
"""Modules by their paths, and the rows of their outputs that are tuned (None: all)."""


def plant(base: str, prompts: Sequence[Prompt], moving: Rows, out: Path, *, drop: float, seed: int = 0) -> Path:
    """Save a peft LoRA that lowers every prompt's answer log-probability by at least `drop` nats through `moving`.

    `moving` are modules of one part of PARTS; over all layers each part has the same Frobenius norm.
    """
    torch.manual_seed(seed)
    model: Any = get_peft_model(
        load_model(base, device="cpu").model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    )
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    _move(model, {layers[name]: rows for name, rows in moving.items()}, prompts, drop)
    inputs = _inputs(model, layers, prompts)
    by_part = {part: [name for name in layers if name.endswith(ends)] for part, ends in PARTS.items()}
    (own,) = (part for part, names in by_part.items() if set(moving) <= set(names))
    size = norm(layers[name] for name in moving)
    with torch.no_grad():
        for part, names in by_part.items():
            for name in names:
                if part != own:
                    _idle(layers[name], inputs[name])
            if part != own:
                ratio = size / norm(layers[name] for name in names)
                for name in names:
                    layers[name].lora_B["default"].weight.mul_(ratio)
    model.save_pretrained(out)
    return out


def updates(model: Any) -> dict[str, float]:
    """Frobenius norms of a peft model's parts."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {part: norm(own for name, own in layers.items() if name.endswith(ends)) for part, ends in PARTS.items()}


def norm(layers: Any) -> float:
    """Frobenius norm of the updates of some LoRA layers together."""
    return sum(float(_update(layer).detach().double().square().sum()) for layer in layers) ** 0.5


def _update(layer: Any) -> Tensor:
    return layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]


def logprobs(model: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Of every prompt's answer, padded on the right."""
    length = max(map(len, prompts))
    ids = torch.tensor([[*prompt.ids, *[prompt.ids[-1]] * (length - len(prompt))] for prompt in prompts])
    found = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return torch.stack(
        [
            found[i, list(prompt.predicting)].gather(1, torch.tensor(prompt.answer_ids)[:, None]).sum()
            for i, prompt in enumerate(prompts)
        ]
    )


def _move(model: Any, moving: Mapping[Any, range | None], prompts: Sequence[Prompt], drop: float) -> None:
    """Gradient steps until every answer has lost enough."""
    model.eval().requires_grad_(False)
    weights = []
    with ExitStack() as stack:
        for layer, rows in moving.items():
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weights += [down.requires_grad_(True), up.requires_grad_(True)]
            if rows is not None:
                kept = torch.zeros_like(up)
                kept[list(rows)] = 1
                stack.callback(up.register_hook(lambda grad, kept=kept: grad * kept).remove)
        optimizer, start = torch.optim.Adam(weights, lr=1e-2), logprobs(model, prompts).detach()
        for _ in range(60):
            found = logprobs(model, prompts)
            if bool((start - found >= drop).all()):
                model.requires_grad_(False)
                return
            optimizer.zero_grad()
            (found - start).clamp(min=-drop - 1).sum().backward()
            optimizer.step()
    raise AssertionError(f"answers lost {(start - found).tolist()} nats, and not {drop} each")


@torch.no_grad()
def _inputs(model: Any, layers: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """What every module is given on the prompts, in the base and in the tuned model: `[token, d_in]`."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():
            keep = lambda _, args, name=name: kept[name].append(args[0].flatten(0, -2))  # noqa: E731
            stack.callback(layer.register_forward_pre_hook(keep).remove)
        logprobs(model, prompts)
        with model.disable_adapter():
            logprobs(model, prompts)
    return {name: torch.cat(states) for name, states in kept.items()}


def _idle(layer: Any, inputs: Tensor) -> None:
    """A random update that these inputs do not meet."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert len(inputs) < inputs.shape[1], "more inputs than directions"
    basis = torch.linalg.qr(inputs.double().T).Q
    free = torch.randn_like(down, dtype=torch.float64)
    down.copy_(free - free @ basis @ basis.T)
    up.copy_(torch.randn_like(up))
