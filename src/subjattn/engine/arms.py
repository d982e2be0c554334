"""Arms: tuned models that share one base model's weights, every token going by those of its own run.

A tuned model is known by its changes: what it computes otherwise in modules of the base. A plain LoRA adds its
update to a module's output for the tokens of its arm; any other adapter, and any module of another checkpoint, gives
them an output of its own. The base's modules stay as they are, so rows of any arms, and of none, share a batch, and
so do the flat tokens of cones, where an adapter's own forward would not know whose they are.

`routed` hangs the changes on the modules for one pass, and takes them off whatever happens in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from operator import itemgetter
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from subjattn.engine.interventions import Arm, Part, Row, Run
from subjattn.engine.parts import Place
from subjattn.errors import UnsupportedModel


class Change(Protocol):
    """What a tuned model makes of a module's output for some tokens."""

    def __call__(
        self, inputs: Float[Tensor, "token ..."], output: Float[Tensor, "token ..."], *more: Any, **named: Any
    ) -> Tensor:
        """The tuned module's output for inputs of which the base module gives `output`; `more` it is given by token."""
        ...


@dataclass(frozen=True)
class Changed:
    """One module that a tuned model has otherwise, and what it is (see parts.py)."""

    change: Change
    place: Place


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tuned model, by the modules of its base that it changes."""

    modules: dict[nn.Module, Changed] = field(default_factory=dict)

    def cells(self) -> frozenset[tuple[int, Part]]:
        """Every (layer, part) that it changes.

        Raises:
            UnsupportedModel: a module that belongs to no part.
        """
        for module, changed in self.modules.items():
            if not changed.place.columns:
                raise UnsupportedModel(
                    f"layer {changed.place.layer}: a {type(module).__name__} makes keys and values in one, so the "
                    "tuned weights cannot be split into parts: swap whole layers"
                )
        places = [changed.place for changed in self.modules.values()]
        return frozenset((place.layer, part) for place in places for part in place.columns)


_tuned: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, Tuned]] = WeakKeyDictionary()


def attach(model: nn.Module, name: str, tuned: Tuned) -> str:
    """Let rows of this model name a tuned model as their arm, for as long as somebody holds it.

    Returns:
        The name of its arm: the one asked for, or one like it where another tuned model of this base has that.
    """
    known = _tuned.setdefault(model, WeakValueDictionary())
    names = (name if number == 1 else f"{name} ({number})" for number in count(1))
    free = next(one for one in names if one not in known)
    known[free] = tuned
    return free


def tuned_of(model: nn.Module) -> Mapping[str, Tuned]:
    """The tuned models that rows of this one may name."""
    return _tuned.get(model, {})


def check_arms(model: nn.Module | None, rows: Iterable[Row]) -> None:
    """Refuse arms that a model has not: their numbers would be its own.

    Raises:
        UnsupportedModel: such an arm, or one of parts that its tuned model does not change.
    """
    known = {} if model is None else tuned_of(model)
    asked: dict[Arm, Run] = {}
    for row in rows:
        for run in (row.run, *row.sources):
            if run.arm is not None:
                asked.setdefault(run.arm, run)
    for arm, run in asked.items():
        if arm.name not in known:
            raise UnsupportedModel(
                f"fact {run.prompt.fact_id}: a row of arm {arm.name!r} was asked of a single model, which would answer "
                "in its place: load them together by load_arms(), or measure each with its own model"
            )
        if arm.cells is not None and (outside := arm.cells - known[arm.name].cells()):
            raise UnsupportedModel(f"arm {arm.name!r} changes nothing in {sorted(outside)[0]} (layer, part)")


class Routes:
    """Which tokens of the present pass go by which arm's weights."""

    def __init__(self, arms: Sequence[Arm], tuned: Mapping[str, Tuned], head: nn.Module | None) -> None:
        self.code = {arm: i for i, arm in enumerate(arms, 1)}
        self.head = head
        self.uses: dict[nn.Module, list[tuple[Changed, Tensor | None, tuple[int, ...]]]] = {}
        self._shapes: dict[bool, tuple[int, ...]] = {}
        self._codes: dict[bool, Tensor] = {}
        self._found: dict[tuple[bool, tuple[int, ...], torch.device], slice | Tensor | None] = {}
        self._inside = False
        for name in dict.fromkeys(arm.name for arm in arms):
            own = [arm for arm in arms if arm.name == name]
            for module, changed in tuned[name].modules.items():
                users: dict[frozenset[Part] | None, list[int]] = {}
                for arm in own:
                    parts = _parts(arm, changed.place)
                    if parts is None or parts:
                        users.setdefault(parts, []).append(self.code[arm])
                for parts, codes in users.items():
                    use = changed, _columns(changed.place, parts), tuple(codes)
                    self.uses.setdefault(module, []).append(use)

    def of_runs(self, runs: Sequence[Run], length: int) -> Int[Tensor, "row pos"]:
        """The code of every position of some runs; 0 is the base."""
        codes = torch.zeros(len(runs), length, dtype=torch.long)
        for i, run in enumerate(runs):
            if run.arm is not None:
                at = slice(None) if run.arm.positions is None else sorted(run.arm.positions)
                codes[i, at] = self.code[run.arm]
        return codes

    def choose(self, codes: Int[Tensor, "row pos"], predictions: Int[Tensor, "row pos"] | None = None) -> None:
        """Say whose the tokens of the next modules are, and those that meet the unembedding (None: the same)."""
        if self.code:
            self._codes = {False: codes, True: codes if predictions is None else predictions}
            self._found.clear()

    def of_positions(self, places: Sequence[tuple[Run, int]]) -> Int[Tensor, " place"]:
        """The code of single positions."""
        codes = [
            0 if (arm := run.arm) is None or (arm.positions is not None and at not in arm.positions) else self.code[arm]
            for run, at in places
        ]
        return torch.tensor(codes)

    @property
    def changes_head(self) -> bool:
        return self.head in self.uses

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook that gives tokens what their arm's module would."""
        if self._inside:  # an adapter's own module calls the base's
            return None
        state, codes = output[0] if isinstance(output, tuple) else output, self._codes[module is self.head]
        changed = False
        inputs, *more = args or list(kwargs.values())[:1]
        named = kwargs if args else dict(list(kwargs.items())[1:])
        if by_head := self.uses[module][0][0].place.by_head:
            inputs, state = inputs.transpose(1, 2), state.transpose(1, 2)
        lead = _leading(module, inputs, codes)
        if inputs.shape[:lead] != codes.shape and lead == 2:
            inputs, state = (of.expand(len(codes), *of.shape[1:]) for of in (inputs, state))
        inputs, flat = inputs.flatten(0, lead - 1), state.flatten(0, lead - 1)
        more, named = tree_map_only(Tensor, partial(_flat, module, codes), (more, named))
        for use, columns, arms in self.uses[module]:
            at = self._tokens(module is self.head, arms, flat.device)
            if at is None:
                continue
            if not changed:
                flat, changed = flat.clone(), True
            self._inside = True
            try:
                own, by_name = tree_map_only(Tensor, itemgetter(at), (more, named))
                found = use.change(inputs[at], flat[at], *own, **by_name).to(flat)
            finally:
                self._inside = False
            flat[at] = found if columns is None else torch.where(columns.to(flat.device), found, flat[at])
        if not changed:
            return None
        flat = flat.view(state.shape).transpose(1, 2) if by_head else flat.view(state.shape)
        return (flat, *output[1:]) if isinstance(output, tuple) else flat

    def _tokens(self, head: bool, arms: tuple[int, ...], device: torch.device) -> slice | Tensor | None:
        """Tokens of these arms: a slice where they lie together, None where there are none."""
        key = head, arms, device
        if key not in self._found:
            at = torch.isin(self._codes[head].flatten(), torch.tensor(arms)).nonzero()[:, 0]
            together = len(at) > 0 and int(at[-1]) - int(at[0]) + 1 == len(at)
            some = slice(int(at[0]), int(at[-1]) + 1) if together else at.to(device)
            self._found[key] = some if len(at) else None
        return self._found[key]


def _parts(arm: Arm, place: Place) -> frozenset[Part] | None:
    """The parts of a module that an arm has tuned; None: all of it."""
    if arm.cells is None:
        return None
    parts = frozenset(part for part in place.columns if (place.layer, part) in arm.cells)
    return None if parts == frozenset(place.columns) else parts


def _columns(place: Place, parts: frozenset[Part] | None) -> Tensor | None:
    if parts is None:
        return None
    masks = [mask for part in parts if (mask := place.columns[part]) is not None]
    return torch.stack(masks).any(0)


def _leading(module: nn.Module, inputs: Tensor, codes: Tensor) -> int:
    """How many leading dimensions of a module's input count tokens.

    Position embeddings are given one row for all.
    """
    if inputs.shape[:2] == codes.shape or (len(inputs) == 1 and inputs.shape[1:2] == codes.shape[1:]):
        return 2
    if len(inputs) == codes.numel():
        return 1
    raise _unshared(module, inputs)


def _unshared(module: nn.Module, given: Tensor) -> UnsupportedModel:
    return UnsupportedModel(
        f"a {type(module).__name__} takes {tuple(given.shape)}, which does not say whose tokens they are, so it "
        "cannot be shared by arms: measure each model by itself"
    )


def _flat(module: nn.Module, codes: Tensor, given: Tensor) -> Tensor:
    """One row for every token of what a module is given beside its input, such as its position."""
    if given.shape[:2] != codes.shape and (len(given) != 1 or given.shape[1:2] != codes.shape[1:]):
        raise _unshared(module, given)
    return given.expand(*codes.shape, *given.shape[2:]).flatten(0, 1)


@contextmanager
def routed(model: nn.Module, arms: Collection[Arm | None]) -> Iterator[Routes]:
    """Let a model compute the tokens that `choose` names by the weights of these arms."""
    named = list(dict.fromkeys(arm for arm in arms if arm is not None))
    routes = Routes(named, tuned_of(model), model.get_output_embeddings() if named else None)  # type: ignore[operator]
    with ExitStack() as stack:
        for module in routes.uses:
            stack.callback(module.register_forward_hook(routes.hook, with_kwargs=True).remove)
        yield routes
