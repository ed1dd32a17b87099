"""Generative adversarial networks."""

from imlbench import AnyModel, hookimpl


@hookimpl
def imlbench_models() -> list[type[AnyModel]]:
    """Return the model classes."""
    from imlbench_gan.gan import GAN, WGAN

    return [GAN, WGAN]
