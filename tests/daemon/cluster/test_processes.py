"""A head and two workers as processes on loopback, through the commands that people type, with machines lost in the
middle of answers. Run by `make test-cluster`; TRIALS says how often each way is tried.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import tiny
from fakes.group.clusters import wait_for
from fakes.group.processes import Daemons

from shoal.client import Client
from shoal.comm.messages import Done, Token

pytestmark = pytest.mark.cluster

TRIALS = int(os.environ.get("TRIALS", "2"))
NEW = 80
PORT = 17447
LONGEST_GAP_S = 10.0


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    with Daemons(tmp_path_factory.mktemp("cluster"), PORT) as made:
        made.start("head")
        for name in ("w1", "w2"):
            made.join(name)
        yield made


@pytest.fixture(scope="module")
def client(processes: Daemons) -> Iterator[Client]:
    processes.wait_attached(2)
    with processes.client() as client:
        yield client


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    model = tiny.hf_model("llama", **sizes)
    return str(tiny.save_gguf(model, tmp_path_factory.mktemp("model") / "m.gguf", type="Q8_0"))


@pytest.fixture(scope="module")
def model(client: Client, path: str) -> str:
    loaded = client.load(path, ranks=3).model
    assert loaded.ranks == 3
    return loaded.name


def generate(client: Client, model: str, when: Callable[[], None] = lambda: None) -> tuple[list[int], float]:
    """The ids of an answer, and the longest wait for one of them. `when` is called after some."""
    ids: list[int] = []
    gap_s, last_s = 0.0, time.monotonic()
    for event in client.generate(
        prompt_tokens=list(range(40)), model=model, max_tokens=NEW, temperature=0, ignore_eos=True
    ):
        if isinstance(event, Token):
            now_s = time.monotonic()
            gap_s, last_s = max(gap_s, now_s - last_s), now_s
            if len(ids) < 8 <= len(ids) + len(event.ids):
                when()
            ids += event.ids
    return ids, gap_s


def flap(processes: Daemons, name: str) -> None:
    for _ in range(3):
        processes.kill(name, signal.SIGSTOP)
        time.sleep(0.3)
        processes.kill(name, signal.SIGCONT)
        time.sleep(0.2)


WAYS: dict[str, Callable[[Daemons, str], None]] = {
    "killed": lambda processes, name: processes.kill(name, signal.SIGKILL),
    "frozen": lambda processes, name: processes.kill(name, signal.SIGSTOP),
    "stopped": lambda processes, name: processes.kill(name, signal.SIGTERM),
    "flapping": flap,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_goes_on_with_who_is_left(way: str, processes: Daemons, client: Client, model: str) -> None:
    wanted, _ = generate(client, model)
    source = random.Random(way)
    for _ in range(TRIALS):
        name = source.choice(["w1", "w2"])
        pause_s = source.random() * 0.3

        def lose(name: str = name, pause_s: float = pause_s) -> None:
            time.sleep(pause_s)
            WAYS[way](processes, name)

        losing = threading.Thread(target=lose)
        ids, gap_s = generate(client, model, losing.start)
        losing.join()
        assert ids == wanted
        assert gap_s < LONGEST_GAP_S
        if way != "flapping":
            processes.kill(name, signal.SIGKILL)
            time.sleep(0.5)
            processes.start(name)
        wait_for(lambda: [it.ranks for it in client.status().models] == [3], 40)


def test_a_head_that_restarts_finds_its_workers_again(processes: Daemons) -> None:
    processes.kill("head", signal.SIGKILL)
    time.sleep(0.5)
    processes.start("head")
    processes.wait_attached(2, 30)


def test_a_conversation_goes_on_after_all_were_stopped(processes: Daemons, path: str) -> None:
    """What it was computed from lies on the disks of all three."""

    def turn(prompt: list[int]) -> tuple[list[int], int]:
        processes.wait_attached(2, 30)
        with processes.client() as client:
            assert client.load(path, ranks=3).model.ranks == 3
            ids: list[int] = []
            for event in client.generate(
                prompt_tokens=prompt, model=path, max_tokens=20, temperature=0, ignore_eos=True
            ):
                if isinstance(event, Token):
                    ids += event.ids
                elif isinstance(event, Done):
                    known = event.usage.cached_tokens
            return ids, known

    def restart() -> None:
        for name, pid in processes.pids.items():
            processes.kill(name, signal.SIGTERM)
            wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 30)  # type: ignore[misc]
        for name in [*processes.pids]:
            processes.start(name)

    text = list(range(7, 77))
    answer, _ = turn(text)
    restart()
    again = [*text, *answer, 1, 2, 3]
    following, known = turn(again)
    assert known == len(text) + 20 - 1  # the last token of an answer is never computed
    for home in map(processes.home, processes.pids):
        shutil.rmtree(home.kv)
    restart()
    assert turn(again) == (following, 0)
