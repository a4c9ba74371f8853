"""Maps: values, products, bounds and rows of each kind against dense Jacobians; the tensors they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jvp, vmap

from iresflow_plugin import maps
from iresflow_plugin.inverse.implicit import Derivative, Transposed
from iresflow_plugin.lipschitz import (
    AddContext,
    MaxMin,
    SinCos,
    Sine,
    Sum,
    certified_map,
)
from iresflow_plugin.maps.layers import Weighted
from iresflow_plugin.maps.rounding import Plain, Split
from tests.every_map import Mixing, affine, dense, every_kind, kinds, known, points, sine
from tests.helpers import (
    assert_close,
    branches,
    call,
    gentle_sine,
    name,
    scaled_mlp,
)


@every_kind
def test_products_are_those_of_the_jacobian(label):
    g, x = kinds()[label], points()
    jac, at_x = dense(g, x), g.linearise(x)
    assert_close(at_x.value, g(x), 1e-14)
    tangent, cotangent = torch.randn_like(x), torch.randn_like(at_x.value)
    assert_close(at_x.jvp(tangent).flatten(1), (jac @ tangent[..., None])[..., 0], 1e-12, 1e-14)
    assert_close(at_x.vjp(cotangent), (jac.mT @ cotangent.flatten(1)[..., None])[..., 0], 1e-12, 1e-14)


@every_kind
def test_products_take_a_leading_dimension_and_broadcast_over_the_batch(label):
    """(K, B, *event) as the probes have it, and (K, 1, *event) as the basis of the exact Jacobian has it."""
    g, x = kinds()[label], points()
    at_x = g.linearise(x)
    tangents = torch.randn(3, 5, 4, dtype=torch.float64)
    one_by_one = torch.stack([at_x.jvp(t) for t in tangents])
    assert_close(at_x.jvp(tangents), one_by_one, 1e-13, 1e-15)
    cotangents = torch.randn(3, *at_x.value.shape, dtype=torch.float64)
    assert_close(at_x.vjp(cotangents), torch.stack([at_x.vjp(c) for c in cotangents]), 1e-13, 1e-15)
    shared = at_x.jvp(torch.eye(4, dtype=torch.float64)[:, None])
    expected = at_x.jvp(torch.eye(4, dtype=torch.float64)[:, None].expand(4, 5, 4))
    assert_close(shared.expand_as(expected), expected, 1e-13, 1e-15)


@every_kind
def test_rows_belong_to_their_samples(label):
    g, x = kinds()[label], points()
    index = torch.tensor([3, 1])
    assert_close(g.rows(index)(x[index]), g(x)[index], 1e-14)
    assert_close(g.rows(index).linearise(x[index]).jvp(x[index]), g.linearise(x).jvp(x)[index], 1e-14, 1e-15)
    assert_close(g.rows(index).rows(torch.tensor([1]))(x[[1]]), g(x)[[1]], 1e-14)
    assert g.rows(index).bound == g.bound and g.rows(index).ceiling == g.ceiling
    assert g.rows(index).certified == g.certified and type(g.rows(index)) is type(g)


@every_kind
def test_jacobians_obey_the_bound(label):
    g = kinds()[label]
    steepest = torch.linalg.matrix_norm(dense(g, points()), ord=2)
    assert steepest.max() <= g.bound * (1 + 1e-12)
    assert g.bound <= g.ceiling


def test_only_what_is_proven_is_certified():
    proven = {label for label, g in kinds().items() if g.certified}
    assert set(kinds()) - proven == {"Stated", "Stated with context"}
    stated, layer = certified_map(Mixing()), affine(4, 4)
    for g in (maps.Composition((layer, stated)), maps.Sum((stated, layer)), maps.Endomap(stated)):
        assert not g.certified
    assert maps.Endomap(layer).certified and not Derivative(stated, points()).certified


def test_bounds_compose():
    a, b = maps.Scaling(2.0, 2.0), maps.Scaling(0.25, 0.25)
    assert maps.Composition((a, b)).bound == maps.Composition((a, b)).ceiling == 0.5
    assert maps.Sum((a, b)).bound == maps.Sum((a, b)).ceiling == 2.25
    assert maps.Concatenation((a, b), -1).bound == math.hypot(2, 0.25)
    assert maps.Concatenation((a, b), -1, most=2.0).bound == 2.0
    layer = maps.Affine(torch.eye(2), None, norm=0.3, most=0.9)
    assert (layer.bound, layer.ceiling) == (pytest.approx(0.3, rel=1e-15), 0.9) and layer.bound >= 0.3
    assert maps.Affine(torch.eye(2), None, norm=torch.tensor(3.0), most=0.9).bound == 0.9
    assert math.isnan(maps.Affine(torch.eye(2), None, norm=torch.tensor(math.nan), most=0.9).bound)
    assert maps.Composition((layer, a)).bound == 2 * layer.bound and maps.Composition((layer, a)).ceiling == 1.8
    assert maps.Map().ceiling == maps.Map().bound == math.inf


def test_shares_are_never_steeper_than_the_steepest_part():
    """And less steep where only the gentle one has a share."""
    parts = [maps.Scaling(0.9, 0.9), maps.Scaling(0.1, 0.1)]
    even = maps.Shares.of(parts, torch.tensor([0.5, 0.5]).sqrt(), -1)
    assert even.ceiling == 0.9 and even.bound == pytest.approx(math.hypot(0.9, 0.1) / math.sqrt(2))
    uneven = maps.Shares.of(parts, torch.tensor([0.0, 1.0]), -1)
    assert uneven.ceiling == 0.9 and uneven.bound == pytest.approx(0.1)


def test_a_missing_context_has_a_bound_but_no_values():
    g = maps.Shift(None)
    assert g.bound == g.rows(torch.tensor([0])).bound == 1
    for use in USES.values():
        with pytest.raises(ValueError, match="context"):
            use(g, torch.zeros(2, 3))


def test_a_shift_meets_samples_and_not_positions():
    """A context of one row per sample, events (S, F) with S equal to the batch: rows must not mix."""
    shift = torch.arange(3.0)[:, None].expand(3, 4)
    out = maps.Shift(shift)(torch.zeros(3, 3, 4))
    assert torch.equal(out, torch.arange(3.0).view(3, 1, 1).expand(3, 3, 4))
    assert torch.equal(maps.Shift(shift[:1] + 7)(torch.zeros(2, 5, 4)), torch.full((2, 5, 4), 7.0))


def test_wrong_features_are_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"4 features.*5"):
        affine(3, 4)(torch.zeros(2, 5).double())


@given(branch_and_size=branches())
def test_whole_branches_agree_with_their_modules(branch_and_size):
    """The Map path against the plain forward of the nested module."""
    branch, size = branch_and_size
    dtype = next(branch.parameters()).dtype
    x, context = torch.randn(4, size, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert_close(certified_map(branch, context)(x), call(branch, x, context), tolerance, tolerance)
    assert_close(certified_map(branch, context).linearise(x).value, call(branch, x, context), tolerance, tolerance)


# ------------------------------------------------------------------------------------------- the tensors that it holds


def norms_in(g: maps.Map) -> set[int]:
    """The tensors on which no value depends."""
    found: set[int] = set()
    g.replacing(Weighted, lambda layer: found.add(id(layer.norm)) or layer)
    return found


def replaced_one_by_one(g: maps.Map, tensors: list[Tensor]) -> Iterator[tuple[Tensor, maps.Map]]:
    """Every tensor that holds numbers, and the map that holds another one in its place."""
    for i, tensor in enumerate(tensors):
        if tensor.is_floating_point():
            yield tensor, g.holding([*tensors[:i], tensor + 0.1, *tensors[i + 1 :]])


@every_kind
def test_a_map_is_its_tensors(label):
    """In a fixed order; the map of others is another one, and the first stays as it was."""
    g, x = kinds()[label], points()
    value, held = g(x), g.tensors()
    assert [id(t) for t in held] == [id(t) for t in g.tensors()]
    twin = g.holding([t.clone() for t in held])
    assert type(twin) is type(g) and torch.equal(twin(x), value)
    assert not {id(t) for t in held} & {id(t) for t in twin.tensors()}
    assert all(torch.equal(a, b) for a, b in zip(held, twin.tensors(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(g.with_tensors(torch.neg).tensors(), map(torch.neg, held), strict=True)
    )
    for tensor, other in replaced_one_by_one(g, held):
        assert torch.equal(other(x), value) == (id(tensor) in norms_in(g))
    assert torch.equal(g(x), value)


@every_kind
def test_precision_is_changed_in_all_of_a_map_and_in_counts_of_none(label):
    g, x = kinds()[label], points()
    half = g.to(torch.float32)
    for before, after in zip(g.tensors(), half.tensors(), strict=True):
        assert after.dtype == (torch.float32 if before.is_floating_point() else before.dtype)
    assert_close(half(x.float()), g(x), 1e-5, 1e-6)
    assert half(x.float()).dtype == torch.float32
    back = half.to(torch.float64)
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(half.tensors(), back.tensors(), strict=True))
    floating = [t for t in g.tensors() if t.is_floating_point()]
    assert g.dtype() == (torch.float64 if floating else None)
    assert half.dtype() == (torch.float32 if floating else None)


def test_the_precision_of_a_map_is_its_widest():
    layer = affine(4, 4)
    half = layer.to(torch.float32)
    assert maps.Composition((half, layer)).dtype() == maps.Sum((layer, half)).dtype() == torch.float64
    assert maps.Scaling(torch.tensor(0.5).half(), 1.0).dtype() == torch.float16
    assert maps.Composition((layer.to(torch.float16), layer.to(torch.bfloat16))).dtype() == torch.float32
    counted = certified_map(Mixing())
    assert [t.dtype for t in counted.to(torch.bfloat16).tensors()].count(torch.int64) == 1


@every_kind
def test_wider_numbers_keep_bounds(label):
    g = kinds()[label].to(torch.float32)
    assert g.to(torch.float64).bound == g.bound and g.to(torch.float64).ceiling == g.ceiling


class Mapped(nn.Module):
    """Its forward pass gives the map, and its values."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor, context: Tensor) -> tuple[maps.Map, Tensor]:
        return certified_map(self.branch, context), call(self.branch, x, context)


@given(branch_and_size=branches())
def test_a_map_keeps_the_tensors_of_its_call(branch_and_size):
    """Whatever the module gets afterwards, as it does from functional_call, load_state_dict or optimisers of others."""
    branch, size = branch_and_size
    dtype = next(branch.parameters()).dtype
    x, context = torch.randn(4, size, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    module = Mapped(branch)
    others = {label: torch.randn_like(p) for label, p in module.named_parameters()}
    g, value = functional_call(module, others, (x, context))
    assert_close(g(x), value, 1e-5 if dtype == torch.float32 else 1e-12)
    assert_close(module(x, context)[0](x), call(branch, x, context), 1e-5, 1e-6)


@every_kind
def test_maps_of_one_kind_are_replaced_wherever_they_are(label):
    """By themselves: nothing changes. By others: `Sum` of all scalings in a nest, for instance."""
    g, x = kinds()[label], points()
    seen: list[maps.Map] = []
    same = g.replacing(maps.Affine, lambda layer: seen.append(layer) or layer)
    assert torch.equal(same(x), g(x))
    assert len(seen) == count(g, maps.Affine)


def count(g: Any, kind: type) -> int:
    """Written apart from what it judges."""
    if isinstance(g, kind):
        return 1
    parts = g if isinstance(g, tuple) else [getattr(g, f.name) for f in fields(g)] if isinstance(g, maps.Map) else []
    return sum(count(part, kind) for part in parts)


# ------------------------------------------------------------------------------- derivatives in the tensors of a map


def numbers_of(g: maps.Map) -> list[bool]:
    return [t.is_floating_point() for t in g.tensors()]


def dots(left: list[Tensor | None], right: list[Tensor | None]) -> float:
    return sum((a * b).sum().item() for a, b in zip(left, right, strict=True) if a is not None and b is not None)


@every_kind
def test_pull_back_is_the_gradient(label):
    g, x = kinds()[label], points()
    held, wanted = g.tensors(), numbers_of(g)
    cotangent = torch.randn_like(g(x))
    leaves = [t.detach().clone().requires_grad_(w) for t, w in zip(held, wanted, strict=True)]
    if not any(wanted):
        assert maps.pull_back(g, x, cotangent, wanted) == [None] * len(held)
        return
    chosen = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
    expected = torch.autograd.grad((cotangent * g.holding(leaves)(x)).sum(), chosen, materialize_grads=True)
    found = [p for p in maps.pull_back(g, x, cotangent, wanted) if p is not None]
    assert len(found) == sum(wanted)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-12, 1e-14)


@every_kind
def test_push_forward_is_the_transpose_of_pull_back(label):
    """<v, dg/dt dt> = <(dg/dt)^T v, dt>, for all tensors and for some."""
    g, x = kinds()[label], points()
    wanted = numbers_of(g)
    cotangent = torch.randn_like(g(x))
    for some in (wanted, [w and i % 2 == 0 for i, w in enumerate(wanted)], [False] * len(wanted)):
        tangents = [torch.randn_like(t) if w else None for t, w in zip(g.tensors(), some, strict=True)]
        if g(x).shape != x.shape:  # it serves x + g(x)
            continue
        pushed, pulled = maps.push_forward(g, x, tangents), maps.pull_back(g, x, cotangent, some)
        assert [p is not None for p in pulled] == some
        assert (cotangent * pushed).sum().item() == pytest.approx(dots(pulled, tangents), rel=1e-11, abs=1e-12)
        if not any(some):
            assert not pushed.any() and pushed.shape == x.shape
    assert_finite_difference(g, x)


def assert_finite_difference(g: maps.Map, x: Tensor) -> None:
    """The derivative in the tensors along a random direction, by pull_back, is that of values."""
    wanted, held, h = numbers_of(g), g.tensors(), 1e-6
    directions = [torch.randn_like(t) if w else torch.zeros_like(t) for t, w in zip(held, wanted, strict=True)]
    up, down = (
        g.holding([t + s * h * d if w else t for t, d, w in zip(held, directions, wanted, strict=True)])(x)
        for s in (1, -1)
    )
    cotangent = torch.randn_like(up)
    slope = (cotangent * (up - down)).sum().item() / (2 * h)
    assert dots(maps.pull_back(g, x, cotangent, wanted), directions) == pytest.approx(slope, rel=1e-6, abs=1e-7)


@every_kind
def test_pull_back_and_push_forward_are_differentiable(label):
    g, x = kinds()[label], points(2)
    g = g.rows(torch.arange(2))
    wanted = [w and id(t) not in norms_in(g) for t, w in zip(g.tensors(), numbers_of(g), strict=True)]
    if not any(wanted):
        return
    held = [t.detach().clone().requires_grad_(w) for t, w in zip(g.tensors(), wanted, strict=True)]
    chosen = [t for t, w in zip(held, wanted, strict=True) if w]
    x, cotangent = x.requires_grad_(), torch.randn_like(g(x)).requires_grad_()

    def pulled(x: Tensor, cotangent: Tensor, *new: Tensor) -> Tensor:
        source = iter(new)
        these = [next(source) if w else t for t, w in zip(held, wanted, strict=True)]
        return sum(p.square().sum() for p in maps.pull_back(g.holding(these), x, cotangent, wanted) if p is not None)

    assert torch.autograd.gradcheck(pulled, (x, cotangent, *chosen), fast_mode=True)


@pytest.mark.parametrize("kind", [Derivative, Transposed], ids=name)
def test_derivatives_are_the_products_of_their_branch(kind):
    g = certified_map(scaled_mlp(3, 6, gentle_sine, 0.9, context_features=2), torch.randn(5, 2).double())
    x, u, v = (points(5, 3) for _ in range(3))
    h = kind(g, x)
    jac = dense(g, x)
    jac = jac if kind is Derivative else jac.mT
    assert_close(h(u), (jac @ u[..., None])[..., 0], 1e-12, 1e-14)
    assert_close(h(2 * u - 3 * v), 2 * h(u) - 3 * h(v), 1e-13, 1e-14)  # linear, so it is its own derivative
    at_v = h.linearise(v)
    assert_close(at_v.value, h(v), 1e-14)
    assert_close(at_v.jvp(u), h(u), 1e-14)
    assert_close(at_v.vjp(u), (jac.mT @ u[..., None])[..., 0], 1e-12, 1e-14)
    assert (h.bound, h.ceiling, h.certified) == (g.bound, g.ceiling, g.certified)


def test_derivative_and_transposed_are_transposes():
    g = certified_map(scaled_mlp(3, 6, gentle_sine, 0.9))
    x, u, v = (points(5, 3) for _ in range(3))
    assert (v * Derivative(g, x)(u)).sum().item() == pytest.approx((u * Transposed(g, x)(v)).sum().item(), rel=1e-12)


@pytest.mark.parametrize("kind", [Derivative, Transposed], ids=name)
def test_derivatives_of_other_tensors_are_computed_anew(kind):
    """What a derivative keeps of its point belongs to its tensors alone."""
    first, second = (certified_map(scaled_mlp(3, 6, gentle_sine, 0.9)) for _ in range(2))
    x, z, u = (points(5, 3) for _ in range(3))
    h = kind(first, x)
    h(u)  # keeps the point
    other = h.holding(kind(second, z).tensors())
    assert_close(other(u), kind(second, z)(u), 1e-14)
    assert_close(h.to(torch.float32)(u.float()), h(u), 1e-5)
    assert (other(u) - h(u)).abs().max() > 1e-2


# -------------------------------------------------------------------------------------- what a backward pass recomputes


def smooth(x: Tensor, w: Tensor) -> Tensor:
    return torch.sin(x @ w) * x


def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return smooth(x, w), (x @ w).exp().sum(1)


def leaves() -> tuple[Tensor, Tensor]:
    return (0.3 * points(2, 3)).requires_grad_(), (0.3 * points(3, 3)).requires_grad_()


@pytest.mark.parametrize("function", [smooth, two], ids=name)
def test_recomputed_has_values_and_derivatives_of_the_function(function):
    """First, second and third ones, in reverse mode."""
    x, w = leaves()

    def ours(x: Tensor, w: Tensor) -> Any:
        return maps.recomputed(function, x, w)

    for one, other in zip(as_tuple(ours(x, w)), as_tuple(function(x, w)), strict=True):
        assert torch.equal(one, other)
    assert torch.autograd.gradcheck(ours, (x, w))
    assert torch.autograd.gradgradcheck(ours, (x, w))

    def third(f: Callable[..., Any]) -> Tensor:
        total = sum(t.square().sum() for t in as_tuple(f(x, w)))
        for _ in range(3):
            first, second = torch.autograd.grad(total, (x, w), create_graph=True)
            total = first.sin().sum() + second.sin().sum()
        return total

    assert_close(third(ours), third(function), 1e-12)


@pytest.mark.parametrize("function", [smooth, two], ids=name)
def test_recomputed_in_forward_mode(function):
    """That of torch.autograd.forward_ad; and forward over reverse."""
    x, w = leaves()

    def ours(x: Tensor, w: Tensor) -> Any:
        return maps.recomputed(function, x, w)

    assert torch.autograd.gradcheck(ours, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, (x, w), check_fwd_over_rev=True)
    with forward_ad.dual_level():
        dual = as_tuple(maps.recomputed(function, x.detach(), forward_ad.make_dual(w.detach(), torch.ones_like(w))))
        pushed = [forward_ad.unpack_dual(t).tangent for t in dual]
    expected = jvp(lambda w: function(x, w), (w,), (torch.ones_like(w),))[1]
    for one, other in zip(pushed, as_tuple(expected), strict=True):
        assert_close(one, other, 1e-14)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_recomputed_in_torch_func():
    x, w = (t.detach() for t in leaves())

    def ours(x: Tensor) -> Tensor:
        return maps.recomputed(smooth, x, w).sum()

    assert_close(hessian(ours)(x), hessian(lambda x: smooth(x, w).sum())(x), 1e-13)
    tangent = torch.randn_like(x)
    found, expected = (
        jvp(f, (x,), (tangent,)) for f in (lambda x: maps.recomputed(smooth, x, w), lambda x: smooth(x, w))
    )
    assert_close(found[1], expected[1], 1e-14)
    stack = torch.stack([x, 2 * x])
    assert_close(vmap(lambda x: maps.recomputed(smooth, x, w))(stack), vmap(lambda x: smooth(x, w))(stack), 1e-14)


def test_recomputed_keeps_its_inputs_alone_and_evaluates_once_for_a_backward():
    x, w = leaves()
    calls, kept = [], []

    def counted(x: Tensor, w: Tensor) -> Tensor:
        calls.append(1)
        return smooth(x, w)

    def pack(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = maps.recomputed(counted, x, w)
    assert len(calls) == 1 and set(kept) == {x.data_ptr(), w.data_ptr()}
    out.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("which", [0, 1])
def test_recomputed_refuses_what_was_edited_in_between(which):
    tensors = [t * 1 for t in leaves()]
    out = maps.recomputed(smooth, *tensors)
    with torch.no_grad():
        tensors[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_recomputed_gives_gradients_to_those_that_want_them():
    x, w = leaves()
    out = maps.recomputed(smooth, x.detach(), w)
    (grad,) = torch.autograd.grad(out.sum(), w)
    assert_close(grad, torch.autograd.grad(smooth(x, w).sum(), w)[0], 1e-14)
    assert not maps.recomputed(smooth, x.detach(), w.detach()).requires_grad


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_recomputed_computes_as_it_did_under_autocast(inside, order):
    """Whatever autocast is when the backward pass runs."""
    x, w = (t.detach().float().requires_grad_() for t in leaves())

    def gradient(f: Callable[..., Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss = f(x, w).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            for _ in range(order - 1):
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = slope.sin().sum()
            return torch.autograd.grad(loss, x)[0]

    seen: list[bool] = []

    def watched(x: Tensor, w: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return smooth(x, w)

    ours = gradient(lambda x, w: maps.recomputed(watched, x, w))
    assert set(seen) == {inside} and len(seen) >= 1 + order
    assert_close(ours, gradient(smooth), 0.02)  # torch's own backward products are rounded where it is on


# ----------------------------------------------------- broadcasting inside an event copies entries: no bound covers it

USES: dict[str, Callable[[maps.Map, Tensor], Any]] = {
    "call": lambda g, x: g(x),
    "linearise": lambda g, x: g.linearise(x),
    "rounded": lambda g, x: g.rounded(*known(x, Plain(x.dtype))),
}


every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


def widened(width: int) -> dict[str, maps.Map]:
    """Maps made for events of `width` features, which would copy narrower ones."""
    weights = torch.ones(1, 1, 1).double(), torch.ones(width, 1, 1).double()
    spec = maps.ConvSpec((1,), (1,), (1,), ((0, 0),))
    one, many = (maps.Convolution(w, None, 1.0, 1.0, spec) for w in weights)
    return {
        "Elementwise": certified_map(Sine(width).double()),
        "Circle": certified_map(SinCos(width).double()),
        "Shift": maps.Shift(torch.randn(5, width).double()),
        "Shift of one row": maps.Shift(torch.randn(1, width).double()),
        "Sum": maps.Sum((maps.Scaling(1.0, 1.0), affine(width, 1))),
        "nested": maps.Composition((maps.Endomap(maps.Composition((certified_map(Sine(width).double()),))),)),
        "Concatenation": maps.Composition((maps.Reshape(1, 1, (1, 1)), maps.Concatenation((one, many), -1))),
    }


@pytest.mark.parametrize("label", widened(8))
@every_use
def test_copied_entries_are_refused_with_the_numbers(label, use):
    """Eight copies of one feature have Lipschitz constant sqrt(8), whatever is done to each."""
    for width in (2, 8):
        with pytest.raises(ValueError, match=rf"{width}.*(features|agree)"):
            use(widened(width)[label], torch.randn(5, 1, dtype=torch.float64))


@every_use
@pytest.mark.parametrize("width", [1, 3, 5])
def test_pairs_of_an_odd_number_are_refused(use, width):
    with pytest.raises(ValueError, match=rf"even.*{width}"):
        use(certified_map(MaxMin(2)), torch.randn(4, width))


@pytest.mark.parametrize("use", ["call", "linearise"])
def test_a_branch_of_another_shape_is_refused(use):
    with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
        USES[use](maps.Endomap(affine(3, 4)), points())


def test_one_row_may_still_meet_many_contexts():
    g = maps.Composition((maps.Shift(torch.randn(5, 4).double()), sine()))
    x = torch.randn(1, 4, dtype=torch.float64)
    assert_close(g(x), g(x.expand(5, 4)), 1e-14)
    both = maps.Sum((g, maps.Scaling(0.5, 0.5)))
    assert_close(both(x), both(x.expand(5, 4)), 1e-14)
    beside = maps.Concatenation((g, maps.Scaling(0.5, 0.5)), -1)
    assert_close(beside(x), beside(x.expand(5, 4)), 1e-14)
    for h in (g, both, beside):
        one, many = (h.rounded(*known(t, Split(torch.float64))) for t in (x, x.expand(5, 4)))
        assert_close(one.value, many.value, 1e-14)
        assert_close(one.error.expand(5), many.error, 1e-12)


@pytest.mark.parametrize(
    "module, features",
    [
        (Sine(8), 1),
        (SinCos(8), 1),
        (AddContext(nn.Linear(2, 8)), 1),
        (Sum(nn.Linear(1, 1), nn.Linear(1, 8)), 1),
        (MaxMin(), 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_plain_modules_refuse_as_well(module, features):
    """What is certified is the module, too, and not only its `Map`."""
    x = torch.randn(8, features)
    context = (torch.randn(8, 2),) if isinstance(module, AddContext) else ()
    with pytest.raises((ValueError, RuntimeError)):
        module(x, *context)
    if not context:
        with pytest.raises(ValueError):
            certified_map(module)(x)
