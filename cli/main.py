"""Entry point of the `shoal` command: the process around the verbs.

Knows signals and streams. Imports next to nothing, so that Ctrl-C is quiet from the first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 130


def main() -> NoReturn:
    """Run the verb in sys.argv and exit."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # while importing nothing needs tidying
    from .verbs import cli

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.main()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # threads may still compute: nobody waits for them after Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _flush()
            os._exit(INTERRUPTED)
        raise


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue


if __name__ == "__main__":
    main()
