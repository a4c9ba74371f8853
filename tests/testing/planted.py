"""A small sound transform, and for every check a copy of it with exactly the fault that the check is for."""

from __future__ import annotations

import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from torch import Tensor, nn

D = 3


class Sound(nn.Module):
    """y = sinh(A x + b + M c) with A lower triangular: an exact inverse, and a log-det that depends on x."""

    def __init__(self, features: int = D, context_features: int | None = None) -> None:
        super().__init__()
        self.lower = nn.Parameter(0.3 * torch.randn(features, features), requires_grad=features > 1)
        self.log_diagonal = nn.Parameter(0.2 * torch.randn(features))
        self.bias = nn.Parameter(0.2 * torch.randn(features))
        if context_features is not None:
            self.mix = nn.Parameter(0.5 * torch.randn(features, context_features))

    def matrix(self) -> Tensor:
        return self.lower.tril(-1) + torch.diag(self.log_diagonal.exp())

    def shift(self, context: Tensor | None) -> Tensor:
        return self.bias if context is None else self.bias + context @ self.mix.T

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.shape[1:] != self.bias.shape:
            raise ValueError(f"inputs must have {len(self.bias)} features, got {tuple(inputs.shape)}.")
        h = inputs @ self.matrix().T + self.shift(context)
        return h.sinh(), h.cosh().log().sum(1) + self.log_diagonal.sum()

    def inverse(self, outputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = outputs.asinh()
        x = torch.linalg.solve_triangular(self.matrix(), (h - self.shift(context)).T, upper=False).T.clone()
        return x, -(h.cosh().log().sum(1) + self.log_diagonal.sum())


class InverseOff(Sound):
    def inverse(self, outputs, context=None):
        x, log_det = super().inverse(outputs, context)
        return x + 1e-3, log_det


class SignError(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y, -log_det


class InverseSign(Sound):
    def inverse(self, outputs, context=None):
        x, log_det = super().inverse(outputs, context)
        return x, -log_det


class Noisy(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y, log_det + torch.randn_like(log_det)


class DetachedSolution(Sound):
    def inverse(self, outputs, context=None):
        x, log_det = super().inverse(outputs, context)
        return x.detach(), log_det


class DetachedInEval(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y, log_det if self.training else log_det.detach()


class DetachedInverseLogDet(Sound):
    def inverse(self, outputs, context=None):
        x, log_det = super().inverse(outputs, context)
        return x, log_det.detach()


class FirstRowsCotangent(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        if log_det.requires_grad:
            log_det.register_hook(lambda g: g[:1].expand_as(g))
        return y, log_det


class IdleParameter(Sound):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.idle = nn.Parameter(torch.zeros(1))


class BatchMean(Sound):
    def forward(self, inputs, context=None):
        return super().forward(inputs + 0.1 * inputs.mean(0), context)


class IgnoresContext(Sound):
    def shift(self, context):
        return self.bias


class NoContext(Sound):
    def forward(self, inputs):
        return super().forward(inputs)

    def inverse(self, outputs):
        return super().inverse(outputs)


class LogDetColumn(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y, log_det[:, None]


class Squeezes(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y.squeeze(0), log_det


class Views(Sound):
    def forward(self, inputs, context=None):
        return super().forward(inputs.view(-1).view(inputs.shape), context)


class TouchesInputs(Sound):
    def forward(self, inputs, context=None):
        return super().forward(inputs if inputs.requires_grad else inputs.requires_grad_(), context)


class ReturnsWhatItSaved(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y.asinh().exp(), log_det


class OwnRandomness(Sound):
    calls = 0

    def forward(self, inputs, context=None):
        OwnRandomness.calls += 1
        y, log_det = super().forward(inputs, context)
        return y, log_det + 1e-3 * (OwnRandomness.calls % 7)


class ModeMatters(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y, log_det + 0.1 * self.training


class NeedsGradients(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs * torch.ones((), requires_grad=True), context)
        torch.autograd.grad(y.sum(), list(self.parameters()), retain_graph=True, allow_unused=True)
        return y, log_det


class UpdatesABuffer(Sound):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs, context=None):
        self.seen = self.seen.detach().clone() if torch.is_inference_mode_enabled() else self.seen.detach()
        self.seen.copy_(inputs.sum())
        return super().forward(inputs, context)


class ForgetsState(Sound):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.factor = float(torch.rand(()) + 0.5)

    def forward(self, inputs, context=None):
        return super().forward(self.factor * inputs, context)


class CopiesAreOne(Sound):
    def __deepcopy__(self, memo):
        return self


class HoldsALambda(Sound):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.identity = lambda x: x


class NotNormalised(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return y, log_det + 0.1


class FakeFlow(Flow):
    """nflows' Flow with samples whose log-density is off."""

    def __init__(self, offset: float) -> None:
        super().__init__(Sound(), StandardNormal([D]))
        self.offset = offset

    def sample_and_log_prob(self, num_samples, context=None):
        samples, log_prob = super().sample_and_log_prob(num_samples, context)
        return samples, log_prob + self.offset


class UphillGradients(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        for out in (y, log_det):
            if out.requires_grad:
                out.register_hook(torch.neg)
        return y, log_det


class CompilesToAnother(Sound):
    def forward(self, inputs, context=None):
        y, log_det = super().forward(inputs, context)
        return (2 * y if torch.compiler.is_compiling() else y), log_det


class Unconstrained(nn.Module):
    """y = x + g(x), a contraction as long as nobody trains it; a bound that is a lie; a solver that never complains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D))
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(0.5)

    def forward(self, inputs, context=None):
        rows = [torch.func.jacrev(self.net)(row) for row in inputs]
        eye = torch.eye(D, dtype=inputs.dtype)
        jacobian = torch.stack(rows) + eye if rows else inputs.new_zeros(0, D, D)
        return inputs + self.net(inputs), torch.linalg.slogdet(jacobian)[1]

    def inverse(self, outputs, context=None):
        x = outputs
        for _ in range(50):
            x = outputs - self.net(x)
        return torch.nan_to_num(x), -self.forward(x)[1]

    def certificate(self) -> float:
        return 1e-3


class SwallowsKeywords(Sound):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args)

    def forward(self, inputs, context=None, **kwargs):
        return super().forward(inputs, context)
