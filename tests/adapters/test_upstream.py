"""The hosts' own tests, pointed at our adapters, for whoever has the hosts' sources (their wheels hold no tests):

    UPSTREAM_ZUKO=/path/to/zuko UPSTREAM_PYRO=/path/to/pyro pytest tests/adapters/test_upstream.py

What they ask is asked in our words by test_zuko.py and test_pyro.py, which always run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters import test_zuko


def sources(host: str) -> Path:
    folder = os.environ.get(f"UPSTREAM_{host.upper()}")
    if folder is None:
        pytest.skip(f"UPSTREAM_{host.upper()} names no folder with the sources of {host}")
    return Path(folder)


@pytest.mark.parametrize("make", [test_zuko.flow, test_zuko.mixed])
def test_zukos_test_flows(make, tmp_path) -> None:
    file = sources("zuko") / "tests" / "test_flows.py"
    spec = importlib.util.spec_from_file_location("zukos_test_flows", file)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    theirs.test_flows(tmp_path, make)


# In a process of its own: Pyro's tests are a package named tests, as ours are.
PYRO = """
import sys, unittest, torch
torch.set_default_dtype(torch.float64)  # as in Pyro's conftest.py
torch.manual_seed(123)
from tests.distributions.test_transforms import TransformTests
from iresflow_plugin.adapters.pyro import ConditionalResidualTransform, ResidualTransform
from iresflow_plugin.nets import LipschitzMLP
from iresflow_plugin.testing import scale_weights

def branch(features, context=None):
    return scale_weights(LipschitzMLP([features, 16, 16, features], context))

class Ours(TransformTests):
    def test_residual(self):
        self._test(lambda features: ResidualTransform(branch(features)))

    def test_residual_with_cache(self):
        self._test(lambda features: ResidualTransform(branch(features), cache_size=1))

    def test_residual_the_other_way_round(self):
        # inverse=False: that test of theirs calls `_call`, which torch's inverses do not have
        self._test(lambda features: ResidualTransform(branch(features)).inv, inverse=False, autodiff=False)

    def test_conditional_residual(self):
        self._test_conditional(lambda features, context: ConditionalResidualTransform(branch(features, context)))

suite = unittest.TestSuite(map(Ours, [name for name in vars(Ours) if name.startswith("test")]))
result = unittest.TextTestRunner(verbosity=2).run(suite)
sys.exit(not (result.wasSuccessful() and result.testsRun == 4))
"""


def test_pyros_transform_tests() -> None:
    done = subprocess.run([sys.executable, "-c", PYRO], cwd=sources("pyro"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
