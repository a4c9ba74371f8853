"""A module that is its map."""

from __future__ import annotations

from torch import Tensor, nn

from iresflow_plugin.maps import Map


class Part(nn.Module):
    """Base class of modules to build branches from: `as_map` says what it computes and how steep it is.

    `forward` evaluates that map, and so does a block. To write a part of your own, write `as_map`.
    """

    def as_map(self, context: Tensor | None = None) -> Map:
        """The part for one call, with the weights and the context of now. Without a context it has bounds alone."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.as_map(context)(x)
