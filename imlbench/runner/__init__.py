"""Running jobs: the steps, the spine that joins them, and the local runner."""
