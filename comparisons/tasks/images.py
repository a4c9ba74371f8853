"""Images as images: MNIST, CIFAR-10 and scikit-learn's digits, points of shape (channels, height, width).

load_images("cifar10")       images and labels as published, for any use
mnist(), cifar10(), ...      tasks: densities of the uniformly dequantised images, scaled to [0, 1)
"""

from __future__ import annotations

import difflib
import math

import torch
from sklearn import datasets
from torch import Generator

from comparisons.tasks.image_files import READERS, ImageSet
from comparisons.tasks.sources import VARIABLE, DataNotFoundError, data_folders
from comparisons.tasks.tables import one_hot, random_split
from comparisons.tasks.task import Points, Task

__all__ = ["ImageSet", "load_images"]

NOISE_SEED = 7  # one fixed draw of the noise of validation and test images: every method meets the same points
SPLIT_SEED = 42
VALIDATION = 5000  # images held out of the train part
SMALL_TEST = 2000  # images that a run on a CPU is judged by
BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1: grey value and noise may round up to the next


def load_images(name: str) -> ImageSet:
    """ "mnist" or "cifar10" from the first folder that holds it, in one of the published formats or the shared one."""
    if name not in READERS:
        close = difflib.get_close_matches(name, READERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(READERS)}."
        raise ValueError(f"there are no images {name!r}; {hint}")
    for folder in data_folders():
        for read in READERS[name]:
            found = read(folder)
            if found is not None:
                return found
    searched = " and ".join(str(folder) for folder in data_folders())
    published = {"mnist": "train-images-idx3-ubyte and its three companions", "cifar10": "cifar-10-batches-py or -bin"}
    raise DataNotFoundError(
        f"{name} is not in {searched}; set ${VARIABLE} to the folder that holds {published[name]}, or the shared .npz."
    )


def image_task(
    name: str,
    about: str,
    parts: tuple[Points, Points, Points],
    levels: int,
    *,
    noted: tuple[str, ...] = (),
    batch: int = 64,
    parameters: int,
) -> Task:
    """Train, validation and test images of `levels` grey values each; batches are drawn with replacement.

    A value k becomes (k + u) / levels with u uniform on [0, 1), fresh in every batch and fixed in validation and test.
    Bits per dimension are then those of the literature: minus the mean log2-likelihood plus log2(levels).
    """
    train, validation, test = parts

    def prepared(images: Points, generator: Generator) -> Points:
        noise = torch.rand(images.x.shape, generator=generator)
        return Points(((images.x + noise) / levels).clamp_(max=BELOW_ONE), images.context)

    def draw(n: int, generator: Generator) -> Points:
        return prepared(train[torch.randint(len(train), (n,), generator=generator)], generator)

    fixed = torch.Generator().manual_seed(NOISE_SEED)
    shape = tuple(train.x.shape[1:])
    return Task(
        name,
        f"{about}: {' x '.join(map(str, shape))}, {len(train)} train and {len(test)} test images",
        "image",
        draw,
        validation=prepared(validation, fixed),
        test=prepared(test, fixed),
        batch=batch,
        parameters=parameters,
        preprocessing=(*noted, f"added noise of width 1 to all {levels} grey values, and divided by {levels}"),
        log_volume=-math.prod(shape) * math.log(levels),
        levels=1,
        restore=lambda x: x * levels,
        value_range=(0.0, float(levels)),
    )


def published_task(
    name: str, about: str, images: str, *, parameters: int, most_test: int | None = None, conditional: bool = False
) -> Task:
    """Validation images are taken from the published train part at random, test images from the beginning."""
    found = load_images(images)
    order = torch.randperm(len(found.x_train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = min(VALIDATION, len(order) // 10)
    rest, validation = order[held_out:], order[:held_out]
    train_classes, test_classes = (one_hot(y.numpy()) if conditional else None for y in (found.y_train, found.y_test))
    train, test = Points(found.x_train, train_classes), Points(found.x_test, test_classes)[:most_test]
    noted = [found.note, f"held {held_out} of the train images out for validation"]
    if len(test) < len(found.x_test):
        noted.append(f"kept the first {len(test)} test images")
    return image_task(
        name, about, (train[rest], train[validation], test), 256, noted=tuple(noted), parameters=parameters
    )


def mnist() -> Task:
    return published_task("mnist", "MNIST, handwritten digits", "mnist", parameters=200_000)


def mnist_conditional() -> Task:
    about = "MNIST, handwritten digits, given the digit"
    return published_task("mnist-conditional", about, "mnist", parameters=200_000, conditional=True)


def mnist_small() -> Task:
    """Sized for an hour on two CPU cores."""
    about = "MNIST, judged by a part of its test images"
    return published_task("mnist-small", about, "mnist", parameters=60_000, most_test=SMALL_TEST)


def cifar10() -> Task:
    return published_task("cifar10", "CIFAR-10, small colour photographs", "cifar10", parameters=1_000_000)


def digits_image(conditional: bool = False) -> Task:
    """scikit-learn's 8x8 digits as images, grey values 0 to 16, split like the flat ones; the context is the digit."""
    bunch = datasets.load_digits()
    points = Points(
        torch.from_numpy(bunch.images).to(torch.uint8)[:, None], one_hot(bunch.target) if conditional else None
    )
    split = torch.from_numpy(random_split(len(points)))
    train, validation, test = (points[(split == part).nonzero()[:, 0]] for part in range(3))
    return image_task(
        "digits-image-conditional" if conditional else "digits-image",
        "scikit-learn digits, given the digit" if conditional else "scikit-learn digits",
        (train, validation, test),
        17,
        parameters=40_000,
    )


def digits_image_conditional() -> Task:
    return digits_image(conditional=True)
