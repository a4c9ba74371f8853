"""One seed, one thread, and the hypothesis profiles dev, ci and nightly (HYPOTHESIS_PROFILE chooses)."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
torch.set_flush_denormal(True)

_COMMON = dict(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("dev", max_examples=15, **_COMMON)
settings.register_profile("ci", max_examples=30, **_COMMON)
settings.register_profile("nightly", **{**_COMMON, "max_examples": 500, "derandomize": False})
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
