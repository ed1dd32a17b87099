"""Speed and accuracy beside other libraries: ``python -m benchmarks [CASE ...]``."""
