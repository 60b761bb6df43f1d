"""What steps free stays with the process, and goes back when it is asked for."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

STEPS = """
import json, resource, sys, threading
import numpy as np
from shoal.daemon.memory import keep_freed, one_heap, private_bytes, return_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    results = [np.empty(24 << 20, np.uint8) for _ in range(4)]
    for one in results:
        one[:] = 1

def steps():
    global taken
    step()
    step()
    before = faults()
    for _ in range(10):
        step()
    taken = faults() - before

if sys.argv[1] == "kept":
    one_heap()
    keep_freed()
thread = threading.Thread(target=steps)  # steps are not the main thread's
thread.start()
thread.join()
held = private_bytes()
return_freed()
print(json.dumps([taken, held - private_bytes()]))
"""


def taken_and_given(how: str) -> tuple[int, int]:
    command = [sys.executable, "-P", "-c", STEPS, how]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    taken, given = json.loads(ended.stdout)
    return taken, given


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_what_steps_free_is_there_for_the_next_one_and_goes_back_when_asked() -> None:
    taken, given = taken_and_given("kept")
    usual, _ = taken_and_given("as usual")
    assert taken < 200
    assert usual > 1000  # the test would see it
    assert given > 90_000_000
