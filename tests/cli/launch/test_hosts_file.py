"""hosts.toml: what may stand in it, and one line with field, value and limit for what may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cli.launch.hosts_file import MAX_HOSTS, Host, read_hosts
from shoal.daemon.errors import DaemonError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts.toml"
    path.write_text(text)
    return path


def test_all_fields_and_their_defaults(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [[host]]
        address = "pi3.local"
        [[host]]
        name = "old laptop"
        address = "192.168.1.7"
        user = "me"
        shoal = "~/venv/bin/shoal"
        memory = "6GB"
        threads = 4
        home = "~/lent"
        [[host]]
        name = "box"
        memory = "auto"
        """,
    )
    assert read_hosts(path) == [
        Host("pi3.local", "pi3.local"),
        Host("192.168.1.7", "old laptop", "me", "~/venv/bin/shoal", 6_000_000_000, 4, "~/lent"),
        Host("box", "box"),
    ]


WRONG = [
    ("", "has no [[host]]"),
    ("host = 3", "[host] must be written [[host]]"),
    ('[host]\naddress="a"', "[host] must be written [[host]], once for each machine"),
    ("host = [1]", "host 1: must be a table"),
    ('[[hosts]]\naddress="a"', "'hosts' is not known: machines are written as [[host]]"),
    ("[[host]", "is no TOML"),
    ("[[host]]", "host 1: address: is required"),
    ('[[host]]\nadress="a"', "host 1: 'adress' is not known (did you mean address?)"),
    ('[[host]]\naddress="a"\nport=22', "'port' is not known (known are address, name, "),
    ("[[host]]\naddress=3", "address=3: must be a text"),
    ('[[host]]\naddress=""', "address='': must have from 1 to 1024 characters"),
    ('[[host]]\naddress="-oProxyCommand=reboot"', 'must not begin with "-"'),
    ('[[host]]\nname="-oProxyCommand=reboot"', 'must not begin with "-"'),
    ('[[host]]\nname="old laptop"', "name='old laptop': must have no spaces (or give the host an address)"),
    ('[[host]]\naddress="a b"', "must have no spaces"),
    ('[[host]]\naddress="a\\nb"', "must be in one line"),
    ('[[host]]\naddress="me@a"', "must not have the user"),
    ('[[host]]\naddress="a"\nuser="-l"', "user='-l': must not begin with"),
    ('[[host]]\naddress="a"\nuser="a@b"', 'must not have "@" or ":"'),
    ('[[host]]\naddress="a"\nname="\\u001b[2J"', "must be in one line, without control characters"),
    ('[[host]]\naddress="a"\nshoal=""', "shoal='': must have from 1"),
    ('[[host]]\naddress="a"\nhome=["x"]', "home=['x']: must be a text"),
    (
        '[[host]]\naddress="a"\nhome="~me/x"',
        "home='~me/x': must be a path, and ~ stands for the own home only",
    ),
    ('[[host]]\naddress="a"\nmemory=6', 'memory=6: must be a text such as "6GB", or "auto"'),
    ('[[host]]\naddress="a"\nmemory="much"', "memory='much': must be a text such as"),
    ('[[host]]\naddress="a"\nmemory="0"', "must be from 1 B to 1 PiB"),
    ('[[host]]\naddress="a"\nmemory="9999999TB"', "must be from 1 B to 1 PiB"),
    ('[[host]]\naddress="a"\nmemory="' + "9" * 400 + '"', "must be a text such as"),
    ('[[host]]\naddress="a"\nthreads=0', "threads=0: must be a whole number from 1 to 4096"),
    ('[[host]]\naddress="a"\nthreads=true', "threads=True: must be a whole number"),
    ('[[host]]\naddress="a"\nthreads="4"', "threads='4': must be a whole number"),
    ('[[host]]\naddress="a"\nthreads=1.5', "threads=1.5: must be a whole number"),
    ('[[host]]\naddress="a"\n[[host]]\naddress="a"', "host 2: name='a': host 1 has it, too"),
    (
        '[[host]]\naddress="a"\nname="x"\n[[host]]\naddress="a"\nname="y"',
        "host 2: address='a': host 1 is the same machine",
    ),
    ("".join(f'[[host]]\naddress="h{i}"\n' for i in range(MAX_HOSTS + 1)), "must be at most 63"),
    ("#" * (1 << 20) + "\n", "must have at most 1048576 bytes"),
    ("a=" + "[" * 5000, "is no TOML"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DaemonError) as caught:
        read_hosts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert caught.value.code == "bad_request"


def test_one_machine_twice_with_another_home(tmp_path: Path) -> None:
    text = '[[host]]\naddress="a"\nname="x"\nhome="1"\n[[host]]\naddress="a"\nname="y"\nhome="2"'
    assert [host.home for host in read_hosts(written(tmp_path, text))] == ["1", "2"]


def test_what_is_no_file_of_text(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="no such file"):
        read_hosts(tmp_path / "none")
    with pytest.raises(DaemonError, match="must be a file"):
        read_hosts(tmp_path)
    (tmp_path / "latin").write_bytes(b"[[host]]\naddress='\xe4'")
    with pytest.raises(DaemonError, match="is no text in UTF-8"):
        read_hosts(tmp_path / "latin")
