"""``python -m imlbench``."""

from imlbench.cli import main

main(prog_name="imlbench")
