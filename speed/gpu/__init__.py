"""What can be seen only on a CUDA device: ``python -m speed.gpu``; see docs/gpu.md."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The folder of the project."""
