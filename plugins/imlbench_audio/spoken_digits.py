"""Spoken digits: the Free Spoken Digit Dataset, one recording per utterance."""

from __future__ import annotations

import difflib
import hashlib
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pooch
import torch
from filelock import FileLock
from pydantic import Field

from imlbench import DataError, Examples, Params, Sources, Splits
from imlbench_audio.audio import AudioDataset
from imlbench_audio.framing import CHUNK_SIZE, RATE, chunked
from imlbench_audio.recordings import read_recording

RECORDINGS = "spoken-digits/recordings"
NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<index>\d+)\.wav")

N_TEST = 5
"""The official test split: recordings 0 to 4 of every speaker and digit."""

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/v1.0.10.tar.gz"

CONTENT_SHA256 = "1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959"
"""What :func:`content_sha256` gives for the 3,000 recordings of version 1.0.10.

The authors publish no checksum, and GitHub makes the archive anew, so that its bytes may change.
This one was computed from a copy of the recordings, not from the archive.
"""


@dataclass(frozen=True, order=True)
class Recording:
    """What a file's name says; recordings are ordered by index, then speaker, then digit."""

    index: int
    speaker: str
    digit: int
    file: str


class SpokenDigitsParams(Params):
    """Parameters of ``spoken-digits``."""

    digits: list[Annotated[int, Field(ge=0, le=9)]] | None = Field(None, min_length=1)
    """Only these digits, such as ``[0]``; by default all."""
    speakers: list[str] | None = Field(None, min_length=1)
    """Only these speakers, such as ``["jackson"]``; by default all."""
    n_train: int = Field(1000, ge=1)
    """Utterances for training, at most: all, if there are fewer."""
    split_seed: int = Field(0, ge=0)
    """Determines which utterances are for training and validation, and their order."""


class SpokenDigits(AudioDataset[SpokenDigitsParams]):
    """English digits spoken by six people, 8 kHz, in Hann-windowed chunks of 100 ms.

    The Free Spoken Digit Dataset, version 1.0.10, and its official test split: recordings 0 to 4
    of every speaker and digit. Of the others, put in random order by ``split_seed``, the first
    tenth (at least one) is for validation and the next ``n_train`` are for training: a smaller
    training set is the beginning of a larger one. Test recordings are ordered by index, speaker and
    digit. Each recording is divided by its standard deviation. Any part of the files will do.

    Chunks are labelled by ``digit``, 0 to 9, and by ``speaker``, the speaker's number in the
    alphabetical order of all that have a file in the folder, counted from 0, chosen or not.
    """

    name = "spoken-digits"

    def load(self, sources: Sources) -> Splits:
        """Read the recordings, or download them into the cache if there are none."""
        folder = sources.find(RECORDINGS) or download(sources)
        found = list_recordings(folder)
        speakers = sorted({recording.speaker for recording in found})
        train, valid, test = (
            read_all(folder, split, speakers)
            for split in self._split(self._chosen(found, folder), folder)
        )
        return Splits(train, valid, test)

    def _chosen(self, found: list[Recording], folder: Path) -> list[Recording]:
        """Return the recordings of the given digits and speakers."""
        for field, wanted in (("digit", self.params.digits), ("speaker", self.params.speakers)):
            require_known(field, wanted, {getattr(recording, field) for recording in found}, folder)
            found = [r for r in found if wanted is None or getattr(r, field) in wanted]
        return found

    def _split(self, chosen: list[Recording], folder: Path) -> tuple[list[Recording], ...]:
        """Return the recordings for training, validation and test."""
        test = [recording for recording in chosen if recording.index < N_TEST]
        rest = [recording for recording in chosen if recording.index >= N_TEST]
        generator = torch.Generator().manual_seed(self.params.split_seed)
        order = torch.randperm(len(rest), generator=generator).tolist()
        n_valid = max(1, len(rest) // 10)
        valid, train = order[:n_valid], order[n_valid : n_valid + self.params.n_train]
        if not (train and test):
            raise DataError(
                f"dataset spoken-digits: {folder} must have at least one recording numbered 0 to "
                f"{N_TEST - 1} for testing and two others, of the chosen digits and speakers; got "
                f"{len(test)} and {len(rest)}. Add some, or choose more digits or speakers."
            )
        return [rest[i] for i in train], [rest[i] for i in valid], test


def list_recordings(folder: Path) -> list[Recording]:
    """Return the recordings in a folder, in order.

    Raises:
        DataError: There are none, or a WAV file has another form of name.
    """
    names = [path.name for path in folder.glob("*.wav") if not path.name.startswith(".")]
    found = [(name, NAME.fullmatch(name)) for name in names]
    others = sorted(name for name, match in found if match is None)
    if others or not found:
        raise DataError(
            f"dataset spoken-digits: {folder} must hold recordings named "
            f"{{digit}}_{{speaker}}_{{index}}.wav; got {others[0] if others else 'none'}. "
            "Put the recordings of the Free Spoken Digit Dataset there, and nothing else."
        )
    return sorted(
        Recording(int(match["index"]), match["speaker"], int(match["digit"]), name)
        for name, match in found
        if match
    )


def require_known(
    field: str, wanted: Iterable[int | str] | None, known: set[int | str], folder: Path
) -> None:
    """Raise :class:`DataError` if ``wanted`` has something that is not in ``known``."""
    for value in wanted or ():
        if value not in known:
            near = difflib.get_close_matches(str(value), map(str, known), n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise DataError(
                f"dataset spoken-digits: {field}s must be of those in {folder}; got '{value}'."
                f"{hint} Known: {', '.join(sorted(map(str, known)))}."
            )


def read_all(folder: Path, recordings: Sequence[Recording], speakers: Sequence[str]) -> Examples:
    """Return the chunks of all recordings, in their order, labelled.

    Arguments:
        folder: Where they are.
        recordings: Which to read.
        speakers: Names in the order of their numbers.
    """
    labels = {
        "digit": [recording.digit for recording in recordings],
        "speaker": [speakers.index(recording.speaker) for recording in recordings],
    }
    signals = (
        read_recording(folder / recording.file, "spoken-digits", CHUNK_SIZE / RATE)
        for recording in recordings
    )
    return chunked(signals, labels)


def download(sources: Sources) -> Path:
    """Download the recordings into the cache, verify and unpack them; return their folder.

    Raises:
        DataError: It failed, what came is not version 1.0.10, or ``sources`` forbids it.
    """
    if sources.offline:
        remedy = "Run once without --offline to download it, or name its folder by --data-dir."
        raise sources.missing("spoken-digits", RECORDINGS, remedy)
    target = sources.cache_dir / RECORDINGS
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent.with_suffix(".lock")):
            if not target.exists():  # nobody else was quicker
                _download_to(target)
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = " ".join(str(error).split())
        remedy = (
            f"Download failed ({reason}). Unpack {URL} by hand into a folder named spoken-digits, "
            "and name the folder that holds it by --data-dir."
        )
        raise sources.missing("spoken-digits", RECORDINGS, remedy) from error
    return target


def _download_to(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".downloading-") as temporary:
        archive, folder = Path(temporary) / "archive.tar.gz", Path(temporary) / "recordings"
        pooch.HTTPDownloader()(URL, str(archive), None)
        folder.mkdir()
        unpack(archive, folder)
        found = content_sha256(folder)
        if found != CONTENT_SHA256:
            raise ValueError(
                f"the recordings' SHA-256 must be {CONTENT_SHA256}; got {found}, "
                "so they are damaged or of another version"
            )
        folder.rename(target)


def unpack(archive: Path, folder: Path) -> None:
    """Write the recordings in an archive into a folder, whatever folders they are in there."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            content = tar.extractfile(member) if NAME.fullmatch(name) else None
            if content is not None:
                (folder / name).write_bytes(content.read())


def content_sha256(folder: Path) -> str:
    """Return the SHA-256 of a text: name and SHA-256 of every recording, in order of the names.

    The same as ``LC_ALL=C sha256sum *.wav | sha256sum`` in that folder prints.
    """
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.glob("*.wav"))
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()
