"""Autoregressive flows: each feature moves by what those before it say. MADE, MAF, IAF."""

from __future__ import annotations

import math

import torch
import torch.distributions.transforms as torch_transforms
from nflows.transforms import (
    InverseTransform,
    MaskedAffineAutoregressiveTransform,
    ReversePermutation,
    Transform,
)
from torch import nn

from comparisons.methods.density import BLOCKS, ONE, Images, Method, Shape
from comparisons.methods.hosts import NflowsDensity, ZukoDensity, nflows_flow
from comparisons.methods.multiscale import ALPHA, CENTRE, SPREAD, Flattened, is_grey


def made(features: int, width: int, context_features: int | None) -> nn.Module:
    """A Gaussian for each feature given those before it: a flow of one transform.

    Of zuko, since the mask of nflows lets no context through to the first feature, and here none follows to mend it.
    """
    from zuko.flows import MAF  # here, because zuko switches off torch's argument validation on import

    return MAF(features, context_features or 0, transforms=1, hidden_features=[width, width])


def made_of_images(shape: Shape, width: int, context_features: int | None) -> nn.Module:
    """The same on pixels in a row, prepared as for all others."""
    from zuko.flows import MAF, Flow, UnconditionalTransform

    vectors = MAF(math.prod(shape), context_features or 0, transforms=1, hidden_features=[width, width])
    return Flow([UnconditionalTransform(preparation, shape), vectors.transform], vectors.base)


def preparation(shape: Shape) -> torch_transforms.Transform:
    """That of `multiscale.nflows_preparation` in torch's transforms, and the pixels in a row."""
    steps: list[torch_transforms.Transform] = [torch_transforms.AffineTransform(-CENTRE / SPREAD, 1 / SPREAD)]
    if is_grey(shape):
        steps = [torch_transforms.AffineTransform(ALPHA, 1 - 2 * ALPHA), torch_transforms.SigmoidTransform().inv]
    row = torch_transforms.ReshapeTransform(torch.Size(shape), torch.Size([math.prod(shape)]))
    return torch_transforms.ComposeTransform([*steps, row])


def maf(features: int, width: int, context_features: int | None) -> nn.Module:
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        transforms += [
            ReversePermutation(features),
            MaskedAffineAutoregressiveTransform(features, width, context_features),
        ]
    return nflows_flow(features, transforms)


def iaf(features: int, width: int, context_features: int | None) -> nn.Module:
    """MAF turned round: samples in one pass, densities feature by feature.

    The transforms start near the identity: each feature is fed with those just computed, and what nflows starts with
    grows beyond all bounds on the way through ten features and eight transforms.
    """
    transforms: list[Transform] = []
    for _ in range(BLOCKS):
        transform = MaskedAffineAutoregressiveTransform(features, width, context_features)
        last = transform.autoregressive_net.final_layer
        last.weight.data *= 0.1
        last.bias.data = torch.tensor([ONE, 0.0]).repeat(features)  # for each feature scale and shift
        transforms += [ReversePermutation(features), InverseTransform(transform)]
    return nflows_flow(features, transforms)


METHODS = (
    Method(
        "made",
        "MADE: one masked network for a chain of Gaussians, in zuko",
        "autoregressive",
        "Germain, Gregor, Murray and Larochelle 2015, arXiv 1502.03509",
        made,
        ZukoDensity,
        learning_rate=1e-2,
        images=Images(made_of_images, ZukoDensity, conditional=True),
    ),
    Method(
        "nflows-maf",
        "MAF: masked autoregressive flow of nflows",
        "autoregressive",
        "Papamakarios, Pavlakou and Murray 2017, arXiv 1705.07057",
        maf,
        NflowsDensity,
        learning_rate=1e-2,
        images=Images(Flattened(maf), NflowsDensity, conditional=True),
    ),
    Method(
        "iaf",
        "IAF: inverse autoregressive flow of nflows, with quick samples and sequential densities",
        "autoregressive",
        "Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling 2016, arXiv 1606.04934",
        iaf,
        NflowsDensity,
        learning_rate=1e-2,
    ),
)
