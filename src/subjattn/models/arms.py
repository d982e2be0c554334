"""A base model and its tuned ones side by side, on one copy of the base's weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from subjattn.engine.anatomy import decoder_layers, mlp_module, mlp_modules
from subjattn.engine.arms import Change, Changed, Tuned, attach, routed
from subjattn.engine.checks import check_model, probe_ids, relative_gap, tolerance
from subjattn.engine.interventions import Arm, Part
from subjattn.engine.parts import Place, parts_of, with_weights
from subjattn.errors import BadInput, UnsupportedModel
from subjattn.models.adapter import special, with_adapter
from subjattn.models.load import LoadedModel, load_model
from subjattn.models.names import identity
from subjattn.models.shared import digests, tensors_of, twin
from subjattn.models.streamed import fits, stream_model


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"
PARTS: tuple[Part, ...] = ("qk", "vo", "mlp", "rest")
_SAYS_NOTHING = re.compile(
    r"_name_or_path|transformers_version|(torch_)?dtype|architectures|use_cache|.*_token_id|id2label|label2id|"
    r"max_position_embeddings|tokenizer_class|.*dropout.*"
)
"""Fields of a configuration that do not change what a model computes of these tokens; the probe tells of the rest."""


@dataclass(frozen=True)
class Source:
    """Where a tuned model comes from: an adapter, live and unmerged, or a checkpoint; and its arm on the base."""

    name: str
    kind: Literal["adapter", "checkpoint"]
    held: str
    arm: str = field(repr=False)
    tuned: Tuned = field(repr=False)


@dataclass(frozen=True)
class Arms:
    """A base model, and tuned models that share its weights; rows of any of them run in one batch.

    The base's modules are untouched: `base` is measured as ever. `arm` names one in rows of the engine, and in
    `transfer`, `swap_weights` and others that compare.
    """

    base: LoadedModel
    sources: Mapping[str, Source]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of all of them."""
        return self.base.tokenizer

    def arm(
        self,
        name: str,
        parts: Collection[Part] | None = None,
        layers: Collection[int] | None = None,
        positions: Collection[int] | None = None,
    ) -> Arm | None:
        """A model by its name, `base` included; or only some parts of its update, in some layers or at some positions.

        Args:
            name: of a tuned model, or `base`.
            parts: of `qk` (projections and norms of queries and keys), `vo`, `mlp` and `rest` (other norms,
                embeddings, unembedding); None: all.
            layers: with parts; None: all, what lies outside the layers included.
            positions: tokens that go by the tuned weights; None: all.

        Raises:
            BadInput: no such model, part or layer.
        """
        if name == BASE:
            return None
        if name not in self.sources:
            raise BadInput(f"there is no arm {name!r}: there are {', '.join([BASE, *self.sources])}")
        cells = None
        if parts is not None or layers is not None:
            cells = self.cells(name)
            for what, asked, held in (("part", parts, {part for _, part in cells}), ("layer", layers, dict(cells))):
                if missing := [one for one in asked or () if one not in held]:
                    raise BadInput(f"arm {name!r} changes nothing in {what} {missing[0]!r}")
            cells = frozenset(
                (layer, part)
                for layer, part in cells
                if (parts is None or part in parts) and (layers is None or layer in layers)
            )
        return Arm(self.sources[name].arm, cells, None if positions is None else frozenset(positions))

    def cells(self, name: str) -> frozenset[tuple[int, Part]]:
        """Every (layer, part) that a tuned model changes; -1 lies outside the layers.

        Raises:
            UnsupportedModel: where its weights cannot be told into parts.
        """
        return self.sources[name].tuned.cells()

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to get the same numbers: the base's, and what each tuned model is and how it is held."""
        tuned = {
            name: {
                "source": source.name,
                "identity": identity(source.name),
                "kind": source.kind,
                "held": source.held,
            }
            for name, source in self.sources.items()
        }
        return self.base.provenance() | {"arms": tuned}


def load_arms(
    base: str | LoadedModel,
    adapters: Mapping[str, str] | None = None,
    checkpoints: Mapping[str, str | LoadedModel] | None = None,
    *,
    identical: Collection[str] = (),
    stream: bool | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> Arms:
    """Load a base model and tuned ones, so that their runs share batches and weights.

    Args:
        base: name of the base model, as for `load_model`; or one that is loaded, without an adapter.
        adapters: PEFT adapters by the names of their arms. Of a plain LoRA the update alone is kept.
        checkpoints: whole tuned models by the names of their arms; or ones that are loaded.
        identical: arms that may change nothing, as controls.
        stream: whether the layers of checkpoints are read from disk as they are called, and not held beside the base;
            None: where they would take more than half of the memory that is free.
        dtype: as for `load_model`.
        device: as for `load_model`.

    Raises:
        BadInput: no arms, a name twice or `base`, a checkpoint that is another kind of model, has another tokenizer, or
            is loaded in another precision or place.
        AdapterMismatch: see `load_model`.
        UnsupportedModel: an update that cannot be put on single tokens.
    """
    adapters, checkpoints = dict(adapters or {}), dict(checkpoints or {})
    names = [*adapters, *checkpoints]
    if not names or BASE in names or len(set(names)) < len(names):
        raise BadInput(f"arms {names}: give at least one, each a name of its own, and not {BASE!r}")
    loaded = load_model(base, dtype=dtype, device=device) if isinstance(base, str) else base
    if loaded.adapter is not None or getattr(loaded.model, "peft_config", None):
        raise BadInput(f"model {loaded.name!r} carries an adapter: give the base alone, and the adapter as an arm")
    check_model(loaded.model)
    sources = {}
    for name, adapter in adapters.items():
        attached = _attach_adapter(loaded, name, str(adapter), may_be_identical=name in identical)
        sources[name] = Source(str(adapter), "adapter", "update alone, unmerged", *attached)
    for name, checkpoint in checkpoints.items():
        kind, where = loaded.model.dtype, loaded.model.device
        here = isinstance(checkpoint, LoadedModel)
        streamed = not here and (not fits(str(checkpoint), kind, where) if stream is None else stream)
        if isinstance(checkpoint, LoadedModel):
            other = checkpoint
            if (other.model.dtype, other.model.device) != (kind, where):
                raise BadInput(
                    f"checkpoint {name!r} is loaded as {other.model.dtype} on {other.model.device} and the base as "
                    f"{kind} on {where}: load both alike"
                )
            check_model(other.model)
        elif streamed:
            other = stream_model(str(checkpoint), kind, str(where))
        else:
            other = load_model(str(checkpoint), dtype=str(kind).removeprefix("torch."), device=str(where))
        attached = _attach_checkpoint(loaded, name, other, may_be_identical=name in identical)
        held = "layers read from disk as they are called" if streamed else "whole, beside the base"
        source = f"{other.name}, in memory" if here else str(checkpoint)
        sources[name] = Source(source, "checkpoint", held, *attached)
    return Arms(loaded, sources)


class _Lora:
    """A plain LoRA's update, added as peft adds it."""

    def __init__(self, layer: Any) -> None:
        (name,) = layer.lora_A
        self.down, self.up, self.scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]

    def __call__(self, inputs: Tensor, output: Tensor, *_: Any, **__: Any) -> Tensor:
        update = self.up(self.down(inputs.to(self.down.weight.dtype)))
        return (output + update * self.scaling).to(output.dtype)  # type: ignore[no-any-return]


class _Other:
    """A module in place of the base's: another checkpoint's, or one that peft puts around it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, inputs: Tensor, output: Tensor, *more: Any, **named: Any) -> Tensor:  # noqa: ARG002
        more, named = tree_map_only(Tensor, lambda of: of[None], (more, named))
        found = self.module(inputs[None], *more, **named)
        return (found[0] if isinstance(found, tuple) else found)[0]  # type: ignore[no-any-return]


def _attach_adapter(base: LoadedModel, name: str, adapter: str, *, may_be_identical: bool) -> tuple[str, Tuned]:
    model, kept = base.model, digests(base.model)
    before = _probe(model)
    with twin(model) as tuned:
        with_adapter(tuned, base.tokenizer, base.name, adapter, may_be_identical=may_be_identical)
        tuned.eval().requires_grad_(False)
        expected = _probe(tuned)
    _refuse_changed(base, kept, name, tuned.peft_config)
    places = parts_of(model)
    changes: dict[nn.Module, Change] = {}
    for path, own, theirs in _changed(model, tuned):
        if own not in places and own not in {one for _, one in _whole_mlps(model)}:
            raise UnsupportedModel(
                f"arm {name!r}: its adapter changes {path} as a whole, which tokens cannot share: measure it by itself"
            )
        changes[own] = _Lora(theirs) if _is_plain(own, theirs) else _Other(theirs)
    for number, mlp in _whole_mlps(model):
        if any(isinstance(changes.get(one), _Other) for one in mlp.modules()):  # experts take more than their tokens
            changes = {one: change for one, change in changes.items() if one not in set(mlp.modules())}
            changes[mlp], places[mlp] = (
                _Other(mlp_module(decoder_layers(tuned)[number])),
                places[next(with_weights(mlp))],
            )
    return _attach(model, name, changes, places, before, expected)


def _whole_mlps(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """MLPs that are one module, with their layers."""
    each = ((number, mlp_modules(layer)) for number, layer in enumerate(decoder_layers(model)))
    return [(number, found[0]) for number, found in each if len(found) == 1]


def _changed(own: nn.Module, theirs: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules that a twin has otherwise, the outermost: wrapped ones, and those with other numbers."""
    if type(own) is not type(theirs) or not _equal(own, theirs):
        yield path, own, theirs
        return
    others = dict(theirs.named_children())
    if others.keys() != dict(own.named_children()).keys():
        raise UnsupportedModel(f"an adapter that adds modules to {path or 'the model'} is no arm: measure it by itself")
    for name, child in own.named_children():
        yield from _changed(child, others[name], f"{path}.{name}".lstrip("."))


def _is_plain(own: nn.Module, theirs: nn.Module) -> bool:
    """Whether an adapter's module is a LoRA that adds to what the base's gives, and changes nothing else in it."""
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    if not isinstance(theirs, LoraLayer) or theirs.lora_variant or not isinstance(own, nn.Linear | Conv1D):
        return False
    return _equal(own, theirs.get_base_layer())


def _refuse_changed(base: LoadedModel, kept: Mapping[str, str], name: str, configs: Mapping[str, Any] | None) -> None:
    """Refuse an adapter that reached the base itself: all further numbers of the base would be another model's."""
    now = digests(base.model)
    if changed := sorted(tensor for tensor in kept.keys() | now.keys() if kept.get(tensor) != now.get(tensor)):
        (config,) = (configs or {"": None}).values()
        raise UnsupportedModel(
            f"arm {name!r}: loading its adapter{special(config)} changed {len(changed)} tensors of the base, such as "
            f"{changed[0]}: load the base anew, and measure each model by itself"
        )


def _attach_checkpoint(
    base: LoadedModel, name: str, other: LoadedModel, *, may_be_identical: bool
) -> tuple[str, Tuned]:
    _refuse_other_kind(base, other)
    ours, theirs = base.model, other.model
    before = _probe(ours)
    path = {module: where for where, module in ours.named_modules()}
    units = {module: module for module in with_weights(ours)}
    for _, mlp in _whole_mlps(ours):
        units |= dict.fromkeys(with_weights(mlp), mlp)
    changed = {
        unit: theirs.get_submodule(path[unit])
        for module, unit in units.items()
        if not _equal(module, theirs.get_submodule(path[module]))
    }
    if not changed and not may_be_identical:
        raise BadInput(f"checkpoint {other.name!r} is the base itself: name it in `identical` if it should be")
    parts = parts_of(ours) | {mlp: Place(number, {"mlp": None}) for number, mlp in _whole_mlps(ours)}
    changes = {unit: _Other(module) for unit, module in changed.items()}
    return _attach(ours, name, changes, parts, before, _probe(theirs))


def _attach(
    model: PreTrainedModel,
    name: str,
    changes: Mapping[nn.Module, Change],
    places: Mapping[nn.Module, Place],
    before: Tensor,
    expected: Tensor,
) -> tuple[str, Tuned]:
    """Attach after a check: in one batch, base and tuned rows give what each model gave by itself, `before` the arm."""
    tuned = Tuned({module: Changed(change, places[module]) for module, change in changes.items()})
    arm = attach(model, name, tuned)
    base, found = _probe(model, [None, Arm(arm)]).unbind(1)
    gap = max(relative_gap(base, before[:, 0]), relative_gap(found, expected[:, 0]))
    if not gap <= tolerance(model):
        raise UnsupportedModel(
            f"arm {name!r}: in one batch with the base its logits part by {gap:.1e} of their size from those it has by "
            "itself: measure each model by itself"
        )
    return arm, tuned


@torch.inference_mode()
def _probe(model: PreTrainedModel, arms: Iterable[Arm | None] = (None,)) -> Tensor:
    """Logits of two texts under each arm, in one batch: `[text, arm, pos, vocab]`."""
    arms, text = list(arms), probe_ids(model)
    ids = torch.stack([text[0], text[0].flip(0)]).repeat_interleave(len(arms), 0)
    with routed(model, arms) as routes:
        codes = torch.tensor([[0 if arm is None else routes.code[arm]] for arm in arms]).repeat(2, 1).expand_as(ids)
        routes.choose(codes)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.view(2, len(arms), *logits.shape[1:])


def _equal(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules have the same parameters and buffers of their own."""
    with align_module_device(theirs):  # where its weights are on disk
        own, others = (dict(tensors_of(one, recurse=False)) for one in (ours, theirs))
        same = own.keys() == others.keys()
        return same and all(torch.equal(one, others[name].to(one.device)) for name, one in own.items())


def _refuse_other_kind(base: LoadedModel, other: LoadedModel) -> None:
    """Refuse a checkpoint that is no tuned version of the base: of another shape, or that reads other tokens."""
    ours, theirs = (
        {key: value for key, value in of.model.config.to_dict().items() if not _SAYS_NOTHING.fullmatch(key)}
        for of in (base, other)
    )
    differ = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if type(base.model) is not type(other.model) or differ:
        what = f"its configuration differs in {', '.join(differ[:3])}" if differ else "it is another architecture"
        raise BadInput(f"checkpoint {other.name!r} is no tuned version of {base.name!r}: {what}")
    if base.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise BadInput(
            f"checkpoint {other.name!r} has another tokenizer than {base.name!r}: the two would read different tokens"
        )
