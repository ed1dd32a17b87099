"""Metrics: kernel density estimates, likelihoods of invertible models, reconstruction error."""

from imlbench import Metric, hookimpl


@hookimpl
def imlbench_metrics() -> list[type[Metric]]:
    """Return the metrics, the paper's main one first."""
    from imlbench_metrics import calibration, components, kde, likelihood, reconstruction

    return [
        kde.PaperKDE,
        likelihood.LogLikelihood,
        calibration.LogLikelihoodGap,
        likelihood.ManifoldLogLikelihood,
        reconstruction.ReconstructionError,
        calibration.ModesCovered,
        kde.KDE,
        kde.TunedKDE,
        likelihood.LayerwiseLogLikelihood,
        likelihood.BaseLogLikelihood,
        components.EffectiveComponents,
    ]
