"""The fault campaign: real processes, disturbed in a thousand ways, and judged by their files.

``python -m tests.campaign`` runs it. A *fault* is one disturbance; a *trial* is what is run to see
it, and may hold several faults that cannot disturb each other. What counts as survived stands in
:mod:`tests.campaign.oracle`, and nowhere else.
"""
