"""One seed, one thread, and the hypothesis profiles dev, ci and nightly (HYPOTHESIS_PROFILE chooses)."""

import pytest
import torch

from iresflow_plugin.testing.strategies import register_profiles

torch.set_num_threads(1)
torch.set_flush_denormal(True)

register_profiles()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
