"""The memory of a certificate: what it returns was found from the very weight that asks, whoever asks meanwhile."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from iresflow_plugin.lipschitz import Spectral, constrain, lipschitz_bound
from iresflow_plugin.lipschitz.constraints import Memo, memo
from tests.helpers import name, raw_weights, scale_weights, svd_norm


class Finder:
    """Finds the sum of a weight, and remembers which weights it was shown."""

    def __init__(self, meanwhile=lambda: None) -> None:
        self.shown: list[Tensor] = []
        self.meanwhile = meanwhile

    def __call__(self, weight: Tensor) -> Tensor:
        self.shown.append(weight)
        self.meanwhile()
        return weight.sum()


MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def test_what_was_found_is_found_once():
    kept, find, weight = Memo(), Finder(), torch.randn(3, 4)
    found = [kept.recall(weight.clone(), "settings", find) for _ in range(3)]
    assert len(find.shown) == 1 and all(f is found[0] for f in found)


@pytest.mark.parametrize(
    "other",
    [
        lambda w: w + torch.eye(3) * 1e-7,
        lambda w: w.double(),
        lambda w: w.bfloat16().float(),
        lambda w: w.reshape(1, 9),
        lambda w: w[:2],
        lambda w: w * torch.nan,
    ],
    ids=["one entry", "wider", "rounded", "shape", "fewer rows", "NaN"],
)
def test_another_weight_is_found_anew(other):
    kept, find, weight = Memo(), Finder(), torch.randn(3, 3)
    for asked in (weight, other(weight), weight):
        found = kept.recall(asked, "settings", find)
        torch.testing.assert_close(found, asked.sum(), rtol=0, atol=0, equal_nan=True)
        assert found.dtype == asked.dtype
    assert len(find.shown) == 3


def test_equal_numbers_of_another_dtype_are_another_weight():
    """Their margins for rounding differ."""
    kept, find, weight = Memo(), Finder(), torch.ones(3, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert kept.recall(weight.to(dtype), "settings", find).dtype == dtype
    assert [w.dtype for w in find.shown] == [torch.float32, torch.float64, torch.bfloat16]


def test_a_weight_that_is_no_number_is_never_taken_for_another():
    kept, find, weight = Memo(), Finder(), torch.full((2, 2), torch.nan)
    for _ in range(2):
        assert kept.recall(weight, "settings", find).isnan()
    assert len(find.shown) == 2


def test_other_settings_are_found_anew():
    kept, find, weight = Memo(), Finder(), torch.randn(3, 3)
    for settings in ((0.9, None), (0.8, None), (0.8, torch.bfloat16), (0.9, None)):
        kept.recall(weight, settings, find)
    assert len(find.shown) == 4


def test_what_is_found_belongs_to_a_copy():
    """Edits of the weight, also such as no version counter tells of, reach neither what is kept nor what was found."""
    kept, find, weight = Memo(), Finder(), torch.ones(3, 3)
    first = kept.recall(weight, "settings", find)
    weight.data.mul_(2)
    assert find.shown[0].untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
    assert first == 9 and kept.recall(weight, "settings", find) == 18 and first == 9
    weight.data.div_(2)
    assert kept.recall(weight, "settings", find) == 9


def test_an_edit_while_it_is_computed_does_not_reach_it():
    """As by another thread that trains: what is kept belongs to the weight before, and the one after is found anew."""
    kept, weight = Memo(), torch.ones(3, 3)
    find = Finder(meanwhile=lambda: weight.data.zero_() if len(find.shown) == 1 else None)
    assert kept.recall(weight, "settings", find) == 9
    assert kept.recall(torch.ones(3, 3), "settings", find) == 9 and len(find.shown) == 1
    assert kept.recall(weight, "settings", find) == 0 and len(find.shown) == 2


def test_what_another_one_finds_meanwhile_is_not_returned():
    """Neither to the one who computes nor to the one who compares, wherever the other comes between."""
    kept, mine, theirs = Memo(), torch.ones(3, 3), torch.full((3, 3), 5.0)
    others = Finder()
    find = Finder(meanwhile=lambda: kept.recall(theirs, "settings", others))
    assert kept.recall(mine, "settings", find) == 9
    assert kept.recall(theirs, "settings", others) == 45


@pytest.mark.parametrize("when", ["before", "behind"])
def test_what_another_one_keeps_while_this_one_compares_is_not_returned(monkeypatch, when):
    kept, mine, theirs = Memo(), torch.ones(3, 3), torch.full((3, 3), 5.0)
    kept.recall(mine, "settings", Finder())
    compare, waiting = memo._same, [True]

    def interrupted(a: Tensor, b: Tensor) -> bool:
        def other() -> None:
            if waiting and waiting.pop():
                assert kept.recall(theirs, "settings", Finder()) == 45

        if when == "before":
            other()
        same = compare(a, b)
        if when == "behind":
            other()
        return same

    monkeypatch.setattr(memo, "_same", interrupted)
    assert kept.recall(mine, "settings", Finder()) == 9
    assert not waiting


def test_many_threads_with_weights_of_their_own_share_one_memory():
    kept = Memo()
    start = threading.Barrier(8)

    def ask(number: int) -> bool:
        weight = torch.full((4, 4), float(number))
        start.wait()
        return all(kept.recall(weight, "settings", Finder()) == 16 * number for _ in range(300))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


@pytest.mark.parametrize("first", MODES, ids=name)
@pytest.mark.parametrize("second", MODES, ids=name)
def test_what_is_found_in_one_mode_serves_in_every_other(first, second):
    """Without a graph, and never as an inference tensor, which no training step could use."""
    kept, find = Memo(), Finder()
    weight = torch.ones(3, 3, requires_grad=True)
    for mode in (first, second):
        with mode():
            found = kept.recall(weight.detach(), "settings", find)
            assert not found.requires_grad and not found.is_inference()
    assert len(find.shown) == 1 and not find.shown[0].is_inference()
    (weight * found).sum().backward()
    assert (weight.grad == 9).all()


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_is_neither_copied_nor_saved(twin_of):
    kept, find, weight = Memo(), Finder(), torch.randn(3, 3)
    kept.recall(weight, "settings", find)
    twin = twin_of(kept)
    assert isinstance(twin, Memo) and len(pickle.dumps(kept)) < 200
    twin.recall(weight, "settings", find)
    assert len(find.shown) == 2  # it had nothing
    kept.recall(weight, "settings", find)
    assert len(find.shown) == 2  # and took nothing away


# ------------------------------------------------------------------------------------------------- in a constraint


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_standing_weight_is_certified_once_until_something_changes(monkeypatch, factor):
    """The bound, autocast, the geometry of a convolution and the weight itself each make it count anew."""
    found = []
    original = Spectral._find
    monkeypatch.setattr(Spectral, "_find", lambda self, weight: found.append(1) or original(self, weight))
    net = scale_weights(constrain(nn.Sequential(nn.Conv2d(2, 2, 3, stride=2, padding=1)), 0.9), factor)
    item, x = net[0].parametrizations.weight[0], torch.randn(1, 2, 4, 4)

    def counts() -> int:
        found.clear()
        for mode in MODES:
            for _ in range(2):
                with mode():
                    lipschitz_bound(net)
        net(x).sum().backward()
        return len(found)

    counts()
    assert counts() == 0
    for change in (
        lambda: setattr(item, "lipschitz", 0.5),
        lambda: setattr(net[0], "stride", (1, 1)),
        lambda: raw_weights(net)[0].data.mul_(1.5),
        lambda: raw_weights(net)[0].data[0, 0, 0].add_(1e-3),
        lambda: net.double(),
        lambda: net.float(),
    ):
        change()
        x = x.to(raw_weights(net)[0].dtype)
        assert counts() == 1 and counts() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lipschitz_bound(net)
    assert len(found) == 1


@pytest.mark.parametrize("mode", MODES, ids=name)
def test_threads_with_weights_of_their_own_share_one_constraint(mode):
    item = Spectral(0.9)
    weights = [size * torch.randn(6, 6) for size in (0.01, 0.1, 30.0, 3000.0)]

    def certify(weight: Tensor) -> tuple[Tensor, float]:
        with mode():
            used, bound = item.certify(weight)
        return used, bound

    right = [certify(weight) for weight in weights]
    assert torch.equal(right[0][0], weights[0]) and 0.8 < svd_norm(right[3][0].clone()) <= 0.9
    with ThreadPoolExecutor(4) as pool:
        rounds = list(pool.map(lambda weight: [certify(weight) for _ in range(100)], weights))
    for mine, (used, bound) in zip(rounds, right, strict=True):
        assert all(torch.equal(weight, used) and number == bound for weight, number in mine)
