"""Implicit maximum likelihood: an auto-encoder, then a learnt distribution of its latents."""

from imlbench import Model, hookimpl


@hookimpl
def imlbench_models() -> list[type[Model]]:
    """Return the model classes."""
    from imlbench_iml.models import IMLDPGMM, IMLGMM, IMLGaussian
    from imlbench_iml.sequences import IMLHMM, IMLRNN

    return [IMLGMM, IMLDPGMM, IMLGaussian, IMLHMM, IMLRNN]
