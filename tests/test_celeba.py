"""CelebA: decoding against Pillow step by step, the cache, damage, and how much memory it takes."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pydantic import ValidationError
from torchvision.datasets import utils

from imlbench import DataError, Sources, Splits
from imlbench_images import celeba
from imlbench_images.celeba import CelebA, CelebAParams
from imlbench_images.faces import FaceCrop, NoFace

N_IMAGES = 12
"""In the made-up folder: 8 for training, 2 for validation, 2 for testing."""


@pytest.fixture(autouse=True)
def _no_other_data(monkeypatch):
    monkeypatch.delenv("IMLBENCH_DATA", raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in CelebA's layout, of made-up images."""
    images = tmp_path / "data" / celeba.IMAGES
    images.mkdir(parents=True)
    random_source = np.random.default_rng(0)
    for number in range(1, N_IMAGES + 1):
        coarse = random_source.integers(0, 256, (20, 16, 3), np.uint8)
        image = Image.fromarray(coarse).resize((178, 218), Image.Resampling.BICUBIC)
        image.save(images / f"{number:06}.jpg", quality=95)
    write_partition(tmp_path / "data", [0] * 8 + [1] * 2 + [2] * 2)
    return tmp_path / "data"


def write_partition(root: Path, splits: list[int]) -> None:
    lines = [f"{number:06}.jpg {split}\n" for number, split in enumerate(splits, start=1)]
    (root / "celeba" / celeba.PARTITION).write_text("".join(lines))


def load(root: Path, **params: object) -> Splits:
    return CelebA(CelebAParams(**params)).load(Sources(root, offline=True))


def image(root: Path, number: int) -> Path:
    return root / celeba.IMAGES / f"{number:06}.jpg"


def cached() -> list[Path]:
    return sorted(Path(os.environ["IMLBENCH_CACHE"]).glob("decoded/celeba-*/*"))


def test_pixels_are_those_of_torchvisions_crop_and_resize(root):
    splits = load(root)
    transform = torchvision.transforms.Compose(
        [torchvision.transforms.CenterCrop(108), torchvision.transforms.Resize(64)]
    )
    for part, numbers in (
        (splits.train, range(1, 9)),
        (splits.valid, (9, 10)),
        (splits.test, (11, 12)),
    ):
        assert len(part) == len(numbers)
        for row, number in enumerate(numbers):
            with Image.open(image(root, number)) as picture:
                truth = np.asarray(transform(picture)).transpose(2, 0, 1)
            np.testing.assert_array_equal(part.stored[row].numpy(), truth)
    x = splits.train[:]
    torch.testing.assert_close(x, splits.train.stored / 127.5 - 1)
    assert x.dtype == torch.float32
    assert x.min() >= -1
    assert x.max() <= 1


def test_black_and_white_are_the_ends_of_the_range(root):
    for number, colour in ((1, "black"), (2, "white")):
        Image.new("L", (178, 218), colour).save(image(root, number))  # grey files are taken too
    x = load(root).train[:2]
    assert (x[0] == -1).all()
    assert (x[1] == 1).all()


@pytest.mark.parametrize("params", [{"size": 16}, {"crop_size": 178, "size": 32}])
def test_other_sizes(root, params):
    dataset = CelebA(CelebAParams(**params))
    splits = dataset.load(Sources(root))
    assert splits.test[:].shape == (2, *dataset.space.event_shape)
    assert dataset.space.event_shape == (3, params["size"], params["size"])


@pytest.mark.parametrize(
    "params", [{"size": 63}, {"crop_size": 200}, {"crop": "face", "crop_size": 100}]
)
def test_impossible_parameters_are_refused(params):
    with pytest.raises(ValidationError):
        CelebAParams(**params)


def test_the_second_start_decodes_nothing(root, monkeypatch, capsys):
    first = load(root)
    message = capsys.readouterr().err
    assert re.search(r"decoded 12 images in [\d.]+ s \([\d,]+ images/s\)", message)
    assert "\r" not in message  # no bar where it is not a terminal
    monkeypatch.setattr(celeba, "decode_image", None)
    second = load(root)
    assert capsys.readouterr().err == ""
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train[:], second.train[:])
    assert [path.name for path in cached()] == sorted(
        ["facts.json", "test.npy", "train.npy", "valid.npy"]
    )


def test_the_fingerprint_depends_on_content_alone(root):
    first = load(root).fingerprint
    os.utime(image(root, 1), (0, 0))
    assert load(root).fingerprint == first
    write_partition(root, [0] * 7 + [1] * 3 + [2] * 2)
    moved = load(root).fingerprint
    image(root, 1).write_bytes(image(root, 2).read_bytes())
    assert len({first, moved, load(root).fingerprint, load(root, size=32).fingerprint}) == 4


def test_writing_to_an_example_does_not_reach_the_cache(root):
    first = load(root)
    value = first.train.stored[0, 0, 0, 0].item()
    first.train.stored[0] = 255 - value
    assert load(root).train.stored[0, 0, 0, 0] == value


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda content: content[:-40]])
@pytest.mark.parametrize("name", ["train.npy", "facts.json"])
def test_a_damaged_cache_is_decoded_again(root, name, damage):
    first = load(root)
    content = first.train[:]
    [file] = [path for path in cached() if path.name == name]
    file.write_bytes(damage(file.read_bytes()))
    again = load(root)
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train[:], content)


def test_an_interrupted_decoding_leaves_nothing(root, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(celeba, "decode_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert cached() == []
    assert list(Path(os.environ["IMLBENCH_CACHE"]).glob("decoded/.writing-*")) == []


def test_a_cache_that_cannot_be_written_is_named(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IMLBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/decoded must be writable .*; got .*IMLBENCH_CACHE"):
        load(root)


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not an image": lambda content: b"<html>404</html>",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_damaged_image_is_named_and_left_out(root, damage, capsys):
    whole = load(root).train.stored
    image(root, 3).write_bytes(DAMAGE[damage](image(root, 3).read_bytes()))
    for _ in ("decoded", "cached"):
        capsys.readouterr()
        splits = load(root)
        message = capsys.readouterr().err
        assert "left out the damaged image 000003.jpg (" in message
        assert torch.equal(splits.train.stored, whole[[0, 1, 3, 4, 5, 6, 7]])


def test_an_image_smaller_than_the_crop_is_damaged(root, capsys):
    Image.new("RGB", (100, 218)).save(image(root, 3))
    assert len(load(root).train) == 7
    assert "000003.jpg (ValueError: 100x218 pixels are too few)" in capsys.readouterr().err


def test_many_damaged_images_are_refused(root):
    for number in (3, 9):
        image(root, number).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load(root)
    message = caught.value.messages[0]
    assert re.search(r"at most 1 of the 12 images in .* may be damaged; got more", message)
    for part in ("000003.jpg (", "000009.jpg (", "Copy these files again"):
        assert part in message
    assert cached() == []


def test_damage_that_empties_a_split_is_refused(root):
    image(root, 12).unlink()
    image(root, 11).write_bytes(b"")
    with pytest.raises(DataError, match=r"usable images of all of .*; got none of test\. Add"):
        load(root)


def without_images(root: Path) -> None:
    for path in (root / celeba.IMAGES).iterdir():
        path.unlink()


def partition(root: Path) -> Path:
    return root / "celeba" / celeba.PARTITION


BAD_FOLDERS = {
    "images not in the partition": (
        lambda root: write_partition(root, [0] * 10),
        r"must list every image of .*; got 2 that it lacks: 000011.jpg, 000012.jpg\. Put",
    ),
    "no partition": (
        lambda root: partition(root).unlink(),
        r"list_eval_partition.txt must be a readable text file; got 'No such file.*'\. Put",
    ),
    "a partition of bytes": (
        lambda root: partition(root).write_bytes(b"\xff\xfe"),
        r"list_eval_partition.txt must be a readable text file; got '.*utf-8.*'\. Put",
    ),
    "an unknown split": (
        lambda root: partition(root).write_text("000001.jpg 0\n000002.jpg 3\n"),
        r"line 2 must be a file name and 0, 1 or 2; got '000002.jpg 3'\. Put",
    ),
    "empty splits": (
        lambda root: write_partition(root, [0] * 12),
        r"must have usable images of all of train, .*; got none of valid, test\. Add",
    ),
    "no images": (without_images, r"must hold images named \*\.jpg; got none\. Put"),
    "a link to nowhere": (
        lambda root: (root / celeba.IMAGES / "9.jpg").symlink_to("nowhere"),
        r"9.jpg must be readable; got 'No such file.*'\. Mend",
    ),
}


@pytest.mark.parametrize("bad", BAD_FOLDERS)
def test_bad_folders_are_one_clear_message(root, bad):
    spoil, message = BAD_FOLDERS[bad]
    spoil(root)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert len(caught.value.messages) == 1
    assert cached() == []


def test_missing_data_offline_say_where_was_looked(tmp_path):
    with pytest.raises(DataError, match=r"celeba: celeba/img_align_celeba not found; .*--offline"):
        load(tmp_path / "nowhere")


def test_download_takes_the_images_and_the_partition(root, monkeypatch):
    fetched = []

    def fetch(file_id: str, folder: str, name: str, md5: str) -> None:
        fetched.append(name)
        target = Path(folder)
        target.mkdir(exist_ok=True)
        if name.endswith(".zip"):
            (target / name).touch()
        else:
            (target / name).write_bytes((root / "celeba" / name).read_bytes())

    def extract(archive: str, folder: str, remove_finished: bool) -> None:
        (root / celeba.IMAGES).rename(Path(folder) / "img_align_celeba")

    truth = load(root).fingerprint
    monkeypatch.setattr(utils, "download_file_from_google_drive", fetch)
    monkeypatch.setattr(utils, "extract_archive", extract)
    sources = Sources()
    sources.cache_dir.mkdir(exist_ok=True)
    assert CelebA(CelebAParams()).load(sources).fingerprint == truth
    assert CelebA(CelebAParams()).load(Sources(offline=True)).fingerprint == truth
    assert sorted(fetched) == ["img_align_celeba.zip", celeba.PARTITION]


def test_a_failed_download_is_one_clear_message(monkeypatch):
    def fail(*arguments: str) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(utils, "download_file_from_google_drive", fail)
    with pytest.raises(DataError, match=r"Download failed \(no route to host\)\. Download img_al"):
        CelebA(CelebAParams()).load(Sources())


@pytest.mark.parametrize("cv2", [None, torch], ids=["absent", "without the detector"])
def test_the_missing_face_detector_is_named_with_its_command(root, monkeypatch, cv2):
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    with pytest.raises(DataError, match=r"crop=face; got .*pip install 'imlbench\[faces\]'"):
        load(root, crop="face")


def subset(data_dir: Path, folder: Path, n: int) -> Path:
    """A folder with links to ``n`` of the real images, of all splits."""
    source, target = (where / celeba.IMAGES for where in (data_dir, folder))
    if not source.is_dir():
        pytest.skip(f"needs {source}")
    target.mkdir(parents=True)
    for name in random.Random(0).sample(sorted(os.listdir(source)), n):
        (target / name).symlink_to(source / name)
    (folder / "celeba" / celeba.PARTITION).symlink_to(data_dir / "celeba" / celeba.PARTITION)
    return folder


def test_any_part_of_the_real_images_works(data_dir, tmp_path):
    splits = load(subset(data_dir, tmp_path / "part", 200))
    sizes = [len(part) for part in (splits.train, splits.valid, splits.test)]
    assert sum(sizes) == 200
    assert sizes[0] > 100
    assert all(sizes)
    assert splits.train[:].std() == pytest.approx(0.5, abs=0.15)


def test_faces_are_cut_out_and_images_without_one_are_left_out(data_dir, tmp_path, capsys):
    pytest.importorskip("cv2", reason="needs imlbench[faces]")
    root = subset(data_dir, tmp_path / "part", 200)
    splits = load(root, crop="face")
    n_faces = sum(len(part) for part in (splits.train, splits.valid, splits.test))
    assert 170 < n_faces < 200
    assert f"left out {200 - n_faces} without a face" in capsys.readouterr().err
    for path in cached():
        path.unlink()
    assert load(root, crop="face").fingerprint == splits.fingerprint


def test_the_crop_is_the_largest_face(data_dir):
    pytest.importorskip("cv2", reason="needs imlbench[faces]")
    crop = FaceCrop()
    with Image.open(next((data_dir / celeba.IMAGES).glob("000040.jpg"))) as picture:
        both = Image.new("RGB", (600, 300))
        both.paste(picture, (0, 0))
        both.paste(picture.resize((267, 327)), (300, 0))
        small, large = crop(picture), crop(both)
    assert small.width == small.height
    assert large.width == large.height
    assert 1.3 < large.width / small.width < 1.7
    with pytest.raises(NoFace):
        crop(Image.new("RGB", (178, 218)))


MEASURE = r"""
import re, sys
from pathlib import Path
from imlbench import Sources
from imlbench_images.celeba import CelebA, CelebAParams

# Not getrusage's ru_maxrss: across exec it keeps the peak of the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
splits = CelebA(CelebAParams()).load(Sources(Path(sys.argv[1]), offline=True))
print(before, peak(), sum(map(len, (splits.train, splits.valid, splits.test))))
"""


def measure(root: Path) -> tuple[int, int, int]:
    """Peak memory before and after loading in a fresh process, in MiB, and the examples."""
    command = [sys.executable, "-c", MEASURE, str(root)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, n = map(int, answer.stdout.split())
    return before, after, n


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoding_takes_little_memory(data_dir, tmp_path):
    before, after, n = measure(subset(data_dir, tmp_path / "part", 1000))
    assert n == 1000
    assert after < 1024
    assert 0 < after - before < 150  # whatever the number of images


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_real_images_decode_in_less_than_a_gibibyte_and_load_in_two_seconds(data_dir):
    for _ in ("decode", "load"):
        before, after, n = measure(data_dir)
        print(f"{n} images: {after} MiB, {after - before} of them for the data")
        assert after < 1024
        assert after - before < 150
    start = time.perf_counter()
    load(data_dir)
    assert time.perf_counter() - start < 2
