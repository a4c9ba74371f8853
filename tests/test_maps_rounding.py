"""Rounding: no value is further from the exact one than its bound says, in exact arithmetic wherever that can be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iresflow_plugin import maps
from iresflow_plugin.lipschitz import CLipSwish, CPila, LipSwish, SinCos, Sine, certified_map
from iresflow_plugin.maps.rounding import Plain, Rounded, Split, elementwise, gamma, products_for
from iresflow_plugin.torch_state import norms
from tests.every_map import dense, every_kind, kinds, known, points
from tests.helpers import EPS, EVERY_ACTIVATION, assert_close, branches, name, svd_norm

PRODUCTS = {"Plain": Plain, "Split": Split}
every_product = pytest.mark.parametrize("products", PRODUCTS.values(), ids=PRODUCTS)
every_dtype = pytest.mark.parametrize("dtype", EPS, ids=str)
Numbers = list[Fraction]


def exactly(x: Tensor) -> list[Numbers]:
    """Every sample as a list of fractions."""
    return [[Fraction(*number.as_integer_ratio()) for number in row] for row in x.double().flatten(1).tolist()]


def assert_holds(found: Rounded, exact: list[Numbers]) -> None:
    """|value - exact| <= error and |value| <= size, in exact arithmetic but for how norms are rounded."""
    assert torch.isfinite(found.value).all() and found.error.shape == found.size.shape == (len(exact),)
    slack = (1 + 64 * Fraction(torch.finfo(found.error.dtype).eps)) ** 2
    for value, right, error, size in zip(
        exactly(found.value), exact, found.error.tolist(), found.size.tolist(), strict=True
    ):
        off = sum((a - b) ** 2 for a, b in zip(value, right, strict=True))
        assert off <= Fraction(error) ** 2 * slack, (root(off), error)
        assert sum(a**2 for a in value) <= Fraction(size) ** 2 * slack


def root(number: Fraction) -> float:
    """Of numbers whose squares no float holds, too."""
    return math.isqrt(number.numerator * 2**4096 // number.denominator) / 2**2048 if number else 0.0


def matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Numbers]:
    rows, matrix = exactly(x), exactly(weight)
    shift = [Fraction(0)] * len(matrix) if bias is None else exactly(bias[None])[0]
    return [
        [sum(w * e for w, e in zip(line, row, strict=True)) + b for line, b in zip(matrix, shift, strict=True)]
        for row in rows
    ]


Draw = Callable[[int, int, torch.dtype], tuple[Tensor, Tensor]]


def spread(*shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, all digits in use."""
    exponents = torch.randint(-12, 13, shape) if dtype == torch.float32 else torch.randint(-90, 91, shape)
    return (torch.randn(shape, dtype=torch.float64) * 2.0**exponents).to(dtype)


def cancelling(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Large products that cancel, but for the last digits."""
    x, weight = torch.randn(3, n, dtype=dtype), torch.randn(m, n, dtype=dtype)
    half = n // 2
    x[:, half : 2 * half] = x[:, :half] * (1 + EPS[dtype])
    weight[:, half : 2 * half] = -weight[:, :half]
    return 1e4 * x, weight


def lost_one_by_one(n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each product is below half a unit in the last place of the first, and all together are many."""
    weight = torch.full((m, n), EPS[dtype] * 0.49, dtype=dtype)
    weight[:, 0] = 1
    return torch.ones(3, n, dtype=dtype) * (1 + 3 * EPS[dtype]), weight


ADVERSARIES: dict[str, Draw] = {
    "random": lambda n, m, dtype: (torch.randn(3, n, dtype=dtype), torch.randn(m, n, dtype=dtype)),
    "averaging": lambda n, m, dtype: (torch.full((3, n), 0.7, dtype=dtype), torch.full((m, n), 1.0 / 3, dtype=dtype)),
    "of every size": lambda n, m, dtype: (spread(3, n, dtype=dtype), spread(m, n, dtype=dtype)),
    "cancelling": cancelling,
    "lost one by one": lost_one_by_one,
    "large": lambda n, m, dtype: (torch.randn(3, n, dtype=dtype) * 1e12, torch.randn(m, n, dtype=dtype)),
    "small": lambda n, m, dtype: (torch.randn(3, n, dtype=dtype) * 1e-12, torch.randn(m, n, dtype=dtype) * 1e-3),
    "zero": lambda n, m, dtype: (torch.zeros(3, n, dtype=dtype), torch.randn(m, n, dtype=dtype)),
    "below a power of two": lambda n, m, dtype: (
        torch.full((3, n), 1 - EPS[dtype] / 2, dtype=dtype),
        torch.full((m, n), 2 - EPS[dtype], dtype=dtype),
    ),
}


@every_product
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (65, 2), (784, 3)], ids=str)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_rounding_of_matrix_products(adversary, shape, dtype, products):
    x, weight = ADVERSARIES[adversary](*shape, dtype)
    for bias in (None, torch.randn(shape[1], dtype=dtype)):
        layer = maps.Affine(weight, bias, svd_norm(weight), math.inf)
        found = layer.rounded(*known(x, products(dtype)))
        assert_close(found.value, layer(x), 0, 1e3 * EPS[dtype] * shape[0] * float(weight.norm() * x.norm()) + 1e-30)
        assert_holds(found, matrix_product(x, weight, bias))


@every_product
@every_dtype
@pytest.mark.parametrize("rows, columns", [(784, 1), (3, 1), (3, 50)])
def test_rounding_of_products_below_the_smallest_normal_number(rows, columns, dtype, products):
    """Where denormals are flushed, every entry of the value may lose as much, however many there are."""
    root = torch.finfo(dtype).tiny ** 0.5
    weight, x = torch.full((rows, columns), 0.99 * root, dtype=dtype), torch.full((2, columns), root, dtype=dtype)
    layer = maps.Affine(weight, None, svd_norm(weight), math.inf)
    assert_holds(layer.rounded(*known(x, products(dtype))), matrix_product(x, weight))


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_numbers_split_apart_lose_what_a_few_roundings_lose(adversary):
    """However long the sums: the error is that of the value, and a small part of what a plain sum may lose."""
    for n in (16, 784):
        x, weight = ADVERSARIES[adversary](n, 3, torch.float64)
        layer = maps.Affine(weight, None, svd_norm(weight), math.inf)
        found, plain = (layer.rounded(*known(x, kind(torch.float64))) for kind in (Split, Plain))
        limit = EPS[torch.float64] * (2 * norms(found.value) + weight.norm() * norms(x) / 32) + 1e-300
        assert (found.error <= limit).all()
        assert n == 16 or (found.error <= plain.error).all()


SPECS = {
    "zeros": ((2, 3, 3), maps.ConvSpec((3,), (1,), (1,), ((1, 1),)), (3, 5)),
    "asymmetric": ((2, 1, 2), maps.ConvSpec((2,), (1,), (1,), ((1, 0),)), (1, 4)),
    "stride and dilation": ((2, 2, 3, 2), maps.ConvSpec((3, 2), (2, 1), (1, 2), ((2, 2), (1, 1))), (2, 5, 4)),
    "groups": ((4, 1, 2, 2), maps.ConvSpec((2, 2), (1, 1), (1, 1), ((0, 0), (0, 0)), groups=2), (2, 3, 3)),
    "circular": ((2, 2, 3, 3), maps.ConvSpec((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), "circular"), (2, 3, 3)),
    "circular, wide": ((1, 2, 2), maps.ConvSpec((2,), (1,), (1,), ((4, 4),), "circular"), (2, 4)),
    "three axes": ((2, 1, 2, 2, 2), maps.ConvSpec((2,) * 3, (1,) * 3, (1,) * 3, ((1, 1),) * 3), (1, 2, 2, 2)),
    "deep": ((2, 64, 3), maps.ConvSpec((3,), (1,), (1,), ((1, 1),)), (64, 3)),
}


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, spec: maps.ConvSpec) -> list[Numbers]:
    """Pixel by pixel and tap by tap."""
    outs, ins, *kernel = weight.shape
    sizes = x.shape[2:]
    images = [
        [front + n + behind - d * (k - 1) - 1, s]
        for n, (front, behind), d, k, s in zip(sizes, spec.padding, spec.dilation, kernel, spec.stride, strict=True)
    ]
    places = list(itertools.product(*[range(room // stride + 1) for room, stride in images]))
    taps = list(itertools.product(*map(range, kernel)))
    wide, shift = weight.double(), None if bias is None else exactly(bias[None])[0]

    def entry(image: Tensor, out: int, place: tuple[int, ...]) -> Fraction:
        total = Fraction(0) if shift is None else shift[out]
        for channel, tap in itertools.product(range(ins), taps):
            at = [
                p * s + t * d - front
                for p, s, t, d, (front, _) in zip(place, spec.stride, tap, spec.dilation, spec.padding, strict=True)
            ]
            if spec.mode == "circular":
                at = [a % n for a, n in zip(at, sizes, strict=True)]
            if all(0 <= a < n for a, n in zip(at, sizes, strict=True)):
                source = out // (outs // spec.groups) * ins + channel
                total += Fraction(wide[(out, channel, *tap)].item()) * Fraction(image[(source, *at)].item())
        return total

    return [[entry(image, out, place) for out in range(outs) for place in places] for image in x.double()]


@every_product
@every_dtype
@pytest.mark.parametrize("label", SPECS)
def test_rounding_of_convolutions(label, dtype, products):
    shape, spec, event = SPECS[label]
    for draw in (torch.randn, lambda *s: torch.full(s, 0.7), lambda *s: spread(*s, dtype=dtype)):
        x, weight, bias = (draw(*s).to(dtype) for s in ((2, *event), shape, (shape[0],)))
        taps = torch.linalg.matrix_norm(weight.double().flatten(2).movedim(2, 0), ord=2).sum().item()
        layer = maps.Convolution(weight, bias, taps * spec.gain, math.inf, spec)
        found = layer.rounded(*known(x, products(dtype)))
        assert found.value.shape == layer(x).shape
        assert_holds(found, convolved(x, weight, bias, spec))


@every_product
@every_dtype
@pytest.mark.parametrize("terms", [1, 2, 33])
def test_rounding_of_sums(terms, dtype, products):
    """Of terms that cancel to something small, in any order; what the terms are off by comes on top."""
    terms = [spread(3, 4, dtype=dtype) for _ in range(terms)]
    terms = [*terms, *[-t for t in terms], torch.ones(1, 4, dtype=dtype)]
    terms = [terms[i] for i in torch.randperm(len(terms))]
    found = products(dtype).add([known(t, products(dtype))[0] for t in terms])
    assert_holds(found, [[Fraction(1)] * 4] * 3)
    largest = sum(norms(t).max() for t in terms)
    if products is Split:
        assert (found.error <= 2 * EPS[dtype] + (len(terms) * EPS[dtype]) ** 2 * largest).all()
    off = products(dtype).add([known(t, products(dtype), off=7.0)[0] for t in terms])
    assert_close(off.error, found.error + 7.0 * len(terms), 1e-5)


@every_product
@every_dtype
def test_rounding_of_sums_and_shifts_of_maps(dtype, products):
    """Those of the terms come on top."""
    shifts = [1e6 * torch.randn(3, 4, dtype=dtype) for _ in range(6)]
    shifts = [*shifts, *[-s for s in shifts]]
    x = torch.randn(3, 4, dtype=dtype)
    found = maps.Sum(tuple(map(maps.Shift, shifts))).rounded(*known(x, products(dtype)))
    assert_holds(found, [[len(shifts) * e for e in row] for row in exactly(x)])
    assert (found.error >= len(shifts) * 1e5 * EPS[dtype]).all()
    chain = maps.Composition(tuple(map(maps.Shift, shifts))).rounded(*known(x, products(dtype)))
    assert_holds(chain, exactly(x))
    beside = maps.Concatenation(tuple(map(maps.Shift, shifts)), -1).rounded(*known(x, products(dtype)))
    rows = zip(exactly(x), *[exactly(s) for s in shifts], strict=True)
    assert_holds(beside, [[a + b for shift in row for a, b in zip(first, shift, strict=True)] for first, *row in rows])


@pytest.mark.parametrize("scale", [1e-200, 1e-100, 1e100, 1e200])
def test_rounding_of_numbers_whose_squares_no_float_holds(scale):
    """In all maps whose error is made of several."""
    x, shift = scale * points(3), scale * torch.randn(3, 4, dtype=torch.float64)
    both = maps.Shift(shift), maps.Scaling(-1 / 3, 0.5)
    third = Fraction(-1 / 3)
    rows = list(zip(exactly(x), exactly(shift), strict=True))
    for g, exact in (
        (maps.Concatenation(both, -1), [[*map(sum, zip(a, b, strict=True)), *[third * e for e in a]] for a, b in rows]),
        (maps.Sum(both), [[e + s + third * e for e, s in zip(a, b, strict=True)] for a, b in rows]),
        (maps.Composition(both), [[third * (e + s) for e, s in zip(a, b, strict=True)] for a, b in rows]),
    ):
        found = g.rounded(*known(x, Split(torch.float64)))
        assert_holds(found, exact)
        assert (found.error <= 8 * EPS[torch.float64] * (norms(x) + norms(shift))).all()


@every_product
@every_dtype
@pytest.mark.parametrize("factor", [-0.7, 1 / 3, 0.9999999999, torch.tensor([0.1, -0.9, 1e-3, 0.0])], ids=str)
def test_rounding_of_scalings(factor, dtype, products):
    """A number is what the judged precision holds of it, whatever the precision that judges."""
    x = spread(3, 4, dtype=dtype)
    tensor = isinstance(factor, Tensor)
    scaling = maps.Scaling(factor.to(dtype) if tensor else factor, 1.0)
    judged = dtype if tensor else torch.float32
    in_use = exactly(scaling.factor[None])[0] if tensor else [Fraction(scaling(torch.ones(1, dtype=judged)).item())] * 4
    found = scaling.rounded(*known(x, products(judged)))
    assert_holds(found, [[f * e for f, e in zip(in_use, row, strict=True)] for row in exactly(x)])


@every_product
@every_kind
def test_what_is_off_in_front_is_off_by_no_more_behind(label, products):
    """Errors of the input, along random directions and the steepest, are covered; and no more than L times them."""
    g, x = kinds()[label], points()
    off = torch.tensor([0.0, 1e-8, 1e-3, 0.1, 0.1]).double()
    if g.bound == math.inf or not g.needs_proof:
        return
    found = g.rounded(*known(x, products(torch.float64), off))
    assert_close(found.value, g(x), 1e-13)
    steepest = torch.linalg.svd(dense(g, x))[2][:, 0]
    for direction in (steepest, -steepest, *torch.randn(4, 5, 4, dtype=torch.float64)):
        moved = g(x + off[:, None] * direction / direction.norm(dim=1, keepdim=True))
        assert (norms(moved - found.value) <= found.error * (1 + 1e-12) + 1e-14).all()
    overlap = 2 if isinstance(g, maps.Concatenation) else 1  # the parts are not as steep at once
    assert (found.error <= overlap * off * g.bound * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("label", [k for k, g in kinds().items() if g.bound < math.inf and g.needs_proof])
def test_plain_and_split_judge_the_same_value(label):
    g, x = kinds()[label], 1e3 * points()
    one, other = (g.rounded(*known(x, kind(torch.float64))) for kind in PRODUCTS.values())
    assert (norms(one.value - other.value) <= one.error + other.error).all()


@given(branch_and_size=branches(), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rounding_of_whole_branches(branch_and_size, scale):
    """In single precision against double, and in double by plain products against split ones."""
    branch, size = branch_and_size
    branch = branch.float()
    x, context = scale * torch.randn(4, size), torch.randn(4, 2)
    g = certified_map(branch, context)
    wide = g.to(torch.float64)
    plain, split = (kind(torch.float32) for kind in PRODUCTS.values())
    exact = wide.rounded(*known(x.double(), plain))
    again = wide.rounded(*known(x.double(), split))
    assert (norms(exact.value - again.value) <= exact.error + again.error).all()
    for products in (plain, split):
        rough = g.rounded(*known(x, products))
        assert (norms(rough.value - exact.value) <= rough.error + exact.error).all()
        assert (exact.error <= 1e-6 * rough.error).all()


@pytest.mark.parametrize(
    "judge, judged, kind",
    [
        (torch.float64, torch.float64, Split),
        (torch.float64, torch.float32, Plain),
        (torch.float64, torch.bfloat16, Plain),
        (torch.float64, torch.float16, Plain),
        (torch.float32, torch.float32, Split),
        (torch.float32, torch.bfloat16, Split),
    ],
    ids=str,
)
def test_a_judge_is_as_good_as_it_must_be(judge, judged, kind):
    """Plain products suffice only where even long sums of them stay below the judged precision."""
    products = products_for(torch.ones(1, 1, dtype=judge), judged)
    assert products == kind(judged) and products.judged == judged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gamma_covers_every_product_of_roundings(dtype):
    """(1 + u)^n - 1 <= gamma_n, and 1 - (1 - u)^n, in exact arithmetic; nothing is known where n u reaches one."""
    u = Fraction(torch.finfo(dtype).eps) / 2
    assert gamma(0, dtype) == 0
    for n in (1, 2, 3, 10, 100):
        found = gamma(n, dtype)
        if n * u < 1:
            assert max((1 + u) ** n - 1, 1 - (1 - u) ** n) <= Fraction(found) * (1 + Fraction(1, 2**50))
            assert found == pytest.approx(float(n * u / (1 - n * u)), rel=1e-14)
        else:
            assert found == math.inf
    assert gamma(int(1 / u), dtype) == gamma(int(2 / u), dtype) == math.inf


# ------------------------------------------------------------------------------------------ rounding of activations


def grid(limit: float, smallest: float, many: int = 0) -> Tensor:
    """Dense where activations bend, and powers of ten on both sides of it, shape (N, 1)."""
    bend = torch.cat([torch.linspace(-25, 25, 4001), 4 * torch.randn(many)]).double()
    exponents = torch.arange(math.log10(smallest), math.log10(limit), 0.25, dtype=torch.float64)
    edges = torch.tensor([0.0, 0.2, -0.2, 1.0, -1.0, 3.0, -3.0, 20.0, -20.0], dtype=torch.float64)
    return torch.cat([bend, 10**exponents, -(10**exponents), edges, edges * (1 + 1e-9)])[:, None]


def activation_maps(kind: type[nn.Module]) -> list[maps.Map]:
    """With parameters from small to large, for one feature."""
    if issubclass(kind, (Sine, SinCos)):
        return [certified_map(kind(1, low=w, high=w).double()) for w in (1e-6, 0.5, 3.0, 40.0, 1e4)]
    if issubclass(kind, (LipSwish, CLipSwish)):
        found = [kind(1).double() for _ in range(4)]
        for module, b in zip(found, (-20.0, 0.5, 5.0, 300.0), strict=True):
            for parameter in module.parameters():
                parameter.data.fill_(b)
        return list(map(certified_map, found))
    options = {
        nn.ELU: [{}, {"alpha": 0.1}, {"alpha": 3.0}],
        nn.Softplus: [{}, {"beta": 1e-3}, {"beta": 50.0}],
        nn.LeakyReLU: [{}, {"negative_slope": 0.9}],
        nn.GELU: [{}, {"approximate": "tanh"}],
        nn.Hardtanh: [{}, {"min_val": -0.3, "max_val": 7.0}],
    }
    return [certified_map(kind(**o)) for o in options.get(kind, [{}])]


def on_features(g: maps.Map, x: Tensor) -> Tensor:
    """MaxMin takes pairs."""
    return torch.cat([x, x.flip(0)], 1) if "Sort" in type(g).__name__ else x


@pytest.mark.parametrize("kind", EVERY_ACTIVATION, ids=name)
def test_rounding_of_activations_in_single_precision(kind):
    """Against double precision, entry by entry; beyond 1e12 a value may be NaN, which is no wrong value."""
    for wide in activation_maps(kind):
        g = wide.to(torch.float32)
        wide = g.to(torch.float64)
        x = on_features(g, grid(1e37, 1e-30, many=100_000).float())
        found, exact = g.rounded(*known(x, Plain(torch.float32))), wide(x.double())
        assert torch.equal(found.value.nan_to_num(7.0), g(x).nan_to_num(7.0))
        finite = torch.isfinite(found.value).all(1)
        assert finite[x.abs().amax(1) < 1e12].all()
        off = norms(found.value.double() - exact)
        assert (off <= found.error)[finite].all(), (off / found.error)[finite].max()
        allowed = 16 * EPS[torch.float32] * (norms(x) + norms(found.value)) + 1e-29
        assert (found.error <= allowed)[x.abs().amax(1) < 1e12].all()


def formulas() -> dict[type[nn.Module], Callable[..., list[Any]]]:
    """Of (mpmath, x, tensors of the map, settings), the entries of f(x)."""

    def swish(mp: Any, x: Any, s: Any) -> Any:
        return x / (1 + mp.exp(-s * x)) / mp.mpf(1.1)

    def pila(mp: Any, x: Any) -> Any:
        u = x - mp.mpf(0.2)
        z = 5 * u
        return u if u >= 0 else (z**3 / 2 - z**2 + z) / 5 * mp.exp(z)

    def gelu(mp: Any, x: Any, approximate: str) -> Any:
        if approximate == "none":
            return x * mp.ncdf(x)
        return x * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3))) / 2

    return {
        Sine: lambda mp, x, p, s: [mp.sin(p[0] * x) / p[0]],
        SinCos: lambda mp, x, p, s: [mp.sin(p[0] * x) / p[0], mp.cos(p[0] * x) / p[0]],
        LipSwish: lambda mp, x, p, s: [swish(mp, x, p[0])],
        CLipSwish: lambda mp, x, p, s: [swish(mp, t, p[0]) / mp.mpf(1.004) for t in (x, -x)],
        CPila: lambda mp, x, p, s: [pila(mp, t) / mp.mpf(1.06) for t in (x, -x)],
        nn.ELU: lambda mp, x, p, s: [x if x > 0 else mp.mpf(s["alpha"]) * mp.expm1(x)],
        nn.Softplus: lambda mp, x, p, s: [mp.log1p(mp.exp(mp.mpf(s["beta"]) * x)) / mp.mpf(s["beta"])],
        nn.Tanh: lambda mp, x, p, s: [mp.tanh(x)],
        nn.Sigmoid: lambda mp, x, p, s: [1 / (1 + mp.exp(-x))],
        nn.Softsign: lambda mp, x, p, s: [x / (1 + abs(x))],
        nn.LogSigmoid: lambda mp, x, p, s: [-mp.log1p(mp.exp(-x))],
        nn.SiLU: lambda mp, x, p, s: [x / (1 + mp.exp(-x))],
        nn.GELU: lambda mp, x, p, s: [gelu(mp, x, s["approximate"])],
        nn.Mish: lambda mp, x, p, s: [x * mp.tanh(mp.log1p(mp.exp(x)))],
    }


@pytest.mark.parametrize("kind", formulas(), ids=name)
def test_rounding_of_activations_in_double_precision(kind):
    """Against 60 decimal digits, at one number and at many (torch has code of its own for those)."""
    mpmath = pytest.importorskip("mpmath")
    few = grid(1e6, 1e-25)[::13]
    for g in activation_maps(kind):
        settings = getattr(getattr(g, "function", None), "keywords", {})
        found = g.rounded(*known(few, Plain(torch.float64)))
        alone = torch.cat([g(row[None]) for row in few])
        with mpmath.workdps(60):
            tensors = [mpmath.mpf(t.item()) for t in g.tensors()]
            for x, *values, error in zip(few[:, 0].tolist(), found.value, alone, found.error.tolist(), strict=True):
                right = formulas()[kind](mpmath, mpmath.mpf(x), tensors, settings)
                for value in values:
                    off = mpmath.sqrt(sum((mpmath.mpf(v) - r) ** 2 for v, r in zip(value.tolist(), right, strict=True)))
                    assert off <= error, (x, float(off), error)


@pytest.mark.parametrize("kind", [Sine, SinCos], ids=name)
def test_rounding_of_the_slowest_sines(kind):
    """The smallest frequency times a small number is flushed to zero: sin(w x) / w is x, and must not be called 0."""
    module = kind(1).double()
    module.log_frequency.data.fill_(-1e4)
    x = 10.0 ** torch.arange(-300, 0, 3, dtype=torch.float64)[:, None]
    found = certified_map(module).rounded(*known(x, Split(torch.float64)))
    assert ((found.value[:, 0] - x[:, 0]).abs() <= found.error).all()


@every_product
@every_dtype
def test_what_an_activation_is_off_by_belongs_to_its_sample(dtype, products):
    """And grows by its slope."""
    x, value = points(3).to(dtype), points(3).to(dtype)
    before = torch.tensor([0.0, 1.0, 2.0], dtype=dtype)
    exact, found = (
        elementwise(known(x, products(dtype), off)[0], value, 0.5, products(dtype)) for off in (0.0, before)
    )
    assert_close(found.error, exact.error + 0.5 * before, 1e-6)
    alone = elementwise(known(x[1:2], products(dtype))[0], value[1:2], 0.5, products(dtype))
    assert_close(alone.error, exact.error[1:2], 1e-6)
    assert found.value is value and (exact.error < 1e-4).all()
