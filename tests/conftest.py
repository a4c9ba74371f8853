"""One seed, one thread, and the hypothesis profiles dev, ci and nightly (HYPOTHESIS_PROFILE chooses)."""

import pytest
import torch

from iresflow_plugin.log_det import default
from iresflow_plugin.testing.strategies import register_profiles

torch.set_num_threads(1)
torch.set_flush_denormal(True)

register_profiles()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def random_densities_have_been_told(monkeypatch):
    """The one warning of a process about random log-dets has a test of its own, and is in nobody else's way."""
    monkeypatch.setattr(default, "_told", ["random"])
