"""Speed and accuracy beside other libraries: ``python -m speed [CASE ...]``."""
