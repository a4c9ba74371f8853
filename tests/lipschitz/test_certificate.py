"""The certificate of a module tree against sampled Jacobians and known answers; what cannot be certified is named."""

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from iresflow_plugin import NotContractiveError, ResidualBlock, maps
from iresflow_plugin.lipschitz import (
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    Bound,
    Chain,
    Concatenate,
    Constraint,
    Frobenius,
    LipSwish,
    MaxMin,
    Part,
    Scale,
    Sine,
    Spectral,
    Sum,
    certified_map,
    constrain,
    lipschitz_bound,
    lipschitz_estimate,
)
from iresflow_plugin.log_det import Exact
from iresflow_plugin.nets import LipschitzMLP
from tests.helpers import (
    EPS,
    assert_close,
    branches,
    call,
    gentle_sine,
    jacobian,
    name,
    orthogonal,
    raw_weights,
    scale_weights,
    scaled_mlp,
    seeds,
    svd_norm,
)

CONSTRAINTS = [Spectral, AlmostOrthogonal, Bjorck, Frobenius]


def diagonal(*entries: float) -> nn.Linear:
    layer = nn.Linear(len(entries), len(entries), bias=False, dtype=torch.float64)
    layer.weight.data = torch.diag(torch.tensor(entries, dtype=torch.float64))
    return layer


def jacobian_norms(module: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    return torch.linalg.matrix_norm(jacobian(module, x, context).double(), ord=2)


# ------------------------------------------------------------------------------------------------------- composition


@given(branch_and_size=branches(), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_no_jacobian_exceeds_the_bound(branch_and_size, scale):
    """Nested sums, concatenations, scalings, contexts, every activation, raw weights up to 100 times their size."""
    branch, size = branch_and_size
    dtype = next(branch.parameters()).dtype
    x, context = scale * torch.randn(24, size, dtype=dtype), scale * torch.randn(24, 2, dtype=dtype)
    bound = lipschitz_bound(branch)
    assert bound.certified and 0 <= bound.value < 1
    norms = jacobian_norms(branch, x, context)
    assert norms.max() <= bound.value * (1 + 20 * EPS[dtype])
    with torch.no_grad():  # finite differences, kinks included
        y = x + torch.randn_like(x) * torch.logspace(-2, 1, 24, dtype=dtype)[:, None]
        change = (call(branch, x, context) - call(branch, y, context)).norm(dim=1)
        size_of_g = call(branch, x, context).norm(dim=1) + call(branch, y, context).norm(dim=1) + x.norm(dim=1)
    assert (change <= bound.value * (x - y).norm(dim=1) + 100 * EPS[dtype] * (1 + size_of_g)).all()


A, B = diagonal(3.0, 1.0), diagonal(0.5, 2.0)
KNOWN = {
    "linear": (A, 3.0),
    "chain": (nn.Sequential(A, B), 6.0),
    "sum": (Sum(A, B), 5.0),
    "concatenation": (Concatenate(A, B), math.hypot(3, 2)),
    "scale": (nn.Sequential(Scale(-0.5), A), 1.5),
    "nothing": (nn.Sequential(), 1.0),
    "identity": (nn.Identity(), 1.0),
    "sigmoid": (nn.Sequential(A, nn.Sigmoid(), B), 1.5),
    "nested": (Sum(nn.Sequential(A, Scale(2.0)), Concatenate(nn.Sequential(A, Sum(B, A)))), 6.0 + 15.0),
    "flatten": (nn.Sequential(nn.Flatten(), A), 3.0),
    "shared": (nn.Sequential(A, nn.Tanh(), A), 9.0),
    "context": (Chain(A, AddContext(nn.Linear(3, 2))), 3.0),
    "context network is free": (Chain(A, AddContext(nn.Sequential(nn.Linear(3, 2), nn.SELU(), nn.LayerNorm(2)))), 3.0),
    "context network in eval mode": (Chain(A, AddContext(nn.Sequential(nn.Linear(3, 2), nn.Dropout()).eval())), 3.0),
    "beyond one": (nn.SiLU(), 1.09984),
}


@pytest.mark.parametrize("label", KNOWN)
def test_composition_rules(label):
    """Products, sums, roots of sums of squares; of two singular values as different as these the norm is exact."""
    module, expected = KNOWN[label]
    assert lipschitz_bound(module).certified
    assert expected * (1 - 1e-12) <= lipschitz_bound(module).value <= (1 + 1e-5) * expected


def test_dropout_in_a_network_of_the_context_is_refused_while_it_draws():
    """It would shift the forward pass and the inverse differently."""
    net = Chain(A, AddContext(nn.Sequential(nn.Linear(3, 2), nn.Dropout())))
    with pytest.raises(NotContractiveError, match=r"Dropout at '1\.network\.1'.*mask"):
        lipschitz_bound(net)
    assert lipschitz_bound(net.eval()).value == lipschitz_bound(A).value


def test_bounds_are_attained_by_linear_networks():
    """Composition is exact where all parts stretch the same direction: the rules give nothing away there."""
    one, two = torch.diag(torch.tensor([2.0, 1.0])).double(), torch.diag(torch.tensor([3.0, 0.1])).double()
    a, b = diagonal(2.0, 1.0), diagonal(3.0, 0.1)
    for module, matrix in (
        (nn.Sequential(a, b), two @ one),
        (Sum(a, b), one + two),
        (Concatenate(a, b), torch.cat([one, two])),
        (nn.Sequential(Scale(-3.0), a), 3 * one),
    ):
        assert svd_norm(matrix) <= lipschitz_bound(module).value <= (1 + 1e-5) * svd_norm(matrix)


def test_the_bound_is_that_of_the_present_weights():
    """Not merely the ceiling: a fresh small net is known to be small."""
    net = constrain(nn.Sequential(diagonal(0.1, 0.05), nn.Tanh(), diagonal(0.2, 0.1)), 0.9)
    assert 0.02 <= lipschitz_bound(net).value <= 0.0217
    scale_weights(net, 1e3)
    assert 0.9 / 1.04**2 <= lipschitz_bound(net).value <= 0.9


def test_certificate_concerns_x_alone():
    """A context may do what it likes, and the bound with respect to x holds for every context."""
    net = scaled_mlp(3, context_features=2, lipschitz=0.9)
    x = torch.randn(16, 3, dtype=torch.float64)
    for scale in (0.0, 1.0, 1e3):
        context = scale * torch.randn(16, 2, dtype=torch.float64)
        assert jacobian_norms(net, x, context).max() <= 0.9
    for part in net:
        if isinstance(part, AddContext):
            part.network.weight.data.mul_(1e4)
    assert lipschitz_bound(net).value <= 0.9
    assert jacobian_norms(net, x, torch.randn(16, 2, dtype=torch.float64)).max() <= 0.9


# ------------------------------------------------------------------------------------ the ends of the range of floats


@pytest.fixture(params=[True, False], ids=["denormals flushed", "denormals kept"])
def flushing(request):
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(True)  # as conftest has it


LAYERS = {
    "dense": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "convolution": (lambda: nn.Conv1d(2, 2, 3, padding=1, bias=False), (2, 6)),
}


def stretched(layer: nn.Module, shape: tuple[int, ...], exponent: int) -> Fraction:
    """2^exponent times the norm of a linear layer, by what it makes of 2^exponent times the identity."""
    identity = 2.0**exponent * torch.eye(math.prod(shape), dtype=layer.weight.dtype).view(-1, *shape)
    with torch.no_grad():
        return Fraction(svd_norm(layer(identity).flatten(1)))


@pytest.mark.parametrize(
    "label, constraint",
    [(label, kind) for kind in (None, *CONSTRAINTS) for label in LAYERS if (label, kind) != ("convolution", Bjorck)],
    ids=lambda part: part if isinstance(part, str) else name(part),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_certificate_covers_weights_of_every_size(label, constraint, dtype, flushing):
    """From the smallest denormal to the largest number, judged by what layers make of inputs of the opposite size."""
    limits = torch.finfo(dtype)
    tiny, largest, digits = (round(math.log2(x)) for x in (limits.tiny, limits.max, 1 / limits.eps))
    for size in (
        tiny - digits,
        tiny - digits + 5,
        tiny - 1,
        tiny + 1,
        -60,
        0,
        60,
        largest - 8,
        largest - 3,
        largest - 1,
    ):
        build, shape = LAYERS[label]
        layer = build().to(dtype) if constraint is None else constrain(build().to(dtype), 0.9, constraint)
        raw = layer.weight if constraint is None else raw_weights(layer)[0]
        half = torch.tensor(2.0 ** (size // 2), dtype=dtype)
        raw.data = (1 + torch.rand_like(raw)) * half * (half * 2 ** (size % 2))
        used = math.frexp(layer.weight.detach().abs().max().item())[1]
        exponent = max(tiny, min(-used, largest - 1))
        bound = lipschitz_bound(layer).value
        assert 0 <= bound <= (math.inf if constraint is None else 0.9)
        assert bound < math.inf or size >= largest - 3  # the norm may be more than the dtype can tell
        if bound < math.inf:
            rounded = 1 - Fraction(8 * limits.eps)
            assert stretched(layer, shape, exponent) * rounded <= Fraction(bound) * Fraction(2) ** exponent
        assert size > 0 or flushing or layer.weight.any()  # small, and yet no zero


# --------------------------------------------------------------------------------------------------------- constrain


Act = Callable[[], nn.Module]


def dense(act: Act) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), act(), nn.Linear(4, 3))


def with_a_shared_layer(act: Act) -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(3, 4), layer, act(), layer, Sum(layer, nn.Linear(4, 4)), nn.Linear(4, 3))


# Networks with free weights, of activations whose constants are not all one.
PLAIN: dict[str, Callable[[Act], nn.Module]] = {
    "linear": lambda act: nn.Linear(3, 3),
    "deep": lambda act: nn.Sequential(*[dense(act) for _ in range(3)]),
    "sum": lambda act: Sum(dense(act), nn.Linear(3, 3), nn.Sequential(Scale(0.01))),
    "concatenate": lambda act: nn.Sequential(Concatenate(dense(act), nn.Linear(3, 2)), nn.Linear(5, 3)),
    "scaled": lambda act: nn.Sequential(Scale(7.0), dense(act)),
    "shared": with_a_shared_layer,
    "nested": lambda act: nn.Sequential(nn.Sequential(nn.Sequential(dense(act))), Sum(dense(act), dense(act))),
}
ACTS = st.sampled_from([nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Tanh, LipSwish, lambda: Sine(4)])


@pytest.mark.parametrize("kind", PLAIN)
@given(data=st.data(), seed=seeds, lipschitz=st.sampled_from([0.05, 0.5, 0.97, 0.999]))
def test_constrain_reaches_exactly_the_bound_asked_for(kind, data, seed, lipschitz):
    torch.manual_seed(seed)
    net = PLAIN[kind](lambda: data.draw(ACTS)())
    assert constrain(net, lipschitz) is net
    ceiling = certified_map(net).ceiling
    assert lipschitz * (1 - 1e-9) <= ceiling <= lipschitz
    layers = {layer for layer in net.modules() if isinstance(layer, nn.Linear)}
    assert {len(layer.parametrizations.weight) for layer in layers} == {1}  # one that is used twice is constrained once
    assert len({layer.parametrizations.weight[0].lipschitz for layer in layers}) == 1
    scale_weights(net, 1e3)
    assert 0.8 * lipschitz <= lipschitz_bound(net).value <= lipschitz
    assert jacobian_norms(net, torch.randn(16, 3)).max() <= lipschitz


def test_a_layer_that_is_used_thrice_counts_thrice():
    """c^3 = 0.729, so c = 0.9: also where the uses stand side by side."""
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    constrain(nn.Sequential(one, nn.Tanh(), nn.Sequential(one), nn.ELU(), one), 0.729)
    constrain(Sum(other, nn.Sequential(other, nn.Tanh(), other)), 0.75)  # c + c^2
    for layer, expected in ((one, 0.9), (other, 0.5)):
        (item,) = layer.parametrizations.weight
        assert item.lipschitz == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)
def test_constrain_installs_what_was_asked_for(constraint):
    """Of this kind, and with the bound of a layer."""
    net = constrain(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), 0.81, constraint)
    for layer in (net[0], net[2]):
        (item,) = layer.parametrizations.weight
        assert type(item) is constraint
        assert item.lipschitz == pytest.approx(0.9, rel=1e-9)


def test_constrain_again_changes_the_bound_and_stacks_nothing():
    net = constrain(nn.Sequential(nn.Linear(3, 3)), 0.9)
    constrain(net, 0.3)
    assert len(net[0].parametrizations.weight) == 1
    scale_weights(net, 100)
    assert svd_norm(net[0].weight) <= 0.3


@pytest.mark.parametrize("first", CONSTRAINTS, ids=name)
def test_constrain_again_with_another_constraint_is_honoured(first):
    """It stands behind the first one, whose weight it takes, and has the last word."""
    net = constrain(nn.Sequential(nn.Linear(3, 3)), 0.9, first).double()
    scale_weights(net, 100.0)
    before = net[0].weight.detach()
    second = Spectral if first is Bjorck else Bjorck
    constrain(net, 0.4, second)
    assert [type(item) for item in net[0].parametrizations.weight] == [first, second]
    assert torch.equal(net[0].weight, second(0.4)(before))
    assert 0.4 / 1.04 <= svd_norm(net[0].weight) <= lipschitz_bound(net).value <= 0.4
    assert certified_map(net).ceiling == pytest.approx(0.4, rel=1e-9)
    assert ResidualBlock(net)


def test_constrain_leaves_small_weights_and_the_function_as_they_are():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.1)
    x = torch.randn(5, 3)
    before = net(x)
    assert torch.equal(constrain(net)(x), before)


def test_constrain_keeps_frozen_weights_frozen():
    net = nn.Sequential(nn.Linear(3, 3))
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in constrain(net).parameters())


def test_constrain_works_on_top_of_weight_norm():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    constrain(net, 0.5)
    net[0].parametrizations.weight.original0.data.mul_(100)
    assert 0.4 < svd_norm(net[0].weight) <= 0.5
    assert lipschitz_bound(net).value <= 0.5
    ResidualBlock(net)


@pytest.mark.parametrize("lipschitz", [0.0, 1.0, 1.5, -0.3, math.nan, math.inf])
def test_constrain_refuses_bounds_outside_zero_and_one(lipschitz):
    with pytest.raises(ValueError, match="lipschitz"):
        constrain(nn.Linear(2, 2), lipschitz)


def test_constrain_of_a_network_without_weights():
    assert isinstance(constrain(nn.Sequential(Scale(0.5), nn.Tanh()), 0.9), nn.Sequential)
    with pytest.raises(NotContractiveError, match="no weights"):
        constrain(nn.Tanh(), 0.9)


@pytest.mark.parametrize(
    "net",
    [lambda: Sum(nn.Identity(), nn.Linear(2, 2)), lambda: Sum(nn.Sequential(Scale(0.98)), nn.Linear(2, 2))],
)
def test_constrain_refuses_what_no_weights_could_satisfy(net):
    """x + W x has a bound of at least 1 whatever W; silently returning it would be a lie."""
    with pytest.raises(NotContractiveError):
        constrain(net(), 0.97)


class Picky(Spectral):
    """Refuses layers of four features by the check that is asked before anything is done."""

    @staticmethod
    def check(layer: nn.Module) -> None:
        if layer.in_features == 4:
            raise NotContractiveError("four", layer)


class Late(Spectral):
    """Refuses weights of four columns when it sees them, after the layers in front have been constrained."""

    def certify(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        if weight.shape[1] == 4:
            raise NotContractiveError("four")
        return super().certify(weight)


def two_layers(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), *more)


REFUSED = {
    "an unknown part": (lambda: two_layers(nn.SELU()), 0.9, Spectral),
    "dropout of a context": (lambda: two_layers(Chain(AddContext(nn.Dropout(0.5)))), 0.9, Spectral),
    "padding that copies": (lambda: two_layers(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")), 0.9, Spectral),
    "a convolution under Bjorck": (lambda: two_layers(nn.Conv1d(2, 2, 3)), 0.9, Bjorck),
    "the same, constrained before": (lambda: constrain(two_layers(nn.Conv1d(2, 2, 3)), 0.9), 0.5, Bjorck),
    "a bound that the rest exceeds": (lambda: Sum(constrain(two_layers(), 0.9), Scale(0.6)), 0.5, Spectral),
    "a bound that is none": (lambda: constrain(two_layers(), 0.9), 1.5, Spectral),
    "a constraint that refuses a layer": (two_layers, 0.9, Picky),
    "a constraint that refuses a weight": (two_layers, 0.9, Late),
}


@pytest.mark.parametrize("label", REFUSED)
def test_constrain_changes_nothing_when_it_refuses(label):
    build, lipschitz, constraint = REFUSED[label]
    net = build()

    def state() -> tuple:
        modules = [(path, type(module), id(module)) for path, module in net.named_modules()]
        items = [(item.lipschitz, item.spec) for item in net.modules() if isinstance(item, Constraint)]
        return modules, items, sorted((k, id(v)) for k, v in net.state_dict(keep_vars=True).items())

    before, values = state(), {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError):
        constrain(net, lipschitz, constraint)
    assert state() == before
    assert all(torch.equal(values[k], v) for k, v in net.state_dict().items())


@pytest.mark.timeout(30)
def test_constrain_ends_when_the_bound_depends_on_no_weight():
    net = nn.Sequential(Scale(0.0), nn.Linear(2, 2))
    assert certified_map(constrain(net)).ceiling == 0


# -------------------------------------------------------------------------------------------------- refusals, by name


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class LoudSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


class LoudFlatten(nn.Flatten):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


class LoudSum(Sum):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return 5 * super().forward(x, context)


class LoudChain(Chain):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return 5 * super().forward(x, context)


class LoudTanh(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, __, out: 5 * out)
    return module


def prehooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda _, args: (5 * args[0],))
    return module


OFFENDERS = {
    "Dropout": lambda: nn.Dropout(0.1),
    "AlphaDropout": lambda: nn.AlphaDropout(0.1),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "LayerNorm": lambda: nn.LayerNorm(3),
    "SELU": lambda: nn.SELU(),
    "Unknown": lambda: Unknown(),
    "Doubling": lambda: Doubling(3, 3),
    "LoudSequential": lambda: LoudSequential(),
    "LoudFlatten": lambda: LoudFlatten(),
    "LoudSum": lambda: LoudSum(nn.Tanh()),
    "LoudTanh": lambda: LoudTanh(),
    "LSTM": lambda: nn.LSTM(3, 3),
    "Bilinear": lambda: nn.Bilinear(3, 3, 3),
    "ModuleList": lambda: nn.ModuleList(),
    "Softmax": lambda: nn.Softmax(-1),
}


@pytest.mark.parametrize("label", OFFENDERS)
def test_what_cannot_be_certified_is_named_with_its_path(label):
    """SELU, dropout, batch norm, unknown modules and overridden forwards inside g."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), OFFENDERS[label]()))
    for attempt in (constrain, lipschitz_bound, ResidualBlock):
        with pytest.raises(NotContractiveError, match=rf"{label}.*'1\.1'"):
            attempt(net)
    assert not parametrize.is_parametrized(net[0])  # and nothing was changed by the attempts


@pytest.mark.parametrize("old_norm", [spectral_norm, weight_norm], ids=name)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_norms_that_work_by_hooks_are_refused(old_norm):
    with pytest.raises(NotContractiveError, match="hook"):
        lipschitz_bound(nn.Sequential(old_norm(nn.Linear(3, 3))))


HOOKED = {
    "Linear": lambda: nn.Linear(4, 4),
    "Tanh": lambda: nn.Tanh(),
    "Sine": lambda: Sine(4),
    "MaxMin": lambda: MaxMin(4),
    "Sequential": lambda: nn.Sequential(),
    "Chain": lambda: Chain(nn.Tanh()),
    "Sum": lambda: Sum(nn.Tanh()),
    "Scale": lambda: Scale(0.1),
    "Concatenate": lambda: Concatenate(nn.Tanh()),
    "Flatten": lambda: nn.Flatten(),
}


@pytest.mark.parametrize("add", [hooked, prehooked], ids=name)
@pytest.mark.parametrize("label", HOOKED)
def test_a_hook_that_returns_something_is_refused_by_name(label, add):
    """Whatever it stands at, before the block was built or after."""
    part = HOOKED[label]()
    block = ResidualBlock(constrain(nn.Sequential(nn.Linear(3, 4), nn.Sequential(part), nn.Linear(4, 3)), 0.9))
    early = copy.deepcopy(block.branch)
    add(part)
    add(early[1][0])
    x = torch.randn(5, 3)
    for attempt in (block, block.inverse, block.solve, block.preimage, block.estimate, ResidualBlock(early)):
        with pytest.raises(NotContractiveError, match=rf"hook of .*{label} returns"):
            attempt(x)


@pytest.mark.parametrize("label", HOOKED)
def test_a_hook_added_later_is_noticed(label):
    """One that only reads is called with what its module would see, and changes nothing; the other is refused."""
    part = HOOKED[label]()
    block = ResidualBlock(constrain(nn.Sequential(nn.Linear(3, 4), part, nn.Linear(4, 3)), 0.9))
    x, seen = torch.randn(5, 3), []
    before = block(x)
    handles = [
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
        part.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output])),
    ]
    after = block(x)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, old)
    inside = block.branch[0](x)
    for found, expected in zip(seen[:3], [inside, inside, part(inside)], strict=True):
        assert torch.equal(found, expected)
    for handle in handles:
        handle.remove()
    assert len(seen) == 6  # one pass of the block, and the one just now
    block(x)
    assert len(seen) == 6
    hooked(part)
    with pytest.raises(NotContractiveError, match="hook"):
        block(x)


def test_a_free_linear_layer_is_named():
    """Even if its weight is small today: nothing keeps it so."""
    layer = nn.Linear(3, 3)
    layer.weight.data.mul_(1e-3)
    with pytest.raises(NotContractiveError, match=r"Linear at '1'.*constrain"):
        ResidualBlock(nn.Sequential(nn.Tanh(), layer))
    half = nn.Sequential(constrain(nn.Linear(3, 3)), nn.Sequential(layer))
    with pytest.raises(NotContractiveError, match=r"Linear at '1\.0'"):
        ResidualBlock(half)


def test_layers_that_each_obey_may_not_compose():
    """Two parts of Lipschitz 0.97 in a sum reach 1.94: refused, with the number."""
    with pytest.raises(NotContractiveError, match=r"1\.94"):
        ResidualBlock(Sum(LipschitzMLP([2, 4, 2]), LipschitzMLP([2, 4, 2])))


def test_a_constraint_removed_later_is_noticed():
    block = ResidualBlock(constrain(nn.Sequential(nn.Linear(3, 3))))
    parametrize.remove_parametrizations(block.branch[0], "weight")
    with pytest.raises(NotContractiveError, match="free to grow"):
        block(torch.randn(2, 3))


def test_a_parametrization_stacked_on_a_constraint_is_noticed():
    """Whoever scales the constrained weight afterwards has broken the constraint."""

    class Tenfold(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 10 * weight

    block = ResidualBlock(constrain(nn.Sequential(nn.Linear(3, 3))))
    parametrize.register_parametrization(block.branch[0], "weight", Tenfold())
    with pytest.raises(NotContractiveError):
        block(torch.randn(2, 3))


# ------------------------------------------------------------------------------------------- modules of the user's own


class Rotating(nn.Module):
    """x -> 0.6 R(context) x for a rotation R: Lipschitz 0.6 in x whatever the context; nothing a rule could know."""

    takes_context = True

    def __init__(self) -> None:
        super().__init__()
        self.angle = nn.Linear(2, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        angle = self.angle(context)[:, 0]
        c, s = angle.cos(), angle.sin()
        return 0.6 * torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)

    def lipschitz_bound(self) -> float:
        return 0.6


class Wave(nn.Module):
    """Contains a linear layer, and vouches for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * torch.sin(x) + 0 * self.inner(x)

    def lipschitz_bound(self) -> float:
        return 0.5


def test_a_module_may_state_its_own_bound():
    net = Chain(Wave(), Scale(0.5))
    bound = lipschitz_bound(net)
    assert bound.value == 0.25 and not bound.certified  # its word, not our proof
    block = ResidualBlock(net, Exact()).double()
    x = torch.randn(6, 2, dtype=torch.float64).requires_grad_()
    y, log_det = block(x)
    expected = torch.log1p(0.25 * torch.cos(x)).sum(1)
    assert torch.allclose(log_det, expected, atol=1e-12)
    (grad,) = torch.autograd.grad(log_det.sum(), x)
    assert torch.allclose(grad, torch.autograd.grad(expected.sum(), x)[0], atol=1e-12)
    z, _ = block.inverse(y.detach())
    assert (z - x).abs().max() < 1e-12


def test_a_module_with_context_may_state_its_own_bound():
    block = ResidualBlock(Chain(Rotating()), Exact()).double()
    x, context = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    y, log_det = block(x, context)
    assert torch.allclose(y, x + block.branch(x, context))
    angle = block.branch[0].angle(context)[:, 0]
    assert torch.allclose(log_det, torch.log(1 + 1.2 * angle.cos() + 0.36), atol=1e-12)
    z, back = block.inverse(y.detach(), context)
    assert (z - x).abs().max() < 1e-12 and (back + log_det).abs().max() < 1e-12
    back.sum().backward()
    assert block.branch[0].angle.weight.grad.abs().max() > 0
    for attempt in (block, block.inverse, block.solve):
        with pytest.raises(ValueError, match=r"Rotating needs a context, but context is None"):
            attempt(x)


OVERRIDDEN = {
    "Linear": lambda: Doubling(3, 3),
    "Sequential": lambda: LoudSequential(nn.Linear(3, 3)),
    "Flatten": lambda: LoudFlatten(),
    "Sum": lambda: LoudSum(nn.Tanh()),
    "Chain": lambda: LoudChain(nn.Linear(3, 3)),
    "Tanh": lambda: LoudTanh(),
}


@pytest.mark.parametrize("label", OVERRIDDEN)
def test_a_subclass_with_a_forward_of_its_own_may_state_its_bound(label):
    """What the message of the refusal advises has to work; without the method it stays refused."""
    plain = OVERRIDDEN[label]()
    with pytest.raises(NotContractiveError, match=type(plain).__name__):
        lipschitz_bound(nn.Sequential(plain))
    stating = type(f"Stated{label}", (type(plain),), {"lipschitz_bound": lambda self: 30.0})
    layer = copy.deepcopy(plain)
    layer.__class__ = stating
    net = constrain(nn.Sequential(Scale(0.01), layer, nn.Tanh()), 0.9)
    assert lipschitz_bound(net) == Bound(0.3, certified=False)
    assert not any(parametrize.is_parametrized(part) for part in net.modules())
    x = torch.randn(4, 3)
    assert torch.equal(certified_map(net)(x), net(x))
    y, _ = ResidualBlock(net, Exact())(x)
    assert torch.equal(y, x + net(x))


def test_a_stated_bound_does_not_replace_a_proof():
    """A subclass that computes what its base computes is certified by the rule of its base."""

    class Modest(nn.Linear):
        def lipschitz_bound(self) -> float:
            return 1e-3

    layer = Modest(3, 3)
    assert lipschitz_bound(layer).value >= svd_norm(layer.weight)
    chain = type("Modestly", (Chain,), {"lipschitz_bound": lambda self: 1e-3})(nn.Linear(3, 3))
    assert lipschitz_bound(chain).value >= svd_norm(chain[0].weight)


@pytest.mark.timeout(30)
def test_constrain_does_not_touch_modules_that_vouch_for_themselves():
    net = constrain(Chain(Wave(), nn.Linear(2, 2)), 0.9)
    assert not parametrize.is_parametrized(net[0].inner)
    assert net[1].parametrizations.weight[0].lipschitz == pytest.approx(1.8)
    assert not parametrize.is_parametrized(constrain(Chain(Wave()), 0.9)[0].inner)


@pytest.mark.parametrize("stated", [math.nan, math.inf, 1.0, 1.2, -0.5])
def test_a_stated_bound_that_is_no_contraction_is_refused(stated):
    wave = Wave()
    wave.lipschitz_bound = lambda: stated
    with pytest.raises(NotContractiveError):
        ResidualBlock(Chain(wave))


class Mirrored(Part):
    """x -> -c x, known to the certificate by its map."""

    def __init__(self, factor: float = 0.4) -> None:
        super().__init__()
        self.factor = factor

    def as_map(self, context: Tensor | None = None) -> maps.Map:
        return maps.Scaling(-self.factor, self.factor)


def test_a_part_of_ones_own_needs_its_map_alone():
    """forward, blocks and the certificate all take it from there."""
    x = torch.randn(5, 3)
    assert_close(Mirrored()(x), -0.4 * x, 1e-6)
    assert_close(nn.Sequential(Mirrored(), nn.Tanh())(x), torch.tanh(-0.4 * x), 1e-6)
    bound = lipschitz_bound(nn.Sequential(Mirrored(), Mirrored()))
    assert bound.value == pytest.approx(0.16) and bound.certified
    y, log_det = ResidualBlock(Mirrored())(torch.ones(2, 3))
    assert torch.allclose(y, torch.full((2, 3), 0.6))
    assert torch.allclose(log_det, torch.full((2,), 3 * math.log(0.6)))
    with pytest.raises(NotContractiveError, match=r"1\.2"):
        ResidualBlock(nn.Sequential(Mirrored(1.2)))


def test_a_part_without_a_map_says_so():
    for attempt in (lambda: lipschitz_bound(Part()), lambda: Part()(torch.ones(1, 1))):
        with pytest.raises(NotImplementedError):
            attempt()


# ---------------------------------------------------------------------------------------------------------- estimates


@given(seed=seeds, lipschitz=st.sampled_from([0.5, 0.97]))
def test_lipschitz_estimate_is_close_to_the_truth_and_below_the_bound(seed, lipschitz):
    torch.manual_seed(seed)
    net = scaled_mlp(4, activation=gentle_sine, lipschitz=lipschitz)
    x = torch.randn(10, 4, dtype=torch.float64)
    truth = jacobian_norms(net, x).max().item()
    estimate = lipschitz_estimate(net, x)
    assert not estimate.certified
    assert 0.9 * truth <= estimate.value <= truth * (1 + 1e-9) <= lipschitz_bound(net).value


def test_lipschitz_estimate_with_context_and_on_images():
    net = scaled_mlp(3, activation=gentle_sine, context_features=2)
    x, context = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    truth = jacobian_norms(net, x, context).max().item()
    assert lipschitz_estimate(net, x, context, steps=100).value == pytest.approx(truth, rel=1e-2)
    image = nn.Sequential(nn.Flatten(), *scaled_mlp(12, activation=gentle_sine), nn.Unflatten(1, (3, 2, 2)))
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    assert lipschitz_estimate(image, x, steps=100).value == pytest.approx(
        jacobian_norms(image, x).max().item(), rel=1e-2
    )


def test_constraint_is_a_base_class_for_ones_own():
    class Clip(Constraint):
        def certify(self, weight: Tensor) -> tuple[Tensor, float]:
            limit = self.lipschitz / math.sqrt(weight.numel())
            return weight.clamp(-limit, limit), self.lipschitz

    net = constrain(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), 0.9, Clip)
    scale_weights(net, 100)
    assert svd_norm(net[0].weight) * svd_norm(net[2].weight) <= 0.9
    assert len(raw_weights(net)) == 2
    y, log_det = ResidualBlock(net, Exact())(torch.randn(4, 3))
    assert torch.isfinite(log_det).all() and y.shape == (4, 3)


def test_orthogonal_weights_are_certified_at_their_norm():
    net = constrain(nn.Linear(6, 6).double(), 0.9)
    net.parametrizations.weight.original.data = orthogonal(6)
    assert 0.9 / 1.04 <= svd_norm(net.weight) <= lipschitz_bound(net).value <= 0.9


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)
def test_reported_bounds_are_not_rounded_down_to_single_precision(constraint):
    """In float64 the margin is 1e-14; a bound passed through float32 would lie below the true norm."""
    for target in torch.linspace(0.5, 0.9, 9).tolist():
        net = constrain(nn.Sequential(nn.Linear(3, 3)), target + 1e-9, constraint).double()
        net[0].parametrizations.weight.original.data = 50 * torch.diag(torch.tensor([1.0, 1e-5, 1e-6])).double()
        assert svd_norm(net[0].weight) <= lipschitz_bound(net).value
