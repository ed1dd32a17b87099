"""What is done on a GPU, tried without one: pieces, what they count, and how data get there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tarfile
import time
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from imlbench import Sources
from imlbench.errors import DataError, UserError
from imlbench.runner import server
from imlbench.runner.calls import count_devices
from imlbench.runner.local import choose_devices
from imlbench.runner.pool import Pool
from speed.gpu import __main__ as entrance
from speed.gpu import command, pack, pieces, twice, work
from speed.gpu.cases import FULL, QUICK, make_cases
from speed.runner import measure
from tests.accelerator import DEVICE, accelerator

CPU = torch.device("cpu")


@pytest.fixture
def run_gpu(monkeypatch, tmp_path):
    """The command line on the CPU, in an empty folder; returns click's result."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, made_up=()):
        if made_up:
            monkeypatch.setattr(command, "PIECES", {piece.name: piece for piece in made_up})
        return CliRunner().invoke(command.main, ["--device", "cpu", *arguments])

    return invoke


def make_piece(name, do):
    return pieces.Piece(name, "About it.", f"tables/{name}.md", do, lambda setup: "| a table |")


def test_what_was_stopped_goes_on_and_what_is_done_is_not_done_again(run_gpu, tmp_path):
    calls = []

    def slow_at_first(setup):
        calls.append("slow")
        if len(calls) == 1:
            time.sleep(60)
        return []

    def quick(setup):
        calls.append("quick")
        return []

    made_up = [make_piece("first", slow_at_first), make_piece("second", quick)]
    stopped = run_gpu("--minutes", "0.02", made_up=made_up)
    assert stopped.exit_code == 1
    page = (tmp_path / "tables" / "first.md").read_text()
    assert page.startswith("# first\n\nAbout it.\n\n**Not finished**: its time was over.")
    assert page.endswith("| a table |\n")
    again = run_gpu(made_up=made_up)
    assert again.exit_code == 0
    assert calls == ["slow", "quick", "slow"]
    assert "second: done; remove tables/second.md to have it done again" in again.stdout
    assert "finished" not in (tmp_path / "tables" / "first.md").read_text()


@pytest.mark.parametrize(
    ("error", "message"),
    [(DataError("dataset mnist: no file"), "dataset mnist: no file"), (KeyError("k"), "KeyError")],
)
def test_a_piece_that_fails_costs_no_other(run_gpu, tmp_path, error, message):
    def fail(setup):
        raise error

    result = run_gpu(made_up=[make_piece("bad", fail), make_piece("good", lambda setup: [])])
    assert result.exit_code == 1
    assert f"error: bad: {message}" in result.stderr
    assert "**Not finished**" in (tmp_path / "tables" / "bad.md").read_text()
    assert "**Not finished**" not in (tmp_path / "tables" / "good.md").read_text()


def test_ctrl_c_ends_it_all(run_gpu):
    def interrupted(setup):
        raise KeyboardInterrupt

    result = run_gpu(made_up=[make_piece("one", interrupted), make_piece("two", lambda s: [])])
    assert result.exit_code != 0
    assert "two" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper-mist"], "error: unknown piece 'paper-mist'. Did you mean 'paper-mnist'?"),
        (["--device", "cuda:7"], "error: --device: must be one of auto, cpu"),
    ],
)
def test_a_mistake_in_the_request_is_one_message(run_gpu, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = run_gpu(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_packages_that_are_lacking_are_named_at_once(monkeypatch, capsys):
    installed = importlib.metadata.version

    def version(name):
        if name in ("hmmlearn", "mlflow"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit) as exit:
        entrance.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: hmmlearn, mlflow not installed: see docs/gpu.md\n"


@pytest.mark.slow
def test_all_pieces_in_miniature(run_gpu, tmp_path):
    result = run_gpu("--quick")
    assert result.exit_code == 0, result.output
    tables = {path.name: path.read_text() for path in tmp_path.glob("results/gpu-quick/*.md")}
    assert set(tables) == {piece.table.rpartition("/")[2] for piece in pieces.PIECES.values()}
    for text in tables.values():
        assert "**Not finished**" not in text
        assert "| device " in text
        assert "| convolutions of float32 | float32" in text
    assert "12 passed" in tables["gpu-tests.md"]
    assert "| yes               | yes            | yes " in tables["gpu-twice.md"]
    assert "log_prob_manifold 0.0e+00" in tables["gpu-twice.md"]
    assert "| iml-gaussian |" in tables["gpu-paper-mnist.md"]
    assert "| 1300 " in tables["gpu-paper-mnist.md"]
    assert "share of peak" in tables["GPU.md"]
    again = run_gpu("--quick")
    assert again.exit_code == 0
    assert again.stdout.count("to have it done again") == len(pieces.PIECES)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(make_cases(CPU, QUICK))))
def test_cases_compute_on_another_device_what_the_cpu_does(index):
    with accelerator() as log:
        found = measure(make_cases(torch.device(DEVICE), QUICK)[index], threads=1)
    assert log.n_launches > 10
    assert all(item["difference"] <= 1e-6 for item in found["agreements"])


def test_all_claims_fit_the_table():
    for case in make_cases(CPU, FULL):
        names = [claim.name for claim in case.claims]
        assert len(set(names)) == len(names)
        assert max(map(len, names)) <= 30


def test_cases_that_were_measured_are_not_measured_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    setup = pieces.Setup(CPU, quick=True)
    names = [case.name for case in make_cases(CPU, QUICK)]
    made_up = {"case": names[1], "title": "T", "agreements": [], "rows": []}
    measured = []

    def fake(case, threads):
        measured.append(case.name)
        if len(measured) == 1:
            raise MemoryError("no room")
        return made_up | {"case": case.name}

    monkeypatch.setattr(pieces, "measure", fake)
    setup.results.mkdir(parents=True)
    (setup.results / "speed.json").write_text(json.dumps({names[1]: made_up}))
    assert pieces.time_cases(setup) == [f"{names[0]}: MemoryError: no room"]
    assert pieces.time_cases(setup) == []
    assert measured == [names[0], *names[2:], names[0]]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_count_two_operations_for_each_pair_of_factors(dtype):
    x, y = torch.ones(3, 5, dtype=dtype), torch.ones(5, 7, dtype=dtype)
    with work.Products() as found:
        torch.exp(x @ y)
        torch.stack([x, x]) @ y
    assert dict(found.operations) == {str(dtype).removeprefix("torch."): 3 * (2 * 3 * 5 * 7)}


def test_a_step_costs_three_times_what_the_network_costs():
    """Forward, gradient of the weights, gradient of the input."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)
    )
    x = torch.ones(5, 3, 8, 8, requires_grad=True)
    with work.Products() as found:
        layers(x).sum().backward()
    forward = 2 * 5 * (6 * 6 * 4 * 3 * 9 + 4 * 4 * 2 * 4 * 9)
    assert dict(found.operations) == {"float32": 3 * forward}


def test_tf32_is_told_from_float32():
    def on_cuda(dtype):
        return SimpleNamespace(dtype=dtype, device=torch.device("cuda"))

    assert work.precision(on_cuda(torch.float32), is_convolution=False) == "float32"
    assert work.precision(on_cuda(torch.float32), is_convolution=True) == "tf32"
    assert work.precision(on_cuda(torch.bfloat16), is_convolution=True) == "bfloat16"
    assert work.precision(torch.ones(1), is_convolution=True) == "float32"


def test_time_at_peak_adds_up_over_precisions(monkeypatch):
    monkeypatch.setattr(work, "peak", lambda name, device: {"float32": 10.0, "float64": 2.0}[name])
    assert work.seconds_at_peak({"float32": 20.0, "float64": 6.0}, CPU) == 5.0


def test_peak_is_that_of_a_product():
    assert 1e8 < work.peak("float32", CPU) < 1e14
    assert torch.get_float32_matmul_precision() == "highest"


def test_results_of_two_runs_are_told_apart():
    def record(checkpoint="a", samples="b", score=1.0):
        fit = SimpleNamespace(checkpoint=SimpleNamespace(sha256=checkpoint))
        drawn = SimpleNamespace(file=SimpleNamespace(sha256=samples))
        scores = [SimpleNamespace(label="kde", value=score)]
        return SimpleNamespace(fit=fit, draws={"2x10": drawn}, scores=scores)

    assert twice.same_results(record(), record()) == (True, True, True)
    assert twice.same_results(record(), record(checkpoint="c")) == (False, True, True)
    assert twice.same_results(record(), record(samples="c")) == (True, False, True)
    assert twice.same_results(record(), record(score=1.5)) == (True, True, False)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of data of no sense, in the right places."""
    folder = tmp_path / "data"
    files = {
        "MNIST/raw/train-images-idx3-ubyte": 300_000,
        "violin/piece.mp3": 1000,
        "spoken-digits/recordings/0_a_0.wav": 1000,
        "celeba/list_eval_partition.txt": 100,
        **{f"celeba/img_align_celeba/{number:06}.jpg": 100_000 for number in range(40)},
    }
    for name, size in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))
    monkeypatch.setenv("IMLBENCH_DATA", str(folder))
    return folder


def test_archives_are_small_and_together_everything(data, tmp_path):
    limit = 2_500_000
    files = list(pack.needed(Sources()))
    archives = list(pack.pack(files, tmp_path / "archives", limit))
    names = [archive.name for archive in archives]
    assert names[:3] == ["1.tar.gz", "2.tar.gz", "3.tar.gz"]
    assert all(archive.stat().st_size <= limit for archive in archives)
    with tarfile.open(archives[0]) as first:
        images = [name for name in first.getnames() if name.endswith(".jpg")]
    assert images
    assert images != sorted(images)  # some of every split
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / "there", filter="data")
    for path, name in files:
        copy = tmp_path / "there" / name
        assert copy.read_bytes() == path.read_bytes()
        assert copy.stat().st_mtime == pytest.approx(path.stat().st_mtime, abs=1)
    assert len(files) == 44


def test_data_that_are_not_there_are_named(data):
    (data / "violin" / "piece.mp3").unlink()
    with pytest.raises(DataError, match=r"dataset violin: violin/.* not found; looked in .*data"):
        list(pack.needed(Sources()))


def test_what_is_packed_beside_the_data_says_which_plugins_there_are(tmp_path, monkeypatch):
    (archive,) = pack.pack(pack.installed(), tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "site")])
    assert found.name == "imlbench"
    assert "mnist" not in found.entry_points.names
    assert {"iml", "vae", "images"} <= found.entry_points.select(group="imlbench").names


@pytest.mark.parametrize(
    ("requested", "n_cuda", "expected"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1,cuda", 2, ["cuda:1", "cuda:0"]),
        ("cpu,cuda:0", 1, ["cpu", "cuda:0"]),
    ],
)
def test_devices_are_those_that_are_visible(requested, n_cuda, expected):
    assert choose_devices(requested, n_cuda) == expected


@pytest.mark.parametrize(
    ("requested", "n_cuda", "known"),
    [
        ("cuda:2", 2, "auto, cpu, cuda:0, cuda:1, cuda"),
        ("cuda", 0, "auto, cpu"),
        ("cuda:0,cuda:-1", 1, "auto, cpu, cuda:0, cuda"),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1, "auto, cpu, cuda:0, cuda"),
        ("mps", 0, "auto, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_one_message(requested, n_cuda, known):
    with pytest.raises(UserError) as error:
        choose_devices(requested, n_cuda)
    name = requested.rpartition(",")[2]
    message = f"--device: must be one of {known}; got '{name}'. Use another."
    assert error.value.messages == (message,)


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there may be such devices")
def test_names_of_devices_are_read_by_torch_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-8932f937/1/0,GPU-2c9d")
    with Pool() as pool:
        assert count_devices(pool) == 0


def test_cublas_is_told_to_be_deterministic_before_it_starts(monkeypatch):
    """Both ways to begin: the server of processes, and a task in a process of its own."""
    seen = []

    class Server:
        def __init__(self, *args):
            seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

        def serve(self):
            pass

    monkeypatch.setattr(server, "_Server", Server)
    monkeypatch.setattr(server.socket, "socket", lambda **options: None)
    monkeypatch.setattr(server.sys, "argv", ["server", "0", "{}"])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    server.main()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    server.main()
    assert seen == [":16:8", ":4096:8"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # what is restored in the end
