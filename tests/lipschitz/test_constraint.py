"""The weight in use obeys its bound whatever happens to the raw one, and nobody has to call anything."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from iresflow_plugin.lipschitz import (
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    Chain,
    CLipSwish,
    Frobenius,
    Spectral,
    certified_map,
    constrain,
    lipschitz_bound,
    schatten_norm,
    spectral_penalty,
)
from iresflow_plugin.nets import LipschitzMLP
from tests.helpers import (
    assert_close,
    assert_slope,
    certified_by_svd,
    dtypes,
    gentle_sine,
    jacobian,
    name,
    orthogonal,
    raw_weights,
    scale_weights,
    scaled_mlp,
    seeds,
    svd_norm,
    thorough,
)

CONSTRAINTS = [Spectral, AlmostOrthogonal, Bjorck, Frobenius]
SOFT = [Spectral, AlmostOrthogonal, Frobenius]

every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)
every_soft_one = pytest.mark.parametrize("constraint", SOFT, ids=name)


@st.composite
def raw(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.sampled_from([(1, 1), (1, 6), (6, 1), (4, 9), (9, 4), (32, 32)]))
    torch.manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["normal", "rank one", "orthogonal", "zero", "zero column"]))
    weight = torch.randn(rows, columns, dtype=torch.float64)
    if kind == "rank one":
        weight = torch.outer(weight[:, 0], weight[0])
    elif kind == "orthogonal":
        weight = orthogonal(max(rows, columns))[:rows, :columns].clone()
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "zero column":
        weight[:, 0] = 0
    return weight * draw(st.sampled_from([1e-30, 1e-3, 0.3, 1.0, 30.0, 1e15]))


def layer_with(constraint: nn.Module, weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    parametrize.register_parametrization(layer, "weight", constraint)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(weight)
    return layer


@every_constraint
@thorough
@given(weight=raw(), bound=st.sampled_from([0.3, 0.97, 1.0, 2.5]), dtype=dtypes)
def test_the_weight_in_use_obeys_for_every_raw_weight(constraint, weight, bound, dtype):
    weight = weight.to(dtype)
    layer = layer_with(constraint(bound), weight)
    for mode in (torch.enable_grad, torch.no_grad):  # they take different paths
        with mode():
            assert svd_norm(layer.weight) <= bound
            used, certified = constraint(bound).certify(weight)
            assert svd_norm(used) <= min(float(certified), bound)


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_weights_just_above_and_just_below_the_bound(constraint, dtype):
    """Where being soft could be too soft: rank one, so that no bound has any slack to hide an error in."""
    for excess in (-1e-3, -1e-6, 0.0, 1e-7, 1e-6, 1e-4, 1e-3, 1e-2, 0.05):
        weight = torch.outer(torch.randn(6), torch.randn(4)).double()
        weight = (weight / svd_norm(weight) * 0.9 * (1 + excess)).to(dtype)
        layer = layer_with(constraint(0.9), weight)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                assert svd_norm(layer.weight) <= 0.9
                assert svd_norm(constraint(0.9).certify(weight)[0]) <= 0.9


@every_constraint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_half_precision_rounding_does_not_break_the_bound(constraint, dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        weight = 3 * torch.outer(torch.randn(16), torch.randn(16)) + 0.01 * torch.randn(16, 16)
        layer = layer_with(constraint(0.9), weight.to(dtype))
        assert svd_norm(layer.weight) <= 0.9


@every_constraint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_factors_of_large_half_precision_weights_are_not_rounded(constraint, dtype):
    """A factor of 1e-5 has few digits in float16, and none below 6e-8."""
    for entry in torch.linspace(2e4, 6e4, 30).tolist():
        for shape in ((64, 64), (3, 40)):
            weight = torch.full(shape, entry, dtype=dtype)
            layer = layer_with(constraint(0.97), weight)
            for mode in (torch.enable_grad, torch.no_grad):
                with mode():
                    used = svd_norm(constraint(0.97).certify(weight)[0])
                    assert max(svd_norm(layer.weight), used) <= 0.97
                    mapped = torch.func.vmap(constraint(0.97))(weight[None])[0]  # its norm cannot be read
                    assert svd_norm(mapped) <= 0.97
            assert used >= 0.85


@every_constraint
def test_certificates_ignore_autocast_and_do_not_keep_its_errors(constraint):
    for seed in range(20):
        torch.manual_seed(seed)
        weight = 3 * torch.outer(torch.randn(16), torch.randn(16)) + 0.01 * torch.randn(16, 16)
        layer = layer_with(constraint(0.9), weight)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert svd_norm(layer.weight) <= 0.9
        assert svd_norm(layer.weight) <= 0.9


@every_constraint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
@pytest.mark.parametrize("bound", [0.97, 0.98, 0.999])
def test_weights_obey_after_autocast_has_rounded_them(constraint, dtype, bound):
    """Autocast rounds single precision before each product; entries of one sign and size leave no slack."""
    for n, scale in ((1, 5.0), (4, 5.0), (4, 1e-2), (9, 0.3)):
        weight = torch.full((n, n), -scale)
        layer = layer_with(constraint(bound), weight)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                plain = layer.weight
                for _ in range(2):  # what was remembered outside does not count inside, nor the reverse
                    with torch.autocast("cpu", dtype=dtype):
                        assert svd_norm(layer.weight.to(dtype)) <= bound
                        used, certified = layer.parametrizations.weight[0].certify(weight)
                        assert svd_norm(used.to(dtype)) <= min(float(certified), bound)
                    assert torch.equal(layer.weight, plain)


@every_soft_one
@given(weight=raw(), slack=st.sampled_from([1.2, 10.0]))
def test_small_weights_are_left_as_they_are(constraint, weight, slack):
    """Soft: below the bound (by what this constraint takes to be the norm) not a bit changes."""
    loosest = float(constraint(1.0).certify(weight)[1]) if constraint is not AlmostOrthogonal else _row_norm(weight)
    bound = slack * max(loosest, 1e-6)
    assert torch.equal(layer_with(constraint(bound), weight).weight, weight)


def _row_norm(weight: Tensor) -> float:
    w = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    return (w.mT @ w).abs().sum(1).max().sqrt().item()


def test_spectral_reaches_its_bound():
    """A large weight is used at no less than 1/1.04 of what is allowed."""
    for n in (2, 16, 64):
        layer = layer_with(Spectral(0.8), 50 * orthogonal(n))
        assert 0.8 / 1.04 - 1e-9 <= svd_norm(layer.weight) <= 0.8
        layer = layer_with(Spectral(0.8), torch.diag(torch.arange(1.0, n + 1)))
        assert 0.8 / 1.04 <= svd_norm(layer.weight) <= 0.8


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_bjorck_makes_all_singular_values_equal(shape):
    layer = layer_with(Bjorck(0.8, steps=30), torch.randn(shape, dtype=torch.float64))
    values = torch.linalg.svdvals(layer.weight)
    assert_close(values, torch.full_like(values, 0.8), 1e-9)


def test_almost_orthogonal_scales_columns_one_by_one():
    """Orthogonal columns of length 5 and 0.1: the long one is shortened, the short one stays."""
    weight = torch.tensor([[5.0, 0.0], [0.0, 0.1], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.1], [0.0, 0.0]], dtype=torch.float64)
    assert_close(layer_with(AlmostOrthogonal(1.0), weight).weight, expected, 1e-12)


@every_soft_one
def test_right_inverse(constraint):
    """Assigning a weight within the bound gives that weight; a larger one is scaled to the bound, not refused."""
    layer = layer_with(constraint(1.0), torch.zeros(4, 4, dtype=torch.float64))
    small = 0.1 * orthogonal(4)
    layer.weight = small
    assert torch.equal(layer.weight, small)
    layer.weight = 50 * orthogonal(4)
    assert 0.4 <= svd_norm(layer.weight) <= 1.0


@every_constraint
@given(seed=seeds, scale=st.sampled_from([0.1, 3.0]))
def test_gradients_match_finite_differences(constraint, seed, scale):
    torch.manual_seed(seed)
    weight = (scale * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    item, probe, direction = constraint(1.0), torch.randn(4, 3).double(), torch.randn(4, 3).double()

    def value(w: Tensor) -> Tensor:
        return (item(w) * probe).sum()

    assert_slope(value, weight, direction, 1e-6)


@every_constraint
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 3), (2, 4), (4, 2)], ids=str)
def test_second_derivatives_match_finite_differences(constraint, shape, scale):
    """Of the weight in use, in reverse and in forward mode, where the constraint binds and where it does not."""
    torch.manual_seed(0)
    weight = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    item = constraint(1.0, steps=4) if constraint is Bjorck else constraint(1.0)
    assert torch.autograd.gradcheck(item, weight, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(item, weight, check_fwd_over_rev=True, check_batched_grad=True)


@every_constraint
@pytest.mark.parametrize("kind", ["zero", "zero column"])
def test_zero_weights_have_finite_gradients_and_recover(constraint, kind):
    """Zero-initialised layers are common; a NaN gradient there would destroy the model at the first step."""
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[:, 0] = 0
        if kind == "zero":
            layer.weight.zero_()
    net = constrain(nn.Sequential(layer), 0.9, constraint)
    optimiser = torch.optim.Adam(net.parameters(), 0.1)
    x = torch.randn(16, 3)
    for _ in range(3):
        optimiser.zero_grad()
        (net(x) - x).square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        optimiser.step()
    assert 0 < svd_norm(layer.weight) <= 0.9


# ----------------------------------------------------------------------------------- nothing breaks the contraction


@every_constraint
@pytest.mark.parametrize(
    "optimiser, activation", [(torch.optim.Adam, gentle_sine), (torch.optim.SGD, nn.ELU)], ids=name
)
def test_contraction_survives_adverse_training(constraint, optimiser, activation):
    """200 steps at lr 1e-2 (SGD: 1e-1) that reward large outputs; every step is judged by exact SVD, and by Jacobians.

    Without a constraint the layer norms reach 30 and more.
    """
    torch.manual_seed(1)
    bound = 0.97
    net = LipschitzMLP([4, 16, 16, 4], activation=activation, lipschitz=bound, constraint=constraint)
    step = optimiser(net.parameters(), 1e-2 if optimiser is torch.optim.Adam else 1e-1)
    x = 3 * torch.randn(32, 4)
    largest = 0.0
    for i in range(200):
        step.zero_grad()
        (-10 * net(x).norm(dim=1).mean()).backward()
        step.step()
        assert certified_by_svd(net) <= bound
        assert lipschitz_bound(net).value <= bound
        if i % 20 == 19:
            norms = torch.linalg.matrix_norm(jacobian(net, torch.randn(32, 4)), ord=2)
            largest = max(largest, norms.max().item())
            assert largest <= bound
    assert max(svd_norm(w) for w in raw_weights(net)) > 1.5  # the constraint did bind
    assert largest > (0.2 if constraint in (Spectral, Bjorck) else 0.02)


@every_constraint
@pytest.mark.parametrize("context", [None, 3])
def test_contraction_survives_loading_and_editing(constraint, context):
    """Foreign weights, data.mul_(100), edits of .original.data, .weight.data, assignment and copies."""
    bound = 0.9
    net = LipschitzMLP([3, 12, 3], context, activation=CLipSwish, lipschitz=bound, constraint=constraint)

    def contractive(some: nn.Module) -> bool:
        x = 3 * torch.randn(8, 3)
        jac = jacobian(some, x, None if context is None else 10 * torch.randn(8, context))
        norms = torch.linalg.matrix_norm(jac, ord=2)
        return certified_by_svd(some) <= bound and norms.max() <= bound and lipschitz_bound(some).value <= bound

    foreign = {k: 100 * torch.randn_like(v) for k, v in net.state_dict().items()}
    net.load_state_dict(foreign)
    assert contractive(net)
    for weight in raw_weights(net):
        weight.data.mul_(100)
    assert contractive(net)
    for part in net.modules():
        if parametrize.is_parametrized(part, "weight"):
            part.weight.data.mul_(100)  # what trainers of other packages do; it may or may not arrive
    assert contractive(net)
    for weight in raw_weights(net):
        weight.data = torch.randn_like(weight) * 50
    assert contractive(net)
    net.load_state_dict(foreign, assign=True)
    assert contractive(net)
    twin = copy.deepcopy(net)
    scale_weights(twin, 7.0)
    assert contractive(twin) and contractive(net)
    assert contractive(net.double().float())


# ------------------------------------------------------------------------------------------ the memo is never stale


@pytest.mark.parametrize("first", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=name)
@pytest.mark.parametrize("second", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=name)
def test_the_memory_is_never_stale(first, second):
    """An edit through .data moves no version counter: only the entries themselves tell."""
    net = constrain(nn.Sequential(nn.Linear(4, 4)), 0.9)
    layer = net[0]
    for factor in (100.0, 1e-4, 30.0):
        with first():
            layer.weight, lipschitz_bound(net)  # fill the memory
        layer.parametrizations.weight.original.data.mul_(factor)
        with second():
            fresh = layer_with(Spectral(0.9), layer.parametrizations.weight.original.detach().clone())
            fresh.parametrizations.weight[0].lipschitz = layer.parametrizations.weight[0].lipschitz
            assert torch.equal(layer.weight, fresh.weight)
            assert lipschitz_bound(net).value == lipschitz_bound(nn.Sequential(fresh)).value


def test_the_memory_notices_one_changed_entry_and_a_changed_bound():
    net = constrain(nn.Sequential(nn.Linear(4, 4)), 0.9)
    layer, item = net[0], net[0].parametrizations.weight[0]
    with torch.no_grad():
        before = layer.weight.clone(), lipschitz_bound(net).value
        layer.parametrizations.weight.original.data[2, 1] += 1e-3
        assert not torch.equal(layer.weight, before[0])
        assert lipschitz_bound(net).value != before[1]
        layer.parametrizations.weight.original.data.mul_(100)
        assert 0.8 < svd_norm(layer.weight) <= 0.9
        lipschitz_bound(net)
        item.lipschitz = 0.2
        x = torch.randn(3, 4)
        assert torch.equal(certified_map(net)(x), net(x))  # what blocks evaluate follows as well
        assert 0.1 < svd_norm(layer.weight) <= 0.2
        assert lipschitz_bound(net).value <= 0.2


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_the_memory_shares_nothing_with_tensors_of_others(kind, scale):
    """functional_call may bring equal weights that belong to somebody else, who changes them in place later."""
    layers = {"dense": nn.Linear(3, 3), "convolution": nn.Conv2d(3, 3, 3, padding=1)}
    net = constrain(nn.Sequential(layers[kind]), 0.9)
    x = torch.randn(2, 3) if kind == "dense" else torch.randn(2, 3, 4, 4)

    class Evaluated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return certified_map(self.net)(x)

    scale_weights(net, scale)
    theirs = {label: value.detach().clone() for label, value in Evaluated().named_parameters()}
    with torch.no_grad():
        functional = torch.func.functional_call(Evaluated(), theirs, (x,))
        for value in theirs.values():
            value.mul_(1000)
        assert torch.equal(certified_map(net)(x), net(x))
        assert torch.equal(certified_map(net)(x), functional)


@every_constraint
@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("kind", [Chain, nn.Sequential], ids=name)
def test_training_goes_on_after_validation_in_inference_mode(constraint, factor, kind):
    """It trains as if nobody had looked: what was kept meanwhile serves the next step, also where the bound binds."""

    def train(validate: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = constrain(kind(nn.Linear(2, 8), gentle_sine(8), nn.Linear(8, 2)), 0.97, constraint)
        scale_weights(net, factor)
        optimiser = torch.optim.Adam(net.parameters())
        x, seen = torch.randn(4, 2), []
        for _ in range(3):
            optimiser.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            optimiser.step()
            with torch.inference_mode():
                if validate:
                    y, bound = net(x), lipschitz_bound(net).value
                    assert bound <= 0.97
            if validate:
                assert_close(y.clone(), net(x), 1e-6)  # of the weights that this step has left
            seen.append(loss.detach())
        return [*seen, *net.parameters()]

    for one, other in zip(train(validate=True), train(validate=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=name)
@every_constraint
def test_looking_at_a_weight_in_any_mode_changes_none(constraint, mode):
    """Nor does an edit of what was shown: it is refused at the next use, and lost where nothing tells of edits."""
    layer = layer_with(constraint(0.9), 30 * torch.randn(4, 3))
    before = layer.weight.detach().clone()
    with mode():
        shown = layer.weight
        assert_close(shown.clone(), before, 1e-6)
        shown.detach().zero_()
    if mode is not torch.inference_mode:
        with pytest.raises(RuntimeError, match="changed in place"):
            layer.weight  # noqa: B018
    assert torch.equal(layer.weight, before)


def test_gradients_do_not_depend_on_the_memory():
    net = scaled_mlp(3, activation=gentle_sine)
    x = torch.randn(5, 3, dtype=torch.float64)

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))

    fresh = gradient()
    with torch.no_grad():
        lipschitz_bound(net)
        net(x)
    for one, other in zip(fresh, gradient(), strict=True):
        assert torch.equal(one, other)


@every_constraint
def test_copies_are_independent_and_picklable(constraint):
    item = constraint(0.5)
    weight = 10 * torch.randn(3, 3)
    used = item(weight)
    for copied in (copy.deepcopy(item), pickle.loads(pickle.dumps(item))):
        assert torch.equal(copied(weight), used)
        copied.lipschitz = 0.1
        assert svd_norm(copied(weight)) <= 0.1
    assert torch.equal(item(weight), used)


@pytest.mark.parametrize(
    "other, first",
    [
        (parametrizations.orthogonal, True),
        (parametrizations.weight_norm, True),
        (parametrizations.spectral_norm, True),
        (parametrizations.spectral_norm, False),
    ],
)
def test_what_other_parametrizations_hold_is_copied_or_refused_but_never_lost(other, first):
    """torch refuses to pickle them; a layer that came back as another function would be worse."""
    layer = nn.Linear(3, 3)
    net = nn.Sequential(other(layer) if first else layer)
    constrain(net, 0.9)
    if not first:
        other(layer)
    layer.eval()  # torch's spectral_norm iterates in training
    x = torch.randn(4, 3)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(net)
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(net, io.BytesIO())


def test_a_parametrized_bias_is_refused_and_two_constraints_are_kept():
    biased = constrain(nn.Sequential(nn.Linear(3, 3)), 0.9)
    parametrize.register_parametrization(biased[0], "bias", nn.Tanh())
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(biased)
    twice = constrain(constrain(nn.Sequential(nn.Linear(3, 3)), 0.9), 0.5, Bjorck)
    assert len(twice[0].parametrizations.weight) == 2
    x = torch.randn(4, 3)
    assert torch.equal(pickle.loads(pickle.dumps(twice))(x), twice(x))


def test_state_dict_holds_weights_only():
    net = constrain(nn.Sequential(nn.Linear(3, 3)))
    svd_norm(net[0].weight)
    assert set(net.state_dict()) == {"0.bias", "0.parametrizations.weight.original"}


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
@every_constraint
def test_bad_bounds_are_refused_by_name(constraint, bound):
    with pytest.raises(ValueError, match="lipschitz"):
        constraint(bound)


# ----------------------------------------------------------------------------------------------------------- penalty


def test_spectral_penalty_value_and_gradient():
    net = constrain(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))).double()
    scale_weights(net, 7.0)
    weights = raw_weights(net)
    expected = 0.1 * sum(schatten_norm(w).item() ** 2 for w in weights)
    penalty = spectral_penalty(net, 0.1)
    assert penalty.item() == pytest.approx(expected, rel=1e-12)
    exact = 0.1 * sum(svd_norm(w) ** 2 for w in weights)
    assert exact <= penalty.item() <= 1.04**2 * exact * (1 + 1e-9)
    penalty.backward()
    for weight in weights:  # d |W|_p^2 along W itself: homogeneous of degree two
        assert (weight.grad * weight).sum().item() == pytest.approx(0.2 * schatten_norm(weight).item() ** 2, rel=1e-9)


def test_spectral_penalty_of_a_plain_network_shrinks_it():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    before = svd_norm(net[0].weight)
    for _ in range(50):
        optimiser.zero_grad()
        spectral_penalty(net, 1.0).backward()
        optimiser.step()
    assert svd_norm(net[0].weight) < 0.5 * before


def test_spectral_penalty_needs_weights():
    with pytest.raises(ValueError, match="Tanh"):
        spectral_penalty(nn.Tanh())


def test_spectral_penalty_concerns_the_layers_of_the_bound_alone():
    """Networks of the context and frequencies are free: a penalty on them would be regularisation nobody asked for."""
    with_context = LipschitzMLP([3, 8, 3], 2)
    layers = raw_weights(with_context)
    spectral_penalty(with_context).backward()
    assert all(w.grad is not None for w in layers)
    entry = next(m for m in with_context if isinstance(m, AddContext))
    assert entry.network.weight.grad is None
