"""The entry point of the commands `blueking-exporter` and `python -m exporter`."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Set the signals of a starting daemon, then run the command line; importing that takes most of the start."""
    if sys.argv[1:2] in ([], ["run"]) or sys.argv[1].startswith("-"):
        # Until the daemon handles them itself: a stop is no failure, and a reload is what a start does anyway.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from exporter.cli import main

    main()


if __name__ == "__main__":
    main()
