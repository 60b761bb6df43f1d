"""`shoal cluster launch` with an ssh that runs the command here: what joins, and what is said of the rest."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.group.clusters import wait_for
from fakes.group.processes import with_tested_kernels

from shoal.cli import background
from shoal.cli.launch.hosts_file import Host
from shoal.cli.launch.launching import _said, for_others
from shoal.cli.launch.over_ssh import Outcome, join_over_ssh, outcome, ssh_command
from shoal.client import Client
from shoal.comm.cluster_messages import NodeStatus
from shoal.comm.home import Home
from shoal.daemon.errors import DaemonError
from shoal.daemon.installed import package_version

FAKE_SSH = r"""#!/bin/sh
# What stands behind --: the host, and a command for its shell. Hosts are named by what happens there.
options=""
while [ "$1" != "--" ]; do options="$options $1"; shift; done
host=$2; command=$3
echo "$options -- $host $command" >> "$FAKE_LOG"
case $host in
unknown) echo "Host key verification failed." >&2; exit 255 ;;
locked) echo "me@locked: Permission denied (publickey,password)." >&2; exit 255 ;;
nowhere) echo "ssh: Could not resolve hostname nowhere: Name or service not known" >&2; exit 255 ;;
off) echo "ssh: connect to host off port 22: Connection timed out" >&2; exit 255 ;;
closed) echo "ssh: connect to host closed port 22: Connection refused" >&2; exit 255 ;;
odd) exit 255 ;;
bare) echo "sh: 1: shoal: not found" >&2; exit 127 ;;
old) echo "shoal: no such option: --head (see shoal cluster join --help)" >&2; exit 2 ;;
far) echo "shoal: not paired: the node cannot be reached (10.0.0.1:7447: timed out)" >&2; exit 1 ;;
strange) echo "hello"; exit 0 ;;
hanging) echo "debug: waiting" >&2; sleep 60 & echo $! > "$FAKE_LOG.pid"; wait ;;
asks) case $options in *BatchMode=yes*) echo "asks: Permission denied (password)." >&2; exit 255 ;; esac
      read answer < /dev/tty ;;
shares) sleep 5 & exit 255 ;;  # a connection that is kept open for others holds standard error
*) echo "welcome to $host"; exec sh -c "$command" ;;
esac
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its log: a line for each call, without what came on standard input."""
    folder = tmp_path / "bin"
    folder.mkdir()
    ssh = folder / "ssh"
    ssh.write_text(FAKE_SSH)
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def joined(host: Host, limit_s: float = 20.0) -> Outcome:
    command = ssh_command(host, ["10.0.0.1:7447", "[fd00::1]:7447"], "ab" * 32)
    return join_over_ssh(host, command, "7K3M-Q9TX-2BD4F", limit_s, threading.Event())


FAILURES = {
    "unknown": "ssh does not trust its host key: type ssh unknown once, and answer what it asks "
    "[Host key verification failed.]",
    "locked": "ssh is not let in without a password: set up a key (ssh-copy-id locked) "
    "[me@locked: Permission denied (publickey,password).]",
    "nowhere": "ssh finds no machine of this name [ssh: Could not resolve hostname nowhere: "
    "Name or service not known]",
    "off": "ssh does not reach it: is it on, and is the address right? "
    "[ssh: connect to host off port 22: Connection timed out]",
    "closed": "it is there, but no ssh server answers [ssh: connect to host closed port 22: Connection refused]",
    "odd": "ssh failed and said nothing",
    "shares": "ssh failed and said nothing",
    "asks": "ssh is not let in without a password: set up a key (ssh-copy-id asks) "
    "[asks: Permission denied (password).]",
    "bare": "there is no shoal there: install Shoal, or say in the file where it is (shoal = …)",
    "old": "Shoal there is of another version: no such option: --head (see shoal cluster join --help)",
    "far": "not paired: the node cannot be reached (10.0.0.1:7447: timed out)",
    "strange": "shoal there says nothing that is known: is it Shoal?",
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_went_wrong_is_one_clear_line(name: str, fake_ssh: Path) -> None:
    began_s = time.monotonic()
    found = joined(Host(name, name))
    assert (found.trouble, found.fingerprint) == (FAILURES[name], "")
    assert time.monotonic() - began_s < 15


def test_an_ssh_that_hangs_is_ended_with_all_that_it_started(fake_ssh: Path) -> None:
    found = joined(Host("hanging", "h"), limit_s=2.0)
    assert found.trouble == "no answer within 2 s; the last that it said: debug: waiting"
    pid = int(Path(f"{fake_ssh}.pid").read_text())
    wait_for(lambda: not alive(pid), 5)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_giving_up_ends_all(fake_ssh: Path) -> None:
    given_up = threading.Event()
    threading.Timer(0.3, given_up.set).start()
    began_s = time.monotonic()
    host = Host("hanging", "h")
    assert join_over_ssh(host, ssh_command(host, [], ""), "c", 60, given_up).trouble == "given up"
    assert time.monotonic() - began_s < 30


def test_without_ssh_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DaemonError, match="there is no ssh on this machine"):
        joined(Host("a", "a"))


def test_the_command_has_everything_but_the_code(fake_ssh: Path) -> None:
    host = Host("bare", "pi 3", "me", "~/venv/bin/shoal", 6_000_000_000, 4, "~/it's lent")
    joined(host)
    (line,) = fake_ssh.read_text().splitlines()
    assert line.startswith(
        " -T -o BatchMode=yes -o ConnectTimeout=15 -o ClearAllForwardings=yes -l me -- bare env "
    )
    assert line.endswith(
        "~/venv/bin/shoal cluster join - --address 10.0.0.1:7447 --address '[fd00::1]:7447'"
        f" --head {'ab' * 32} --detach --json --memory 6000000000 --threads 4"
    )
    assert "7K3M" not in line


@pytest.mark.parametrize(
    ("home", "is_at"),
    [
        ("~", "/h"),
        ("~/", "/h"),
        ("~/x y", "/h/x y"),
        ("/a/it's", "/a/it's"),
        ("$(reboot)", "$(reboot)"),
        ("x", "x"),
    ],
)
def test_the_home_is_no_program_for_the_shell(home: str, is_at: str) -> None:
    command = ssh_command(Host("a", "a", shoal="printenv SHOAL_HOME #", home=home), [], "")[-1]
    said = subprocess.run(
        ["sh", "-c", command], env={"HOME": "/h", "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert said.stdout.decode().rstrip("\n") == is_at


@pytest.mark.parametrize(
    "out", ["", "{}", "{\n}", '{\n"fingerprint": 3\n}', '{\n"fingerprint": "ab"\n}', "{\nx\n}"]
)
def test_what_claims_to_have_joined(out: str) -> None:
    assert (
        outcome(Host("a", "a"), 0, out, "").trouble == "shoal there says nothing that is known: is it Shoal?"
    )


def test_addresses_that_others_cannot_reach_are_left_out() -> None:
    assert for_others(["10.0.0.1:7447", "[::1]:7447", "127.0.0.1:7447"]) == ["10.0.0.1:7447"]
    assert for_others(["127.0.0.1:7447"]) == ["127.0.0.1:7447"]
    assert for_others(["head.local:7447", "127.0.0.1:1"]) == ["head.local:7447"]


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ({}, False),
        ({"memory": 6_000_000_000, "threads": 4}, False),
        ({"memory": 5_000_000_000}, True),
        ({"threads": 2}, True),
    ],
)
def test_a_machine_that_runs_already_may_lend_more_than_the_file_says(
    asked: dict[str, int], more: bool
) -> None:
    facts = {"threads": 4, "memory_bytes": 5_900_000_000, "version": package_version()}
    node = NodeStatus(name="pi", fingerprint="ab" * 32, role="worker", attached=True, **facts)
    said = _said(Outcome(Host("pi", "pi", **asked), node.fingerprint, before=True), node)
    assert said.startswith("was in the cluster already: 4 threads, 5.9 GB")
    assert ("more than the file says" in said) == more


# --- end to end ----------------------------------------------------------------------------------------------

SHOAL = [sys.executable, "-P", "-m", "shoal.cli.main"]


class Launched:
    """A head and whatever was launched from it, each with a home below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.head = Home(directory / "head")

    def shoal(self, *arguments: str, home: Home | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SHOAL, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"SHOAL_HOME": str((home or self.head).root)},
        )

    def hosts(self, *names: str) -> Path:
        """A file of hosts with these names, which are those of their homes, too."""
        for name in names:
            with_tested_kernels(Home(self.directory / name))
        path = self.directory / "hosts.toml"
        command = " ".join(SHOAL)
        path.write_text(
            "".join(
                f'[[host]]\naddress="{name}"\nshoal="{command}"\nthreads=1\nmemory="1GB"\n'
                f'home="{self.directory / name}"\n'
                for name in names
            )
        )
        return path

    def close(self) -> None:
        for path in self.directory.iterdir():
            if (pid := background.running_pid(Home(path))) is not None:
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launched(tmp_path: Path, fake_ssh: Path) -> Iterator[Launched]:
    made = Launched(tmp_path)
    try:
        assert made.shoal("cluster", "init", "--listen", "127.0.0.1:0").returncode == 0
        yield made
    finally:
        made.close()


def test_hosts_join_and_are_told_each_and_again(launched: Launched, fake_ssh: Path) -> None:
    path = launched.hosts("one", "two", "locked")
    done = launched.shoal("cluster", "launch", str(path))
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 1
    assert [line.split(":")[0] for line in lines] == ["locked", "one", "two"]
    assert "ssh-copy-id locked" in lines[0]
    assert all("has joined as " in line and ": 1 thread, " in line for line in lines[1:])
    assert "1 machine of 3 failed; to try again, type the same command again" in done.stderr
    assert "only this machine itself can join at 127.0.0.1:" in done.stderr
    with Client(launched.head.address) as client:
        nodes = client.nodes().nodes
        assert [node.attached for node in nodes] == [True] * 3
        assert {link.verdict for link in client.measure_links().links} - {"lost"}
    codes = [line for line in fake_ssh.read_text().splitlines() if "-" in line.split(" join ")[1].split()[0]]
    assert [line.split(" join ")[1].split()[0] for line in codes] == ["-"] * 3

    one = Home(launched.directory / "one")
    assert launched.shoal("stop", "--now", home=one).returncode == 0
    done = launched.shoal("cluster", "launch", str(launched.hosts("one", "two")))
    assert (done.returncode, done.stderr.count("failed")) == (0, 0)
    assert [line.split(":")[1].split(" as ")[0] for line in done.stdout.splitlines()] == [
        " was in the cluster already"
    ] * 2
    assert background.running_pid(one) is not None

    assert launched.shoal("cluster", "forget", nodes[1].fingerprint).returncode == 0
    done = launched.shoal("cluster", "launch", str(launched.hosts("one", "two")))
    assert done.returncode == 0
    assert sorted(" has joined as " in line for line in done.stdout.splitlines()) == [False, True]
    with Client(launched.head.address) as client:
        again = client.nodes().nodes
        assert sorted(node.fingerprint for node in again) == sorted(node.fingerprint for node in nodes)
        assert all(node.attached for node in again)
    assert launched.shoal("cluster", "forget", nodes[1].fingerprint).returncode == 0

    shown = json.loads(launched.shoal("cluster", "test", "--json").stdout)
    assert [link["trips"] > 0 for link in shown["links"]] == [True]
    assert "no member stands out" not in shown["why"]  # there is but one
    assert "there and back" in launched.shoal("cluster", "test").stdout


def test_a_dry_run_only_prints(tmp_path: Path, fake_ssh: Path) -> None:
    made = Launched(tmp_path)
    done = made.shoal("cluster", "launch", str(made.hosts("one", "locked")), "--dry-run")
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines), done.stderr) == (0, 2, "")
    assert all(line.startswith("ssh -T -o BatchMode=yes ") for line in lines)
    assert "cluster join - --address " in lines[0]
    assert not fake_ssh.exists()
    assert background.running_pid(made.head) is None


def test_a_worker_launches_nobody(launched: Launched) -> None:
    assert launched.shoal("cluster", "launch", str(launched.hosts("one"))).returncode == 0
    one = Home(launched.directory / "one")
    done = launched.shoal("cluster", "launch", str(launched.hosts("two")), home=one)
    assert done.returncode == 2
    assert "this machine is a worker of" in done.stderr


def test_a_code_from_standard_input(tmp_path: Path) -> None:
    for text, said in (
        (b"", "no join code came"),
        (b"\xff\xfe", "in no join code"),
        (b"7K3M\n", "code of 4"),
    ):
        done = subprocess.run(
            [*SHOAL, "cluster", "join", "-", "--address", "127.0.0.1:1"],
            input=text,
            capture_output=True,
            timeout=60,
            env=os.environ | {"SHOAL_HOME": str(tmp_path / "h")},
        )
        assert done.returncode == 2
        assert said in done.stderr.decode()
