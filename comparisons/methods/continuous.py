"""Continuous flows: data drift to noise along an ordinary differential equation. FFJORD."""

from __future__ import annotations

from torch import nn

from comparisons.methods.density import Method
from comparisons.methods.hosts import ZukoDensity

EXACT_UP_TO = 12  # features: beyond this the exact trace costs too much
TRAINING_TOLERANCE = 1e-3  # of 1e-4 a step takes twice the time, and the loss was the same to three digits
EVALUATION_TOLERANCE = 1e-6


class FfjordDensity(ZukoDensity):
    """A `zuko.flows.CNF`, coarse in training and fine in evaluation, as in the paper.

    Beyond `EXACT_UP_TO` features the trace is Hutchinson's estimate with one probe per point, in training and in
    evaluation: with 63 features an exact one takes 63 products an evaluation of the field, an hour for the test points
    of bsds300. The solver's steps are chosen for a whole batch, so that a log_prob depends on its neighbours, within
    the tolerance (and a hundred times that for the log-det: zuko's choice).
    """

    def __init__(self, flow: nn.Module, context_features: int | None = None, swap: str = "") -> None:
        super().__init__(flow, context_features, swap)
        self.flow.transform.exact = self.flow.transform.ode[-1].out_features <= EXACT_UP_TO
        self.train()

    def train(self, mode: bool = True) -> FfjordDensity:
        super().train(mode)
        transform = self.flow.transform
        transform.atol = transform.rtol = TRAINING_TOLERANCE if mode else EVALUATION_TOLERANCE
        return self


def ffjord(features: int, width: int, context_features: int | None) -> nn.Module:
    from zuko.flows import CNF  # here, because zuko switches off torch's argument validation on import

    return CNF(features, context_features or 0, hidden_features=[width, width, width])


METHODS = (
    Method(
        "ffjord",
        "FFJORD: continuous flow of zuko, adaptive Dormand-Prince, adjoint gradients",
        "continuous",
        "Grathwohl, Chen, Bettencourt, Sutskever and Duvenaud 2018, arXiv 1810.01367",
        ffjord,
        FfjordDensity,
        learning_rate=1e-2,
    ),
)
