"""Generative adversarial networks."""

from imlbench import Model, hookimpl


@hookimpl
def imlbench_models() -> list[type[Model]]:
    """Return the model classes."""
    from imlbench_gan.gan import GAN, WGAN

    return [GAN, WGAN]
