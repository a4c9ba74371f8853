"""The memory of a certificate."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")


class _Kept(NamedTuple, Generic[Found]):
    weight: Tensor
    settings: Hashable
    found: Found


class Memo(Generic[Found]):
    """Keeps what was found out about a weight, as long as the weight and the settings are what it was found from.

    What is found belongs to a copy that was taken first, whatever other threads do to the weight meanwhile, and what
    is returned is what this call has found or compared, never what another thread has put here since.
    """

    def __init__(self) -> None:
        self._kept: _Kept[Found] | None = None

    def recall(self, weight: Tensor, settings: Hashable, find: Callable[[Tensor], Found]) -> Found:
        """find(copy of the weight), or what it gave the last time."""
        kept = self._kept
        if kept is None or kept.settings != settings or not _same(kept.weight, weight):
            # it may serve a training step next, which inference tensors cannot
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
                copy = weight.clone()
                kept = self._kept = _Kept(copy, settings, find(copy))
        return kept.found

    def __reduce__(self) -> tuple:
        return Memo, ()  # neither copied nor saved


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
