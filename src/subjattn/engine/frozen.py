"""Norms as the linear maps they are once their scale is fixed, found by what they do instead of by their names.

A norm divides by a number that it takes from its input. With that number kept, what it gives is linear in what it is
given, so parts of its input have parts of its output that add up ("frozen" norms, Elhage et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subjattn.engine.checks import LAYER_TOLERANCE
from subjattn.errors import UnsupportedModel


@dataclass(frozen=True)
class Frozen:
    """y = scale · weight ⊙ (x − mean of x, where `centred`) + bias, at the scale of every row; all in float64."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    scale: Float[Tensor, " row"]
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, x: Float[Tensor, "row d_model"], y: Float[Tensor, "row d_model"]) -> Self:
        """The norm at the scales that made `y` of `x`.

        Raises:
            UnsupportedModel: the module is not an RMS or layer norm over the last dimension.
        """
        probe = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        probe[1::2] = -1
        bias = norm(torch.zeros_like(probe)[None])[0].double()
        weight = (norm(probe[None])[0].double() - bias) / probe.double()
        shifted = norm(probe[None] + 1)[0].double() - bias
        centred = bool((shifted - weight * probe).norm() < 0.1 * weight.norm())
        wide, made = x.double(), y.double() - bias
        unit = weight * (wide - wide.mean(-1, keepdim=True) if centred else wide)
        scale = (made * unit).sum(-1) / (unit * unit).sum(-1)
        apart = float((made - scale[:, None] * unit).norm() / made.norm())
        if not apart <= LAYER_TOLERANCE[x.dtype]:
            raise UnsupportedModel(
                f"{type(norm).__name__} is no norm that is linear at a fixed scale ({apart:.1e} of it is left over), "
                "so what goes through it has no parts that add up"
            )
        return cls(weight, bias, scale, centred)

    def forward(self, part: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What a part of the input becomes; the bias belongs to no part."""
        part = part.double()
        if self.centred:
            part = part - part.mean(-1, keepdim=True)
        return self.scale[:, None] * self.weight * part

    def back(self, direction: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The direction in the input whose product with a part is that of `direction` with what it becomes."""
        direction = direction.double() * self.weight * self.scale[:, None]
        return direction - direction.mean(-1, keepdim=True) if self.centred else direction
