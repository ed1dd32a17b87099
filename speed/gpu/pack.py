"""Data for a machine without a network: ``python -m speed.gpu.pack``.

Each archive is small enough to be sent alone, and holds its files bit by bit as they are. The first
has everything, but only some of CelebA's images; the others have more of them.
"""

from __future__ import annotations

import importlib.metadata
import random
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from imlbench import DataError, Sources

FOLDER = Path("results/gpu-data")
LIMIT = 58 * 2**20
"""Most bytes of an archive."""
CELEBA = "celeba/img_align_celeba"
NEEDED = ("MNIST/raw/*-ubyte", "violin/*", "spoken-digits/recordings/*.wav", "celeba/*.txt")
Files = Iterable[tuple[Path, str]]
"""Files, and their names in an archive."""


def main() -> None:
    """Write the archives of what there is, and say where they are."""
    if len(sys.argv) > 1:
        sys.exit("usage: python -m speed.gpu.pack; $IMLBENCH_DATA names the folder of the data")
    try:
        for archive in pack([*installed(), *needed(Sources())], FOLDER):
            print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def needed(sources: Sources) -> Iterator[tuple[Path, str]]:
    """Yield the files of the datasets, images last and in random order, as each archive has some.

    Raises:
        DataError: A dataset is not there.
    """
    for pattern in (*NEEDED, f"{CELEBA}/*.jpg"):
        folder, _, names = pattern.rpartition("/")
        found = sources.find(folder)
        paths = sorted(found.glob(names)) if found else []
        if not paths:
            remedy = "Name a folder that has it by $IMLBENCH_DATA."
            raise sources.missing(folder.partition("/")[0].lower(), pattern, remedy)
        if folder == CELEBA:
            random.Random(0).shuffle(paths)
        yield from ((path, f"{folder}/{path.name}") for path in paths)


def installed() -> Iterator[tuple[Path, str]]:
    """Yield what says that imlbench is installed, and which plugins it has, but not its code."""
    for file in importlib.metadata.files("imlbench") or ():
        if file.name in ("METADATA", "entry_points.txt"):
            yield Path(str(file.locate())), f"site/{file.parent.name}/{file.name}"


def pack(files: Files, folder: Path, limit: int = LIMIT) -> Iterator[Path]:
    """Write files into as many archives as it takes, in order.

    Arguments:
        files: What to write; each must be smaller than an archive.
        folder: Where the archives go; those of before are removed.
        limit: Most bytes of an archive.

    Yields:
        The archives, ``1.tar.gz`` and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tar.gz"):
        old.unlink()
    rest = list(reversed(list(files)))
    for number in range(1, len(rest) + 1):
        if not rest:
            return
        path = folder / f"{number}.tar.gz"
        _fill(path, rest, limit)
        yield path


def _fill(path: Path, rest: list[tuple[Path, str]], limit: int) -> None:
    """Write files from the end of a list into an archive, until the next might be too large."""
    slack = 2**20  # what the compressor holds back, and the archive's own ends
    with path.open("wb") as raw, tarfile.open(fileobj=raw, mode="w:gz", compresslevel=6) as tar:
        while rest:
            source, name = rest[-1]
            if raw.tell() + source.stat().st_size + slack > limit and raw.tell() > 0:
                return
            tar.add(source, name, filter=_anonymous)
            rest.pop()


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
