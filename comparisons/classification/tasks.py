"""Images with their classes as tasks: x is the image, between -0.5 and 0.5, the context its class."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Generator, Tensor

from comparisons.tasks import Points, Task
from comparisons.tasks.images import ImageSet, load_images

CLASSES = 10
LEVELS = {"digits": 17, "mnist": 256, "cifar10": 256}  # grey values
HELD_OUT = {"digits": 200, "mnist": 5000, "cifar10": 5000}  # of the train images, for validation
BATCHES = {"digits": 64, "mnist": 128, "cifar10": 128}
SHIFT = 4  # pixels at most, in CIFAR-10's augmentation

Prepare = Callable[[Tensor, Generator], Tensor]


def load_task(name: str, dequantise: bool = False) -> Task:
    """Digits of scikit-learn (8x8, a smoke test), MNIST, or CIFAR-10 with random flips and shifts.

    Args:
        dequantise: spread every grey value over its step, as a density needs, and augment nothing.
    """
    found, levels = digits() if name == "digits" else load_images(name), LEVELS[name]
    classes, test_classes = found.y_train.float()[:, None], found.y_test.float()[:, None]
    count = len(classes) - HELD_OUT[name]
    augmented = name == "cifar10" and not dequantise
    prepare = dequantised(levels) if dequantise else scaled(levels)

    def draw(n: int, generator: Generator) -> Points:
        rows = torch.randint(count, (n,), generator=generator)
        images = found.x_train[rows]
        return Points(prepare(moved(images, generator) if augmented else images, generator), classes[rows])

    fixed = Generator().manual_seed(0)
    return Task(
        name=name,
        about=found.note,
        kind="image",
        draw=draw,
        validation=Points(prepare(found.x_train[count:], fixed), classes[count:]),
        test=Points(prepare(found.x_test, fixed), test_classes),
        batch=BATCHES[name],
        parameters=1,  # these networks have a size of their own
        preprocessing=("grey values to [-0.5, 0.5]", *(["random shifts and flips"] if augmented else [])),
        log_volume=-found.x_train[0].numel() * math.log(levels),
        levels=1.0 if dequantise else None,
        restore=lambda x: (x + 0.5).clamp(0, 1),
    )


def digits() -> ImageSet:
    """scikit-learn's, in a fixed random order; the last 300 are the test part."""
    bunch, test = datasets.load_digits(), 300
    order = torch.randperm(len(bunch.target), generator=Generator().manual_seed(42))
    x, y = torch.from_numpy(bunch.images).to(torch.uint8)[order, None], torch.from_numpy(bunch.target).long()[order]
    note = f"{len(x) - test} train and {test} test images of scikit-learn"
    return ImageSet("digits", x[:-test], y[:-test], x[-test:], y[-test:], note)


def scaled(levels: int) -> Prepare:
    return lambda x, generator: x.float() / (levels - 1) - 0.5


def dequantised(levels: int) -> Prepare:
    return lambda x, generator: (x.float() + torch.rand(x.shape, generator=generator)) / levels - 0.5


def moved(x: Tensor, generator: Generator) -> Tensor:
    """Each image moved by up to four pixels, black coming in at the border, and turned left to right or not."""
    n, _, height, width = x.shape
    padded = F.pad(x, (SHIFT,) * 4)
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=generator)
    turned = torch.rand(n, 1, generator=generator) < 0.5
    rows, columns = down + torch.arange(height), torch.arange(width).expand(n, -1)
    columns = right + torch.where(turned, width - 1 - columns, columns)
    pixels = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)
