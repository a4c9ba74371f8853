"""The property kit on transforms of every host: which are sound, and what the others get wrong."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from comparisons.bench import as_text
from comparisons.provenance import provenance
from comparisons.tables import PROGRESS_COLUMNS, print_lines
from iresflow_plugin.nets import LipschitzMLP
from iresflow_plugin.testing import CHECKS, Outcome, Report, check_transform, scale_weights

D, C = 4, 3
FILE = "property_kit.md"
COUPLING = "AffineCouplingTransform"


@dataclass(frozen=True)
class Subject:
    """A transform to look at: its maker, and the packages that have to be there."""

    name: str
    make: Callable[..., Any]
    package: str
    context: bool = False
    event: tuple[int, ...] = (D,)
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> Report:
        torch.manual_seed(0)
        context_shape = (C,) if self.context else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check_transform(self.make, self.event, context_shape, raise_failures=False, **self.options)


def _nflows(name: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    def make() -> Any:
        import nflows.transforms

        return getattr(nflows.transforms, name)(*args, **kwargs)

    return make


def _nflows_coupling(name: str, **kwargs: Any) -> Callable[[], Any]:
    def make() -> Any:
        import nflows.transforms
        from nflows.nn.nets import ResidualNet

        def net(inputs: int, outputs: int) -> Any:
            return ResidualNet(inputs, outputs, 16, context_features=kwargs.get("context"), activation=torch.tanh)

        extra = {k: v for k, v in kwargs.items() if k != "context"}
        return getattr(nflows.transforms, name)(torch.arange(D) % 2, net, **extra)

    return make


def _nflows_flow() -> Any:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, ReversePermutation

    parts = [_nflows_coupling(COUPLING)(), ReversePermutation(D)]
    return Flow(CompositeTransform([*parts, _nflows_coupling(COUPLING)()]), StandardNormal([D]))


def _normflows(make: Callable[[Any], Any]) -> Callable[[], Any]:
    def build() -> Any:
        import normflows as nf

        return make(nf)

    return build


def _trained_normflows_residual(**kwargs: Any) -> Any:
    """normflows' block as its users train it: steps on a loss that stretches, update_lipschitz called after each."""
    import normflows as nf

    net = nf.nets.LipschitzMLP([D, 32, 32, D], lipschitz_const=0.97, init_zeros=False)
    flow = nf.flows.Residual(net, **kwargs)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        x = torch.randn(64, D)
        optimizer.zero_grad()
        (net(x) + x).square().mean().backward()
        optimizer.step()
        nf.utils.update_lipschitz(flow, 20)
    return flow


def _ours(host: str, name: str, context: int | None = None) -> Callable[[], Any]:
    """Our adapter for a host, around a branch whose constraint binds."""

    def make() -> Any:
        adapter = getattr(importlib.import_module(f"iresflow_plugin.adapters.{host}"), name)
        branch = scale_weights(LipschitzMLP([D, 32, 32, D], context), 3.0)
        if host == "freia":
            return adapter([(D,)], None if context is None else [(context,)], branch_or_block=branch)
        return adapter(branch)

    return make


def _zuko(make: Callable[[Any], Any]) -> Callable[[], Any]:
    def build() -> Any:
        return make(importlib.import_module("zuko"))

    return build


def _pyro(name: str, **kwargs: Any) -> Callable[[], Any]:
    def build() -> Any:
        return getattr(importlib.import_module("pyro.distributions.transforms"), name)(D, **kwargs)

    return build


def _freia(name: str, **kwargs: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("FrEIA.modules"), name)([(D,)], **kwargs)


def _trained_freia_residual() -> Any:
    """FrEIA's block with a Jacobian that is large and varies, lipschitz_correction called after each step."""
    block = _freia("IResNetLayer", internal_size=32, n_internal_layers=1)()
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    for _ in range(300):
        x = 2 * torch.randn(64, D)
        optimizer.zero_grad()
        (block.residual(x) - 0.9 * x.sin()).square().mean().backward()
        optimizer.step()
        block.lipschitz_correction()
    return block


def _freia_net(inputs: int, outputs: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(inputs, 16), torch.nn.Tanh(), torch.nn.Linear(16, outputs))


def _torchflows() -> Any:
    residual = importlib.import_module("torchflows.bijections.finite.residual.iterative")
    return scale_weights(residual.InvertibleResNetBlock(event_shape=(D,)))


SUBJECTS = (
    Subject("ours: nflows", _ours("nflows", "ResidualTransform"), "nflows"),
    Subject("ours: nflows, conditional", _ours("nflows", "ResidualTransform", C), "nflows", True),
    Subject("ours: normflows", _ours("normflows", "ResidualFlow"), "normflows"),
    Subject("ours: normflows, conditional", _ours("normflows", "ResidualFlow", C), "normflows", True),
    Subject("ours: torch.distributions", _ours("distributions", "ResidualTransform"), "torch"),
    Subject("ours: Pyro", _ours("pyro", "ResidualTransform"), "pyro"),
    Subject("ours: Pyro, conditional", _ours("pyro", "ConditionalResidualTransform", C), "pyro", True),
    Subject("ours: zuko", _ours("zuko", "ResidualTransform"), "zuko"),
    Subject("ours: zuko, conditional", _ours("zuko", "ResidualTransform", C), "zuko", True),
    Subject("ours: FrEIA", _ours("freia", "ResidualModule"), "FrEIA"),
    Subject("ours: FrEIA, conditional", _ours("freia", "ResidualModule", C), "FrEIA", True),
    Subject("nflows RealNVP coupling", _nflows_coupling(COUPLING), "nflows"),
    Subject("nflows RealNVP coupling, conditional", _nflows_coupling(COUPLING, context=C), "nflows", True),
    Subject(
        "nflows NSF coupling",
        _nflows_coupling("PiecewiseRationalQuadraticCouplingTransform", tails="linear", tail_bound=5.0),
        "nflows",
    ),
    Subject("nflows MAF", _nflows("MaskedAffineAutoregressiveTransform", D, 16, activation=torch.tanh), "nflows"),
    Subject(
        "nflows MAF, conditional",
        _nflows("MaskedAffineAutoregressiveTransform", D, 16, context_features=C, activation=torch.tanh),
        "nflows",
        True,
    ),
    Subject("nflows LULinear", _nflows("LULinear", D), "nflows"),
    Subject("nflows RandomPermutation", _nflows("RandomPermutation", D), "nflows"),
    Subject("nflows ActNorm", _nflows("ActNorm", D), "nflows"),
    Subject("nflows Flow of couplings", _nflows_flow, "nflows"),
    Subject("normflows MAF", _normflows(lambda nf: nf.flows.MaskedAffineAutoregressive(D, 16)), "normflows"),
    Subject(
        "normflows RealNVP coupling",
        _normflows(lambda nf: nf.flows.AffineCouplingBlock(nf.nets.MLP([D // 2, 16, D]))),
        "normflows",
    ),
    Subject("normflows NSF", _normflows(lambda nf: nf.flows.CoupledRationalQuadraticSpline(D, 1, 16)), "normflows"),
    Subject("normflows LULinearPermute", _normflows(lambda nf: nf.flows.LULinearPermute(D)), "normflows"),
    Subject("normflows ActNorm", _normflows(lambda nf: nf.flows.ActNorm(D)), "normflows"),
    Subject("normflows Residual, trained", _trained_normflows_residual, "normflows"),
    Subject(
        "normflows Residual, brute_force=True",
        lambda **kw: _trained_normflows_residual(brute_force=True, **kw),
        "normflows",
        options={"deterministic": True},
    ),
    Subject("zuko MAF", _zuko(lambda zuko: zuko.flows.MAF(D, hidden_features=(16,))), "zuko"),
    Subject("zuko MAF, conditional", _zuko(lambda zuko: zuko.flows.MAF(D, C, hidden_features=(16,))), "zuko", True),
    Subject("zuko NSF", _zuko(lambda zuko: zuko.flows.NSF(D, hidden_features=(16,))), "zuko"),
    Subject("Pyro IAF", _pyro("affine_autoregressive", hidden_dims=[16]), "pyro"),
    Subject("Pyro coupling", _pyro("affine_coupling", hidden_dims=[16]), "pyro"),
    Subject("Pyro Permute", _pyro("permute"), "pyro"),
    Subject("FrEIA GLOWCouplingBlock", _freia("GLOWCouplingBlock", subnet_constructor=_freia_net), "FrEIA"),
    Subject("FrEIA IResNetLayer, trained", _trained_freia_residual, "FrEIA"),
    Subject("torchflows InvertibleResNetBlock", _torchflows, "torchflows"),
)


def property_kit(names: list[str], out: Path, console: Console) -> int:
    """Check the subjects whose packages are here; print and write `property_kit.md`."""
    subjects = [s for s in SUBJECTS if not names or any(name.lower() in s.name.lower() for name in names)]
    here = [s for s in subjects if importlib.util.find_spec(s.package)]
    for subject in sorted({s.package for s in subjects} - {s.package for s in here}):
        console.print(f"[yellow]Left out:[/] {subject} is not installed.")
    reports: dict[str, Report] = {}
    with Progress(*PROGRESS_COLUMNS, console=console) as progress:
        for subject in progress.track(here, description="subjects"):
            report = reports[subject.name] = subject.check()
            failed = ", ".join(o.check for o in report.failures) or "all passed"
            write(out, reports)
            print_lines(progress.console, f"{subject.name:<40} {failed}")
    print_lines(console, f"Written: {out / FILE}")
    return 0


def write(out: Path, reports: dict[str, Report]) -> None:
    """What is known so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(markdown(reports))


EXPLAINED = """\
What fails on transforms that are mathematically sound is a limit of their code, each reproduced by the evidence
below: spline and coupling code that reshapes with -1 cannot take an empty batch; nflows' LULinear and zuko's
transforms return a tensor that they saved for backward, so that a caller who changes it in place breaks the gradient;
normflows' ActNorm returns one log-det for the whole batch; Pyro's inverse autoregressive pass makes float32 zeros
whatever the input's dtype, so every check that runs in float64 fails; FrEIA's coupling block holds a lambda, which
cannot be pickled."""


def markdown(reports: dict[str, Report]) -> str:
    """An overview, the evidence for each failure, and the table of checks."""
    how = "\n".join(f"- {key}: {as_text(value)}" for key, value in provenance().items())
    parts = [
        "# The property kit on transforms of every host",
        how,
        table("subject | passed | not applicable | failed", [overview(*item) for item in reports.items()]),
        EXPLAINED,
        "## Evidence",
        "\n".join(evidence(name, o) for name, r in reports.items() for o in r.failures) or "Nothing failed.",
        "## The checks",
        checks_table(),
    ]
    return "\n\n".join(parts) + "\n"


def checks_table() -> str:
    """Which check covers which of the known defects D1 to D18."""
    return table(
        "check | defects | property",
        [f"`{check.name}` | {', '.join(check.defects) or '-'} | {check.sentence}" for check in CHECKS.values()],
    )


def overview(name: str, report: Report) -> str:
    applied = sum(o.status != "not applicable" for o in report.outcomes)
    failed = ", ".join(f"`{o.check}`" for o in report.failures) or "-"
    return f"{name} | {applied - len(report.failures)} | {len(report.outcomes) - applied} | {failed}"


def evidence(name: str, outcome: Outcome) -> str:
    words = " ".join(str(outcome).split(": ", 1)[1].split())
    return f"- **{name}**, `{outcome.check}`: {words if len(words) < 400 else words[:400] + ' ...'}"


def table(head: str, rows: list[str]) -> str:
    return "\n".join(f"| {row} |" for row in (head, " | ".join(["---"] * (head.count("|") + 1)), *rows))
