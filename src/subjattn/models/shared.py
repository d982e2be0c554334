"""A second instance of a model on the same weights: whatever is put on it or written into it, the first keeps its own.

Adapters are put on such a twin. Modules and parameters are its own and only the numbers are shared, so nothing that
peft wraps, renames or replaces reaches the base; what it writes into a shared tensor (trained biases, a weight's
residual) goes to a copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


_Model = TypeVar("_Model", bound=nn.Module)


def tensors_of(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    return chain(module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse))


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the bytes of every parameter and buffer, by name."""

    def digest(tensor: Tensor) -> str:
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return hashlib.sha256(flat.numpy()).hexdigest()  # type: ignore[arg-type]

    names, tensors = zip(*tensors_of(model), strict=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, tensors), strict=True))


@contextmanager
def twin(model: _Model) -> Iterator[_Model]:
    """A twin of a model, to be changed inside: behind it the model has the numbers it had, and the twin its own."""
    shared = [(tensor, _alias(tensor)) for _, tensor in tensors_of(model)]
    copied = deepcopy(model, {id(tensor): alias for tensor, alias in shared})
    writes = _Writes({_place(tensor) for tensor, _ in shared})
    try:
        with writes:
            yield copied
    finally:
        written = [(tensor, alias) for tensor, alias in shared if _place(tensor) in writes.before]
        for _, alias in written:
            if _place(alias) in writes.before:
                alias.data = alias.detach().clone()
        with torch.no_grad():
            for place in writes.before:
                tensor = next(tensor for tensor, _ in written if _place(tensor) == place)
                tensor.untyped_storage().copy_(writes.before[place])


def _alias(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach() if type(tensor) is Tensor else tensor


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Writes(TorchDispatchMode):
    """Keeps what some storages held before they were first written into."""

    def __init__(self, places: set[int]) -> None:
        super().__init__()
        self.places = places - {0}
        self.before: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(given):
                    if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                        self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> None:
        place = _place(tensor)
        if place in self.places and place not in self.before:
            self.before[place] = tensor.untyped_storage().clone()
