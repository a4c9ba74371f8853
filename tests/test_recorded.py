"""The present code against the numbers of an older revision: tests/recorded.py says which, and how they were made."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from iresflow_plugin import ResidualBlock
from tests import recorded
from tests.recorded import CASES, Inputs, Numbers

every_block = pytest.mark.parametrize("name", CASES)


@cache
def file() -> dict[str, dict[str, Numbers]]:
    return torch.load(Path(__file__).with_name("recorded.pt"), weights_only=True)


def block_of(name: str) -> ResidualBlock:
    block = recorded.build(name)
    block.load_state_dict(file()[name]["state"], strict=True)
    return block


def inputs_of(name: str) -> Inputs:
    return file()[name]["inputs"]


def outputs_of(name: str) -> Inputs:
    """What the inverse takes: y in the place of x."""
    return {**inputs_of(name), "x": file()[name]["forward"]["y"]}


def compare(actual: Numbers, name: str, kind: str, keys: Iterable[str] | None = None, atol: float = 1e-10) -> None:
    """Of one kind of numbers those under these keys, or all."""
    expected = file()[name][kind]
    assert actual.keys() == expected.keys()
    rtol, atol = (1e-5, 1e-5) if CASES[name].dtype == torch.float32 else (1e-9, atol)
    for key in keys or expected:
        assert_close(
            actual[key], expected[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{kind}, {key}: {text}"
        )


def test_file_holds_these_blocks() -> None:
    assert file().keys() == CASES.keys()


@every_block
def test_y(name: str) -> None:
    compare(recorded.forward(block_of(name), inputs_of(name)), name, "forward", ["y"])


@every_block
def test_log_det(name: str) -> None:
    compare(recorded.forward(block_of(name), inputs_of(name)), name, "forward", ["log_det"])


@every_block
def test_certificate(name: str) -> None:
    expected = file()[name]["certificate"]["bound"]
    assert recorded.certificate(block_of(name))["bound"] == pytest.approx(expected, rel=1e-5)


@every_block
def test_preimage(name: str) -> None:
    compare(recorded.inverse(block_of(name), outputs_of(name)), name, "inverse", ["x", "preimage"], atol=1e-8)


@every_block
def test_inverse_log_det(name: str) -> None:
    compare(recorded.inverse(block_of(name), outputs_of(name)), name, "inverse", ["log_det"], atol=1e-8)


@every_block
def test_gradients(name: str) -> None:
    block = block_of(name)
    compare(recorded.gradients(block, block, inputs_of(name)), name, "gradients")


@every_block
def test_inverse_gradients(name: str) -> None:
    block = block_of(name)
    actual = recorded.gradients(block.inverse, block, outputs_of(name))
    compare(actual, name, "inverse_gradients", atol=1e-8)


@every_block
def test_series(name: str) -> None:
    compare(recorded.series(block_of(name), inputs_of(name)), name, "series")


@every_block
def test_series_gradients(name: str) -> None:
    compare(recorded.series_gradients(block_of(name), inputs_of(name)), name, "series_gradients")
