"""Datasets: what they hold, where they look, and what they say when something is wrong."""

from __future__ import annotations

import functools
import gzip
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from imlbench import DataError, Examples, Sources
from imlbench_images import mnist
from imlbench_images.digits import Digits, DigitsParams
from imlbench_images.mnist import MNIST, MNISTParams


def test_examples_decode_what_is_stored():
    stored = torch.arange(12, dtype=torch.uint8).reshape(6, 2)
    examples = Examples(stored, scale=0.5, offset=-1.0)
    torch.testing.assert_close(examples[:], stored.float() * 0.5 - 1)
    torch.testing.assert_close(torch.cat(list(examples.batches(4))), examples[:])
    assert stored.tolist() == torch.arange(12).reshape(6, 2).tolist()  # reading changes nothing


def test_float_examples_are_not_changed_by_reading():
    stored = torch.ones(3, 2)
    examples = Examples(stored, scale=2.0)
    assert examples[:].sum() == examples[:].sum() == 12


def test_shuffled_batches_are_a_permutation_set_by_the_seed():
    examples = Examples(torch.arange(10.0)[:, None])
    draw = lambda seed: torch.cat(  # noqa: E731
        list(examples.batches(3, torch.Generator().manual_seed(seed)))
    )
    assert sorted(draw(0).flatten().tolist()) == list(range(10))
    torch.testing.assert_close(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_the_digest_depends_on_labels_and_groups():
    x = torch.zeros(3, 2)
    digits = [{"digit": torch.tensor(values)} for values in ([0, 1, 2], [0, 1, 3])]
    groups = [torch.tensor(values) for values in ([0, 0, 1], [0, 1, 1])]
    found = [Examples(x), *(Examples(x, labels=d) for d in digits)]
    found += [Examples(x, groups=g) for g in groups]
    assert len({examples.digest() for examples in found}) == 5


def test_the_digest_depends_on_the_decoded_content():
    stored = torch.zeros(4, 2, dtype=torch.uint8)
    digests = [
        Examples(stored).digest(),
        Examples(stored, scale=2.0).digest(),
        Examples(stored, lengths=(1, 3)).digest(),
        Examples(stored + 1).digest(),
        Examples(stored.reshape(2, 4)).digest(),
    ]
    assert len(set(digests)) == len(digests)
    assert Examples(stored.clone()).digest() == digests[0]


def test_digits_are_scikit_learns_split_without_overlap():
    splits = Digits(DigitsParams()).load(Sources())
    parts = [part[:].flatten(1) for part in (splits.train, splits.valid, splits.test)]
    assert [len(part) for part in parts] == [1300, 200, 297]
    together = np.sort(torch.cat(parts).mul(16).numpy(), axis=0)
    np.testing.assert_array_equal(together, np.sort(load_digits().data, axis=0))


def test_digits_have_scikit_learns_labels():
    bundle = load_digits()
    truth = sorted(zip(bundle.data.astype(int).tolist(), bundle.target.tolist(), strict=True))
    splits = Digits(DigitsParams()).load(Sources())
    found = [
        (pixels, digit)
        for part in (splits.train, splits.valid, splits.test)
        for pixels, digit in zip(
            part.stored.flatten(1).tolist(), part.labels["digit"].tolist(), strict=True
        )
    ]
    assert sorted(found) == truth


def test_too_many_held_out_is_one_clear_message():
    with pytest.raises(DataError, match=r"digits: the examples to hold out must be fewer"):
        Digits(DigitsParams(valid_size=1500)).load(Sources())


def test_mnist_is_the_standard_set(data_dir):
    splits = MNIST(MNISTParams()).load(Sources(data_dir, offline=True))
    assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [55000, 5000, 10000]
    truth = np.fromfile(data_dir / "MNIST/raw/t10k-images-idx3-ubyte", np.uint8)[16:]
    np.testing.assert_allclose(splits.test[:].numpy().ravel(), truth / np.float32(255), atol=1e-6)
    assert splits.train[:100].shape == (100, 1, 28, 28)


def test_mnist_has_the_labels_of_the_original_files(data_dir):
    splits = MNIST(MNISTParams()).load(Sources(data_dir, offline=True))
    raw = data_dir / "MNIST/raw"
    truth = np.fromfile(raw / "t10k-labels-idx1-ubyte", np.uint8)[8:]
    np.testing.assert_array_equal(splits.test.labels["digit"].numpy(), truth)
    images = np.fromfile(raw / "train-images-idx3-ubyte", np.uint8)[16:].reshape(60_000, 784)
    digits = np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8)[8:]
    known = {image.tobytes(): digit for image, digit in zip(images, digits, strict=True)}
    assert len(known) == 60_000  # no image is there twice
    for part in (splits.train, splits.valid):
        found = [known.pop(image.tobytes()) for image in part.stored.numpy()]
        np.testing.assert_array_equal(part.labels["digit"].numpy(), found)
    assert not known


def test_mnist_can_be_reduced_to_some_classes(data_dir):
    splits = MNIST(MNISTParams(classes=[0, 1])).load(Sources(data_dir, offline=True))
    assert len(splits.test) == 980 + 1135  # zeros and ones of the standard test set
    for part in (splits.train, splits.valid, splits.test):
        assert set(part.labels["digit"].tolist()) == {0, 1}
    assert splits.test.labels["digit"].sum() == 1135


def test_missing_data_offline_say_where_was_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("IMLBENCH_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError) as caught:
        MNIST(MNISTParams()).load(Sources(tmp_path / "here", offline=True))
    message = caught.value.messages[0]
    for part in ("MNIST/raw not found", "here", "elsewhere", "--offline", "--data-dir"):
        assert part in message


@pytest.mark.parametrize("damage", ["truncate", "delete", "change"])
def test_damaged_files_are_named(data_dir, tmp_path, damage):
    folder = tmp_path / "MNIST" / "raw"
    shutil.copytree(data_dir / "MNIST" / "raw", folder)
    file = folder / "t10k-images-idx3-ubyte"
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "truncate" else content[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte must .*; got .*--data-dir"):
        MNIST(MNISTParams()).load(Sources(tmp_path, offline=True))


@pytest.fixture
def mirror(data_dir, tmp_path, monkeypatch):
    """A local server that offers MNIST as the public mirrors do."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name in mnist.CHECKSUMS:
        content = gzip.compress((data_dir / "MNIST" / "raw" / name).read_bytes(), 1, mtime=0)
        (folder / f"{name}.gz").write_bytes(content)
        resources.append((f"{name}.gz", _md5(content)))
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False  # so that closing the server waits for them
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("IMLBENCH_DATA", raising=False)
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    yield folder
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def _md5(content: bytes) -> str:
    import hashlib

    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_mnist_is_downloaded_into_the_cache_once(mirror, data_dir):
    dataset, sources = MNIST(MNISTParams()), Sources()
    first = dataset.load(sources)
    shutil.rmtree(mirror)
    second = dataset.load(Sources(offline=True))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint == dataset.load(Sources(data_dir)).fingerprint


def test_a_failed_download_is_one_clear_message(mirror: Path):
    for file in mirror.iterdir():
        file.unlink()
    for _ in range(2):  # what the first attempt leaves in the cache is not taken for the data
        with pytest.raises(DataError, match=r"MNIST/raw not found; .*Download failed .*--data-dir"):
            MNIST(MNISTParams()).load(Sources())
