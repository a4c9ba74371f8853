"""What a module computes can be changed from outside: that is honoured, or refused with a sentence, but never missed.

A block evaluates its branch by what the certificate knows of every module. A subclass, a patch of one instance, a mask,
a hook, dropout in a network of the context: each could make the two differ.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from iresflow_plugin import NotContractiveError, ResidualBlock, lipschitz
from iresflow_plugin.inverse import Newton
from iresflow_plugin.lipschitz import (
    ACTIVATIONS,
    AddContext,
    AlmostOrthogonal,
    Bjorck,
    Chain,
    Concatenate,
    Frobenius,
    LearnableConcatenate,
    LipSwish,
    MaxMin,
    Scale,
    SinCos,
    Sine,
    Spectral,
    Sum,
    constrain,
    lipschitz_bound,
)
from iresflow_plugin.log_det import Exact, PowerSeries
from iresflow_plugin.nets import LipschitzConvNet, LipschitzDenseNet, LipschitzMLP
from tests.helpers import assert_close, log_det, name, scale_weights, svd_norm


def agree(block: ResidualBlock, x: Tensor, context: Tensor | None = None) -> None:
    """The block computes x plus what its branch computes, with gradients and without."""
    inputs = (x,) if context is None else (x, context)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(block(*inputs)[0], x + block.branch(*inputs), 1e-6)


def refused(block: ResidualBlock, x: Tensor, words: str, *context: Tensor) -> None:
    """In every direction, and by the certificate."""
    calls = [block, block.estimate, block.inverse, block.preimage, block.solve]
    for attempt in [*[lambda call=call: call(x, *context) for call in calls], block.certificate]:
        with pytest.raises(NotContractiveError, match=words):
            attempt()


# ------------------------------------------------------------------------------------------- subclasses


def louder(kind: type[nn.Module], factor: float = 5.0, **methods: Any) -> type[nn.Module]:
    """A subclass that computes `factor` times what its base computes."""

    def forward(self: nn.Module, *inputs: Tensor) -> Tensor:
        return factor * kind.forward(self, *inputs)

    return type(f"Loud{kind.__name__}", (kind,), {"forward": forward, **methods})


# Of three features: how to build the part, the features it gives, and the bound of what it computes.
PARTS: dict[str, tuple[type[nn.Module], Callable[[type], nn.Module], int, float]] = {
    **{
        kind.__name__: (kind, lambda made, kind=kind: made(4), 4 * kind.expansion, 1.0) for kind in ACTIVATIONS.values()
    },
    "Tanh": (nn.Tanh, lambda made: made(), 4, 1.0),
    "Softplus": (nn.Softplus, lambda made: made(), 4, 1.0),
    "Flatten": (nn.Flatten, lambda made: made(), 4, 1.0),
    "Scale": (Scale, lambda made: made(0.5), 4, 0.5),
    "Chain": (Chain, lambda made: made(nn.Tanh(), nn.Sigmoid()), 4, 0.25),
    "Sequential": (nn.Sequential, lambda made: made(nn.Tanh()), 4, 1.0),
    "Sum": (Sum, lambda made: made(nn.Tanh(), nn.Sigmoid()), 4, 1.25),
    "Concatenate": (Concatenate, lambda made: made(nn.Tanh(), nn.ELU()), 8, 2**0.5),
    "LearnableConcatenate": (LearnableConcatenate, lambda made: made(nn.Tanh(), nn.ELU()), 8, 1.0),
}

every_part = pytest.mark.parametrize("label", PARTS)


def around(part: nn.Module, features: int) -> nn.Module:
    return scale_weights(constrain(Chain(nn.Linear(3, 4), part, nn.Linear(features, 3)), 0.9))


@every_part
def test_a_subclass_with_a_forward_of_its_own_is_refused_by_name(label):
    kind, build, features, _ = PARTS[label]
    assert ResidualBlock(around(build(kind), features))
    with pytest.raises(NotContractiveError, match=f"Loud{label}"):
        ResidualBlock(around(build(louder(kind)), features))


@pytest.mark.parametrize(
    "build",
    [
        lambda: louder(AddContext)(nn.Linear(2, 4)),
        lambda: louder(nn.Linear)(4, 4),
        lambda: Chain(Sine(4), louder(Scale)(0.1)),
    ],
    ids=["entry of a context", "layer", "inside a chain"],
)
def test_layers_and_entries_with_a_forward_of_their_own_are_refused_by_name(build):
    with pytest.raises(NotContractiveError, match=r"Loud(AddContext|Linear|Scale)"):
        ResidualBlock(around(build(), 4))


@every_part
def test_a_subclass_that_states_its_bound_is_evaluated_as_it_is(label):
    kind, build, features, bound = PARTS[label]
    made = louder(kind, lipschitz_bound=lambda self: 5.0 * bound)
    block = ResidualBlock(around(build(made), features), log_det=Exact()).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    agree(block, x)
    y, volume = block(x)
    assert_close(volume, log_det(block.branch, x), 1e-9, 1e-12)
    solution = block.solve(y)
    assert_close(solution.x, x, 1e-9)
    assert not lipschitz_bound(block.branch).certified and not block.certificate().certified
    assert not solution.certified


def test_a_subclass_that_changes_nothing_is_its_base():
    class Named(LipSwish):
        """With a name of its own."""

    block = ResidualBlock(around(Named(4), 4))
    assert block.certificate().certified
    agree(block, torch.randn(5, 3))


PLAIN = {
    "MLP": (lambda: LipschitzMLP([3, 8, 3]), (3,)),
    "densely connected": (lambda: LipschitzDenseNet(3, [8]), (3,)),
    "images": (lambda: LipschitzConvNet([2, 4, 2]), (2, 4, 4)),
}


@pytest.mark.parametrize("label", PLAIN)
def test_solutions_of_plain_nets_are_certified(label):
    build, shape = PLAIN[label]
    block = ResidualBlock(build())
    assert block.certificate().certified
    assert block.solve(torch.randn(4, *shape)).certified
    block.solver = Newton(max_evaluations=1, on_failure="return")
    assert block.solve(torch.randn(4, *shape)).certified  # the bound is proven, however large it is


class Softer(LipSwish):
    """An activation of its own by the one method that all is made of."""

    def as_map(self, context: Tensor | None = None) -> Any:
        return lipschitz.certified_map(Chain(Scale(0.5), nn.Tanh()))


class Doubled(SinCos):
    """The same, with two features for one."""

    def as_map(self, context: Tensor | None = None) -> Any:
        return lipschitz.certified_map(Concatenate(Chain(nn.Tanh(), Scale(0.5)), Chain(nn.Sigmoid(), Scale(0.5))))


@pytest.mark.parametrize(
    ("act", "features", "right"),
    [
        (Softer(4), 4, lambda x: torch.tanh(0.5 * x)),
        (Doubled(4), 8, lambda x: torch.cat([0.5 * torch.tanh(x), 0.5 * torch.sigmoid(x)], -1)),
    ],
    ids=["one for one", "two for one"],
)
def test_the_map_of_an_activation_is_what_its_forward_and_the_block_compute(act, features, right):
    block = ResidualBlock(around(act, features), log_det=Exact()).double()
    x, hidden = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert_close(block.branch[1](hidden), right(hidden), 1e-14)
    agree(block, x)
    y, volume = block(x)
    assert_close(volume, log_det(block.branch, x), 1e-9, 1e-12)
    assert block.certificate().certified and block.solve(y).certified
    assert_close(block.solve(y).x, x, 1e-9)


# ------------------------------------------------------------------------------------------- patches of one instance


def vector_net() -> nn.Module:
    return Chain(
        nn.Linear(4, 4),
        nn.Sequential(nn.Tanh(), nn.Flatten()),
        Sum(Scale(0.5), Chain(Sine(4), nn.Linear(4, 4))),
        AddContext(nn.Linear(2, 4)),
        Concatenate(LipSwish(4), MaxMin(4)),
        LearnableConcatenate(nn.Linear(8, 2), Chain(nn.Linear(8, 1), SinCos(1))),
        nn.Identity(),
    )


def image_net() -> nn.Module:
    return Chain(
        nn.Conv2d(1, 4, 3, padding=1), Sine(4, 2), nn.Conv2d(4, 1, 1), nn.Flatten(1), nn.Unflatten(1, (1, 4, 4))
    )


# Where the module hangs in the net that it is patched in.
PATCHED = {
    **{
        f"{kind} at {path or 'the root'}": (vector_net, path, kind)
        for path, kind in {
            "": "Chain",
            "0": "Linear",
            "1": "Sequential",
            "1.0": "Tanh",
            "1.1": "Flatten",
            "2": "Sum",
            "2.branches.0": "Scale",
            "2.branches.1": "Chain",
            "2.branches.1.0": "Sine",
            "2.branches.1.1": "Linear",
            "3": "AddContext",
            "4": "Concatenate",
            "4.branches.0": "LipSwish",
            "4.branches.1": "MaxMin",
            "5": "LearnableConcatenate",
            "5.branches.1.1": "SinCos",
            "6": "Identity",
        }.items()
    },
    **{
        f"{kind} at {path}": (image_net, path, kind)
        for path, kind in {"0": "Conv2d", "1": "Sine", "2": "Conv2d", "4": "Unflatten"}.items()
    },
}

every_patch = pytest.mark.parametrize("label", PATCHED)


def patch(module: nn.Module, factor: float = 5.0) -> None:
    plain = module.forward
    module.forward = lambda *inputs: factor * plain(*inputs)


def inputs_of(build: Callable) -> tuple[Tensor, ...]:
    return (torch.randn(5, 4), torch.randn(5, 2)) if build is vector_net else (torch.randn(5, 1, 4, 4),)


@every_patch
def test_a_patched_instance_is_refused_when_the_block_is_built(label):
    build, path, kind = PATCHED[label]
    net = constrain(build(), 0.9)
    assert ResidualBlock(net)
    patch(net.get_submodule(path))
    with pytest.raises(NotContractiveError, match=kind):
        ResidualBlock(net)


@every_patch
def test_an_instance_that_is_patched_later_is_refused_at_the_next_call(label):
    build, path, kind = PATCHED[label]
    block = ResidualBlock(constrain(build(), 0.9))
    x, *context = inputs_of(build)
    right = block(x, *context)[0]
    module = block.branch.get_submodule(path)
    patch(module)
    refused(block, x, kind, *context)
    del module.forward  # and all is well again
    assert torch.equal(block(x, *context)[0], right)


@pytest.mark.parametrize("kind", [nn.Tanh, LipSwish, nn.Flatten, nn.Identity], ids=name)
def test_a_patched_instance_that_states_its_bound_is_evaluated_as_it_is(kind):
    part = kind()
    patch(part)
    part.lipschitz_bound = lambda: 5.0
    block = ResidualBlock(around(part, 4))
    x = torch.randn(5, 3)
    agree(block, x)
    assert not block.certificate().certified and not block.solve(block(x)[0].detach()).certified


def test_networks_of_the_context_may_be_patched():
    block = ResidualBlock(LipschitzMLP([3, 8, 3], context_features=2))
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    before = block(x, context)[0]
    patch(next(part for part in block.branch if isinstance(part, AddContext)).network)
    agree(block, x, context)
    y = block(x, context)[0]
    assert not torch.allclose(y, before)
    assert_close(block.inverse(y, context)[0], x, 1e-5)


# ------------------------------------------------------------------------------------------- pruning, norms by hooks

CONSTRAINTS = [Spectral, AlmostOrthogonal, Bjorck, Frobenius]


def assign(raw: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        raw.copy_(new)


def assign_data(raw: Tensor, new: Tensor) -> None:
    raw.data.copy_(new)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=name)
@pytest.mark.parametrize("write", [assign, assign_data], ids=name)
def test_pruning_behind_a_constraint_is_seen_by_the_block_as_by_the_branch(constraint, write):
    block = ResidualBlock(scale_weights(LipschitzMLP([4, 16, 4], constraint=constraint)))
    x, layer = torch.randn(5, 4), block.branch[0]
    stack = layer.parametrizations.weight
    prune.random_unstructured(stack, "original", 0.5)
    agree(block, x)
    for size in (3.0, 0.01, 3.0):
        with torch.no_grad():
            before = block(x)[0]
            write(stack.original_orig, size * torch.randn_like(stack.original_orig))
            assert not torch.equal(block(x)[0], before)
        agree(block, x)
        assert svd_norm(layer.weight) * svd_norm(block.branch[2].weight) <= block.certificate().value <= 0.97 + 1e-9
        if constraint is not Bjorck:
            assert torch.equal(layer.weight == 0, stack.original_mask == 0)
    state = {key: torch.randn_like(value) if "orig" in key else value for key, value in block.state_dict().items()}
    block.load_state_dict(state)
    agree(block, x)
    y = block(x)[0].detach()
    assert_close(block.inverse(y)[0], x, 1e-4)
    prune.remove(stack, "original")
    agree(block, x)
    assert_close(block(x)[0], y, 1e-6)


def test_pruned_weights_are_trained():
    block = ResidualBlock(scale_weights(LipschitzMLP([4, 16, 4])), log_det=Exact())
    stack, x = block.branch[0].parametrizations.weight, torch.randn(5, 4)
    prune.l1_unstructured(stack, "original", 0.3)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        before = stack.original_orig.detach().clone()
        optimiser.zero_grad()
        y, volume = block(x)
        (y.square().sum() + volume.sum()).backward()
        optimiser.step()
        assert not torch.equal(stack.original_orig, before)
        agree(block, x)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [weight_norm, spectral_norm, pruned], ids=name)
@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 3), lambda: nn.Conv1d(3, 3, 1)], ids=["linear", "convolution"])
def test_norms_and_masks_that_work_by_hooks_are_refused(old, build):
    """Their hooks return nothing, and write the weight instead."""
    net = nn.Sequential(nn.Tanh(), old(build()))
    for attempt in (lambda: ResidualBlock(constrain(net, 0.9)), lambda: lipschitz_bound(net)):
        with pytest.raises(NotContractiveError, match=r"(Linear|Conv1d).*(hook|parametriz|weight_norm|prun)"):
            attempt()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [weight_norm, pruned], ids=name)
def test_norms_and_masks_by_hooks_may_stand_in_a_network_of_the_context(old):
    net = constrain(Chain(nn.Linear(3, 4), AddContext(old(nn.Linear(2, 4))), nn.Tanh(), nn.Linear(4, 3)), 0.9)
    block = ResidualBlock(net)
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    agree(block, x, context)
    assert_close(block.inverse(block(x, context)[0], context)[0], x, 1e-5)


# ------------------------------------------------------------------------------------------- networks of the context


def with_context(*parts: nn.Module) -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 8), nn.Sequential(*parts))
    return Chain(nn.Linear(2, 8), AddContext(network), nn.Tanh(), nn.Linear(8, 2))


IN_TRAINING = {
    "Dropout": lambda: nn.Dropout(0.5),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
}

every_layer_in_training = pytest.mark.parametrize("label", IN_TRAINING)


@every_layer_in_training
def test_a_context_that_is_different_at_every_evaluation_is_refused(label):
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    with pytest.raises(NotContractiveError, match=label):
        ResidualBlock(constrain(with_context(IN_TRAINING[label]()), 0.9))(x, context)


@every_layer_in_training
def test_in_eval_mode_the_context_is_the_same_there_and_back(label):
    net = with_context(nn.Linear(8, 8), IN_TRAINING[label](), nn.Tanh()).eval()
    block = ResidualBlock(scale_weights(constrain(net, 0.9)))
    state = {key: value.clone() for key, value in block.state_dict().items()}
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    for _ in range(2):
        block.eval()
        agree(block, x, context)
        y = block(x, context)[0].detach()
        assert torch.equal(block(x, context)[0], y)
        solution = block.solve(y, context)
        assert ((solution.x - x).norm(dim=1) <= solution.error_bound + 1e-6).all()
        assert_close(block.inverse(y, context)[0], x, 1e-5)
        block.train()
        for call in (block, block.inverse, block.preimage, block.solve, block.estimate):
            with pytest.raises(NotContractiveError, match=label):
                call(x, context)
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())


def test_dropout_of_nothing_is_allowed():
    block = ResidualBlock(constrain(with_context(nn.Dropout(0.0)), 0.9))
    x, context = torch.randn(5, 2), torch.randn(5, 3)
    assert block.training
    agree(block, x, context)
    assert_close(block.inverse(block(x, context)[0], context)[0], x, 1e-5)


# ------------------------------------------------------------------------------------------- hooks


HOOKED = {
    "first layer": (lambda: LipschitzMLP([3, 8, 3]), "0", (3,), (3,), (4,)),
    "activation": (lambda: LipschitzMLP([3, 8, 3]), "1", (3,), (4,), (8,)),
    "torch's activation": (lambda: LipschitzMLP([3, 8, 3], activation=nn.ELU), "1", (3,), (8,), (8,)),
    "last layer": (lambda: LipschitzMLP([3, 8, 3]), "2", (3,), (8,), (3,)),
    "whole branch": (lambda: LipschitzMLP([3, 8, 3]), "", (3,), (3,), (3,)),
    "concatenation": (lambda: LipschitzDenseNet(3, [8]), "0", (3,), (3,), (11,)),
    "chain in a concatenation": (lambda: LipschitzDenseNet(3, [8]), "0.branches.1", (3,), (3,), (8,)),
    "convolution": (lambda: LipschitzConvNet([2, 4, 2]), "0", (2, 5, 5), (2, 5, 5), (2, 5, 5)),
    "flatten": (
        lambda: constrain(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (2, 2))), 0.9),
        "0",
        (2, 2),
        (2, 2),
        (4,),
    ),
    "scale": (lambda: nn.Sequential(Scale(0.5), nn.Tanh()), "0", (3,), (3,), (3,)),
    "sum": (lambda: Sum(Scale(0.4), nn.Sequential(Scale(0.3), nn.Tanh())), "", (3,), (3,), (3,)),
}


@pytest.mark.parametrize("label", HOOKED)
@pytest.mark.parametrize("estimator", [Exact(), PowerSeries(3)], ids=["exact", "series"])
def test_hooks_that_read_are_called_in_both_directions(label, estimator):
    build, path, event, before, after = HOOKED[label]
    block = ResidualBlock(build(), log_det=estimator)
    module, x = block.branch.get_submodule(path), torch.randn(4, *event)
    plain = block(x)[0]
    y = plain.detach()
    came, went = [], []
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: came.append(inputs[0].detach().clone())),
        module.register_forward_hook(
            lambda module, inputs, output: went.append((inputs[0].shape, output.detach().clone()))
        ),
    ]
    for call in (block, block.estimate, block.inverse, block.preimage, block.solve):
        for mode in (torch.enable_grad, torch.no_grad):
            came.clear(), went.clear()
            with mode():
                call(y if call not in (block, block.estimate) else x)
            assert came and len(came) == len(went)
            for inputs, (shape, output) in zip(came, went, strict=True):
                assert inputs.shape == shape == (len(inputs), *before)
                assert output.shape == (len(inputs), *after) and 1 <= len(inputs) <= 4
    seen = list(zip(came, went, strict=True))
    for handle in handles:
        handle.remove()
    for inputs, (_, output) in seen:
        assert_close(output, module(inputs).detach(), 1e-6)
    assert torch.equal(block(x)[0], plain)


RETURNING = {
    "hook": lambda module: module.register_forward_hook(lambda module, inputs, output: 5 * output),
    "hook that returns what it got": lambda module: module.register_forward_hook(lambda module, inputs, output: output),
    "pre-hook": lambda module: module.register_forward_pre_hook(lambda module, inputs: (5 * inputs[0],)),
    "pre-hook without a tuple": lambda module: module.register_forward_pre_hook(lambda module, inputs: 5 * inputs[0]),
}


@pytest.mark.parametrize("label", RETURNING)
@pytest.mark.parametrize("path", ["", "0", "1", "2"])
def test_hooks_that_return_something_are_refused(label, path):
    block, x = ResidualBlock(LipschitzMLP([3, 8, 3])), torch.randn(4, 3)
    y = block(x)[0].detach()
    handle = RETURNING[label](block.branch.get_submodule(path))
    for call in (block, block.estimate, block.inverse, block.preimage, block.solve):
        with pytest.raises(ValueError, match="hook"):
            call(x)
    handle.remove()
    assert torch.equal(block(x)[0], y)


@pytest.mark.parametrize("path", ["", "0", "1", "2"])
def test_hooks_that_write_into_what_they_are_shown_do_not_change_the_block(path):
    """Refused, or without effect."""
    block, x = ResidualBlock(LipschitzMLP([3, 8, 3]), log_det=Exact()), torch.randn(4, 3)

    def write(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.mul_(5)

    with torch.no_grad():
        right = block(x)
        block.branch.get_submodule(path).register_forward_hook(write)
        try:
            found = block(x)
        except ValueError as error:
            assert "hook" in str(error)
        else:
            assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


def test_lightning_summarises_a_block_layer_by_layer():
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.utilities.model_summary import ModelSummary

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = ResidualBlock(LipschitzMLP([2, 16, 2]))
            self.example_input_array = torch.randn(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.flow(x)[0]

    def sizes(depth: int) -> dict[str, list[int]]:
        summary = ModelSummary(Model(), max_depth=depth)
        return dict(zip(summary.layer_names, summary.out_sizes, strict=True))

    assert set(sizes(1)) == {"flow"}
    layers = sizes(-1)
    assert layers["flow.branch.0"] == [4, 8] and layers["flow.branch.1"] == [4, 16]
    assert layers["flow.branch"] == layers["flow.branch.2"] == [4, 2]
