"""Metrics: kernel density estimates, likelihoods of invertible models, reconstruction error."""

from imlbench import hookimpl
from imlbench.api import AnyMetric


@hookimpl
def imlbench_metrics() -> list[type[AnyMetric]]:
    """Return the metric classes."""
    from imlbench_metrics import calibration, components, kde, likelihood, reconstruction

    return [
        kde.PaperKDE,
        kde.KDE,
        kde.TunedKDE,
        likelihood.LogLikelihood,
        likelihood.ManifoldLogLikelihood,
        likelihood.LayerwiseLogLikelihood,
        likelihood.BaseLogLikelihood,
        calibration.LogLikelihoodGap,
        calibration.ModesCovered,
        components.ComponentsInUse,
        reconstruction.ReconstructionError,
    ]
