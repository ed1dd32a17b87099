"""The command ``imlbench``, also as ``python -m imlbench``."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C ends it with status 130, from its first import on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing has begun
        from imlbench.cli import main as command

        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        from imlbench.cli import main as command
    command(prog_name="imlbench")


if __name__ == "__main__":
    main()
