"""The variational auto-encoder."""

from imlbench import AnyModel, hookimpl


@hookimpl
def imlbench_models() -> list[type[AnyModel]]:
    """Return the model classes."""
    from imlbench_vae.vae import VAE

    return [VAE]
