"""Swapping transforms inside flows of both hosts."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import normflows as nf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows import transforms
from nflows.distributions import ConditionalDiagonalNormal, StandardNormal
from nflows.flows import Flow, MaskedAutoregressiveFlow, SimpleRealNVP
from nflows.nn.nets import ConvResidualNet, ResidualNet
from torch import Tensor, nn

from iresflow_plugin import NotContractiveError, ResidualBlock
from iresflow_plugin.adapters.nflows import ResidualTransform
from iresflow_plugin.adapters.normflows import ResidualFlow
from iresflow_plugin.inverse import Newton
from iresflow_plugin.lipschitz import constrain
from iresflow_plugin.log_det import Exact
from iresflow_plugin.nets import LipschitzMLP
from iresflow_plugin.swap import SwapReport, swap_transforms
from iresflow_plugin.testing import scale_weights
from tests.helpers import assert_close, jacobian

COUPLING = transforms.AffineCouplingTransform
MAF = transforms.MaskedAffineAutoregressiveTransform
C = 3


def coupling(features: int = 4, width: int = 16, context_features: int | None = None) -> nn.Module:
    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, hidden_features=width, context_features=context_features)

    return COUPLING([i % 2 for i in range(features)], net)


def nflows_flow(features: int = 4, context_features: int | None = None) -> Flow:
    c = context_features
    stack = [
        coupling(features, 16, c),
        transforms.ReversePermutation(features),
        transforms.ActNorm(features),
        MAF(features, 12, c),
        transforms.InverseTransform(coupling(features, 8, c)),
    ]
    return Flow(transforms.CompositeTransform(stack), StandardNormal([features]))


NFLOWS_COUPLINGS = ["_transform._transforms.0", "_transform._transforms.4._transform"]


def normflows_coupling(features: int = 4, width: int = 16) -> nn.Module:
    kept = (features + 1) // 2
    return nf.flows.AffineCouplingBlock(nf.nets.MLP([kept, width, 2 * (features - kept)]))


def normflows_model(features: int = 4) -> nf.NormalizingFlow:
    flows = [
        normflows_coupling(features, 32),
        nf.flows.Permute(features),
        nf.flows.ActNorm(features),
        nf.flows.MaskedAffineAutoregressive(features, 12),
        nf.flows.Composite([normflows_coupling(features, 24), nf.flows.Reverse(normflows_coupling(features, 25))]),
    ]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(features), flows)


NORMFLOWS_COUPLINGS = ["flows.0", "flows.4._flows.0", "flows.4._flows.1.flow"]


def conditional_normflows_model(features: int = 4) -> nf.ConditionalNormalizingFlow:
    flows = [
        nf.flows.MaskedAffineAutoregressive(features, 12, C),
        nf.flows.Permute(features),
        nf.flows.CoupledRationalQuadraticSpline(features, 1, 8, C),
    ]
    base = nf.distributions.base.ConditionalDiagGaussian(features, nn.Linear(C, 2 * features))
    return nf.ConditionalNormalizingFlow(base, flows)


HOSTS = {
    "nflows": (nflows_flow, COUPLING, NFLOWS_COUPLINGS, ResidualTransform),
    "normflows": (normflows_model, nf.flows.AffineCouplingBlock, NORMFLOWS_COUPLINGS, ResidualFlow),
}
each_host = pytest.mark.parametrize(("make", "kind", "paths", "ours"), HOSTS.values(), ids=HOSTS)


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def outside(flow: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    """A copy of everything a flow holds outside these paths."""
    state = flow.state_dict().items()
    return {k: v.clone() for k, v in state if not k.startswith(tuple(f"{path}." for path in paths))}


def unchanged(flow: nn.Module, before: dict[str, Tensor]) -> bool:
    now = flow.state_dict()
    return all(torch.equal(now[key], value) for key, value in before.items())


def assert_report_is_true(report: SwapReport, before: nn.Module, flow: nn.Module) -> None:
    """Types and counts of every row are those of the modules themselves, and the flow is as large as it was."""
    for row in report.rows:
        old, new = before.get_submodule(row.path), flow.get_submodule(row.path)
        assert row.old == type(old).__name__ and row.new == f"{type(new).__name__}({type(new.block.branch).__name__})"
        assert (row.parameters_before, row.parameters_after) == (trainable(old), trainable(new))
        assert 0.95 < row.parameters_after / row.parameters_before < 1.05
    assert report.parameters_after - report.parameters_before == trainable(flow) - trainable(before)


def assert_is_a_density(flow: Flow | nf.NormalizingFlow, x: Tensor) -> None:
    """x comes back from its noise, and log_prob changes variables as the dense Jacobian says, all in float64.

    The blocks' weights are pushed against their bounds first: fresh ones hardly change a volume, so errors pass.
    """
    x = x.double()
    for block in (module for module in flow.double().modules() if isinstance(module, ResidualBlock)):
        scale_weights(block)
    flow.log_prob(x)  # what initialises itself on its first points, an ActNorm, has seen them
    flow.eval()
    if isinstance(flow, Flow):
        base, to_noise, to_data = flow._distribution, flow.transform_to_noise, lambda z: flow._transform.inverse(z)[0]
    else:
        base, to_noise, to_data = flow.q0, flow.inverse, flow.forward
    with torch.no_grad():  # so that the log-det of images is exact, too
        z, actual = to_noise(x), flow.log_prob(x)
        assert_close(to_data(z), x, 1e-12)
        expected = base.log_prob(z) + torch.linalg.slogdet(jacobian(to_noise, x)).logabsdet
    assert_close(actual, expected, 1e-6)  # a Composite of normflows adds its log-dets in float32


# which transforms ------------------------------------------------------------------------------------


@each_host
@pytest.mark.parametrize("way", ["type", "types", "paths", "tuple of paths", "predicate by type", "predicate by path"])
def test_every_way_to_select_finds_the_same(make, kind, paths, ours, way) -> None:
    select = {
        "type": kind,
        "types": (kind, transforms.Sigmoid, nf.flows.Planar),
        "paths": paths,
        "tuple of paths": tuple(paths),
        "predicate by type": lambda path, module: isinstance(module, kind),
        "predicate by path": lambda path, module: path in paths,
    }[way]
    flow = make()
    before = outside(flow, paths)
    report = swap_transforms(flow, select)
    assert [row.path for row in report.rows] == paths
    assert all(type(flow.get_submodule(path)) is ours for path in paths)
    assert not any(isinstance(module, kind) for module in flow.modules())
    assert unchanged(flow, before)  # and no ActNorm has seen anything


@each_host
def test_one_path(make, kind, paths, ours) -> None:
    flow = make()
    (row,) = swap_transforms(flow, paths[1]).rows
    assert row.path == paths[1] and row.old == kind.__name__
    assert isinstance(flow.get_submodule(paths[1]), ours) and isinstance(flow.get_submodule(paths[0]), kind)


@each_host
def test_a_predicate_sees_every_transform_and_no_parts_of_one(make, kind, paths, ours) -> None:
    seen = {}
    with pytest.raises(ValueError, match="selects nothing"):
        swap_transforms(make(), lambda path, module: seen.update({path: module}))
    base = transforms.Transform if ours is ResidualTransform else nf.flows.Flow
    assert set(paths) < set(seen) and all(isinstance(module, base) for module in seen.values())
    assert not any(path.startswith(f"{paths[0]}.") for path in seen)


@pytest.mark.parametrize("select", ["_transform", transforms.CompositeTransform, transforms.Transform])
def test_the_root_transform_of_a_flow_can_be_swapped(select) -> None:
    flow = nflows_flow()
    before = copy.deepcopy(flow)
    report = swap_transforms(flow, select)
    assert [row.path for row in report.rows] == ["_transform"] and type(flow._transform) is ResidualTransform
    assert_report_is_true(report, before, flow)
    assert_is_a_density(flow, torch.randn(5, 4))


def test_the_outermost_of_nested_transforms_is_swapped_once() -> None:
    flow = nflows_flow()
    report = swap_transforms(flow, (transforms.InverseTransform, COUPLING))
    assert [row.path for row in report.rows] == ["_transform._transforms.0", "_transform._transforms.4"]
    model = normflows_model()
    report = swap_transforms(model, ["flows.4._flows.1.flow", "flows.4"])
    assert [row.path for row in report.rows] == ["flows.4"]


def test_a_composite_alone() -> None:
    stack = transforms.CompositeTransform([coupling(3), transforms.CompositeTransform([coupling(3)])])
    swap_transforms(stack, transforms.Transform, event_shape=3)  # cannot replace itself in place, so its parts
    assert all(isinstance(part, ResidualTransform) for part in stack._transforms)
    stack = nf.flows.Composite([normflows_coupling()])
    swap_transforms(stack, nf.flows.AffineCouplingBlock, event_shape=4)
    assert isinstance(stack._flows[0], ResidualFlow)


def test_hosts_flow_classes_models_of_the_users_and_transforms_of_the_users() -> None:
    class Step(transforms.Transform):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = coupling(2), transforms.ActNorm(2)

        def forward(self, inputs, context=None):
            outputs, log_det = self.first(inputs, context)
            outputs, more = self.norm(outputs, context)
            return outputs, log_det + more

        def inverse(self, inputs, context=None):
            outputs, log_det = self.norm.inverse(inputs, context)
            outputs, more = self.first.inverse(outputs, context)
            return outputs, log_det + more

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = Flow(Step(), StandardNormal([2]))
            self.other = nn.ModuleDict({"nvp": SimpleRealNVP(3, 8, 2, 1), "maf": MaskedAutoregressiveFlow(3, 8, 2, 1)})

    model = Model()
    before = copy.deepcopy(model)
    report = swap_transforms(model, (COUPLING, MAF))
    assert [row.path for row in report.rows] == [
        "flow._transform.first",
        "other.nvp._transform._transforms.0",
        "other.nvp._transform._transforms.1",
        "other.maf._transform._transforms.1",
        "other.maf._transform._transforms.3",
    ]
    assert_report_is_true(report, before, model)
    for flow, features in ((model.flow, 2), (model.other["nvp"], 3), (model.other["maf"], 3)):
        assert_is_a_density(flow, torch.randn(4, features))


def test_a_transform_in_several_places_stays_one() -> None:
    shared = coupling(4)
    flow = Flow(transforms.CompositeTransform([shared, transforms.ReversePermutation(4), shared]), StandardNormal([4]))
    (row,) = swap_transforms(flow, COUPLING).rows
    first, _, last = flow._transform._transforms
    assert first is last and isinstance(first, ResidualTransform)
    assert row.path == "_transform._transforms.0, _transform._transforms.2"
    assert row.parameters_before == trainable(shared)


def test_the_parts_of_a_coupling_cannot_be_had() -> None:
    model = normflows_model()
    with pytest.raises(ValueError, match="selects nothing"):
        swap_transforms(model, nf.flows.AffineCoupling)
    with pytest.raises(ValueError, match=r"'flows.0.flows.1' is a AffineCoupling, which is no transform"):
        swap_transforms(model, "flows.0.flows.1")
    with pytest.raises(ValueError, match="is a ResidualNet"):
        swap_transforms(nflows_flow(), "_transform._transforms.0.transform_net")


def test_nothing_selected_lists_the_types_with_their_counts() -> None:
    with pytest.raises(ValueError) as error:
        swap_transforms(nflows_flow(), transforms.LULinear)
    for part in ("LULinear", "2 AffineCouplingTransform", "1 ActNorm", "1 InverseTransform", "1 CompositeTransform"):
        assert part in str(error.value)
    for nothing in ([], (), lambda path, module: False, nn.Linear):
        with pytest.raises(ValueError, match="3 AffineCouplingBlock"):
            swap_transforms(normflows_model(), nothing)


@pytest.mark.parametrize("unknown", ["flows.7", ["flows.0", "flow.0"], "q0"])
def test_an_unknown_path_lists_the_known_ones(unknown) -> None:
    model = normflows_model()
    before = outside(model, [])
    with pytest.raises(ValueError, match=r"flows\.0, flows\.1, flows\.2, flows\.3, flows\.4, flows\.4\._flows\.0"):
        swap_transforms(model, unknown)
    assert unchanged(model, before)


def test_the_model_itself_is_not_replaced() -> None:
    with pytest.raises(ValueError, match="model itself"):
        swap_transforms(transforms.CompositeTransform([coupling()]), "")


def test_a_module_without_transforms_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential holds no transform"):
        swap_transforms(nn.Sequential(nn.Linear(2, 2)), nn.Linear)
    with pytest.raises(TypeError, match="flow"):
        swap_transforms([coupling()], COUPLING)


@pytest.mark.parametrize("select", [None, 3, [COUPLING, "flows.0"], {COUPLING}])
def test_a_select_that_is_none_of_the_four_is_refused(select) -> None:
    with pytest.raises(TypeError, match="select"):
        swap_transforms(nflows_flow(), select)


# orientation -----------------------------------------------------------------------------------------


def test_x_plus_g_runs_from_data_to_noise() -> None:
    x = torch.randn(5, 4)
    flow = Flow(coupling(4), StandardNormal([4]))
    swap_transforms(flow, COUPLING)
    assert torch.equal(flow.transform_to_noise(x), flow._transform.block(x)[0])
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [normflows_coupling(4)])
    swap_transforms(model, nf.flows.AffineCouplingBlock)
    assert model.flows[0].reverse is True
    assert torch.equal(model.inverse(x), model.flows[0].block(x)[0])


def test_what_is_turned_round_stays_turned_round() -> None:
    x = torch.randn(5, 4)
    flow = Flow(transforms.InverseTransform(coupling(4)), StandardNormal([4]))
    swap_transforms(flow, COUPLING)
    assert torch.equal(flow.transform_to_noise(x), flow._transform._transform.block.inverse(x)[0])
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), [nf.flows.Reverse(normflows_coupling(4))])
    swap_transforms(model, nf.flows.AffineCouplingBlock)
    assert torch.equal(model.inverse(x), model.flows[0].flow.block.inverse(x)[0])


# sizes of events and contexts ------------------------------------------------------------------------


def widths_of_events(report: SwapReport, flow: nn.Module) -> list[int]:
    return [flow.get_submodule(row.path).block.branch[0].in_features for row in report.rows]


def test_multiscale_models_of_vectors() -> None:
    scales = transforms.MultiscaleCompositeTransform(num_transforms=3)
    shape = (9,)
    for _ in range(3):
        shape = scales.add_transform(transforms.CompositeTransform([transforms.ActNorm(shape[0])]), shape)
    flow = Flow(scales, StandardNormal([9]))
    report = swap_transforms(flow, transforms.ActNorm)  # has no attribute `features`
    assert widths_of_events(report, flow) == [9, 4, 2]
    assert flow.sample(3).shape == (3, 9)

    bases = [nf.distributions.DiagGaussian(2), nf.distributions.DiagGaussian(3)]
    levels = [[normflows_coupling(2)], [normflows_coupling(5), nf.flows.ActNorm(5)]]
    model = nf.MultiscaleFlow(
        bases, levels, [nf.flows.Merge()], transform=nf.flows.AffineConstFlow(5), class_cond=False
    )
    report = swap_transforms(model, (nf.flows.AffineCouplingBlock, nf.flows.AffineConstFlow))
    assert [row.path for row in report.rows] == ["flows.0.0", "flows.1.0", "flows.1.1", "transform"]
    assert widths_of_events(report, model) == [2, 5, 5, 5]


def image_branch(event, hidden_features, context_features):
    size = event[0] * event[1] * event[2]
    parts = [nn.Flatten(), nn.Linear(size, hidden_features), nn.Tanh(), nn.Linear(hidden_features, size)]
    return constrain(nn.Sequential(*parts, nn.Unflatten(1, event)))


def image_coupling(channels: int) -> nn.Module:
    return COUPLING([i % 2 for i in range(channels)], lambda i, o: ConvResidualNet(i, o, hidden_channels=4))


def image_flow() -> Flow:
    scales = transforms.MultiscaleCompositeTransform(num_transforms=2)
    shape = scales.add_transform(
        transforms.CompositeTransform([transforms.SqueezeTransform(), image_coupling(4)]), (4, 2, 2)
    )
    scales.add_transform(image_coupling(2), shape)
    return Flow(scales, StandardNormal([16]))


def test_images_ask_for_their_shape() -> None:
    with pytest.raises(ValueError, match=r"'_transform._transforms.0._transforms.1' .*shape \(4, 2, 2\).*event_shape="):
        swap_transforms(image_flow(), COUPLING)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 2, 2)), [nf.flows.GlowBlock(4, 8)])
    with pytest.raises(ValueError, match=r"'flows.0' \(GlowBlock\).*shape \(4, 2, 2\)"):
        swap_transforms(model, nf.flows.GlowBlock)
    with pytest.raises(ValueError, match="event_shape="):  # images change shape on the way
        swap_transforms(model, nf.flows.GlowBlock, image_branch)
    with pytest.raises(ValueError, match="not known; pass event_shape="):  # `features` are channels
        swap_transforms(transforms.CompositeTransform([image_coupling(4)]), COUPLING)
    with pytest.raises(ValueError, match=r"no net here for events of shape \(4, 2\). Pass replace="):
        swap_transforms(model, nf.flows.GlowBlock, event_shape=(4, 2))


def test_images_get_a_convolutional_net() -> None:
    flow, path = image_flow(), "_transform._transforms.1"
    report = swap_transforms(flow, path, event_shape=(2, 2, 2))
    assert "ResidualTransform(LipschitzConvNet)" in str(report)
    assert abs(report.parameters_after / report.parameters_before - 1) < 0.2
    assert flow.log_prob(torch.randn(5, 1, 4, 4)).shape == (5,)


def glow() -> nf.MultiscaleFlow:
    """Two scales of normflows, whose ActNorm initialises itself even in eval mode."""
    levels = [[nf.flows.GlowBlock(8, 8), nf.flows.Squeeze()], [nf.flows.GlowBlock(4, 8), nf.flows.Squeeze()]]
    bases = [nf.distributions.DiagGaussian((8, 1, 1)), nf.distributions.DiagGaussian((2, 2, 2))]
    return nf.MultiscaleFlow(bases, levels, [nf.flows.Merge()], class_cond=False)


@pytest.mark.parametrize(
    ("make", "kind", "shapes"),
    [
        (image_flow, COUPLING, [(4, 2, 2), (2, 2, 2)]),
        (glow, nf.flows.AffineCouplingBlock, [(8, 1, 1), (4, 2, 2)]),
    ],
)
def test_an_example_shows_the_shapes_of_images(make, kind, shapes) -> None:
    """All scales at once. Neither the flow nor the seed has seen anything of it."""
    flow, images = make(), torch.randn(2, 1, 4, 4)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    seed = torch.get_rng_state()
    with pytest.raises(TypeError, match="replace must return"):  # after the example has run
        swap_transforms(flow, kind, lambda *sizes: None, False, example=images)
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    swap_transforms(flow, kind, image_branch, example=images)
    blocks = [module for module in flow.modules() if isinstance(module, ResidualBlock)]
    assert [tuple(block.branch[-1].unflattened_size) for block in blocks] == shapes
    assert flow.log_prob(torch.randn(5, 1, 4, 4), *[None] * (make is glow)).shape == (5,)


def test_an_example_of_a_conditional_flow_brings_its_context() -> None:
    flow = nflows_flow(context_features=C)
    report = swap_transforms(flow, COUPLING, example=(torch.randn(2, 4), torch.randn(2, C)))
    assert widths_of_events(report, flow) == [4, 4] and report.rows[0].context_features == C


class Spread(ConvResidualNet):
    """A row of context for each image, the same at every pixel."""

    def forward(self, inputs, context=None):
        return super().forward(inputs, context[:, :, None, None].expand(-1, -1, *inputs.shape[2:]))


@pytest.mark.parametrize(("net", "context"), [(ConvResidualNet, (C, 2, 2)), (Spread, (C,))])
@pytest.mark.parametrize("shown", [True, False])
def test_a_context_of_images_is_an_image_or_a_vector(net, context, shown) -> None:
    def coupling() -> nn.Module:
        return COUPLING([0, 1, 0, 1], partial(net, hidden_channels=8, context_channels=C))

    images, contexts = torch.randn(5, 4, 2, 2), torch.randn(5, *context)
    flow = Flow(transforms.CompositeTransform([coupling(), coupling()]), StandardNormal([4, 2, 2]))
    told = {"event_shape": (4, 2, 2), "context_features": C if net is Spread else None}  # else its marks say: an image
    report = swap_transforms(flow, COUPLING, **({"example": (images, contexts)} if shown else told))
    assert [row.context_features for row in report.rows] == [C, C]
    for block in (module for module in flow.modules() if isinstance(module, ResidualBlock)):
        scale_weights(block)
    scores = flow.log_prob(images, contexts)
    assert (flow.log_prob(images, contexts.flip(0)) - scores).abs().max() > 1e-4


def test_vectors_with_a_context_image_need_a_branch_of_the_users() -> None:
    flow = Flow(transforms.CompositeTransform([coupling(4)]), StandardNormal([4]))
    flow._transform._transforms[0].context_channels = 2
    with pytest.raises(ValueError, match="no net here for vectors of 4 features with a context image of 2 channels"):
        swap_transforms(flow, COUPLING)


def test_an_example_goes_from_data_to_noise_in_both_hosts() -> None:
    turned = transforms.InverseTransform(transforms.CompositeTransform([image_coupling(4)]))
    swap_transforms(turned, COUPLING, example=torch.randn(2, 4, 2, 2))
    assert turned(torch.randn(2, 4, 2, 2))[0].shape == (2, 4, 2, 2)
    composite = nf.flows.Composite([nf.flows.GlowBlock(4, 8), nf.flows.Squeeze()])
    swap_transforms(composite, nf.flows.AffineCouplingBlock, example=torch.randn(2, 1, 4, 4))
    assert composite.inverse(torch.randn(2, 1, 4, 4))[0].shape == (2, 4, 2, 2)


def test_an_example_that_does_not_fit_is_refused() -> None:
    flow = image_flow()
    with pytest.raises(ValueError, match=r"The example \(\(1, 1, 3, 3\)\) does not pass through this Flow; .*log_prob"):
        swap_transforms(flow, COUPLING, example=torch.randn(1, 1, 3, 3))
    with pytest.raises(ValueError, match=r"event_shape=\(4, 2, 2\) and example= both tell"):
        swap_transforms(flow, COUPLING, example=torch.randn(2, 1, 4, 4), event_shape=(4, 2, 2))
    flow.aside = image_coupling(4)
    with pytest.raises(ValueError, match=r"The example passes by 'aside'. Pass event_shape="):
        swap_transforms(flow, COUPLING, example=torch.randn(2, 1, 4, 4))


def test_images_with_a_branch_for_them() -> None:
    flow = image_flow()
    shapes = {"_transform._transforms.0._transforms.1": (4, 2, 2), "_transform._transforms.1": (2, 2, 2)}
    for path, shape in shapes.items():
        swap_transforms(flow, path, image_branch, event_shape=shape)
    assert flow.sample(2).shape == (2, 1, 4, 4)
    assert_is_a_density(flow, torch.randn(5, 1, 4, 4))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 2, 2)), [nf.flows.GlowBlock(4, 8)])
    before, path = copy.deepcopy(model), "flows.0.flows.0"  # inside the GlowBlock
    report = swap_transforms(model, nf.flows.AffineCouplingBlock, image_branch, event_shape=(4, 2, 2))
    assert [row.path for row in report.rows] == [path] and type(model.get_submodule(path)) is ResidualFlow
    assert unchanged(model, outside(before, [path]))
    assert_report_is_true(report, before, model)
    assert_is_a_density(model, torch.randn(5, 4, 2, 2))


@pytest.mark.parametrize(
    "base",
    [
        nf.distributions.DiagGaussian(4),
        nf.distributions.base.Uniform([4]),
        nf.distributions.UniformGaussian(4, [0]),
        nf.distributions.GaussianMixture(2, 4),
    ],
)
def test_the_base_distribution_knows_the_number_of_features(base) -> None:
    model = nf.NormalizingFlow(base, [normflows_coupling(4)])
    assert widths_of_events(swap_transforms(model, nf.flows.AffineCouplingBlock), model) == [4]


def test_the_other_models_of_normflows() -> None:
    by_class = nf.ClassCondFlow(nf.distributions.ClassCondDiagGaussian(4, 3), [normflows_coupling(4)])
    swap_transforms(by_class, nf.flows.AffineCouplingBlock)
    assert by_class.log_prob(torch.randn(5, 4), torch.randint(3, (5,))).shape == (5,)
    encoder = nf.distributions.NNDiagGaussian(nn.Linear(6, 8))
    flows = [nf.flows.MaskedAffineAutoregressive(4, 8), normflows_coupling(4)]
    vae = nf.NormalizingFlowVAE(nf.distributions.DiagGaussian(4), encoder, flows)
    swap_transforms(vae, nf.flows.MaskedAffineAutoregressive)
    swap_transforms(vae, "flows.1", event_shape=4)  # an encoder does not tell its size
    assert vae(torch.randn(5, 6), 2)[0].shape == (5, 2, 4)


def test_a_size_that_nobody_knows_is_asked_for() -> None:
    class Base(nn.Module):
        pass

    model = nf.NormalizingFlow(Base(), [normflows_coupling(4)])
    with pytest.raises(ValueError, match=r"'flows.0' \(AffineCouplingBlock\) is not known; pass event_shape="):
        swap_transforms(model, "flows.0")
    swap_transforms(model, "flows.0", event_shape=4)


@pytest.mark.parametrize("event_shape", [0, -1, (), (3, 0), "4", 4.0])
def test_a_bad_event_shape_is_refused(event_shape) -> None:
    with pytest.raises(ValueError, match="event_shape"):
        swap_transforms(normflows_model(), "flows.0", event_shape=event_shape)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(nflows_flow, 4, C), {"0": C, "1": None, "2": None, "3": C, "4": C}),
        (nflows_flow, {"0": None, "1": None, "2": None, "3": None, "4": None}),
        (conditional_normflows_model, {"0": C, "1": None, "2": C}),
    ],
)
def test_a_conditional_transform_is_replaced_by_a_conditional_block(make, expected) -> None:
    report = swap_transforms(make(), lambda path, module: path.rpartition(".")[2] in expected)
    assert {row.path.rpartition(".")[2]: row.context_features for row in report.rows} == expected


def test_the_users_word_on_the_context_counts() -> None:
    flow = nflows_flow(context_features=C)
    for context_features, expected in ((0, None), (2, 2)):
        report = swap_transforms(copy.deepcopy(flow), COUPLING, context_features=context_features)
        assert {row.context_features for row in report.rows} == {expected}
    with pytest.raises(ValueError, match="context_features"):
        swap_transforms(flow, COUPLING, context_features=-1)


def test_contexts_of_several_sizes_are_asked_for() -> None:
    stack = transforms.CompositeTransform([coupling(4, 8, 2), coupling(4, 8, 3)])
    flow = Flow(transforms.CompositeTransform([stack]), StandardNormal([4]))
    with pytest.raises(ValueError, match=r"\[2, 3\]; pass context_features="):
        swap_transforms(flow, "_transform._transforms.0")


# parameters ------------------------------------------------------------------------------------------


def count(features: int, width: int, context_features: int | None = None) -> int:
    return trainable(LipschitzMLP([features, width, width, features], context_features))


@settings(max_examples=settings.default.max_examples // 2)
@given(
    features=st.integers(2, 8), width=st.integers(1, 32), context_features=st.sampled_from([None, C]), data=st.data()
)
def test_no_other_width_comes_closer(features, width, context_features, data) -> None:
    flow = Flow(coupling(features, width, context_features), StandardNormal([features]))
    target = trainable(flow)
    (row,) = swap_transforms(flow, COUPLING).rows
    assert row.parameters_before == target
    assert row.parameters_after == trainable(flow) == count(features, row.hidden_features, context_features)
    distance = abs(row.parameters_after - target)
    near = range(max(1, row.hidden_features - 3), row.hidden_features + 4)
    far = data.draw(st.lists(st.integers(1, 60), max_size=2))
    assert all(abs(count(features, other, context_features) - target) >= distance for other in [*near, *far])


def test_a_wide_coupling_is_matched_within_a_percent() -> None:
    flow = Flow(coupling(6, 128), StandardNormal([6]))
    report = swap_transforms(flow, COUPLING)
    assert report.parameters_before > 50_000
    assert abs(report.parameters_after / report.parameters_before - 1) < 0.01


def test_only_trainable_parameters_count() -> None:
    old = coupling(4)
    for parameter in old.transform_net.blocks.parameters():
        parameter.requires_grad_(False)
    (row,) = swap_transforms(Flow(old, StandardNormal([4])), COUPLING).rows
    assert row.parameters_before == trainable(old) < sum(p.numel() for p in old.parameters())
    assert abs(row.parameters_after - row.parameters_before) < 20


def test_what_has_no_parameters_gets_the_smallest_block() -> None:
    flow = nflows_flow()
    (row,) = swap_transforms(flow, transforms.ReversePermutation).rows
    assert (row.parameters_before, row.hidden_features) == (0, 1)


def test_a_width_of_your_own() -> None:
    for arguments, width in (({}, 64), ({"hidden_features": 10}, 10)):
        flow = nflows_flow()
        report = swap_transforms(flow, COUPLING, match_parameters=False, **arguments)
        assert [row.hidden_features for row in report.rows] == [width] * 2
        assert [row.parameters_after for row in report.rows] == [count(4, width)] * 2


def test_contradictory_and_bad_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="match_parameters=False"):
        swap_transforms(nflows_flow(), COUPLING, hidden_features=10)
    for width in (0, -3, 2.5):
        with pytest.raises(ValueError, match="hidden_features"):
            swap_transforms(nflows_flow(), COUPLING, match_parameters=False, hidden_features=width)


# what comes in their place ---------------------------------------------------------------------------


@each_host
@pytest.mark.parametrize("made", ["branch", "block", "transform"])
def test_replace_may_make_a_branch_a_block_or_a_transform(make, kind, paths, ours, made) -> None:
    def branch(features, hidden_features, context_features):
        return LipschitzMLP([features, hidden_features, features], context_features, lipschitz=0.5)

    chosen = {"log_det": Exact(chunk=1), "inverse": Newton()}
    maker = {
        "branch": branch,
        "block": lambda *sizes: ResidualBlock(branch(*sizes), **chosen),
        "transform": lambda *sizes: ours(branch(*sizes), **chosen),
    }[made]
    flow = make()
    before = copy.deepcopy(flow)
    report = swap_transforms(flow, kind, maker)
    assert [row.path for row in report.rows] == paths
    assert_report_is_true(report, before, flow)
    assert_is_a_density(flow, torch.randn(3, 4))
    for block in (flow.get_submodule(path).block for path in paths):
        assert block.certificate().value == pytest.approx(0.5, rel=1e-3)  # the user's; such large weights exhaust it
        if made != "branch":
            assert (block.estimator, block.solver) == tuple(chosen.values())


def test_the_other_orientation_is_a_ready_transform() -> None:
    """For variational inference: samples without a solve."""
    model = normflows_model()
    swap_transforms(model, "flows.0", lambda d, h, c: ResidualFlow(LipschitzMLP([d, h, d], c), reverse=False))
    assert model.flows[0].reverse is False


def test_replace_is_told_the_sizes() -> None:
    told = []

    def maker(*sizes):
        told.append(sizes)
        return LipschitzMLP([sizes[0], sizes[1], sizes[0]], sizes[2])

    swap_transforms(nflows_flow(5, C), MAF, maker, match_parameters=False, hidden_features=7)
    assert told == [(5, 7, C)]


@each_host
@pytest.mark.parametrize(
    ("maker", "error", "message"),
    [
        (lambda d, h, c: "net", TypeError, "replace must return"),
        (lambda d, h, c: nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, d)), NotContractiveError, "Linear"),
        (lambda d, h, c: LipschitzMLP([d, 2, d]), ValueError, "ignore hidden_features"),
    ],
)
def test_what_cannot_be_put_in_leaves_the_flow_as_it_was(make, kind, paths, ours, maker, error, message) -> None:
    flow = make()
    before, modules = outside(flow, []), list(flow.modules())
    with pytest.raises(error, match=message):
        swap_transforms(flow, kind, maker)
    assert unchanged(flow, before) and list(flow.modules()) == modules


def test_an_error_at_the_last_transform_leaves_the_first_as_it_was() -> None:
    made = []

    def maker(features, hidden_features, context_features):
        made.append(1)
        if len(made) == 2:
            raise ZeroDivisionError
        return LipschitzMLP([features, hidden_features, features])

    flow = nflows_flow()
    with pytest.raises(ZeroDivisionError):
        swap_transforms(flow, COUPLING, maker, match_parameters=False)
    assert sum(isinstance(module, COUPLING) for module in flow.modules()) == 2


@each_host
def test_one_seed_gives_one_flow_however_the_width_was_found(make, kind, paths, ours) -> None:
    flow = make()
    torch.manual_seed(3)
    report = swap_transforms(flow, kind)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = [LipschitzMLP([4, row.hidden_features, row.hidden_features, 4]) for row in report.rows]
    assert torch.equal(after, torch.get_rng_state())
    for path, branch in zip(paths, expected, strict=True):
        ours_now = flow.get_submodule(path).block.branch
        assert all(torch.equal(a, b) for a, b in zip(ours_now.parameters(), branch.parameters(), strict=True))


@each_host
def test_dtype_device_and_mode_are_taken_over(make, kind, paths, ours) -> None:
    flow = make().double().eval()
    swap_transforms(flow, kind)
    new = [flow.get_submodule(path) for path in paths]
    assert {p.dtype for part in new for p in part.parameters()} == {torch.float64}
    assert not any(module.training for part in new for module in part.modules())
    assert flow.log_prob(torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64
    flow = make().to("meta")
    swap_transforms(flow, kind)
    assert {p.device.type for p in flow.parameters()} == {"meta"}
    assert all(module.training for module in flow.modules())


def test_what_has_no_numbers_follows_the_rest() -> None:
    flow = nflows_flow().double()
    swap_transforms(flow, transforms.ReversePermutation)
    assert {p.dtype for p in flow.parameters()} == {torch.float64}


def test_swapping_again() -> None:
    flow = nflows_flow(context_features=C)
    swap_transforms(flow, (COUPLING, MAF))
    again = swap_transforms(flow, ResidualTransform, match_parameters=False, hidden_features=5)
    assert [(row.hidden_features, row.context_features) for row in again.rows] == [(5, C)] * 3


# use -------------------------------------------------------------------------------------------------


def conditional_nflows_flow(features: int = 4) -> Flow:
    flow = nflows_flow(features, C)
    return Flow(flow._transform, ConditionalDiagonalNormal([features], nn.Linear(C, 2 * features)), nn.Linear(2, C))


@pytest.mark.parametrize(
    ("flow", "kinds", "log_prob", "sample"),
    [
        (nflows_flow, (COUPLING, MAF), lambda f, x: f.log_prob(x), lambda f: f.sample(6)),
        (
            conditional_nflows_flow,
            (COUPLING, MAF),
            lambda f, x: f.log_prob(x, x[:, :2]),
            lambda f: f.sample(3, torch.randn(2, 2)).flatten(0, 1),
        ),
        (
            normflows_model,
            (nf.flows.AffineCouplingBlock, nf.flows.MaskedAffineAutoregressive),
            lambda f, x: f.log_prob(x),
            lambda f: f.sample(6)[0],
        ),
        (
            conditional_normflows_model,
            (nf.flows.MaskedAffineAutoregressive, nf.flows.CoupledRationalQuadraticSpline),
            lambda f, x: f.log_prob(x, context=x[:, :C]),
            lambda f: f.sample(6, context=torch.randn(6, C))[0],
        ),
    ],
    ids=["nflows", "nflows with context", "normflows", "normflows with context"],
)
def test_the_swapped_flow_trains_and_samples(flow, kinds, log_prob, sample) -> None:
    flow = flow()
    swap_transforms(flow, kinds)
    x = 0.3 * torch.randn(128, 1) + 0.1 * torch.randn(128, 4) + 1
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = -log_prob(flow, x).mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    flow.eval()
    with torch.no_grad():
        samples = sample(flow)
    assert samples.shape == (6, 4) and torch.isfinite(samples).all()
    twin = copy.deepcopy(flow)
    twin.load_state_dict(flow.state_dict())
    assert torch.equal(log_prob(twin, x), log_prob(flow, x))


# the report ------------------------------------------------------------------------------------------


def test_the_report_is_a_table() -> None:
    flow = nflows_flow(context_features=C)
    before = trainable(flow)
    report = swap_transforms(flow, (COUPLING, MAF))
    assert report.parameters_before == sum(row.parameters_before for row in report.rows)
    assert report.parameters_after - report.parameters_before == trainable(flow) - before
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 4
    head, rule, *rows, other_rule, total = lines
    assert head.split() == ["path", "old", "new", "before", "after", "width", "context"]
    assert rule == other_rule == "-" * len(rule)
    for line, row in zip(rows, report.rows, strict=True):
        numbers = [f"{row.parameters_before:,}", f"{row.parameters_after:,}", f"{row.hidden_features}", str(C)]
        assert line.split() == [row.path, row.old, "ResidualTransform(LipschitzMLP)", *numbers]
    assert total.split() == ["total", f"{report.parameters_before:,}", f"{report.parameters_after:,}"]
    for name in ("before", "after"):  # right-aligned: every number ends where its heading does
        end = head.index(name) + len(name)
        assert all(line[end - 1].isdigit() and line[end : end + 1] in ("", " ") for line in [*rows, total])
    assert all(line.index(row.old) == head.index("old") for line, row in zip(rows, report.rows, strict=True))


def test_the_report_of_a_ready_transform() -> None:
    flow = nflows_flow()
    report = swap_transforms(flow, COUPLING, lambda d, h, c: MAF(d, h))
    assert {row.new for row in report.rows} == {MAF.__name__}
    assert all(line.endswith(" -") for line in str(report).splitlines()[2:4])  # no context


def test_swap_imports_only_the_host_it_meets() -> None:
    code = """
import sys
import iresflow_plugin.swap
assert not {"nflows", "normflows"} & set(sys.modules)
from nflows.flows import SimpleRealNVP
from nflows.transforms import AffineCouplingTransform
iresflow_plugin.swap.swap_transforms(SimpleRealNVP(2, 8, 1, 1), AffineCouplingTransform)
assert "normflows" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("misspelt", ["match_parameter", "hidden_feature", "seed"])
def test_a_misspelt_keyword_is_refused(misspelt) -> None:
    with pytest.raises(TypeError, match=misspelt):
        swap_transforms(nflows_flow(), COUPLING, **{misspelt: True})
