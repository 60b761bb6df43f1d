"""docs/api.md says what the code does: its example runs, its tables list every field, its codes are all codes."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path

import msgspec
import pytest
from fakes.api_fakes import ipc, running

from shoal.comm import messages
from shoal.comm.chat_message import KnownFields
from shoal.comm.sampling_limits import MAX_BIASES, SAMPLING_LIMITS
from shoal.daemon.server.limits import ServerLimits

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SHARED = set(messages.Generation.__struct_fields__)
STRUCTS = (
    {(name, "request"): kind for name, kind in messages.REQUESTS.items()}
    | {(name, "reply"): kind for name, kind in messages.REPLIES.items()}
    | {
        ("chat message", ""): KnownFields,
        ("generation", ""): messages.Generation,
        ("sampling", ""): messages.Sampling,
        ("token logprob", ""): messages.TokenLogprob,
        ("model status", ""): messages.ModelStatus,
    }
)


def section(name: str, side: str) -> str:
    found = re.search(rf"^### `{name}`(?: \({side}\))?\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"no section for {name} {side}"
    return found[1]


@pytest.mark.parametrize(("name", "side"), STRUCTS)
def test_every_field_is_described_with_its_default(name, side):
    kind = STRUCTS[name, side]
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (\S+) \| .*\|$", section(name, side), re.MULTILINE))
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    if name in ("generate", "chat"):
        fields = {key: field for key, field in fields.items() if key not in SHARED}
    assert set(rows) == set(fields)
    for key, shown in rows.items():
        field = fields[key]
        if field.required:
            assert shown == "required", key
        else:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            plain = msgspec.json.encode(default).decode().replace("null", "absent")
            assert shown == plain, key


def test_the_limits_of_sampling_are_those_of_the_table():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| \S+ \| .*\|$", section("sampling", ""), re.MULTILINE))
    for name, limit in SAMPLING_LIMITS.items():
        low, high = str(limit.low).replace("-", "−"), str(limit.high)
        high = "2⁶³ − 1" if limit.high == (1 << 63) - 1 else high
        said = f"{'int' if limit.whole else 'number'}, {'over ' if limit.above else ''}{low} to {high}"
        if name == "logit_bias":
            said = f"map ≤ {MAX_BIASES} of token id → {said}"
        assert rows[name] == said


def test_every_error_code_is_described():
    table = TEXT.split("## Error codes")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(typing.get_args(messages.ErrorCode))


def test_the_limits_are_those_of_the_server():
    limits = ServerLimits()
    assert (limits.message_bytes, limits.pending_bytes, limits.outbox_bytes) == (16 << 20, 256 << 20, 1 << 20)
    assert (limits.requests, limits.requests_per_client, limits.clients) == (1024, 64, 256)
    assert (limits.keepalive_s, limits.heartbeat_s, limits.outbox_s, limits.drain_s) == (2, 5, 30, 30)


def example(address: str) -> subprocess.CompletedProcess[str]:
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert code
    return subprocess.run(
        [sys.executable, "-c", code[1], address], capture_output=True, text=True, timeout=25, check=False
    )


def test_the_example_runs(tmp_path):
    with running(ipc(tmp_path)) as daemon:
        result = example(daemon.address)
    assert result.stderr == ""
    assert result.stdout == "Why is the sky blue? \n[stop after 5 tokens]\n"


@pytest.mark.parametrize("address", ["ipc://{}/none.sock", "tcp://127.0.0.1:9"])
def test_the_example_says_that_nobody_is_there_before_it_gives_up_waiting(tmp_path, address):
    address = address.format(tmp_path)
    result = example(address)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"no daemon answers at {address}: ")
    assert result.stderr.count("\n") == 1
