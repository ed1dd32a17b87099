"""Runners: how the jobs of a plan are brought to their processes."""
