"""Saving, loading and copying give the same function."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch

from iresflow_plugin.testing.case import Case, Live, Measurement, NotApplicableError, duplicate
from iresflow_plugin.testing.checks.measure import close
from iresflow_plugin.testing.checks.registry import check

SAME = 1e-9


def _outputs(case: Case, obj: Any) -> torch.Tensor:
    torch.manual_seed(case.seed)
    x, context = case.point(case.explicit), case.context()
    with torch.no_grad():
        y, log_det = Live(obj, case.door, torch.float64, train=False).call(case.explicit, x, context)
    return torch.cat([y.flatten(1), log_det[:, None]], 1)


@check("D14")
def state_dict_loads_into_a_fresh_model(case: Case) -> Iterator[Measurement]:
    """A state_dict, saved and loaded into a fresh model, gives the same function.

    Catches buffers shaped by the first batch, and state that is not in the state_dict.
    """
    trained = case.live(train=True)
    if not trained.modules:
        raise NotApplicableError("there is no module, hence no state_dict")
    with torch.no_grad():
        trained.call(case.explicit, case.point(case.explicit), case.context())  # what the first batch would shape
    trained.disturb()
    wanted = _outputs(case, duplicate(trained.obj))
    if case.factory is not None:
        fresh = Live(case.factory(), case.door, torch.float64, train=False)
    else:
        fresh = case.live()
        fresh.disturb(0.3)
    for source, target in zip(trained.modules, fresh.modules, strict=True):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
    sentence = "A state_dict loaded into a fresh model gives the same outputs and log-dets."
    yield close(_outputs(case, fresh.obj), wanted, SAME, sentence)


@check()
def deepcopy_gives_the_same_function(case: Case) -> Iterator[Measurement]:
    """copy.deepcopy gives the same function, with parameters of its own.

    Catches state shared between copies: an average of weights that follows the weights.
    """
    live = case.live()
    wanted = _outputs(case, live.obj)
    twin = copy.deepcopy(live.obj)
    yield close(_outputs(case, twin), wanted, SAME, "A deep copy gives the same outputs and log-dets.")
    if live.parameters():
        Live(twin, case.door, torch.float64, train=False).disturb(0.5)
        yield close(_outputs(case, live.obj), wanted, SAME, "Changing a deep copy leaves the original as it was.")


@check()
def pickle_gives_the_same_function(case: Case) -> Iterator[Measurement]:
    """pickle gives the same function.

    Catches lambdas and hooks kept as attributes, on which multiprocessing stops.
    """
    live = case.live()
    wanted = _outputs(case, live.obj)
    try:
        data = pickle.dumps(live.obj)
    except Exception as error:
        if not live.modules:
            raise NotApplicableError("functions that cannot be pickled hold no state") from error
        raise
    yield close(_outputs(case, pickle.loads(data)), wanted, SAME, "A pickled copy gives the same outputs and log-dets.")
