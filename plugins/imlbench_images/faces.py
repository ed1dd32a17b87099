"""Finding the face in a picture, with the detector that comes inside OpenCV 4."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from imlbench import DataError

CASCADE = "haarcascade_frontalface_alt2.xml"
"""Of OpenCV's frontal-face models the one whose boxes vary least on aligned CelebA."""


Box = tuple[int, int, int, int]
"""Left, top, width and height, in pixels."""
Size = tuple[int, int]
"""Width and height, in pixels."""


class NoFace(Exception):
    """No face was found in an image."""


class _Detector(Protocol):
    """What is used of OpenCV's ``CascadeClassifier``."""

    def empty(self) -> bool: ...

    def detectMultiScale(
        self, image: NDArray[np.uint8], factor: float, n_neighbours: int, *, minSize: Size
    ) -> Sequence[Box]: ...


class FaceCrop:
    """Cuts out the square that OpenCV's Viola-Jones detector returns for the largest face.

    Safe to call from several threads.

    Reference:
        | Rapid Object Detection using a Boosted Cascade of Simple Features (Viola and Jones, 2001)

    Arguments:
        min_size: Side of the smallest face to look for, in pixels.

    Raises:
        DataError: OpenCV 4 is not installed.
    """

    def __init__(self, min_size: int = 60) -> None:
        try:
            import cv2

            path = cv2.data.haarcascades + CASCADE
            self._load: Callable[[], _Detector] = lambda: cv2.CascadeClassifier(path)
            usable = not self._load().empty()
        except (ImportError, AttributeError):  # OpenCV 5 has neither the class nor the models
            usable = False
        if not usable:
            raise DataError(
                "dataset celeba: OpenCV 4 must be installed for crop=face; got no usable one. "
                "Run: pip install 'imlbench[faces]'"
            )
        cv2.setNumThreads(1)  # its threads would group the candidates in random order
        self._min_size = (min_size, min_size)
        self._local = threading.local()

    def __call__(self, image: Image) -> Image:
        """Return the face.

        Raises:
            NoFace: There is none.
        """
        grey = np.asarray(image.convert("L"))
        boxes = self._detector.detectMultiScale(grey, 1.1, 5, minSize=self._min_size)
        if len(boxes) == 0:
            raise NoFace
        left, top, width, height = max(map(tuple, boxes), key=lambda box: (box[2], box))
        return image.crop((int(left), int(top), int(left + width), int(top + height)))

    @property
    def _detector(self) -> _Detector:
        """This thread's detector; one cannot be shared."""
        if not hasattr(self._local, "detector"):
            self._local.detector = self._load()
        detector: _Detector = self._local.detector
        return detector
