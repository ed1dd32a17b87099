"""Plans made in the process of a test."""

from __future__ import annotations

from imlbench import Sources
from imlbench.plan.data import fingerprint
from imlbench.plan.jobs import Plan
from imlbench.plan.registry import Registry


def identify_data(plan: Plan, registry: Registry, sources: Sources) -> Plan:
    """Read every dataset, and enter its fingerprint into its jobs."""
    found = {key: fingerprint(job, registry, sources) for key, job in plan.data.items()}
    return plan.with_fingerprints(found)
