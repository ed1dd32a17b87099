"""CelebA: decoded once, in parallel, into memory-mapped arrays in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator
from rich.console import Console
from rich.progress import Progress

from imlbench import DataError, Dataset, Examples, Params, Sources, Space, Splits
from imlbench.files import File, describe, is_intact, read_facts, write_facts
from imlbench_images.faces import FaceCrop, NoFace

IMAGES, PARTITION = "celeba/img_align_celeba", "list_eval_partition.txt"
SPLITS = ("train", "valid", "test")
"""In the order of the official partition's numbers 0, 1, 2."""

DAMAGED_PER_IMAGE = 1 / 1000
"""More damaged images than this (but one is always allowed), and the folder is refused."""

CODE_VERSION = 1
"""Raised when the same files and parameters decode to other pixels than before."""

Crop = Callable[[Image.Image], Image.Image]
Decoded = tuple[str, NDArray[np.uint8] | Exception]
"""A file's name, and its pixels or what is wrong with it."""
_T = TypeVar("_T")


class CelebAParams(Params):
    """Parameters of ``celeba``."""

    size: Literal[8, 16, 32, 64, 128] = 64
    """Height and width of an example, in pixels."""
    crop: Literal["center", "face"] = "center"
    """Which square of the photograph: its centre, or the face (needs ``imlbench[faces]``)."""
    crop_size: int = Field(108, ge=8, le=178)
    """Side of the central square before it is resized, in pixels of the photograph."""

    @field_validator("crop_size")
    @classmethod
    def _is_for_the_center(cls, crop_size: int, info: ValidationInfo) -> int:
        if info.data.get("crop") == "face" and crop_size != 108:
            raise ValueError("must be left out with crop=face, where the detector decides")
        return crop_size


class CelebA(Dataset[CelebAParams]):
    """Celebrity faces, RGB, cropped and resized to 64x64 pixels in [-1, 1]; official partition.

    Any part of the images will do: those that are in ``celeba/img_align_celeba`` are used. They
    are decoded at the first start, by all processors, and memory-mapped ever after; the decoded
    set takes 12 kB an image on disk, and next to nothing in memory.

    A damaged image is left out and named at every start. More than one, and more than one in a
    thousand, are an error. Damage that leaves a JPEG readable cannot be seen.

    With ``crop=face`` those images are left out in which no face is found, and their number is
    printed. OpenCV finds 95 of 100 faces; the paper used 156,209 of the 202,599 images.
    """

    name = "celeba"

    @property
    def space(self) -> Space:
        """One colour image."""
        return Space("image", (3, self.params.size, self.params.size), (-1.0, 1.0))

    def load(self, sources: Sources) -> Splits:
        """Map the decoded images into memory, decoding or downloading them if need be."""
        images = sources.find(IMAGES) or download(sources)
        listing = list_images(images)
        folder = sources.cache_dir / "decoded" / f"celeba-{self._key(listing)}"
        splits = read_decoded(folder)
        if splits is None:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(folder.with_suffix(".lock")):
                    splits = read_decoded(folder) or self._decode(listing, folder)
            except OSError as error:
                raise DataError(
                    f"dataset celeba: {folder.parent} must be writable and have room for "
                    f"{listing.n_images * self.space.n_dims / 1e6:.0f} MB; got "
                    f"'{error.strerror}'. Name another cache folder by $IMLBENCH_CACHE."
                ) from error
        return splits

    def _key(self, listing: Listing) -> str:
        key = f"{CODE_VERSION} {self.params.model_dump_json()} {listing.identity}"
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def _decode(self, listing: Listing, folder: Path) -> Splits:
        crop = FaceCrop() if self.params.crop == "face" else center_crop(self.params.crop_size)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            decode_images(listing, Path(temporary), crop, self.space.event_shape)
            if folder.exists():  # the remains of one that cannot be read
                folder.rename(Path(temporary) / "unreadable")
            written = Path(temporary) / "arrays"
            written.rename(folder)
        splits = read_decoded(folder)
        assert splits is not None
        return splits


@dataclass(frozen=True)
class Listing:
    """Which images there are.

    Arguments:
        folder: The folder of the images.
        names: File names in ascending order, by split.
        identity: Hash of the names, sizes, modification times and splits.
    """

    folder: Path
    names: dict[str, list[str]]
    identity: str

    @property
    def n_images(self) -> int:
        """How many there are in all splits."""
        return sum(map(len, self.names.values()))


def list_images(folder: Path) -> Listing:
    """Return the images of ``folder`` by split.

    Raises:
        DataError: There are none, or the partition is missing, malformed, leaves one out, or gives
            a split nothing.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                (entry.name, (stat := entry.stat()).st_size, stat.st_mtime_ns)
                for entry in entries
                if entry.name.endswith(".jpg") and not entry.name.startswith(".")
            )
    except OSError as error:
        raise DataError(
            f"dataset celeba: {error.filename} must be readable; got '{error.strerror}'. "
            "Mend it, or name another folder by --data-dir."
        ) from error
    if not found:
        raise DataError(
            f"dataset celeba: {folder} must hold images named *.jpg; got none. "
            "Put CelebA's aligned JPEG images there, all or some of them."
        )
    partition = read_partition(folder.parent / PARTITION)
    unlisted = [name for name, _, _ in found if name not in partition]
    if unlisted:
        raise DataError(
            f"dataset celeba: {folder.parent / PARTITION} must list every image of {folder}; got "
            f"{len(unlisted)} that it lacks: {_some(unlisted)}. "
            "Put the official list there (202,599 lines), or take these images away."
        )
    names = {
        split: [name for name, _, _ in found if partition[name] == index]
        for index, split in enumerate(SPLITS)
    }
    _require_all_splits({split: len(members) for split, members in names.items()}, folder)
    identity = json.dumps([found, list(names.values())])
    return Listing(folder, names, hashlib.sha256(identity.encode()).hexdigest())


def read_partition(path: Path) -> dict[str, int]:
    """Return the number of the split of every image, 0 to 2.

    Raises:
        DataError: The file is missing or a line is not of the form ``000001.jpg 0``.
    """
    remedy = "Put CelebA's official list_eval_partition.txt there."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"dataset celeba: {path} must be a readable text file; "
            f"got '{getattr(error, 'strerror', None) or error}'. {remedy}"
        ) from error
    partition = {}
    for number, line in enumerate(lines, start=1):
        name, _, split = line.strip().partition(" ")
        if split.strip() not in ("0", "1", "2"):
            raise DataError(
                f"dataset celeba: {path}, line {number} must be a file name and 0, 1 or 2; "
                f"got '{line[:60]}'. {remedy}"
            )
        partition[name] = int(split)
    return partition


def _require_all_splits(n_images: dict[str, int], folder: Path) -> None:
    empty = [split for split in SPLITS if not n_images[split]]
    if empty:
        raise DataError(
            f"dataset celeba: {folder} must have usable images of all of {', '.join(SPLITS)}; got "
            f"none of {', '.join(empty)}. Add some: {PARTITION} says which are of which split."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def download(sources: Sources) -> Path:
    """Download the images and the partition into the cache; return the folder of the images.

    Raises:
        DataError: It failed, or ``sources`` forbids it.
    """
    if sources.offline:
        remedy = "Run once without --offline to download it, or name its folder by --data-dir."
        raise sources.missing("celeba", IMAGES, remedy)
    from torchvision.datasets import CelebA as Original
    from torchvision.datasets import utils

    target = sources.cache_dir / "celeba"
    incomplete = sources.cache_dir / "celeba-incomplete"  # not where images are looked for
    archive = "img_align_celeba.zip"
    try:
        for file_id, md5, name in Original.file_list:
            if name in (archive, PARTITION):
                utils.download_file_from_google_drive(file_id, str(incomplete), name, md5)
        utils.extract_archive(str(incomplete / archive), str(incomplete), remove_finished=True)
        incomplete.rename(target)
    except Exception as error:  # Google Drive's client has exceptions of its own
        remedy = (
            f"Download failed ({' '.join(str(error).split())}). Download {archive} and {PARTITION} "
            "from http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html by hand, unpack them into a "
            "folder named celeba, and name the folder that holds it by --data-dir."
        )
        raise sources.missing("celeba", IMAGES, remedy) from error
    return target / "img_align_celeba"


def center_crop(size: int) -> Crop:
    """Return the function that cuts out the central square.

    Arguments:
        size: Its side, in pixels.
    """

    def crop(image: Image.Image) -> Image.Image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        if left < 0 or top < 0:
            raise ValueError(f"{image.width}x{image.height} pixels are too few")
        return image.crop((left, top, left + size, top + size))

    return crop


def decode_image(path: Path, crop: Crop, size: int) -> NDArray[np.uint8]:
    """Return one image, cropped and resized with an antialiasing linear filter.

    JPEG's own reduction is not used: it would halve 108 pixels, to fewer than 64.

    Returns:
        Shape (3, size, size).
    """
    with Image.open(path) as image:
        cropped = crop(image.convert("RGB"))
    resized = cropped.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def decode_images(listing: Listing, folder: Path, crop: Crop, shape: tuple[int, ...]) -> None:
    """Decode all images into ``folder / "arrays"``: a ``.npy`` file per split, and the facts.

    Raises:
        DataError: Too many are damaged, or a split has none left.
    """
    arrays, skipped, start = folder / "arrays", _Skipped(listing), time.perf_counter()
    arrays.mkdir()

    def attempt(name: str) -> NDArray[np.uint8] | Exception:
        try:
            return decode_image(listing.folder / name, crop, shape[-1])
        except Exception as error:  # a damaged file can raise anything inside Pillow
            return error

    content, kept = hashlib.sha256(f"celeba {CODE_VERSION}".encode()), {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, _progress(listing.n_images) as advance:
        for split, names in listing.names.items():
            results = advance(zip(names, _in_order(pool, attempt, names), strict=True))
            images = skipped.leave_out(results)
            kept[split] = write_array(arrays / f"{split}.npy", images, shape, content.update)
            content.update(f"{split} {kept[split]} {shape}".encode())
    _require_all_splits(kept, listing.folder)
    files = {split: asdict(describe(arrays / f"{split}.npy")) for split in SPLITS}
    facts: dict[str, Any] = {
        "fingerprint": content.hexdigest()[:16],
        "files": files,
        **skipped.facts,
    }
    write_facts(arrays / "facts.json", facts)
    _report(listing.n_images, time.perf_counter() - start, skipped)


class _Skipped:
    """The images that are left out, and why."""

    def __init__(self, listing: Listing) -> None:
        self._folder, self._n_images = listing.folder, listing.n_images
        self._n_allowed = max(1, int(listing.n_images * DAMAGED_PER_IMAGE))
        self.damaged: dict[str, str] = {}
        self.n_without_face = 0

    def leave_out(self, results: Iterable[Decoded]) -> Iterator[NDArray[np.uint8]]:
        """Yield the images, and keep account of the exceptions."""
        for name, result in results:
            if isinstance(result, NoFace):
                self.n_without_face += 1
            elif isinstance(result, Exception):
                self._add_damaged(name, result)
            else:
                yield result

    def _add_damaged(self, name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".replace(f"{self._folder}{os.sep}", "")
        self.damaged[name] = reason
        if len(self.damaged) > self._n_allowed:
            examples = "; ".join(f"{n} ({why})" for n, why in list(self.damaged.items())[:3])
            raise DataError(
                f"dataset celeba: at most {self._n_allowed} of the {self._n_images} images in "
                f"{self._folder} may be damaged; got more, such as {examples}. "
                "Copy these files again from the original, or take them away."
            )

    @property
    def facts(self) -> dict[str, object]:
        return {"damaged": self.damaged, "n_without_face": self.n_without_face}


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[str], _T], names: Iterable[str]
) -> Iterator[_T]:
    """Yield ``function`` of every name, in order, computing no more than 256 ahead."""
    pending: deque[Future[_T]] = deque()
    for name in names:
        pending.append(pool.submit(function, name))
        if len(pending) == 256:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def write_array(
    path: Path,
    images: Iterable[NDArray[np.uint8]],
    shape: tuple[int, ...],
    tell: Callable[[bytes], object],
) -> int:
    """Write images as they come into one ``.npy`` file, holding none of them.

    Arguments:
        path: The file.
        images: Each of the given shape.
        shape: Shape of one image.
        tell: Called with the bytes of each image.

    Returns:
        How many there were.
    """
    n = 0
    with open(path, "wb") as file:
        _write_header(file, n, shape)
        for image in images:
            content = image.tobytes()
            file.write(content)
            tell(content)
            n += 1
        file.seek(0)
        _write_header(file, n, shape)  # NumPy pads it, so that the first axis has room to grow
    return n


def _write_header(file: BinaryIO, n: int, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def read_decoded(folder: Path) -> Splits | None:
    """Map decoded images into memory; ``None`` if they are not there, or not whole."""
    facts: Any = read_facts(folder / "facts.json")
    if facts is None:
        return None
    try:
        if not all(is_intact(folder / f"{s}.npy", File(**facts["files"][s])) for s in SPLITS):
            return None
        # Copy-on-write: torch wants writable memory, and nothing must ever reach the file.
        arrays = [np.load(folder / f"{split}.npy", mmap_mode="c") for split in SPLITS]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _warn(facts["damaged"])
    train, valid, test = (
        Examples(torch.from_numpy(array), scale=1 / 127.5, offset=-1.0) for array in arrays
    )
    return Splits(train, valid, test, fingerprint=facts["fingerprint"])


@contextmanager
def _progress(n_images: int) -> Iterator[Callable[[Iterator[Decoded]], Iterator[Decoded]]]:
    """Show a bar on a terminal, a line elsewhere; give the function that counts what it yields."""
    console = _console()
    if not console.is_terminal:
        console.print(f"dataset celeba: decoding {n_images:,} images")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("celeba: decoding", total=n_images)

        def count(items: Iterator[Decoded]) -> Iterator[Decoded]:
            for item in items:
                progress.advance(task)
                yield item

        yield count


def _report(n_images: int, seconds: float, skipped: _Skipped) -> None:
    line = f"dataset celeba: decoded {n_images:,} images in {seconds:.1f} s"
    line += f" ({n_images / seconds:,.0f} images/s)"
    if skipped.n_without_face:
        line += f"; left out {skipped.n_without_face:,} without a face"
    _console().print(line)


def _warn(damaged: dict[str, str]) -> None:
    for name, reason in damaged.items():
        _console().print(f"dataset celeba: left out the damaged image {name} ({reason})")


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
