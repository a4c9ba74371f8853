"""Bounds of the norm of a convolution: of the operator on images, not of the reshaped kernel.

On an infinite image a convolution with kernel K_j is multiplication by its symbol, the c_out x c_in matrices
K(t) = sum_j K_j exp(i <j, t>), t in [0, 2 pi)^d, so its norm is sup_t |K(t)|_2 (Sedghi et al. 2019, arXiv 1805.10408).
Every image of finite size obeys that bound: zero padding embeds it in the infinite one and cuts the result, circular
padding keeps the frequencies 2 pi m / n, and both can only lose. Hence one number for all image sizes.

The supremum M is searched on a grid of N points per axis, N depending on the shape of the kernel alone (Pfister and
Bresler 2019, arXiv 1811.00183, treat trigonometric polynomials so). Let it be attained at t*, with singular vectors u
and v, and let the kernel extend over k entries along an axis. Along it f(t) = Re exp(i a - i t (k-1)/2) u* K(t) v,
with the phase a that makes f(t*) = M, is a real function of exponential type s = (k-1)/2 with |f| <= |K(t)|_2 <= M.
By Bernstein and Szego f'^2 + s^2 f^2 <= s^2 M^2, so f = M cos(p) with |p'| <= s, and at the nearest point of the grid,
at most pi / N away, |K(t)|_2 >= f(t) >= M cos(pi (k-1) / (2 N)). One axis after the other,

    sup_t |K(t)|_2  <=  max_grid |K(t)|_2  prod_axes 1 / cos(pi (k-1) / (2 N)).

Strides: taking every s-th output is a convolution of stride one on the s^d interleaved images, exactly. Groups: the
largest of the groups' norms. Kernels of one entry: one matrix, one frequency.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from iresflow_plugin.lipschitz import matrix
from iresflow_plugin.maps import ConvSpec
from iresflow_plugin.torch_state import full_precision, single


def split(spec: ConvSpec, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The kernel of stride one on interleaved images, (groups, out, in, taps), and its sizes."""
    sizes = [math.ceil(k / s) for k, s in zip(weight.shape[2:], spec.interleaved, strict=True)]
    missing = [n * s - k for n, s, k in zip(sizes, spec.interleaved, weight.shape[2:], strict=True)]
    if any(missing):
        weight = F.pad(weight, [side for m in reversed(missing) for side in (0, m)])
    out, channels = weight.shape[:2]
    axes = [length for pair in zip(sizes, spec.interleaved, strict=True) for length in pair]
    kernel = weight.reshape(spec.groups, out // spec.groups, channels, *axes)
    d = len(sizes)
    order = [0, 1, 2, *range(4, 3 + 2 * d, 2), *range(3, 3 + 2 * d, 2)]  # offsets within a stride join the channels
    return kernel.permute(order).reshape(*kernel.shape[:2], -1, math.prod(sizes)), tuple(sizes)


def join(spec: ConvSpec, kernel: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `split`."""
    d = len(spec.stride)
    sizes = [math.ceil(k / s) for k, s in zip(shape[2:], spec.interleaved, strict=True)]
    order = [0, 1, 2, *[axis for i in range(d) for axis in (3 + d + i, 3 + i)]]
    pieces = kernel.reshape(*kernel.shape[:2], shape[1], *spec.interleaved, *sizes).permute(order)
    whole = pieces.reshape(*shape[:2], *[n * s for n, s in zip(sizes, spec.interleaved, strict=True)])
    return whole[(..., *[slice(k) for k in shape[2:]])]


def looseness(channels: int) -> float:
    """How far the grid may overshoot: 1 % up to 16 channels (of the smaller side), 4 % up to 64, then 1 % more per 16.

    The certificate costs channels^3 per point of the grid, of which there are for a 3x3 kernel 32x32 for 16 channels,
    16x16 for 64, 12x12 for 128 and 8x8 from 320 on, at 20 %; half of them follow from the others by symmetry.
    """
    return 1.01 if channels <= 16 else 1 + min(max(channels / 1600, 0.04), 0.2)


def grid(sizes: tuple[int, ...], overshoot: float) -> tuple[list[int], float]:
    """Points per axis for which the grid overshoots by at most this factor, and the factor itself.

    >>> grid((3, 3), 1.04)
    ([16, 16], 1.039...)
    """
    axes = sum(k > 1 for k in sizes)
    if not axes:
        return [1] * len(sizes), 1.0
    widest = math.acos(overshoot ** (-1 / axes))
    points = [math.ceil(math.pi * (k - 1) / (2 * widest)) or 1 for k in sizes]
    factor = math.prod(1 / math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(sizes, points, strict=True))
    return points, factor


def operator_norm(weight: Tensor, spec: ConvSpec) -> Tensor:
    """A certified bound of the norm of the convolution on images of every size, differentiable.

    Raised above the true supremum over frequencies by at most `looseness` for the grid and 1 % to 4 % for the norms.

    >>> layer = torch.nn.Conv2d(1, 1, 3, padding=1)
    >>> operator_norm(torch.full((1, 1, 3, 3), 1 / 9), ConvSpec.of(layer))
    tensor(1.00...)
    """
    wide = single(weight)
    gradient = partial(schatten_gradient, spec=spec)
    return matrix.norm_of(wide, gradient(wide.detach()), gradient)


def schatten_gradient(weight: Tensor, spec: ConvSpec, stored: torch.dtype | None = None) -> Tensor:
    """D with <D, K> the bound and D its gradient at K, rounding margins included: `matrix.schatten_gradient` at the
    frequency and in the group where it is largest, carried back to the kernel."""
    kernel, sizes = split(spec, weight / matrix.largest_entry(weight))  # D does not depend on the scale
    channels = min(kernel.shape[1:3])
    tightness = 1.01 if channels <= 16 else matrix.LOOSENESS
    points, factor = grid(sizes, looseness(channels))
    with full_precision(weight):
        frequency, group = _loudest(kernel.detach(), sizes, points, tightness)
        chosen = kernel.index_select(0, group)[0]
        cos, sin = (wave.index_select(0, frequency)[0] for wave in waves(sizes, (0,) * len(sizes), points, weight))
        if max(points) > 1:
            direction = matrix.schatten_gradient(torch.complex(chosen @ cos, chosen @ sin), tightness)
            direction = direction.real[..., None] * cos + direction.imag[..., None] * sin
        else:
            direction = matrix.schatten_gradient(chosen[..., 0], tightness)[..., None]
    gradient = torch.zeros_like(kernel).index_add(0, group, direction[None])
    margin = matrix.rounding_margin(chosen[..., 0], stored, taps=kernel.shape[-1])
    return join(spec, gradient, weight.shape).mul(factor * spec.gain * margin)


@torch.no_grad()
def _loudest(kernel: Tensor, sizes: tuple[int, ...], points: list[int], tightness: float) -> tuple[Tensor, Tensor]:
    """The frequency of the grid and the group where the norm is largest, shapes (1,)."""
    groups = kernel.shape[0]
    if groups * math.prod(points) == 1:
        nothing = torch.zeros(1, dtype=torch.long, device=kernel.device)
        return nothing, nothing
    best = matrix.largest_schatten_norm(_gram(kernel, sizes, points).flatten(0, 1), tightness)
    return best // groups, best % groups


def gram_lags(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """sum_j K_j^T K_{j+l} for every lag l, shape (lags, groups, n, n), n the smaller number of channels."""
    if kernel.shape[1] < kernel.shape[2]:
        kernel = kernel.transpose(1, 2)  # the same singular values
    groups, _, n, taps = kernel.shape
    flat = kernel.transpose(2, 3).flatten(2)
    pairs = (flat.mT @ flat).view(groups, taps, n, taps, n).permute(1, 3, 0, 2, 4).reshape(taps * taps, -1)
    position = _lattice(sizes).to(kernel.device, torch.long)
    lag = (position[None] - position[:, None]).flatten(0, 1)  # of every pair of taps
    code = torch.zeros_like(lag[:, 0])
    for axis, k in enumerate(sizes):
        code = code * (2 * k - 1) + lag[:, axis] + k - 1
    count = math.prod(2 * k - 1 for k in sizes)
    return pairs.new_zeros(count, pairs.shape[1]).index_add(0, code, pairs).view(count, groups, n, n)


def _gram(kernel: Tensor, sizes: tuple[int, ...], points: list[int]) -> Tensor:
    """K(t)* K(t) for every angle and group, shape (angles, groups, n, n), up to a factor: one Fourier sum over lags."""
    unit = kernel / matrix.largest_entry(kernel)  # its squares cannot overflow
    lags = gram_lags(unit / torch.linalg.vector_norm(unit).clamp_min(torch.finfo(unit.dtype).tiny), sizes)
    if math.prod(points) == 1:
        return lags.sum(0, keepdim=True)
    cos, sin = waves(tuple(2 * k - 1 for k in sizes), tuple(1 - k for k in sizes), points, kernel)
    flat = lags.flatten(1)
    return torch.complex(cos @ flat, sin @ flat).view(len(cos), *lags.shape[1:])


def waves(sizes: tuple[int, ...], first: tuple[int, ...], points: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of <j, t> for the angles t of the grid (rows) and the integer points j of a box (columns).

    Of the grid without the angles that a real kernel repeats with the opposite sign. Taken in double precision on the
    CPU, since not every device has that, and kept, unless compiled code computes with stand-ins for tensors.
    """
    make = _waves.__wrapped__ if torch.compiler.is_compiling() else _waves
    return make(sizes, first, tuple(points), like.dtype, like.device)


@lru_cache(maxsize=512)
def _waves(
    sizes: tuple[int, ...], first: tuple[int, ...], points: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    halved = max(range(len(points)), key=points.__getitem__)
    counts = tuple(n // 2 + 1 if axis == halved else n for axis, n in enumerate(points))
    with torch.inference_mode(False), torch.no_grad():
        angles = _lattice(counts) * (2 * math.pi / torch.tensor(points, dtype=torch.float64))
        phase = angles @ (_lattice(sizes) + torch.tensor(first, dtype=torch.float64)).mT
        return phase.cos().to(device, dtype), phase.sin().to(device, dtype)


def _lattice(sizes: tuple[int, ...]) -> Tensor:
    """All integer points of a box, row by row, shape (prod(sizes), d)."""
    axes = [torch.arange(n, dtype=torch.float64, device="cpu") for n in sizes]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(axes, indexing="ij")], 1)
