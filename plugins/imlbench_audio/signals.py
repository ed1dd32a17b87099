"""How near reconstructed and generated sound comes, after overlap-add."""

from __future__ import annotations

from typing import ClassVar, cast

import torch

from imlbench import Autoencoding, Evaluation, Kind, Metric, Params, Score
from imlbench_audio.framing import overlap_add, recordings_of
from imlbench_audio.spectra import average_spectrum

FLOOR = 1e-6
"""Power, relative to the greatest, below which spectra count as equal: -60 dB."""


class ReconstructionSNR(Metric[Params]):
    r"""Signal-to-noise ratio of reconstructed test recordings, after overlap-add.

    :math:`10 \log_{10} \bigl( \sum x^2 / \sum (\hat x - x)^2 \bigr)`, sums over all recordings.
    """

    name = "reconstruction_snr"
    unit = "dB"
    higher_is_better = True
    position = 21
    requires = (Autoencoding,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the ratio over the test set."""
        model = cast(Autoencoding, evaluation.model)
        signal = noise = 0.0
        for chunks in recordings_of(evaluation.splits.test):
            again = model.decode(model.encode(chunks.to(evaluation.device))).cpu()
            x = overlap_add(chunks).double()
            signal += x.square().sum().item()
            noise += (overlap_add(again).double() - x).square().sum().item()
        return Score(10 * torch.tensor(signal / max(noise, 1e-300)).log10().item())


class LogSpectralDistance(Metric[Params]):
    r"""Distance between the average spectra of generated and of held-out real audio.

    .. math:: \sqrt{\frac1F \sum_f \Bigl( 10 \log_{10} \frac{P_{gen}(f) + \epsilon}
        {P_{real}(f) + \epsilon} \Bigr)^2}

    with power averaged over Hann-windowed frames of 100 ms of the overlap-added audio, in bins of
    10 Hz; :math:`\epsilon` is 60 dB below the greatest real power. Mean over draws.
    """

    name = "log_spectral_distance"
    unit = "dB"
    higher_is_better = False
    value_range = (0.0, None)
    reference = "Gray and Markel, Distance measures for speech processing, IEEE Trans. ASSP, 1976"
    position = 22
    needs_samples = True
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean distance over the draws."""
        real = average_spectrum(recordings_of(evaluation.splits.test))
        floor = FLOOR * real.max()
        generated = torch.stack([average_spectrum([draw]) for draw in evaluation.samples])
        decibels = 10 * ((generated + floor) / (real + floor)).log10()
        distances = decibels.square().mean(dim=1).sqrt()
        n = len(distances)
        stderr = (distances.std() / n**0.5).item() if n > 1 else None
        return Score(distances.mean().item(), stderr, settings={"draws": n, "floor_db": -60})
