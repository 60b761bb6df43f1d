"""Three hosts as network namespaces, whose workers are lost, frozen and unplugged in the middle of answers. Run by
`make test-cluster` as root on Linux; TRIALS says how often each way is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import tiny
from hosts import lab, network
from hosts.crowd import Crowd
from hosts.group import NEW, Group
from hosts.lab import Lab
from hosts.limits import names
from hosts.losses import SLOW_S, WAYS, Losses, head_killed

TRIALS = int(os.environ.get("TRIALS", "2"))
PROMPT = list(range(24))
CROWD_S = 30.0 * TRIALS

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(why := lab.missing()), reason=why)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return tiny.save_gguf(tiny.hf_model("llama", **sizes), path, type="Q8_0")


@pytest.fixture(scope="module")
def losses(model: Path) -> Iterator[Losses]:
    with Lab() as made:
        yield Losses(made, model)


@pytest.fixture
def three(model: Path) -> Iterator[Group]:
    with Lab() as made:
        head, *workers = (made.host(name) for name in ("head", "one", "two"))
        group = Group(head, workers, ("--ranks", "3"))
        group.load(model, ranks=3)
        yield group


@pytest.mark.parametrize("way", WAYS)
def test_all_answers_go_on_with_who_is_left(way: str, losses: Losses) -> None:
    for _ in range(TRIALS):
        trial = losses.trial(way)
        assert not trial.error, trial
        assert trial.same, trial
        assert trial.pause_s < SLOW_S, trial


def test_workers_find_a_head_that_was_killed_in_the_middle_of_an_answer(three: Group) -> None:
    wanted = three.ask(PROMPT).ids
    for _ in range(TRIALS):
        cut, told_s, _, later = head_killed(three, PROMPT)
        assert cut.error.startswith("NoDaemon"), cut.error
        assert wanted[: len(cut.ids)] == cut.ids
        assert len(cut.ids) < NEW
        assert told_s < 2
        assert later.ids == wanted
        assert [it.ranks for it in three.client.status().models] == [3]


def test_a_crowd_hangs_nowhere(three: Group) -> None:
    crowd = Crowd(three, most_prompt=60, most_new=60)
    crowd.run(CROWD_S)
    assert not crowd.troubles
    assert crowd.ended["length"] > 10
    three.attached(2)
    status = three.client.status().models[0]
    assert (status.running, status.waiting) == (0, 0)


def test_nothing_is_left_of_a_lab_whose_process_was_killed() -> None:
    code = """if True:
        import time
        from hosts.lab import Lab
        lab = Lab().__enter__()
        lab.host("one").start("sleep", "100")
        print(lab.name, lab.root, flush=True)
        time.sleep(100)"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout
    name, root = process.stdout.readline().split()
    assert any(it.startswith(name) for it in network.namespaces())
    process.kill()
    process.wait()
    ends_s = time.monotonic() + 20
    while Path(root).exists() and time.monotonic() < ends_s:
        time.sleep(0.1)
    assert not Path(root).exists()
    assert not [it for it in (*network.namespaces(), *names(name)) if it.startswith(name)]


def test_a_host_sees_its_own_network_and_name_alone() -> None:
    with Lab() as made:
        one = made.host("one")
        made.host("two")
        assert one.run("hostname").stdout.strip() == "one"
        assert sorted(one.run("ls", "/sys/class/net").stdout.split()) == ["eth0", "lo"]
        assert one.run("ping", "-c1", "-W2", made.lan.address(2), check=False).returncode in (0, 127)
