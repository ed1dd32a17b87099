"""Audio: spoken digits, a violin, and a synthetic stand-in for one."""

from imlbench import Dataset, Metric, hookimpl


@hookimpl
def imlbench_datasets() -> list[type[Dataset]]:
    """Return the dataset classes."""
    from imlbench_audio import spoken_digits, violin

    return [spoken_digits.SpokenDigits, violin.SynthViolin, violin.Violin]


@hookimpl
def imlbench_metrics() -> list[type[Metric]]:
    """Return the metric classes."""
    from imlbench_audio import metrics

    return [
        metrics.SequenceLogLikelihood,
        metrics.ShuffledLogLikelihood,
        metrics.PairKDE,
        metrics.WaveformPairKDE,
        metrics.ReconstructionSNR,
        metrics.LogSpectralDistance,
    ]
