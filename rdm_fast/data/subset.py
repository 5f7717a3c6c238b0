"""Some images of a set, in an order of their own."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from rdm_fast.data.images import ImageSet, Pixels


class Subset(ImageSet):
    """Image i is image `indices[i]` of another set; nothing is decoded before it is read."""

    def __init__(self, images: ImageSet, indices: NDArray[np.int64]) -> None:
        labels = None if images.labels is None else images.labels[indices]
        super().__init__(labels, images.classes, images.sizes[indices])
        self.images, self.indices, self.channels = images, indices, images.channels
        self.bad_files = images.bad_files
        self.pixels = None if images.pixels is None else images.pixels[indices]

    def read(self, i: int) -> Pixels:
        return self.images.read(int(self.indices[i]))

    def file(self, i: int) -> Pixels:
        return self.images.file(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.images.name(int(self.indices[i]))

    def _content(self, digest: "hashlib._Hash") -> None:
        digest.update(self.images.digest.encode())
        digest.update(np.ascontiguousarray(self.indices).data)
