"""Images come out of every published format as they went in, and files that are broken say so."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from comparisons.tasks import SUITES, DataNotFoundError, load
from comparisons.tasks.images import ImageSet, load_images
from comparisons.tasks.sources import VARIABLE
from tests.comparisons.tasks.helpers import generator, loaded

RANDOM = np.random.RandomState(0)
MNIST = RANDOM.randint(0, 256, (6, 28, 28), np.uint8)
CIFAR = RANDOM.randint(0, 256, (6, 3, 32, 32), np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9], np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("comparisons.tasks.images.data_folders", lambda: [tmp_path])
    return tmp_path


def write_idx(path: Path, x: np.ndarray) -> None:
    content = b"\0\0\x08" + bytes([x.ndim]) + struct.pack(f">{x.ndim}I", *x.shape) + x.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, pattern: str) -> None:
    """Four train images and two test images."""
    for part, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        write_idx(folder / pattern.format(part=part, what="images", dims=3), MNIST[rows])
        write_idx(folder / pattern.format(part=part, what="labels", dims=1), LABELS[rows])


def write_binary(folder: Path) -> None:
    rows = np.concatenate([LABELS[:, None], CIFAR.reshape(6, -1)], 1)
    folder.mkdir()
    for number in range(2):
        (folder / f"data_batch_{number + 1}.bin").write_bytes(rows[2 * number : 2 * number + 2].tobytes())
    (folder / "test_batch.bin").write_bytes(rows[4:].tobytes())


def write_pickles(folder: Path, protocol: int) -> None:
    folder.mkdir()
    for name, start in (("data_batch_1", 0), ("data_batch_2", 2), ("test_batch", 4)):
        rows = slice(start, start + 2)
        batch = {b"data": CIFAR[rows].reshape(2, -1), b"labels": LABELS[rows].tolist(), b"batch_label": b"a batch"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))


def check(found: ImageSet, images: np.ndarray) -> None:
    assert found.x_train.dtype == found.x_test.dtype == torch.uint8
    assert np.array_equal(torch.cat([found.x_train, found.x_test]).numpy(), images)
    assert found.y_train.tolist() + found.y_test.tolist() == LABELS.tolist() and found.y_train.dtype == torch.int64
    assert "4 train and 2 test images" in found.note


@pytest.mark.parametrize(
    "pattern",
    [
        "{part}-{what}-idx{dims}-ubyte",
        "{part}-{what}-idx{dims}-ubyte.gz",
        "{part}-{what}.idx{dims}-ubyte",
        "MNIST/raw/{part}-{what}-idx{dims}-ubyte",
    ],
)
def test_mnist_from_idx_files(folder: Path, pattern: str) -> None:
    write_mnist(folder, pattern)
    check(load_images("mnist"), MNIST[:, None])


def test_cifar10_from_binary_batches(folder: Path) -> None:
    write_binary(folder / "cifar-10-batches-bin")
    found = load_images("cifar10")
    check(found, CIFAR)
    assert "3 of the 5 train batches are missing" in found.note


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_cifar10_from_pickled_batches(folder: Path, protocol: int) -> None:
    write_pickles(folder / "cifar-10-batches-py", protocol)
    check(load_images("cifar10"), CIFAR)


def test_shared_archives_say_that_the_test_part_is_short(folder: Path) -> None:
    pixels = CIFAR.transpose(0, 2, 3, 1)
    small = {"x_train": pixels[:2], "y_train": LABELS[:2], "x_test": pixels[4:], "y_test": LABELS[4:]}
    np.savez(folder / "cifar10_small.npz", **small)  # pyright: ignore[reportArgumentType]
    np.savez(folder / "cifar10_train_3.npz", x=pixels[2:4], y=LABELS[2:4])
    found = load_images("cifar10")
    check(found, CIFAR)
    assert "FIRST 1000 of the 10000 test images" in found.note


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_a_pickle_that_would_run_code_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pickles(folder / "cifar-10-batches-py", 2)
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"names builtins\.print"):
        load_images("cifar10")
    assert capsys.readouterr().out == ""


def test_broken_files_say_what_is_wrong(folder: Path) -> None:
    write_mnist(folder, "{part}-{what}-idx{dims}-ubyte")
    images, labels = folder / "train-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        load_images("mnist")
    images.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no idx file"):
        load_images("mnist")
    labels.unlink()
    with pytest.raises(ValueError, match="t10k-labels-1 is missing"):
        load_images("mnist")


def test_short_batches_and_wrong_pickles_are_refused(folder: Path) -> None:
    write_binary(folder / "cifar-10-batches-bin")
    (folder / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match="no multiple of 3073"):
        load_images("cifar10")
    write_pickles(folder / "cifar-10-batches-py", 2)
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": [1, 2]}))
    with pytest.raises(ValueError, match="'labels' and 'data'"):
        load_images("cifar10")


def test_images_that_are_nowhere_and_names_that_are_none(folder: Path) -> None:
    with pytest.raises(DataNotFoundError, match=rf"set \${VARIABLE}"):
        load_images("mnist")
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        load_images("cifar")


@pytest.mark.parametrize(("name", "shape"), [("mnist", (60000, 1, 28, 28)), ("cifar10", (50000, 3, 32, 32))])
def test_the_images_that_everybody_knows(name: str, shape: tuple[int, ...]) -> None:
    try:
        found = load_images(name)
    except DataNotFoundError as error:
        pytest.skip(str(error))
    assert found.x_train.shape[1:] == found.x_test.shape[1:] == shape[1:] and len(found.x_train) <= shape[0]
    assert found.y_train.unique().tolist() == list(range(10))


# tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES["image"])
def test_an_image_task_is_dequantised_into_the_unit_cube(name: str) -> None:
    task = loaded(name)
    batch, again, other = (task.draw(500, generator(seed)).x for seed in (1, 1, 2))
    assert task.name == name and task.kind == "image" and batch.shape == (500, *task.shape) and len(task.shape) == 3
    assert torch.equal(batch, again) and not torch.equal(batch, other)
    assert task.value_range is not None and task.columns == ()
    for x in (batch, task.test.x, task.validation.x):
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1
        levels = x.mul(task.value_range[1]).floor()
        assert 0.45 < (x * task.value_range[1] - levels).mean() < 0.55  # the noise
    assert (batch.mean((0, 2, 3)) - task.test.x.mean((0, 2, 3))).abs().max() < 0.03


@pytest.mark.parametrize("name", [name for name in SUITES["image"] if name.endswith("-conditional")])
def test_an_image_comes_with_its_class(name: str) -> None:
    """The mean image of a class is that of the same class in the test part, and of no other."""
    task = loaded(name)
    batch = task.draw(4000, generator(0))
    assert batch.context is not None and task.test.context is not None and task.context_features == 10
    assert bool((batch.context.sum(1) == 1).all())
    means, others = (
        points.context.T @ points.x.flatten(1) / points.context.sum(0)[:, None] for points in (batch, task.test)
    )
    assert torch.cdist(means, others).argmin(1).tolist() == list(range(10))
    assert loaded(name.removesuffix("-conditional")).test.context is None


def test_noise_is_fresh_in_batches_and_fixed_in_the_test_part() -> None:
    task = load("digits-image")
    many = task.draw(4000, generator(0)).x
    grey = many.mul(17).floor()
    first, second = next((a, b) for a in range(50) for b in range(a + 1, 4000) if torch.equal(grey[a], grey[b]))
    assert not torch.equal(many[first], many[second])
    assert torch.equal(task.test.x, load("digits-image").test.x)


def test_bits_per_dimension_are_those_of_the_literature() -> None:
    """A uniform density over the cube says 8 bits a pixel for 256 grey values, whatever the image."""
    task = loaded("mnist-small")
    assert task.bits_per_dimension(0.0) == pytest.approx(8)
    assert load("digits-image").bits_per_dimension(0.0) == pytest.approx(np.log2(17))
    nats_in_grey_values = -784 * np.log(256)
    assert 0.0 + task.log_volume == pytest.approx(nats_in_grey_values)


def test_a_task_says_what_its_numbers_rest_on() -> None:
    assert len(loaded("mnist-small").test) == 2000
    said = " ".join(loaded("cifar10").preprocessing)
    assert "train images out for validation" in said and "noise of width 1 to all 256 grey values" in said
    assert ("FIRST 1000" in said) == (len(loaded("cifar10").test) == 1000)
