"""Maps: values, products, bounds and rows of each kind, against dense Jacobians by torch.func."""

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from iresflow_plugin import maps
from iresflow_plugin.lipschitz import AddContext, MaxMin, SinCos, Sine, Sum, certify
from tests.helpers import assert_close, branches, call, svd_norm


def affine(rows: int, columns: int, bias: bool = True) -> maps.Affine:
    weight = torch.randn(rows, columns, dtype=torch.float64)
    return maps.Affine(weight, torch.randn(rows).double() if bias else None, svd_norm(weight), math.inf)


def sine() -> maps.Elementwise:
    return maps.Elementwise(torch.sin, lambda x: (x.sin(), x.cos()), 1.0)


def kinds() -> dict[str, maps.Map]:
    """One of each, for events of shape (4,) and batches of 5."""
    torch.manual_seed(0)
    a, b = affine(4, 4), affine(3, 4, bias=False)
    return {
        "Affine": a,
        "Affine without bias": b,
        "Scaling": maps.Scaling(-0.5, 0.5),
        "Scaling by a tensor": maps.Scaling(torch.linspace(-1, 1, 4).double(), 1.0),
        "Shift": maps.Shift(torch.randn(5, 4).double()),
        "Shift of one row": maps.Shift(torch.randn(1, 4).double()),
        "Elementwise": sine(),
        "Sort": certify(MaxMin(4)),
        "Circle": certify(SinCos(4).double()),
        "Reshape": maps.Reshape(nn.Unflatten(1, (2, 2))),
        "Generic": maps.Generic(lambda x: torch.sin(x) * x.flip(1), math.inf),
        "Generic with context": maps.Generic(lambda x, c: torch.sin(x * c), math.inf, torch.randn(5, 4).double()),
        "Composition": maps.Composition([b, sine(), affine(4, 3)]),
        "empty Composition": maps.Composition([]),
        "Sum": maps.Sum([a, sine(), maps.Shift(torch.randn(5, 4).double())]),
        "Concatenation": maps.Concatenation([a, b, sine()], -1),
    }


every_kind = pytest.mark.parametrize("label", kinds())


def dense(g: maps.Map, x: Tensor) -> Tensor:
    """(B, out, in) by reverse mode through __call__, one sample at a time."""
    blocks = []
    for i in range(len(x)):
        row = g.rows(torch.tensor([i]))
        blocks.append(torch.autograd.functional.jacobian(lambda t, row=row: row(t[None])[0].flatten(), x[i]))
    return torch.stack(blocks)


@every_kind
def test_products_are_those_of_the_jacobian(label):
    g = kinds()[label]
    x = torch.randn(5, 4, dtype=torch.float64)
    jac, at_x = dense(g, x), g.linearise(x)
    assert_close(at_x.value, g(x), 1e-14)
    tangent, cotangent = torch.randn_like(x), torch.randn_like(at_x.value)
    assert_close(at_x.jvp(tangent).flatten(1), (jac @ tangent[..., None])[..., 0], 1e-12, 1e-14)
    assert_close(at_x.vjp(cotangent), (jac.mT @ cotangent.flatten(1)[..., None])[..., 0], 1e-12, 1e-14)


@every_kind
def test_products_take_a_leading_dimension_and_broadcast_over_the_batch(label):
    """(K, B, *event) as the probes have it, and (K, 1, *event) as the basis of the exact Jacobian has it."""
    g = kinds()[label]
    x = torch.randn(5, 4, dtype=torch.float64)
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
    g = kinds()[label]
    x = torch.randn(5, 4, dtype=torch.float64)
    index = torch.tensor([3, 1])
    assert_close(g.rows(index)(x[index]), g(x)[index], 1e-14)
    assert_close(g.rows(index).linearise(x[index]).jvp(x[index]), g.linearise(x).jvp(x)[index], 1e-14, 1e-15)
    assert_close(g.rows(index).rows(torch.tensor([1]))(x[[1]]), g(x)[[1]], 1e-14)
    assert g.rows(index).bound == g.bound and g.rows(index).ceiling == g.ceiling


@every_kind
def test_jacobians_obey_the_bound(label):
    g = kinds()[label]
    norms = torch.linalg.matrix_norm(dense(g, torch.randn(5, 4, dtype=torch.float64)), ord=2)
    assert norms.max() <= g.bound * (1 + 1e-12)


@every_kind
def test_magnitude_covers_everything_on_the_way(label):
    g = kinds()[label]
    x = torch.randn(5, 4, dtype=torch.float64)
    value, size = g.magnitude(x)
    assert_close(value, g(x), 1e-14)
    assert size.shape == (5,)
    assert (size >= torch.maximum(x.norm(dim=1), value.flatten(1).norm(dim=1)) * (1 - 1e-12)).all()


def test_magnitude_sees_what_cancels():
    """Large numbers inside, a small value: their rounding errors stay."""
    shift = torch.full((2, 4), 1e6).double()
    g = maps.Composition([maps.Shift(shift), maps.Shift(-shift)])
    assert (g.magnitude(torch.ones(2, 4).double())[1] > 1e6).all()
    both = maps.Sum([maps.Shift(shift), maps.Shift(-shift)])
    assert (both.magnitude(torch.ones(2, 4).double())[1] > 1e6).all()
    beside = maps.Concatenation([g, maps.Scaling(1.0, 1.0)], -1)
    assert (beside.magnitude(torch.ones(2, 4).double())[1] > 1e6).all()


def test_bounds_compose():
    a, b = maps.Scaling(2.0, 2.0), maps.Scaling(0.25, 0.25)
    assert maps.Composition([a, b]).bound == maps.Composition([a, b]).ceiling == 0.5
    assert maps.Sum([a, b]).bound == maps.Sum([a, b]).ceiling == 2.25
    assert maps.Concatenation([a, b], -1).bound == math.hypot(2, 0.25)
    assert maps.Concatenation([a, b], -1, constant=2.0).bound == 2.0
    layer = maps.Affine(torch.eye(2), None, bound=0.3, ceiling=0.9)
    assert (layer.bound, layer.ceiling) == (0.3, 0.9)
    assert maps.Affine(torch.eye(2), None, bound=3.0, ceiling=0.9).bound == 0.9
    assert maps.Composition([layer, a]).bound == 0.6 and maps.Composition([layer, a]).ceiling == 1.8
    assert maps.Map().ceiling == math.inf


def test_a_missing_context_has_a_bound_but_no_values():
    g = maps.NeedsContext()
    assert g.bound == 1
    for use in (g, g.linearise):
        with pytest.raises(ValueError, match="context"):
            use(torch.zeros(2, 3))


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
    assert_close(certify(branch, context)(x), call(branch, x, context), tolerance, tolerance)
    assert_close(certify(branch, context).linearise(x).value, call(branch, x, context), tolerance, tolerance)


# ----------------------------------------------------- broadcasting inside an event copies entries: no bound covers it


def widened(width: int) -> dict[str, maps.Map]:
    """Maps made for events of `width` features, which would copy narrower ones."""
    weights = torch.ones(1, 1, 1).double(), torch.ones(width, 1, 1).double()
    geometry = maps.Geometry((1,), (1,), 1, ((0, 0),), "zeros")
    one, many = (maps.Convolution(w, None, geometry, 1.0, 1.0) for w in weights)
    return {
        "Elementwise": certify(Sine(width).double()),
        "Circle": certify(SinCos(width).double()),
        "Shift": maps.Shift(torch.randn(5, width).double()),
        "Shift of one row": maps.Shift(torch.randn(1, width).double()),
        "Sum": maps.Sum([maps.Scaling(1.0, 1.0), affine(width, 1)]),
        "nested": maps.Composition([maps.Endomap(maps.Composition([certify(Sine(width).double())]))]),
        "Concatenation": maps.Composition(
            [maps.Reshape(nn.Unflatten(1, (1, 1))), maps.Concatenation([one, many], -1)],
        ),
    }


@pytest.mark.parametrize("label", widened(8))
@pytest.mark.parametrize("use", [maps.Map.__call__, maps.Map.linearise, maps.Map.magnitude], ids=lambda f: f.__name__)
def test_copied_entries_are_refused_with_the_numbers(label, use):
    """Eight copies of one feature have Lipschitz constant sqrt(8), whatever is done to each."""
    for width in (2, 8):
        with pytest.raises(ValueError, match=rf"{width}.*(features|agree)"):
            getattr(widened(width)[label], use.__name__)(torch.randn(5, 1, dtype=torch.float64))


@pytest.mark.parametrize("use", [maps.Map.__call__, maps.Map.linearise, maps.Map.magnitude], ids=lambda f: f.__name__)
@pytest.mark.parametrize("width", [1, 3, 5])
def test_pairs_of_an_odd_number_are_refused(use, width):
    with pytest.raises(ValueError, match=rf"even.*{width}"):
        getattr(certify(MaxMin(2)), use.__name__)(torch.randn(4, width))


def test_one_row_may_still_meet_many_contexts():
    g = maps.Composition([maps.Shift(torch.randn(5, 4).double()), sine()])
    x = torch.randn(1, 4, dtype=torch.float64)
    assert_close(g(x), g(x.expand(5, 4)), 1e-14)
    both = maps.Sum([g, maps.Scaling(0.5, 0.5)])
    assert_close(both(x), both(x.expand(5, 4)), 1e-14)
    beside = maps.Concatenation([g, maps.Scaling(0.5, 0.5)], -1)
    assert_close(beside(x), beside(x.expand(5, 4)), 1e-14)


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
            certify(module)(x)
