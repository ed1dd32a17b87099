"""Audio: spoken digits, a violin, and a synthetic stand-in for one."""

from imlbench import hookimpl
from imlbench.api import AnyArtifact, AnyDataset, AnyMetric


@hookimpl
def imlbench_datasets() -> list[type[AnyDataset]]:
    """Return the dataset classes."""
    from imlbench_audio import spoken_digits, violin

    return [spoken_digits.SpokenDigits, violin.SynthViolin, violin.Violin]


@hookimpl
def imlbench_metrics() -> list[type[AnyMetric]]:
    """Return the metric classes."""
    from imlbench_audio import likelihood, pairs, signals

    return [
        likelihood.SequenceLogLikelihood,
        likelihood.ShuffledLogLikelihood,
        pairs.PairKDE,
        pairs.WaveformPairKDE,
        signals.ReconstructionSNR,
        signals.LogSpectralDistance,
    ]


@hookimpl
def imlbench_artifacts() -> list[type[AnyArtifact]]:
    """Return the artifact classes."""
    from imlbench_audio import artifacts

    return [artifacts.Recordings, artifacts.Spectrograms, artifacts.States]
