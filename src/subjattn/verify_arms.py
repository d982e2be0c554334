"""Verify arms on a model of the user's: base and adapter in one batch, against each of the two models by itself.

The references never see an arm. They run the base or the tuned model, and states of the other are brought along, read
by hooks on that model; parts of an update are weights merged by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.backends import BACKENDS, Backend, BackendName
from subjattn.engine import checks
from subjattn.engine.anatomy import decoder_layers, mlp_module, n_heads, n_kv_heads
from subjattn.engine.interventions import BY_HEAD, COMPONENTS, Arm, Component, Part, Patch, Row, Run
from subjattn.errors import BadInput, NotFired, UnsupportedModel
from subjattn.measures import hf_model, opened
from subjattn.models import LoadedModel
from subjattn.models.arms import load_arms
from subjattn.prompts import Prompt
from subjattn.verify import Comparison, Refusal, Verification
from subjattn.verify_hooks import States, run
from subjattn.verify_inside import with_scores


TUNED = "tuned"
ONE_BATCH, PARTS_OF = "arms in one batch", "parts of the update"
_PARTS: dict[str, Part] = {"q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "o_proj": "vo"}
_PARTS |= {"q_norm": "qk", "k_norm": "qk"}
_PARTS |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")


@dataclass(frozen=True)
class _Put:
    """Rows of a transfer for the engine, by arm, and what tells them from rows of one model."""

    component: Component
    into: Arm | None
    prompt: Prompt
    cells: tuple[tuple[int, int | None], ...]
    positions: tuple[int, ...]

    def row(self, states: States | None, arm: Arm | None) -> Row:
        """With the other arm's states taken in the same batch; or, brought along, in a row of one model."""
        patches = []
        for layer, head in self.cells:
            if states is None:
                other = Run(self.prompt, None if self.into is not None else Arm(TUNED))
                patches.append(Patch(layer, self.positions, other, self.component, head))
                continue
            values = states[self.component, layer]
            values = (values if head is None else values[head])[list(self.positions)]
            patches.append(Patch(layer, self.positions, values, self.component, head))
        return Row(self.prompt, patches=tuple(patches), arm=arm)


def with_arms(
    found: Verification,
    tuned: LoadedModel,
    base: LoadedModel,
    prompts: Sequence[Prompt],
    backends: Sequence[BackendName] = BACKENDS,
) -> Verification:
    """What `verify` found, and how base and adapter in one batch compare with the two models by themselves.

    Quantities, in logits of the tokens that predict the answer: plain rows of both; a transfer of each component in
    both directions, all layers and heads together (of the residual stream the middle layer); and each part of a plain
    LoRA's or a checkpoint's update alone. A scale is what an arm, a transfer or a part moves. Then what `with_scores`
    adds.

    Args:
        found: of the tuned model, from `verify`.
        tuned: the base under its adapter, live; or a checkpoint of its own.
        base: the base alone; its weights are changed for a moment and put back.
        prompts: few; every reference makes some twenty passes of each.
        backends: what to compare.

    Raises:
        BadInput, AdapterMismatch, UnsupportedModel: the two cannot be arms of one batch.
    """
    own = {TUNED: str(tuned.adapter or tuned.name)}
    arms = load_arms(base, own if tuned.adapter else None, None if tuned.adapter else own)
    engine = opened("engine", base.model, None, prompts)
    apart = {None: hf_model(base), Arm(TUNED): hf_model(tuned)}
    plain = [Row(prompt, arm=arm) for prompt in prompts for arm in apart]
    components, refusals = _components(base.model)
    puts = [put for prompt in prompts for arm in apart for put in _puts(base.model, prompt, arm, components)]
    ours = _logits(engine, plain)
    moved = _logits(engine, [put.row(None, put.into) for put in puts])
    alone = {(row.prompt.fact_id, row.arm): logits for row, logits in zip(plain, ours, strict=True)}
    states = {(p.fact_id, arm): run(model, p)[1] for p in prompts for arm, model in apart.items()}
    allowed = checks.logit_tolerance(base.model) * found.largest_logit
    comparisons: list[Comparison] = []
    shift = max(float((alone[p.fact_id, Arm(TUNED)] - alone[p.fact_id, None]).abs().max()) for p in prompts)
    for name in (name for name in dict.fromkeys(backends) if name != "engine"):
        try:
            references = {arm: opened(name, model, None, prompts) for arm, model in apart.items()}
        except (UnsupportedModel, BadInput) as error:
            refusals.append(Refusal(name, ONE_BATCH, str(error)))
            continue
        theirs = [_logits(references[row.arm], [replace(row, arm=None)])[0] for row in plain]
        comparisons.append(_compared(name, ONE_BATCH, ours, theirs, shift, allowed))
        for component in components:
            some = [(put, logits) for put, logits in zip(puts, moved, strict=True) if put.component == component]
            scale = max(float((logits - alone[put.prompt.fact_id, put.into]).abs().max()) for put, logits in some)
            quantity = f"transfer {component}"
            try:
                theirs = [
                    _logits(references[put.into], [put.row(states[put.prompt.fact_id, _other(put.into)], None)])[0]
                    for put, _ in some
                ]
            except UnsupportedModel as error:
                refusals.append(Refusal(name, quantity, str(error)))
            except NotFired as error:
                comparisons.append(Comparison(name, quantity, "logits", 0, None, allowed, None, fault=str(error)))
            else:
                comparisons.append(_compared(name, quantity, [of for _, of in some], theirs, scale, allowed))
        del references
    quantities = [ONE_BATCH, *(f"transfer {component}" for component in components)]
    merged, reasons = _parts(engine, arms.arm, tuned, base, prompts, allowed)
    comparisons += merged
    refusals += [Refusal("hooks", PARTS_OF, reason) for reason in reasons]
    quantities += [found_.quantity for found_ in merged]
    found = replace(
        found,
        quantities=[*found.quantities, *quantities],
        comparisons=[*found.comparisons, *comparisons],
        refusals=[*found.refusals, *refusals],
    )
    return with_scores(found, arms, tuned, prompts)


def _other(arm: Arm | None) -> Arm | None:
    return Arm(TUNED) if arm is None else None


def _components(model: PreTrainedModel) -> tuple[list[Component], list[Refusal]]:
    """What the model's layers have, and why not the rest."""
    try:
        for layer in decoder_layers(model):
            mlp_module(layer)
    except UnsupportedModel as error:
        return [one for one in COMPONENTS if one != "mlp_out"], [Refusal("engine", "transfer mlp_out", str(error))]
    return list(COMPONENTS), []


def _puts(model: PreTrainedModel, prompt: Prompt, into: Arm | None, components: Sequence[Component]) -> Iterator[_Put]:
    n_layers = len(decoder_layers(model))
    for component in components:
        at = prompt.subject_positions if component in ("resid_pre", "k", "v") else prompt.predicting
        layers = [n_layers // 2] if component.startswith("resid") else range(n_layers)
        counts = n_kv_heads(model) if component in ("k", "v") else [n_heads(model)] * n_layers
        by_head = component in BY_HEAD
        cells = tuple((layer, head) for layer in layers for head in (range(counts[layer]) if by_head else [None]))
        yield _Put(component, into, prompt, cells, tuple(at))


def _logits(backend: Backend, rows: Sequence[Row]) -> list[Tensor]:
    """At the predicting positions of each row, in the order asked."""
    found: dict[int, Tensor] = {}
    for output in backend.forward(rows):
        sizes = [len(row.prompt.predicting) for row in output.rows]
        found |= dict(zip(output.index, output.logits.float().cpu().split(sizes), strict=True))
    return [found[i] for i in range(len(rows))]


def _compared(
    backend: BackendName, quantity: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], scale: float, allowed: float
) -> Comparison:
    cells = sum(of.numel() for of in ours)
    if not all(bool(of.isfinite().all()) for of in (*ours, *theirs)):
        fault = "a logit is not finite"
        return Comparison(backend, quantity, "logits", cells, None, allowed, None, fault=fault)
    gap = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))
    return Comparison(backend, quantity, "logits", cells, scale, allowed, None, gap)


@torch.inference_mode()
def _parts(
    engine: Backend,
    arm: Callable[..., Arm | None],
    tuned: LoadedModel,
    base: LoadedModel,
    prompts: Sequence[Prompt],
    allowed: float,
) -> tuple[list[Comparison], list[str]]:
    """Each part of the update alone, against the base with that part's weights put in by hand."""
    try:
        updates = dict(_of_checkpoint(tuned, base) if tuned.adapter is None else _of_lora(tuned, base))
    except UnsupportedModel as error:
        return [], [str(error)]
    found, rows = [], [Row(prompt) for prompt in prompts]
    before, reference = _logits(engine, rows), opened("hooks", base.model, None, prompts)
    for part, weights in updates.items():
        ours = _logits(engine, [replace(row, arm=arm(TUNED, parts=[part])) for row in rows])
        with _put_in(base.model, weights):
            theirs = _logits(reference, rows)
        scale = max(float((one - other).abs().max()) for one, other in zip(ours, before, strict=True))
        found.append(_compared("hooks", f"{PARTS_OF}: {part}", ours, theirs, scale, allowed))
    return found, []


_Weights = dict[str, Tensor]
"""By a parameter's name, what it becomes."""


def _of_lora(tuned: LoadedModel, base: LoadedModel) -> Mapping[Part, _Weights]:
    """The base's weights with a plain LoRA's update in them, by part."""
    from peft.tuners.lora import LoraLayer

    found: dict[Part, _Weights] = {}
    for path, module in hf_model(tuned).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        part, plain = _PARTS.get(path.rpartition(".")[2]), module.get_base_layer()
        if part is None or type(plain) is not nn.Linear or module.lora_variant:
            raise UnsupportedModel(
                f"{path} is no plain LoRA on a projection of one part, so its weights are not merged by hand"
            )
        (name,) = module.lora_A
        down, up = module.lora_A[name].weight.float(), module.lora_B[name].weight.float()
        weight = base.model.get_parameter(f"{path}.weight")
        update = (module.scaling[name] * up @ down).to(weight.device)
        found.setdefault(part, {})[f"{path}.weight"] = weight.float() + update
    if not found:
        raise UnsupportedModel("the adapter is no LoRA, so its weights are not merged by hand")
    return found


def _of_checkpoint(tuned: LoadedModel, base: LoadedModel) -> Mapping[Part, _Weights]:
    """A checkpoint's weights, by part: told by the names of their modules, what stands outside the layers is `rest`."""
    inside = {id(weight) for layer in decoder_layers(base.model) for weight in layer.parameters()}
    theirs, found = dict(tuned.model.named_parameters()), dict[Part, _Weights]()
    for path, weight in base.model.named_parameters():
        part = _PARTS.get(path.split(".")[-2], "rest")
        if part == "rest" and id(weight) in inside and weight.ndim > 1:
            raise UnsupportedModel(f"{path} is no projection of one part, so its weights are not merged by hand")
        if not torch.equal(weight, theirs[path]):
            found.setdefault(part, {})[path] = theirs[path]
    return found


@contextmanager
def _put_in(model: PreTrainedModel, weights: _Weights) -> Iterator[None]:
    """Weights replaced, and then as they were."""
    kept = {path: model.get_parameter(path).clone() for path in weights}
    try:
        for path, weight in weights.items():
            model.get_parameter(path).copy_(weight)
        yield
    finally:
        for path, weight in kept.items():
            model.get_parameter(path).copy_(weight)
