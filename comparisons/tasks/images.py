"""Images as images: `load_images("cifar10")` gives images and labels as published, for any use."""

from __future__ import annotations

import difflib

from comparisons.tasks.image_files import READERS, ImageSet
from comparisons.tasks.sources import VARIABLE, DataNotFoundError, data_folders

__all__ = ["ImageSet", "load_images"]


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
