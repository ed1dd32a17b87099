"""Figures: the pixels of images, the nearest neighbours of scikit-learn, ellipses of scipy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.neighbors import NearestNeighbors

from imlbench import Autoencoding, Evaluation, Examples, Params, Space, Splits
from imlbench.api.capabilities import members
from imlbench.densities import Gaussian, GaussianHMM, GaussianMixture
from imlbench_figures import images, imlbench_artifacts, mosaic, plane

GREY, COLOUR = Space("image", (1, 28, 28), (0.0, 1.0)), Space("image", (3, 64, 64), (-1.0, 1.0))
SMALL, PLANE = Space("image", (1, 8, 8), (0.0, 1.0)), Space("vector", (2,))
SEQUENCE = Space("sequence", (800,))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def examples(space: Space, n: int, seed: int) -> Examples:
    labels = {"digit": torch.arange(n) % 3}
    return Examples(space.from_unit(rand(n, *space.event_shape, seed=seed)), labels=labels)


class _Dataset:
    name = "data"

    def __init__(self, space: Space) -> None:
        self.space = space


class _Model:
    """A linear auto-encoder onto the first coordinates, and a mixture of its latents."""

    name = "model"

    def __init__(self, space: Space, n_latents: int, density: object = None) -> None:
        self.space, self._n_latents, self.density = space, n_latents, density

    def encode(self, x):
        return x.flatten(1)[:, : self._n_latents]

    def decode(self, h):
        n_missing = self.space.n_dims - self._n_latents
        return torch.nn.functional.pad(h, (0, n_missing)).unflatten(1, self.space.event_shape)

    def sample_components(self, n, generator):
        x = torch.rand(n, *self.space.event_shape, generator=generator)
        return x, torch.arange(n).remainder(10).clamp(max=3)  # 3 has seven tenths

    def can(self, capability):
        return all(hasattr(self, name) for name in members(capability))


def evaluation(space: Space, n_latents: int = 2, density: object = None) -> Evaluation:
    splits = Splits(*(examples(space, n, seed) for seed, n in enumerate((300, 20, 150))))
    draws = space.from_unit(rand(1, 120, *space.event_shape, seed=9))
    return Evaluation(
        dataset=_Dataset(space),
        splits=splits,
        draws=draws,
        model=_Model(space, n_latents, density),
        device=torch.device("cpu"),
    )


def mixture() -> GaussianMixture:
    return GaussianMixture.from_parameters(
        torch.tensor([0.5, 0.4995, 0.0005]),
        torch.tensor([[0.0, 0.0], [1.0, 2.0], [9.0, 9.0]]),
        torch.tensor(
            [[[1.0, 0.5], [0.5, 2.0]], [[0.1, 0.0], [0.0, 0.3]], [[1.0, 0.0], [0.0, 1.0]]]
        ),
    )


def written(artifact, given: Evaluation, folder: Path) -> np.ndarray | None:
    """Write an artifact; return its one picture, (height, width, 3) in [0, 1], if there is one."""
    artifact(Params()).write(given, folder)
    paths = list(folder.iterdir())
    if not paths:
        return None
    [path] = paths
    assert path.name == f"{artifact.name}.png"
    assert path.stat().st_size < 1_200_000  # of noise, which cannot be compressed
    return imread(path)[..., :3]


def find(picture: np.ndarray, image: np.ndarray) -> bool:
    """Whether an image (height, width, 3) is somewhere in a picture, but for rounding."""
    height, width, _ = image.shape
    near = lambda a, b: np.abs(a - b).max(axis=-1) < 1.01 / 255  # noqa: E731
    return any(
        near(picture[top : top + height, left : left + width], image).all()
        for top, left in np.argwhere(near(picture, image[0, 0]))
        if top + height <= len(picture) and left + width <= picture.shape[1]
    )


def enlarged(image: torch.Tensor, space: Space, zoom: int) -> np.ndarray:
    low, high = space.value_range
    pixels = (image.numpy().transpose(1, 2, 0) - low) / (high - low)
    return np.kron(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), np.ones((zoom, zoom, 1)))


# Images


@pytest.mark.parametrize(("space", "side", "zoom"), [(GREY, 10, 2), (COLOUR, 6, 1), (SMALL, 10, 7)])
def test_samples_stand_beside_real_images_pixel_by_pixel(tmp_path, space, side, zoom):
    given = evaluation(space)
    picture = written(images.Samples, given, tmp_path)
    real = given.splits.test[:][np.linspace(0, 149, side**2).astype(int)]
    for shown in (given.samples[0, : side**2], real):
        for n in (0, side - 1, side**2 - 1):
            assert find(picture, enlarged(shown[n], space, zoom))
    assert not find(picture, enlarged(given.samples[0, side**2], space, zoom))


def test_values_outside_of_the_range_are_clipped_and_without_a_range_stretched():
    x = torch.tensor([-1.0, 0.0, 0.5, 3.0]).reshape(4, 1, 1, 1).expand(4, 1, 56, 56)
    for space, expected in (
        (Space("image", (1, 56, 56), (0.0, 1.0)), [0, 0, 128, 255]),
        (Space("image", (1, 56, 56)), [0, 64, 96, 255]),
    ):
        pixels = mosaic.tile(x, space, 4)
        assert pixels.shape == (60, 2 + 4 * 58, 3)
        assert pixels[30, [20, 80, 140, 200], 0].tolist() == expected
        assert (pixels[:2] == 255).all()


def test_a_row_that_is_not_full_is_filled_with_white():
    pixels = mosaic.tile(torch.zeros(3, 1, 56, 56), Space("image", (1, 56, 56), (0.0, 1.0)), 2)
    assert pixels.shape == (118, 118, 3)
    assert (pixels[60:, 60:] == 255).all()
    assert (pixels[60:116, 2:58] == 0).all()


@pytest.mark.parametrize("space", [SMALL, COLOUR])
def test_the_nearest_training_images_are_scikit_learns(tmp_path, space):
    given = evaluation(space)
    train, samples = given.splits.train[:], given.samples[0]
    search = NearestNeighbors(n_neighbors=1).fit(train.flatten(1).double().numpy())
    distance, row = (found[:, 0] for found in search.kneighbors(samples.flatten(1).double()))
    rows, distances = images.nearest(samples, given.splits.train, torch.device("cpu"))
    np.testing.assert_array_equal(rows, row)
    np.testing.assert_allclose(distances, distance, rtol=1e-6)
    picture = written(images.Nearest, given, tmp_path)
    zoom = 7 if space is SMALL else 1
    for n in (0, 11):
        assert find(picture, enlarged(train[row[n]], space, zoom))


def test_a_copy_of_a_training_image_has_distance_zero_in_any_batch():
    split = examples(SMALL, 2500, 5)
    rows, distances = images.nearest(split[[3, 1700, 2499]], split, torch.device("cpu"))
    assert rows.tolist() == [3, 1700, 2499]
    assert distances.tolist() == [0, 0, 0]


def test_what_depends_on_the_data_alone_is_computed_once(tmp_path):
    asked = []

    def cache(name, settings, compute):
        asked.append((name, settings))
        return compute()

    written(images.Nearest, replace(evaluation(SMALL), cache=cache), tmp_path)
    assert asked == [("nearest of test images", {"n": 100})]


def test_reconstructions_stand_below_test_images(tmp_path):
    given = evaluation(SMALL, n_latents=40)
    picture = written(images.Reconstructions, given, tmp_path)
    x = given.splits.test[:][np.linspace(0, 149, 12).astype(int)]
    again = x.flatten(1).clone()
    again[:, 40:] = 0
    for n in (0, 11):
        pair = torch.cat([x[n], torch.ones(1, 0, 8), again[n].reshape(1, 8, 8)], dim=1)
        above, below = (enlarged(part, SMALL, 7) for part in pair.split(8, dim=1))
        assert find(picture, np.concatenate([above, np.ones((2, 56, 3)), below]))


def test_components_come_by_frequency_with_ten_samples_each(tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(images, "write_panels", lambda title, given, *rest: panels.extend(given))
    given = evaluation(SMALL)
    written(images.Components, given, tmp_path)
    x, component = given.model.sample_components(2000, given.generator("components"))
    [panel] = panels
    assert panel.row_labels == [
        "component 3\n70.0%",
        "component 0\n10.0%",
        "component 1\n10.0%",
        "component 2\n10.0%",
    ]
    truth = torch.cat([x[component == number][:10] for number in (3, 0, 1, 2)])
    assert torch.equal(panel.images, truth)


def test_without_frequent_components_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(
        _Model, "sample_components", lambda self, n, generator: (rand(n, 1, 8, 8), torch.arange(n))
    )
    assert written(images.Components, evaluation(SMALL), tmp_path) is None


# The plane


def test_ellipses_are_two_standard_deviations():
    density = mixture()
    curves = plane.outlines(_Model(PLANE, 2, density)).double()
    assert curves.shape == (2, 101, 2)  # without the third, of hardly any weight
    for curve, mean, covariance in zip(curves, density.means, density.covariances, strict=False):
        normal = scipy.stats.multivariate_normal(mean, covariance)
        np.testing.assert_allclose(normal.logpdf(curve), normal.logpdf(mean) - 2, atol=1e-5)
        np.testing.assert_allclose(curve[0], curve[-1], atol=1e-5)
        np.testing.assert_allclose(curve[:-1].mean(0), mean, atol=1e-6)


@pytest.mark.parametrize(
    ("density", "n_curves"),
    [
        (None, 0),
        (Gaussian(2), 1),
        (Gaussian(3), 0),
        (GaussianHMM(2, n_components=4), 4),
        (GaussianMixture(2, n_components=3, covariance_type="diag"), 0),
    ],
)
def test_only_densities_of_the_plane_have_ellipses(density, n_curves):
    assert plane.outlines(_Model(PLANE, 2, density)).shape == (n_curves, 101, 2)


def test_a_view_shows_the_data_and_counts_what_is_outside():
    points = rand(1001, 2) * torch.tensor([2.0, 1.0]) + 5
    view = plane.View.of(points)
    assert view == pytest.approx((6, 5.5, 1.2), abs=0.02)
    assert view.outside(points) == ""
    points[:100] += 10
    assert view.outside(points) == " (0.1 outside)"


@pytest.mark.parametrize("density", [None, mixture()])
@pytest.mark.parametrize(("n_latents", "n_panels"), [(1, 2), (2, 3)])
def test_the_plane_has_a_panel_for_latents_if_there_are_two(
    tmp_path, monkeypatch, density, n_latents, n_panels
):
    drawn = spy(monkeypatch)
    assert written(plane.Plane, evaluation(PLANE, n_latents, density), tmp_path) is not None
    [figure] = drawn
    assert len(figure.axes) == n_panels
    assert all(axes.get_title() and axes.get_xlabel() for axes in figure.axes)
    n_curves = 2 * (density is not None and n_latents == 2)
    assert [len(axes.lines) for axes in figure.axes] == [0, n_curves, n_curves][:n_panels]
    data = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(data, evaluation(PLANE).splits.test[:])


def spy(monkeypatch) -> list[Figure]:
    """Return a list that gets every figure that is written."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def record(figure: Figure, *arguments, **options) -> None:
        drawn.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return drawn


@pytest.mark.parametrize(("space", "n_panels"), [(SMALL, 2), (SEQUENCE, 1)])
def test_latents_are_coloured_by_label(tmp_path, monkeypatch, space, n_panels):
    drawn = spy(monkeypatch)
    given = evaluation(space, density=mixture())
    assert written(plane.Latents, given, tmp_path) is not None
    [figure] = drawn
    assert len(figure.axes) == n_panels
    left = figure.axes[0]
    assert left.get_legend().get_title().get_text() == "digit"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["0", "1", "2"]
    h, digit = given.splits.train[:].flatten(1)[:, :2], given.splits.train.labels["digit"]
    for number, points in enumerate(left.collections):
        np.testing.assert_allclose(points.get_offsets(), h[digit == number])
    assert all(len(axes.lines) == 2 for axes in figure.axes)


def test_latents_decode_where_they_are(monkeypatch):
    """The decoder writes the latents into the first two pixels of the image at their place."""
    given = evaluation(SMALL)
    figure = Figure()
    axes = figure.add_subplot()
    plane.show_decoded(axes, given, plane.View(0.5, 0.5, 0.5))
    pixels = np.asarray(axes.images[0].get_array())[..., 0] / 255
    size = 8 * 7
    first, second = pixels[::size, ::size], pixels[::size, 7::size]
    centres = (np.arange(plane.N_GRID) + 0.5) / plane.N_GRID
    np.testing.assert_allclose(first, np.tile(centres, (plane.N_GRID, 1)), atol=1 / 255)
    np.testing.assert_allclose(second.T, np.tile(centres[::-1], (plane.N_GRID, 1)), atol=1 / 255)
    assert axes.images[0].get_extent() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("artifact", "space", "n_latents"),
    [(plane.Plane, SMALL, 2), (plane.Latents, PLANE, 2), (plane.Latents, SMALL, 3)],
)
def test_nothing_is_written_where_there_is_nothing_to_show(tmp_path, artifact, space, n_latents):
    assert written(artifact, evaluation(space, n_latents), tmp_path) is None


# All


def test_every_figure_says_when_it_applies():
    found = {cls.name: cls for cls in imlbench_artifacts()}
    assert set(found) == {
        "components",
        "latents",
        "nearest",
        "plane",
        "reconstructions",
        "samples",
    }
    for name in ("components", "nearest", "reconstructions", "samples"):
        assert found[name].kinds == {"image"}
    for name in ("latents", "reconstructions"):
        assert found[name].requires == (Autoencoding,)
