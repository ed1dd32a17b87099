"""Base distributions, and the kernel density estimate: fit, evaluate and sample in torch."""

from imlbench.densities.density import Density, Points, Report
from imlbench.densities.dirichlet import DirichletProcessMixture
from imlbench.densities.em import EMOptions
from imlbench.densities.gaussian import Gaussian
from imlbench.densities.hmm import GaussianHMM
from imlbench.densities.kernel import KernelLogProb, kde_log_prob
from imlbench.densities.mixture import GaussianMixture
from imlbench.densities.weights import perplexity

__all__ = [
    "Density",
    "DirichletProcessMixture",
    "EMOptions",
    "Gaussian",
    "GaussianHMM",
    "GaussianMixture",
    "KernelLogProb",
    "Points",
    "Report",
    "kde_log_prob",
    "perplexity",
]
