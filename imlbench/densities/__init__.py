"""Base distributions, and the kernel density estimate: fit, evaluate and sample in torch."""

from imlbench.densities.density import Density
from imlbench.densities.dirichlet import DirichletProcessMixture
from imlbench.densities.gaussian import Gaussian
from imlbench.densities.hmm import GaussianHMM
from imlbench.densities.kernel import KernelLogProb, kde_log_prob
from imlbench.densities.mixture import GaussianMixture

__all__ = [
    "Density",
    "DirichletProcessMixture",
    "Gaussian",
    "GaussianHMM",
    "GaussianMixture",
    "KernelLogProb",
    "kde_log_prob",
]
