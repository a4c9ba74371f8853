"""Every certified bound against the float64 SVD, on matrices chosen to break it."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from iresflow_plugin.lipschitz import (
    AlmostOrthogonal,
    Bjorck,
    ConvSpec,
    Frobenius,
    Spectral,
    frobenius_norm,
    matrix,
    operator_norm,
    power_iteration,
    row_column_norm,
    schatten_norm,
    spectral_norm,
)
from iresflow_plugin.lipschitz.matrix import LOOSENESS, rounding_margin, uses_tf32
from tests.helpers import dtypes, name, orthogonal, seeds, svd_norm, thorough

CERTIFIED = [spectral_norm, schatten_norm, frobenius_norm, row_column_norm]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Flat, decaying and degenerate spectra, all shapes, and entries close to the ends of the float range."""
    rows, columns = draw(st.sampled_from([(1, 1), (1, 7), (7, 1), (2, 2), (5, 9), (9, 5), (40, 40), (96, 33)]))
    torch.manual_seed(draw(seeds))
    rank = min(rows, columns)
    spectrum = {
        "flat": torch.ones(rank),  # orthogonal: the worst case of a Schatten norm
        "rank one": torch.eye(rank)[0],  # the worst case of a rounding margin: there is no slack
        "nearly flat": 1 - 1e-3 * torch.rand(rank),
        "decaying": 0.5 ** torch.arange(rank),
        "two": torch.where(torch.arange(rank) < 2, 1.0, 1e-3),
        "zero": torch.zeros(rank),
    }[draw(st.sampled_from(["flat", "rank one", "nearly flat", "decaying", "two", "zero"]))]
    u = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0][:, :rank]
    v = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))[0][:, :rank]
    scale = draw(st.sampled_from([1.0, 3.7, 1e20, 1e-30]))
    return (u * spectrum.double() @ v.mT * scale).to(draw(dtypes))


@pytest.mark.parametrize("bound", CERTIFIED, ids=name)
@thorough
@given(weight=matrices())
def test_certified_bounds_hold(bound, weight):
    assert bound(weight).item() >= svd_norm(weight)


@given(weight=matrices())
def test_spectral_norm_is_the_norm(weight):
    assert spectral_norm(weight).item() <= svd_norm(weight) * rounding_margin(weight) ** 2


@thorough
@given(weight=matrices())
def test_schatten_norm_is_within_four_percent(weight):
    assert schatten_norm(weight).item() <= svd_norm(weight) * LOOSENESS * rounding_margin(weight) ** 2


@pytest.mark.parametrize("n", [2, 16, 128, 512])
def test_schatten_norm_of_a_flat_spectrum_is_as_loose_as_it_promises_and_no_more(n):
    """All singular values equal is the worst case: n^(1/p) with p = 2^(t+1) + 2, between sqrt(1.04) and 1.04 or so."""
    ratio = schatten_norm(torch.eye(n, dtype=torch.float64)).item()
    assert 1 < ratio <= LOOSENESS * (1 + 1e-9)
    p = math.log(n) / math.log(ratio / rounding_margin(torch.eye(n, dtype=torch.float64)))
    assert math.log2((p - 2) / 2) == pytest.approx(round(math.log2((p - 2) / 2)), abs=1e-6)


@pytest.mark.parametrize("looseness", [1.5, 1.1, 1.01, 1.001])
@given(weight=matrices())
def test_schatten_norm_keeps_any_looseness(looseness, weight):
    ratio = schatten_norm(weight, looseness).item() / max(svd_norm(weight), 1e-300)
    assert svd_norm(weight) == 0 or 1 <= ratio <= looseness * rounding_margin(weight) ** 2


def test_simple_bounds_are_tight_where_the_table_says_so():
    rank_one = torch.outer(torch.randn(5), torch.randn(7)).double()
    assert frobenius_norm(rank_one).item() == pytest.approx(svd_norm(rank_one), rel=1e-12)
    permutation = torch.eye(6, dtype=torch.float64)[torch.randperm(6)]
    assert row_column_norm(permutation).item() == pytest.approx(1.0, rel=1e-12)


@given(weight=matrices(), steps=st.integers(1, 30))
def test_power_iteration_never_exceeds_the_norm(weight, steps):
    estimate = power_iteration(weight, steps).item()
    assert 0 <= estimate <= svd_norm(weight) * rounding_margin(weight)


def test_power_iteration_converges_and_takes_a_generator():
    weight = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    assert power_iteration(weight, 30).item() == pytest.approx(3.0, rel=1e-9)
    weight = torch.randn(6, 4)
    one, other = (power_iteration(weight, 1, torch.Generator().manual_seed(3)).item() for _ in range(2))
    assert one == other != power_iteration(weight, 1, torch.Generator().manual_seed(4)).item()


@pytest.mark.parametrize("norm", CERTIFIED, ids=name)
@given(seed=seeds, shape=st.sampled_from([(1, 1), (3, 5), (5, 3), (4, 4)]))
def test_gradients_match_finite_differences(norm, seed, shape):
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(weight), weight)
    direction = torch.randn_like(weight)
    h = 1e-6
    with torch.no_grad():
        slope = (norm(weight + h * direction) - norm(weight - h * direction)) / (2 * h)
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["normal", "rank one", "orthogonal"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("looseness", [LOOSENESS, 1.3])
def test_second_derivatives_of_the_schatten_norm_match_finite_differences(kind, shape, looseness):
    """In reverse and in forward mode, and batched, also where singular values agree, which the largest one dislikes."""
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    if kind == "rank one":
        weight = torch.outer(weight[:, 0], weight[0])
    elif kind == "orthogonal":
        weight = orthogonal(max(shape))[: shape[0], : shape[1]].clone()
    weight.requires_grad_()

    def norm(w: Tensor) -> Tensor:
        return schatten_norm(w, looseness)

    assert torch.autograd.gradcheck(norm, weight, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(norm, weight, check_fwd_over_rev=True, check_batched_grad=True)
    hessian = torch.func.hessian(norm)(weight.detach()).view(weight.numel(), -1)
    assert (hessian @ weight.detach().flatten()).abs().max() < 1e-10  # of a norm: homogeneous of degree one
    assert torch.linalg.eigvalsh(hessian)[0] > -1e-10  # and convex


def test_gradient_of_the_schatten_norm_at_zero_is_finite():
    weight = torch.zeros(3, 3, requires_grad=True)
    schatten_norm(weight).backward()
    assert torch.isfinite(weight.grad).all()


def test_certificates_ignore_autocast():
    """Products in bfloat16 would be wrong by half a percent, with a margin made for float32."""
    torch.manual_seed(0)
    for _ in range(20):
        weight = torch.outer(torch.randn(16), torch.randn(16)) + 0.01 * torch.randn(16, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            bound, margin = schatten_norm(weight).item(), rounding_margin(weight)
        assert svd_norm(weight) <= bound / margin * rounding_margin(weight) <= 1.001 * svd_norm(weight)


@pytest.mark.parametrize("bound", CERTIFIED, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_autocast_makes_of_a_matrix_is_covered(bound, dtype):
    """Its entries are rounded before every product; float64 it leaves alone."""
    for seed in range(20):
        torch.manual_seed(seed)
        u = torch.randint(1, 4, (6,)).float() * (1 + torch.finfo(dtype).eps / 2 * (1 + 1e-3))  # all are rounded up
        for weight in (torch.outer(u, torch.ones(4)), 3 * torch.randn(5, 5)):
            with torch.autocast("cpu", dtype=dtype):
                value, double = bound(weight).item(), bound(weight.double()).item()
            assert svd_norm(weight.to(dtype)) <= value <= (1 + 2 * torch.finfo(dtype).eps) * bound(weight).item()
            assert double == bound(weight.double()).item()


# -------------------------------------------------------------------------------------------------------------- TF32


def to_tf32(x: Tensor, nearest: bool) -> Tensor:
    """Eleven bits of the significand of float32: the nearest, or the others cut off."""
    if x.is_complex():
        return torch.complex(to_tf32(x.real, nearest), to_tf32(x.imag, nearest))
    bits = x.detach().resolve_neg().contiguous().view(torch.int32)
    return ((bits + (0x0FFF + ((bits >> 13) & 1)) * nearest) & ~0x1FFF).view(torch.float32)


class EmulatedTF32(TorchFunctionMode):
    """Matrix products of float32 as a GPU takes them: operands rounded, sums in float32."""

    def __init__(self, nearest: bool) -> None:
        super().__init__()
        self.nearest = nearest

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.matmul, torch.mm):
            args = tuple(a if a.dtype == torch.float64 else to_tf32(a, self.nearest) for a in args)
        return function(*args, **(kwargs or {}))


def adverse_to_tf32(n: int) -> list[Tensor]:
    """Rank one with entries that TF32 moves to the same side, flat spectra, and plain ones."""
    torch.manual_seed(n)
    below = 1 + 2.0**-10 * 0.499 + torch.zeros(n)
    lone = torch.ones(n, n)
    lone[0, 0] = 2.6  # the largest entry scales all others
    wide = torch.outer(below, 1 + 2.0**-10 * torch.rand(n))
    flat = torch.linalg.qr(torch.randn(n, n))[0]
    return [torch.outer(below, below), lone, wide, flat, 3 * torch.randn(n, n), torch.randn(n, 2 * n)]


@pytest.fixture(params=[True, False], ids=["nearest", "cut off"])
def tf32(request, monkeypatch):
    monkeypatch.setattr(matrix, "uses_tf32", lambda weight: weight.dtype == torch.float32)
    return EmulatedTF32(request.param)


@pytest.mark.parametrize("n", [1, 2, 16, 64, 200])
def test_tf32_products_are_covered_by_the_margin(n, tf32):
    for weight in adverse_to_tf32(n):
        with tf32:
            bound = schatten_norm(weight).item()
        assert svd_norm(to_tf32(weight, tf32.nearest)) <= bound  # what its products are those of
        assert svd_norm(weight) <= bound <= 1.05 * svd_norm(weight) * rounding_margin(weight)


def test_the_plain_margin_does_not_cover_tf32():
    """The emulation does what it should: without the margin for it, the bounds above fail."""
    with EmulatedTF32(nearest=True):
        short = [svd_norm(weight) > schatten_norm(weight).item() for weight in adverse_to_tf32(64)]
    assert any(short)


@pytest.mark.parametrize("constraint", [Spectral, AlmostOrthogonal, Bjorck, Frobenius], ids=name)
@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_weights_obey_in_tf32(constraint, n, tf32):
    for weight in adverse_to_tf32(n):
        with tf32:
            used, certified = constraint(0.97).certify(10 * weight)
        most = min(float(certified), 0.97)
        assert max(svd_norm(used), svd_norm(to_tf32(used, tf32.nearest))) <= most


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_convolutions_obey_in_tf32(channels, tf32):
    spec = ConvSpec((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
    for seed in range(5):
        torch.manual_seed(seed)
        for kernel in (torch.ones(channels, channels, 3, 3) * 1.0004, torch.randn(channels, channels, 3, 3)):
            with tf32:
                bound = operator_norm(kernel, spec).item()
            angles = torch.linspace(0, 2 * math.pi, 33, dtype=torch.float64)
            phases = torch.exp(1j * angles[:, None] * torch.arange(3))
            symbols = torch.einsum("oiab,xa,yb->xyoi", kernel.to(torch.complex128), phases, phases)
            assert torch.linalg.matrix_norm(symbols, ord=2).max() <= bound


def test_tf32_is_noticed_where_a_gpu_would_use_it():
    """By either interface of torch; CPUs and float64 never do."""
    single, double = (SimpleNamespace(device=torch.device("cuda"), dtype=d) for d in (torch.float32, torch.float64))
    assert not uses_tf32(single)
    flags = torch.backends.cuda.matmul
    for interface, on in (("allow_tf32", True), ("fp32_precision", "tf32")):
        if not hasattr(flags, interface):
            continue
        before = getattr(flags, interface)
        try:
            setattr(flags, interface, on)
            assert uses_tf32(single) and not uses_tf32(double)
            assert not uses_tf32(torch.ones(2, 2)) and not uses_tf32(torch.ones(2, 2, device="meta"))
            assert rounding_margin(torch.ones(2, 2)) < 1.0001
        finally:
            setattr(flags, interface, before)
        assert not uses_tf32(single)
