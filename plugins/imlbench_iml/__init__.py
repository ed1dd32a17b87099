"""Implicit maximum likelihood: an auto-encoder, then a learnt distribution of its latents."""

from imlbench import AnyModel, hookimpl


@hookimpl
def imlbench_models() -> list[type[AnyModel]]:
    """Return the model classes."""
    from imlbench_iml.models import IMLDPGMM, IMLGMM, IMLGaussian
    from imlbench_iml.sequences import IMLHMM, IMLRNN

    return [IMLGMM, IMLDPGMM, IMLGaussian, IMLHMM, IMLRNN]
