"""Metrics: kernel density estimates, likelihoods of invertible models, reconstruction error."""

from imlbench import Metric, hookimpl


@hookimpl
def imlbench_metrics() -> list[type[Metric]]:
    """Return the metrics, the paper's main one first."""
    from imlbench_metrics import calibration, components, kde, likelihood, reconstruction

    return [
        kde.PaperKDE,
        kde.KDE,
        kde.TunedKDE,
        reconstruction.ReconstructionError,
        likelihood.LogLikelihood,
        likelihood.ManifoldLogLikelihood,
        likelihood.LayerwiseLogLikelihood,
        likelihood.BaseLogLikelihood,
        calibration.LogLikelihoodGap,
        calibration.ModesCovered,
        components.EffectiveComponents,
    ]
