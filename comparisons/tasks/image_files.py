"""Reads MNIST and CIFAR-10 as they are published: idx files, Python pickles, binary batches; and the shared `.npz`.

A reader takes a folder and returns the images it finds there, uint8 and (n, C, H, W), or None where its files are not.
"""

from __future__ import annotations

import codecs
import gzip
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comparisons.tasks.sources import read_archive

MNIST_FOLDERS = (".", "mnist", "MNIST", "MNIST/raw")  # the last: of torchvision
MNIST_FILES = tuple((part, what, dims) for part in ("train", "t10k") for what, dims in (("images", 3), ("labels", 1)))
CIFAR_SHAPE = (3, 32, 32)
CIFAR_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
FIRST_1000 = "the test part is the FIRST 1000 of the 10000 test images"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images as published.

    Args:
        name: mnist or cifar10.
        x_train, x_test: uint8, shape (n, channels, height, width).
        y_train, y_test: labels, int64, shape (n,).
        note: where they come from and how many there are: say it wherever a number rests on them.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    note: str


Reader = Callable[[Path], ImageSet | None]


def image_set(name: str, arrays: Iterable[np.ndarray], note: str) -> ImageSet:
    """From x_train, y_train, x_test, y_test; the note begins with the numbers of images."""
    x_train, y_train, x_test, y_test = arrays
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise ValueError(f"{name} has {len(x)} {part} images and {len(y)} labels; each image needs one.")
        if not len(x):
            raise ValueError(f"{name} has no {part} images.")
    images = [torch.from_numpy(np.require(x, np.uint8, ["C", "W"])) for x in (x_train, x_test)]
    labels = [torch.from_numpy(np.asarray(y).astype(np.int64)) for y in (y_train, y_test)]
    counts = f"{len(x_train)} train and {len(x_test)} test images {note}"
    return ImageSet(name, images[0], labels[0], images[1], labels[1], counts)


# idx -------------------------------------------------------------------------------------------------


def mnist_idx(folder: Path) -> ImageSet | None:
    """The four published files, plain or gzipped, spelled with dashes, dots or underscores."""
    for inner in MNIST_FOLDERS:
        paths = [idx_path(folder / inner, *file) for file in MNIST_FILES]
        found = [path for path in paths if path is not None]
        if len(found) == len(paths):
            x_train, y_train, x_test, y_test = (read_idx(path) for path in found)
            arrays = (x_train[:, None], y_train, x_test[:, None], y_test)
            return image_set("mnist", arrays, f"from idx files in {found[0].parent}")
        if found:
            missing = ["-".join(map(str, file)) for file, path in zip(MNIST_FILES, paths, strict=True) if path is None]
            raise ValueError(f"{found[0].parent} has only a part of MNIST; the idx file of {missing[0]} is missing.")
    return None


def idx_path(folder: Path, part: str, what: str, dims: int) -> Path | None:
    """`train-images-idx3-ubyte`, with one of - . _ before idx and between the words, perhaps `.gz`."""
    names = [
        f"{part}{first}{what}{second}idx{dims}{third}ubyte{ending}"
        for first in "-_"
        for second in "-._"
        for third in "-_"
        for ending in ("", ".gz")
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """Two zero bytes, 8 for unsigned bytes, the number of dimensions, their sizes (big-endian), the data."""
    content = opened(path)
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is no idx file of unsigned bytes: it begins with {content[:4]!r}.")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path.name} announces {shape} bytes and holds {len(content) - start}; it was cut short, get it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def opened(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path.name} cannot be unpacked ({error}); get it again.") from None


# CIFAR-10 --------------------------------------------------------------------------------------------


def cifar10_python(folder: Path) -> ImageSet | None:
    """The "python version": pickled dictionaries with b"data" and b"labels"."""
    return cifar10_batches(folder, "cifar-10-batches-py", "", read_pickle)


def cifar10_binary(folder: Path) -> ImageSet | None:
    """The "binary version": a byte of label and 3072 of pixels an image."""
    return cifar10_batches(folder, "cifar-10-batches-bin", ".bin", read_binary)


def cifar10_batches(
    folder: Path, inner: str, ending: str, read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
) -> ImageSet | None:
    """The batches that are there, and the test batch; the note says how many of the five are missing."""
    home = next((place for place in (folder / inner, folder) if (place / f"test_batch{ending}").is_file()), None)
    if home is None:
        return None
    paths = [path for name in CIFAR_BATCHES if (path := home / f"{name}{ending}").is_file()]
    if not paths:
        raise ValueError(f"{home} has test_batch{ending} and none of data_batch_1{ending} to data_batch_5{ending}.")
    x_train, y_train = joined([read(path) for path in paths])
    missing = len(CIFAR_BATCHES) - len(paths)
    note = f"from {home}" + (f"; {missing} of the 5 train batches are missing" if missing else "")
    return image_set("cifar10", (x_train, y_train, *read(home / f"test_batch{ending}")), note)


def joined(batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows, row = np.frombuffer(path.read_bytes(), np.uint8), 1 + math.prod(CIFAR_SHAPE)
    if not len(rows) or len(rows) % row:
        raise ValueError(f"{path.name} has {len(rows)} bytes, no multiple of {row}; it was cut short, get it again.")
    rows = rows.reshape(-1, row)
    return rows[:, 1:].reshape(-1, *CIFAR_SHAPE), rows[:, 0]


def read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        try:
            content = ArraysOnly(file, encoding="bytes").load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
            raise ValueError(f"{path.name} is no pickled batch of CIFAR-10: {error}") from None
    content = {as_text(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    data, labels = content.get("data"), content.get("labels")
    pixels = math.prod(CIFAR_SHAPE)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (pixels,) or labels is None:
        raise ValueError(f"{path.name} should hold 'labels' and 'data', uint8 of shape (n, {pixels}).")
    return data.reshape(-1, *CIFAR_SHAPE), np.asarray(labels, np.uint8)


def as_text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def numpy_names() -> dict[tuple[str, str], Any]:
    """What pickled arrays name, under the old and the new addresses inside numpy."""
    from numpy._core import multiarray, numeric  # pyright: ignore[reportMissingImports]

    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }
    for core in ("core", "_core"):
        names[f"numpy.{core}.multiarray", "_reconstruct"] = multiarray._reconstruct  # pyright: ignore[reportAttributeAccessIssue]
        names[f"numpy.{core}.numeric", "_frombuffer"] = numeric._frombuffer  # pyright: ignore[reportAttributeAccessIssue]
    return names


class ArraysOnly(pickle.Unpickler):
    """Builds plain containers and numpy arrays; a pickle that names anything else could run code, and is refused."""

    allowed = numpy_names()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch of images has no use for.")
        return self.allowed[module, name]


# the shared archives ---------------------------------------------------------------------------------


def mnist_archive(folder: Path) -> ImageSet | None:
    path = folder / "mnist.npz"
    if not path.is_file():
        return None
    arrays = read_archive(path)
    x_train, x_test = (arrays[f"x_{part}"][:, None] for part in ("train", "test"))
    return image_set("mnist", (x_train, arrays["y_train"], x_test, arrays["y_test"]), f"from {path.name}")


def cifar10_archive(folder: Path) -> ImageSet | None:
    """The first batch and a tenth of the test part, and what other batches lie beside them."""
    path = folder / "cifar10_small.npz"
    if not path.is_file():
        return None
    small = read_archive(path)
    more = [folder / f"cifar10_train_{number}.npz" for number in range(2, 6)]
    others = [read_archive(path) for path in more if path.is_file()]
    x_train, y_train = joined([(small["x_train"], small["y_train"]), *((other["x"], other["y"]) for other in others)])
    arrays = (x_train.transpose(0, 3, 1, 2), y_train, small["x_test"].transpose(0, 3, 1, 2), small["y_test"])
    return image_set("cifar10", arrays, f"from {path.name} and {len(others)} more batches; {FIRST_1000}")


READERS: dict[str, tuple[Reader, ...]] = {
    "mnist": (mnist_idx, mnist_archive),
    "cifar10": (cifar10_python, cifar10_binary, cifar10_archive),
}
