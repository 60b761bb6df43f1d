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
    _open_closed()
    from .terminal.standard_output import named_stdout, unfailing_stderr
    from .verbs import cli

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="strict")
    sys.stdout, sys.stderr = named_stdout(sys.stdout), unfailing_stderr(sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.main()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # after Ctrl-C, threads that still compute are not waited for
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _flush()
            os._exit(INTERRUPTED)
        raise


def _open_closed() -> None:
    """Open standard streams that the caller has closed on /dev/null, or the next file opened would take their place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue


if __name__ == "__main__":
    main()
