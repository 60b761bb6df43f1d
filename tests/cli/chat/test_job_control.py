"""Ctrl-Z while an answer comes, with a shell that takes the terminal back as bash does."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

SHELL = """
import os, signal, sys, termios, time
child = os.fork()
if not child:
    os.setpgid(0, 0)
    from prompt_toolkit.input import create_input
    from prompt_toolkit.output import DummyOutput
    from shoal.cli.chat.keyboard import Keyboard
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpgrp())
    with Keyboard(create_input(sys.stdin), DummyOutput()).listening():
        print("answering", flush=True)
        time.sleep(60)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
own = termios.tcgetattr(0)
for again in range(3):
    os.waitpid(child, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpgrp())
    termios.tcsetattr(0, termios.TCSADRAIN, own)
    os.tcsetpgrp(0, child)
    os.kill(-child, signal.SIGCONT)
    until_s = time.monotonic() + 15
    while (echoes := termios.tcgetattr(0)[3] & (termios.ECHO | termios.ICANON)) and time.monotonic() < until_s:
        time.sleep(0.01)
    print("echoes" if echoes else "quiet", flush=True)
os.kill(child, signal.SIGKILL)
"""


def test_keys_do_not_show_after_a_stop() -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + SHELL],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    got = b""
    try:
        while data := os.read(master, 1 << 16):
            got += data
            if data.rstrip().endswith((b"answering", b"quiet")):
                os.write(master, b"\x1a")
    except OSError:  # its last writer has closed it
        pass
    finally:
        watchdog.cancel()
        os.close(master)
    process.wait()
    assert got.decode().split() == ["answering", "quiet", "quiet", "quiet"]
