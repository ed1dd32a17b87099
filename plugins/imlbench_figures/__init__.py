"""Figures of a fitted model: its samples, reconstructions, components and latents."""

from imlbench import hookimpl
from imlbench.api import AnyArtifact


@hookimpl
def imlbench_artifacts() -> list[type[AnyArtifact]]:
    """Return the artifact classes."""
    from imlbench_figures import images, plane

    return [
        images.Samples,
        images.Nearest,
        images.Reconstructions,
        images.Components,
        plane.Plane,
        plane.Latents,
    ]
