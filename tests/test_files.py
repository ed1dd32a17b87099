"""Files that can be trusted: damage is noticed, and what a file held comes back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from imlbench import Sources, UserError, load
from imlbench.files import (
    lock,
    read_facts,
    read_sealed,
    seal,
    unseal,
    write_facts,
    write_sealed,
)
from imlbench.plan.config import make_benchmark
from imlbench.plan.planning import make_plan
from imlbench.plan.registry import Registry
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Record, Status
from imlbench.runner.contract import Assignment
from imlbench.runner.job import run_job
from tests.plans import identify_data

TEXT = '{"value": 1.25, "name": "ü"}'


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def garble(path: Path) -> None:
    path.write_bytes(b"<html>404</html>")


def delete(path: Path) -> None:
    path.unlink()


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [flip, truncate, empty, zero, garble, delete, turn_into_folder]


def test_what_is_sealed_comes_back_and_nothing_else_does():
    sealed = seal(TEXT).encode()
    assert unseal(sealed) == TEXT.encode()
    for position in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[position] ^= 1 << bit
            with pytest.raises(ValueError, match="SHA-256"):
                unseal(bytes(damaged))
    for length in range(len(sealed)):
        with pytest.raises(ValueError, match="SHA-256"):
            unseal(sealed[:length])


@pytest.mark.parametrize("damage", DAMAGE)
def test_facts_that_are_damaged_are_no_facts(tmp_path, damage):
    path = tmp_path / "facts.json"
    write_facts(path, {"a": 1})
    assert read_facts(path) == {"a": 1}
    damage(path)
    assert read_facts(path) is None


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_sealed_tensors_that_are_damaged_are_set_aside(tmp_path, damage, ending):
    base = tmp_path / "stage"
    write_sealed(base, {"x": torch.arange(300)}, {"seconds": 1.5})
    found = read_sealed(base)
    assert found is not None
    assert torch.equal(found[0]["x"], torch.arange(300))
    assert found[1] == {"seconds": 1.5}
    damage(tmp_path / f"stage.{ending}")
    assert read_sealed(base) is None
    assert list(tmp_path.glob("*.damaged-1"))
    assert not (tmp_path / "stage.json").exists()  # the name is free again
    write_sealed(base, {"x": torch.arange(3)}, {})
    assert read_sealed(base) is not None


def test_a_folder_in_the_place_of_a_lock_is_set_aside(tmp_path):
    (tmp_path / "a.lock").mkdir()
    with lock(tmp_path / "a.lock").acquire(timeout=0):
        assert (tmp_path / "a.lock").is_file()


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Assignment:
    """A finished job, and how to run it again."""
    registry = Registry()
    benchmark = make_benchmark(
        None,
        None,
        models=["reference-train"],
        datasets=["toy-2d"],
        metrics=["kde"],
        n_samples=50,
        settings=["n_train=200", "n_valid=50", "n_test=60"],
    )
    plan = identify_data(make_plan(benchmark, registry), registry, Sources())
    root = tmp_path_factory.mktemp("files") / "results"
    Store(root).prepare()
    assignment = Assignment(plan.jobs[0], root, plan.metrics, plan.artifacts, Sources())
    run_job(assignment, registry)
    assignment.folder.end(Status.DONE)
    return assignment


@pytest.fixture
def copy(original, tmp_path) -> Assignment:
    shutil.copytree(original.results, tmp_path / "results")
    where = tmp_path / "results"
    return Assignment(original.job, where, original.metrics, original.artifacts, original.sources)


def what_counts(folder: JobFolder) -> tuple[object, ...]:
    """Everything of a job that must come out the same."""
    record = folder.read()
    assert record is not None
    assert record.fit is not None
    scores = [(score.label, score.value, score.stderr) for score in record.scores]
    files = {path.relative_to(folder.path): known.sha256 for path, known in folder.files(record)}
    return scores, files, folder.read_curves()


FILES = [
    "record.json",
    "checkpoint.safetensors",
    "curves.json",
    "samples/5x50.safetensors",
    "scores/5x50/kde.safetensors",
    "artifacts/5x50/plane/plane.png",
]


def test_these_are_all_files(original):
    record = original.folder.read()
    named = {
        str(path.relative_to(original.folder.path)) for path, _ in original.folder.files(record)
    }
    assert named == set(FILES) - {"record.json"}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_damaged_is_computed_again(original, copy, registry, name, damage):
    folder, known = copy.folder, original.folder.read()
    damage(folder.path / name)
    record = folder.read()
    if name == "record.json":
        assert record is None
        assert folder.is_damaged
        assert Store(copy.results).damaged() == [copy.job.id]
    else:
        assert folder.damaged(record) == [folder.path / name]
    mended = run_job(copy, registry)
    assert what_counts(folder) == what_counts(original.folder)
    assert folder.damaged(mended) == []
    refitted = name in ("record.json", "checkpoint.safetensors")
    assert (mended.fit.seconds != known.fit.seconds) == refitted  # nothing else is fitted again
    if damage is not delete and "artifacts" not in name:  # whose folder is written anew
        assert list(folder.path.rglob("*.damaged-1"))


def test_a_copy_is_checked_by_its_content(copy):
    record = copy.folder.read()
    for path, _ in copy.folder.files(record):
        os.utime(path, ns=(1, 1))
    assert copy.folder.damaged(record) == []


def test_bytes_that_change_under_the_same_time_are_noticed_when_they_are_read(copy):
    path = copy.folder.checkpoint
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="its SHA-256 is another"):
        load(copy.job.id, copy.results)


def test_every_field_of_a_record_survives(original):
    record = original.folder.read()
    assert Record.model_validate_json(record.model_dump_json()) == record
