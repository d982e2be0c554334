"""What all stages of a study's plan have in common: its models and their identities, and stages that run one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from subjattn.errors import BadInput
from subjattn.measures.record import Shape
from subjattn.models import check_adapter, identity, model_shape, resolve_adapter, resolve_model
from subjattn.run.plan import Stage
from subjattn.study.config import StudyConfig
from subjattn.study.consistency import check_labels


USUAL_POOL = 30_000
"""Facts of a pool whose size is not known before it is read, for time estimates."""
WORK = "subjattn.study.stages"


class Planner:
    """A study whose models and adapters are seen to be there."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.models = {name: identity(name) for name in self._model_names()}
        self.adapters = {
            arm.adapter: identity(resolve_adapter(arm.adapter)) for arm in config.arms.values() if arm.adapter
        }
        n_layers, n_heads = model_shape(config.model)
        check_labels(config, n_layers, n_heads)
        for name, arm in config.arms.items():
            if arm.model and model_shape(arm.model) != (n_layers, n_heads):
                raise BadInput(
                    f"arm {name!r} has {model_shape(arm.model)[0]} layers of {model_shape(arm.model)[1]} heads, the "
                    f"study's model {n_layers} of {n_heads}: only models of one architecture can be compared head by "
                    "head"
                )
        for arm in config.arms.values():
            if arm.adapter:
                check_adapter(arm.model or config.model, arm.adapter)
        held_out = config.facts.split.held_out
        self.shape = Shape(config.facts.n_test + (held_out.n_test if held_out else 0), n_layers, n_heads)
        self.memory = {name: weight_bytes(name, config.dtype) for name in self.models}

    def _model_names(self) -> list[str]:
        names = [self.config.model, *(arm.model for arm in self.config.arms.values() if arm.model)]
        for name in names:
            resolve_model(name)
        return list(dict.fromkeys(names))

    def computing(
        self,
        name: str,
        module: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        cost: float,
        group: str,
        function: str = "work",
        version: int = 1,
    ) -> Stage:
        """A stage that runs a model."""
        external, model, adapter = {}, str(settings["model"]), settings.get("adapter")
        external["model"] = self.models[model]
        if adapter:
            external["adapter"] = self.adapters[adapter]
        where: dict[str, Any] = {"model": model, "adapter": adapter}
        if base := settings.get("base_model"):
            external["base"], where["base_model"] = self.models[base], base
        return Stage(
            name,
            f"{WORK}.{module}:{function}",
            version=version,
            settings={name: of for name, of in settings.items() if name not in ("model", "adapter", "base_model")},
            inputs=inputs,
            external=external,
            where=where | {"identity": list(external.values())},
            cost=cost,
            memory=self.memory[model] + (self.memory[base] if base else 0.0),
            device=True,
            group=group,
        )


@cache
def weight_bytes(name: str, dtype: str) -> float:
    """Bytes that a model's weights take, from its configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from subjattn.models import quiet

    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_model(name)))
    return float(sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, dtype).itemsize)
