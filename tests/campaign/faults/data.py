"""Damaged data of every data set that reads files."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.campaign.faults import FaultClass
from tests.campaign.faults.files import DAMAGES
from tests.campaign.oracle import Kind, Problem, judge_answer, read_records, scores_of, warns
from tests.campaign.process import Place
from tests.campaign.trials import Lab, Skipped, Trial, copy_folder, single

RATE = 8000


def _write_page(path: Path) -> None:
    path.write_text("<!doctype html><title>404</title>\n" * 50)


def _replace_by_link(path: Path) -> None:
    """Let opening a file fail, for root too."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGES_OF_DATA: dict[str, Callable[[Path], None]] = {
    **{name: damage for name, damage in DAMAGES.items() if name != "rotted"},
    "a page": _write_page,
    "not readable": _replace_by_link,
}


@dataclass(frozen=True)
class Source:
    """A data set and a small folder of its files.

    Arguments:
        dataset: Its name.
        make: Writes the files into a folder.
        files: What is damaged, relative to that folder.
        options: Further options of the command.
    """

    dataset: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def command(self) -> tuple[str, ...]:
        """The command that reads the files."""
        return (
            *("run", "--models", "reference-train", "--datasets", self.dataset, "--offline"),
            *("--data-dir", "data", "--metrics", "kde", "--n-samples", "20", "--n-draws", "1"),
            *self.options,
        )


def _tone(seconds: float, seed: int) -> NDArray[np.int16]:
    """Return a noisy tone in 16 bits."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    sound = np.sin(2 * np.pi * (200 + 50 * seed) * time) + 0.1 * generator.standard_normal(
        len(time)
    )
    scaled: NDArray[np.int16] = (sound / np.abs(sound).max() * 3e4).astype("<i2")
    return scaled


def _write_wav(path: Path, sound: NDArray[np.int16]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.tobytes())


def _spoken_digits(data: Path) -> None:
    """Write 40 short recordings of two speakers, under names of the right form."""
    names = [f"{d}_{who}_{i}.wav" for d in (0, 1) for who in ("ann", "bob") for i in range(10)]
    for seed, name in enumerate(names):
        _write_wav(data / "spoken-digits/recordings" / name, _tone(0.3, seed))


def _violin(form: str, data: Path) -> None:
    """Write 12 seconds of a tone in some format."""
    import soundfile

    (data / "violin").mkdir(parents=True)
    soundfile.write(data / f"violin/tone.{form}", _tone(12, 0), RATE)


def _celeba(data: Path) -> None:
    """Write 30 photographs of noise and their partition."""
    from PIL import Image

    folder = data / "celeba/img_align_celeba"
    folder.mkdir(parents=True)
    lines = []
    for number in range(1, 31):
        colours = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(colours).resize((178, 218))
        image.save(folder / f"{number:06d}.jpg", quality=90)
        lines.append(f"{number:06d}.jpg {0 if number <= 20 else 1 if number <= 25 else 2}\n")
    (data / "celeba/list_eval_partition.txt").write_text("".join(lines))


def _mnist(data: Path) -> None:
    """Copy the real files: their checksums are known, and no others will do."""
    real = Path(os.environ.get("IMLBENCH_DATA") or "none") / "MNIST/raw"
    if not real.is_dir():
        raise Skipped("needs the real MNIST: set IMLBENCH_DATA")
    (data / "MNIST/raw").mkdir(parents=True)
    for name in MNIST_FILES:
        copy_folder((real / name).resolve(), data / "MNIST/raw" / name)


MNIST_FILES = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_RECORDINGS = "spoken-digits/recordings"
_FACES = "celeba/img_align_celeba"

SOURCES = (
    Source("mnist", _mnist, tuple(f"MNIST/raw/{name}" for name in MNIST_FILES)),
    Source(
        "spoken-digits",
        _spoken_digits,
        tuple(f"{_RECORDINGS}/{n}.wav" for n in ("0_ann_0", "1_bob_4", "0_bob_7", "1_ann_9")),
    ),
    Source(
        "celeba",
        _celeba,
        (
            *(f"{_FACES}/{number:06d}.jpg" for number in (1, 20, 21, 30)),
            "celeba/list_eval_partition.txt",
        ),
        options=("--set", "celeba.size=8"),
    ),
    *(
        Source("violin", partial(_violin, form), (f"violin/tone.{form}",))
        for form in ("wav", "flac", "ogg", "mp3", "aiff")
    ),
)


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield a trial for every file and every damage, in turn before and after a good run."""
    is_first = False
    for source in SOURCES:
        for file in source.files:
            for how, damage in DAMAGES_OF_DATA.items():
                is_first = not is_first
                when = "before any run" if is_first else "after a run"
                run = partial(_run, lab, source, file, damage, is_first)
                yield single(f"{source.dataset}: {file} {how}, {when}", run)
    decoded = SOURCES[2]
    for how in DAMAGES:
        yield single(f"celeba: decoded images {how}", partial(_decoded, lab, decoded, how))


def _run(
    lab: Lab,
    source: Source,
    file: str,
    damage: Callable[[Path], None],
    is_first: bool,
    place: Place,
) -> list[Problem]:
    """Damage a file; what was computed of the sound one must not be taken for that of the other."""
    truth = lab.truth(source.command, prepare=lambda place: source.make(place.work / "data"))
    source.make(place.work / "data")
    if not is_first:
        lab.copy(truth, place)
    damage(place.work / "data" / file)
    answer = place.imlbench(*source.command)
    problems = [*judge_answer(answer, {0, 2})]
    if answer.code == 2 and not _names(answer.err, file):
        problems.append(Problem(Kind.HIDDEN, f"no message names {file}: {answer.err[-300:]!r}"))
    if answer.code == 0:
        problems += _judge_other(place, set(truth.jobs), is_first)
    return problems


def _names(text: str, file: str) -> bool:
    """Whether a message names a file or the folder that it is in."""
    return any(part in text for part in (Path(file).name, str(Path(file).parent)))


def _judge_other(place: Place, sound: set[str], is_first: bool) -> Iterator[Problem]:
    """Yield what is wrong if a run went well with damaged data: they must count as other data."""
    records = read_records(place.results)
    others = {job: record for job, record in records.items() if job not in sound}
    if not others:
        yield Problem(Kind.HIDDEN, "damaged data pass for the sound ones")
    for job, record in others.items():
        if record["status"] != "done" or not scores_of(record):
            yield Problem(Kind.LOST, f"{job} is {record['status']}, but the exit status is 0")
    if is_first and len(others) < len(records):
        yield Problem(Kind.HIDDEN, "a job bears the name of one on sound data")


def _decoded(lab: Lab, source: Source, how: str, place: Place) -> list[Problem]:
    """Damage the files that images were decoded into; they are made again, or told."""
    source.make(place.work / "data")
    first = place.imlbench(*source.command)
    problems = [*judge_answer(first, {0})]
    before = {job: scores_of(record) for job, record in read_records(place.results).items()}
    for path in sorted(place.cache.rglob("decoded/*/*")):
        if path.is_file() and path.stat().st_size:
            DAMAGES[how](path)
    answer = place.imlbench(*source.command, "--force")
    problems += judge_answer(answer, {0, 2})
    after = {job: scores_of(record) for job, record in read_records(place.results).items()}
    if after != before and not warns([answer], "celeba"):
        problems.append(Problem(Kind.HIDDEN, f"other results of the same images: {sorted(after)}"))
    return problems


CLASS = FaultClass(
    "data",
    "A file of MNIST, of spoken digits, of CelebA, or of a recording in five formats is "
    "truncated, emptied, zeroed, has a byte flipped, is overwritten by garbage or a web page, "
    "deleted, replaced by a folder, or cannot be opened: before any run, or after one on the "
    "sound files. Small synthetic files, but for MNIST.",
    "exit status 2 and a message that names the file; or, where the damage cannot be seen or a "
    "file may be missing, results under another fingerprint, beside those of the sound files.",
    trials,
)
