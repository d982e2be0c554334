"""The weights that training moves: a new low-rank adapter or the model's own, of all or some parts and layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.interventions import Part
from subjattn.engine.parts import Place, parts_of
from subjattn.errors import BadInput
from subjattn.finetune.settings import Training, layer_numbers
from subjattn.models import LoadedModel, load_model


PARTS: dict[str, set[Part]] = {
    "attention": {"qk", "vo"},
    "qk": {"qk"},
    "vo": {"vo"},
    "mlp": {"mlp"},
}
"""Parts of a layer that `modules` stands for."""


def load_base(name: str, dtype: str, settings: Training) -> LoadedModel:
    """The model to train, in 4 bits where the settings say so.

    Raises:
        BadInput: 4 bits without bitsandbytes, or full fine-tuning in half precision, whose steps rounding would lose.
    """
    if settings.weights == "full" and dtype != "float32":
        raise BadInput(
            f"full fine-tuning in {dtype} loses steps smaller than some thousandths of a weight to rounding: train in "
            "float32, or a low-rank adapter (weights: lora)"
        )
    return load_model(name, dtype=dtype, four_bit=settings.four_bit)


class Update:
    """A model and those of its weights that training moves, by name.

    Attributes:
        model: what computes: peft's model around the base, or the base itself.
        tensors: the weights that are trained.
    """

    def __init__(self, base: LoadedModel, settings: Training) -> None:
        self.base, self.settings = base, settings
        put_on = _with_lora if settings.weights == "lora" else _unfrozen
        self.model: Any = put_on(base, settings)
        self.tensors: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights that are trained."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def put(self, state: Mapping[str, Tensor]) -> None:
        """Set the weights that are trained."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])

    @contextmanager
    def being(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other weights for a while, without gradients and in eval mode."""
        own, training = {name: tensor.data for name, tensor in self.tensors.items()}, self.model.training
        try:
            for name, tensor in self.tensors.items():
                tensor.data = state[name]
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            for name, tensor in self.tensors.items():
                tensor.data = own[name]
            self.model.train(training)

    def write(self, file: Path) -> None:
        """Write the weights that are trained."""
        save_file({name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}, file)

    def read(self, file: Path) -> dict[str, Tensor]:
        """Weights that `write` wrote, where this model has them."""
        found = load_file(file)
        return {name: found[name].to(tensor.device) for name, tensor in self.tensors.items()}

    def save(self, folder: Path) -> None:
        """Write what `load_model` reads: peft's adapter, or the whole model with its tokenizer."""
        if self.settings.weights == "lora":
            config = self.model.peft_config["default"]
            config.target_modules = sorted(config.target_modules)  # a set's order differs between processes
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            self.model.save_pretrained(str(folder))
            self.base.tokenizer.save_pretrained(str(folder))


def _modules(base: LoadedModel, settings: Training) -> dict[str, nn.Module] | None:
    """Modules that are trained, by name: matrices alone for an adapter, with biases and norms otherwise; None: all."""
    from transformers.pytorch_utils import Conv1D

    if settings.modules == "all" and settings.layers is None:
        return None
    n_layers, layers = len(decoder_layers(base.model)), layer_numbers(settings.layers)
    if layers and layers[-1] >= n_layers:
        raise BadInput(f"layers: there is no layer {layers[-1]}, the model has layers 0 to {n_layers - 1}")
    names, found = {module: name for name, module in base.model.named_modules()}, {}
    for module, place in parts_of(base.model).items():
        matrix = settings.weights == "full" or isinstance(module, nn.Linear | Conv1D)
        if place.layer in (layers or range(n_layers)) and matrix and _asked_for(settings.modules, place, names[module]):
            found[names[module]] = module
    if not found:
        raise BadInput(
            f"modules {settings.modules!r}: no plain matrix is among them to put an adapter on: train weights: full"
        )
    return found


def _asked_for(modules: str, place: Place, name: str) -> bool:
    if modules == "all":
        return True
    parts = set(place.columns)
    if parts and not parts & PARTS[modules]:
        return False
    if not parts or parts > PARTS[modules]:
        raise BadInput(
            f"modules {modules!r}: {name} makes queries, keys and values in one matrix, which cannot be trained in "
            "part: train modules: attention"
        )
    return True


def _with_lora(base: LoadedModel, settings: Training) -> nn.Module:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    modules = _modules(base, settings)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if modules is None else sorted(modules),
        task_type="CAUSAL_LM",
    )
    inner = base.model
    if settings.four_bit:
        inner = prepare_model_for_kbit_training(inner, use_gradient_checkpointing=False)
    model = get_peft_model(inner, config)
    config.base_model_name_or_path = base.name
    return model


def _unfrozen(base: LoadedModel, settings: Training) -> nn.Module:
    modules = _modules(base, settings)
    for module in [base.model] if modules is None else modules.values():
        for parameter in module.parameters(recurse=modules is None):
            parameter.requires_grad_(True)
    return base.model
