"""The variational auto-encoder."""

from imlbench import Model, hookimpl


@hookimpl
def imlbench_models() -> list[type[Model]]:
    """Return the model classes."""
    from imlbench_vae.vae import VAE

    return [VAE]
