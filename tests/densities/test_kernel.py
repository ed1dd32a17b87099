"""The kernel density estimate against float64 sums over all pairs."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Generator, Tensor

from imlbench.densities import kde_log_prob

ERROR = 1e-4  # nats, the promise


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(x: Tensor, samples: Tensor, h: float) -> tuple[np.ndarray, np.ndarray]:
    a, b = x.double().numpy(), samples.double().numpy()
    squared = np.stack([((row - b) ** 2).sum(1) for row in a])
    log_norm = a.shape[1] * (math.log(h) + math.log(2 * math.pi) / 2)
    return logsumexp(-squared / (2 * h * h), axis=1) - math.log(len(b)) - log_norm, squared


def images(n: int, d: int = 784, seed: int = 0) -> Tensor:
    """Points in [0, 1] near a surface of few dimensions, as images are."""
    basis = torch.randn(8, d, generator=seeded(100))
    z = torch.randn(n, 8, generator=seeded(seed))
    noise = torch.randn(n, d, generator=seeded(seed + 1))
    return torch.sigmoid(z @ basis + 0.1 * noise)


CASES = {
    "images": (images(200), images(300, seed=5)),
    "nearly coincident": (
        images(200),
        images(200) + 1e-4 * torch.randn(200, 784, generator=seeded()),
    ),
    "identical": (images(200), images(200)),
    "collapsed samples": (images(100), images(1).repeat(300, 1) + 1e-3 * images(300, seed=9)),
    "one sample": (images(50), images(1, seed=3)),
    "low dimension": (
        torch.randn(300, 2, generator=seeded()),
        torch.randn(500, 2, generator=seeded(1)),
    ),
    "far from the origin": (images(50, 20) + 1000, images(60, 20, seed=5) + 1000),
    "mixed distances": (images(100), torch.cat([images(100) + 1e-3, images(100, seed=7)])),
    "zeros": (torch.zeros(3, 4), torch.zeros(5, 4)),
    "beyond float32 squares": (images(9) * 1e25, images(9, seed=4) * 1e25),
}


@pytest.mark.parametrize(("case", "h"), [*product(CASES, [0.01, 0.05, 0.2, 1.0, 10.0])])
def test_equals_brute_force(case: str, h: float) -> None:
    x, samples = CASES[case]
    result = kde_log_prob(x, samples, [h])
    expected, squared = brute_force(x, samples, h)
    # Beyond 1e9 nats float64 itself resolves less than the promise.
    np.testing.assert_allclose(result.log_density[0], expected, atol=ERROR, rtol=1e-13)
    np.testing.assert_allclose(result.squared_distance, squared.min(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        np.take_along_axis(squared, result.nearest.numpy()[:, None], 1)[:, 0],
        squared.min(1),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("case", ["images", "nearly coincident", "mixed distances"])
def test_bandwidths_in_one_pass_equal_single_ones(case: str) -> None:
    x, samples = CASES[case]
    bandwidths = [0.01, 0.03, 0.1, 0.2, 0.5, 2.0]
    together = kde_log_prob(x, samples, bandwidths)
    for h, row in zip(bandwidths, together.log_density, strict=True):
        np.testing.assert_allclose(row, brute_force(x, samples, h)[0], rtol=0, atol=ERROR)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    x, samples = images(50).to(dtype), images(60, seed=4).to(dtype)
    result = kde_log_prob(x, samples, [0.1])
    assert result.log_density.dtype == result.squared_distance.dtype == torch.float64
    np.testing.assert_allclose(result.log_density[0], brute_force(x, samples, 0.1)[0], atol=ERROR)


def test_block_size_does_not_show() -> None:
    x, samples = CASES["images"]
    small = kde_log_prob(x, samples, [0.1, 1.0], block=7)
    large = kde_log_prob(x, samples, [0.1, 1.0], block=1000)
    torch.testing.assert_close(small.log_density, large.log_density, rtol=0, atol=ERROR)
    assert torch.equal(small.nearest, large.nearest)


def test_rows_that_are_not_contiguous() -> None:
    x, samples = CASES["images"]
    strided = kde_log_prob(x.T.contiguous().T[::2], samples[::3], [0.2])
    copied = kde_log_prob(x[::2].contiguous(), samples[::3].contiguous(), [0.2])
    torch.testing.assert_close(strided.log_density, copied.log_density, rtol=0, atol=ERROR)


def test_low_precision_products_are_repaired() -> None:
    x, samples = CASES["images"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = kde_log_prob(x, samples, [0.1])
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(result.log_density[0], brute_force(x, samples, 0.1)[0], atol=ERROR)


def test_low_precision_by_the_newer_settings_is_repaired_too() -> None:
    x, samples = CASES["images"]
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
        result = kde_log_prob(x, samples, [0.1])
    finally:
        matmul.fp32_precision = before
    np.testing.assert_allclose(result.log_density[0], brute_force(x, samples, 0.1)[0], atol=ERROR)


def test_is_a_density() -> None:
    samples = torch.randn(20, 1, generator=seeded())
    grid = torch.arange(-8, 8, 0.01, dtype=torch.float64)[:, None]
    p = kde_log_prob(grid, samples.double(), [0.3]).log_density[0].exp()
    assert float(p.sum()) * 0.01 == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("x", "samples", "bandwidths", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), [1.0], "x and samples must be of shape"),
        (torch.zeros(3), torch.zeros(3), [1.0], "x and samples must be of shape"),
        (torch.zeros(3, 2), torch.zeros(0, 2), [1.0], "at least one row each; got 3 and 0"),
        (torch.zeros(3, 2), torch.zeros(3, 2).double(), [1.0], "one floating type"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2).long(), [1.0], "one floating type"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), [1.0], "x must be finite"),
        (torch.zeros(3, 2), torch.full((3, 2), torch.inf), [1.0], "samples must be finite"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [], "bandwidths must be positive"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [0.1, 0.0], "bandwidths must be positive"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [math.nan], "bandwidths must be positive"),
    ],
)
def test_bad_input_is_refused(
    x: Tensor, samples: Tensor, bandwidths: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kde_log_prob(x, samples, bandwidths)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux reports it")
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_working_memory_is_bounded(spread: float) -> None:
    script = f"""
import resource, torch
from imlbench.densities import kde_log_prob
x = torch.rand(300, 12288)
samples = 0.5 + {spread} * (torch.rand(2000, 12288) - 0.5)
kde_log_prob(x[:2], samples[:2], [0.2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kde_log_prob(x, samples, [0.1, 0.2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) / 1024 < 200  # MiB; blocks, whatever the number of points
