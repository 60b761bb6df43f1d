"""The limits of sampling are the same on the wire, from Python and on the command line."""

from __future__ import annotations

import asyncio
import math

import msgspec
import pytest
from fakes.api_fakes import PATIENCE_S, RawClient, ipc, running
from fakes.cli_fakes import shoal

from shoal.client import AsyncClient, Client
from shoal.comm import wire
from shoal.comm.errors import RequestFailed
from shoal.comm.messages import REQUESTS, Error, Generate, Sampling
from shoal.comm.sampling_limits import MAX_BIASES, SAMPLING_LIMITS, Limit, check_sampling

FIELDS = Sampling.__struct_fields__
BEYOND = {
    name: limit.high + 1 if limit.whole else limit.high + 0.5 for name, limit in SAMPLING_LIMITS.items()
}
BELOW = {
    name: limit.low if limit.above else limit.low - 1 if limit.whole else limit.low - 0.5
    for name, limit in SAMPLING_LIMITS.items()
}


def asked(name: str, value: object) -> dict[str, object]:
    return {name: {7: value} if name == "logit_bias" else value}


def test_every_field_has_a_limit() -> None:
    assert tuple(SAMPLING_LIMITS) == FIELDS
    for name in FIELDS:
        default = getattr(Sampling(), name)
        assert default in (None, {}) or SAMPLING_LIMITS[name].allows(default)


@pytest.mark.parametrize("name", FIELDS)
def test_limits_hold_for_messages_made_here_and_read_from_the_wire(name: str) -> None:
    limit = SAMPLING_LIMITS[name]
    for value in (limit.high, limit.low + 1 if limit.whole else limit.low + 1e-6):
        sampling = Sampling(**asked(name, value))  # type: ignore[arg-type]
        body = msgspec.msgpack.encode({"prompt": "x", "sampling": sampling})
        assert wire.decode(wire.Envelope("generate", b"1", body), REQUESTS) == Generate(
            prompt="x", sampling=sampling
        )
    for value in (BEYOND[name], BELOW[name]):
        with pytest.raises(ValueError, match=name) as refused:
            Sampling(**asked(name, value))  # type: ignore[arg-type]
        assert str(value) in str(refused.value), "the value"
        assert str(limit.low) in str(refused.value), "the limits"
        assert str(limit.high) in str(refused.value), "the limits"
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(asked(name, value), Sampling)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", "1"),
        ("presence_penalty", 10.1),
        ("frequency_penalty", math.inf),
        ("logit_bias", {1: 10001.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(4097), 1.0)),
        ("seed", 1 << 63),
        ("seed", -1),
        ("logprobs", 21),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match=field):
        msgspec.structs.replace(Sampling(), **{field: value})
    with pytest.raises(ValueError, match=field):
        check_sampling(field, value)


@pytest.mark.parametrize(
    ("field", "allowed", "beyond"),
    [
        ("temperature", 100.0, 100.1),
        ("top_k", 1 << 24, (1 << 24) + 1),
        ("top_p", 1.0, 1.1),
        ("min_p", 1.0, 1.1),
        ("repetition_penalty", 10.0, 10.1),
        ("presence_penalty", 10.0, 10.1),
        ("frequency_penalty", -10.0, -10.1),
        ("logit_bias", {1: -1e4}, {1: -10001.0}),
        ("logit_bias", dict.fromkeys(range(4096), 1.0), dict.fromkeys(range(4097), 1.0)),
        ("logit_bias", {1 << 24: 1.0}, {(1 << 24) + 1: 1.0}),
        ("seed", (1 << 63) - 1, 1 << 63),
        ("logprobs", 20, 21),
    ],
)
def test_the_limits_are_these(field: str, allowed: object, beyond: object) -> None:
    assert getattr(Sampling(**{field: allowed}), field) == allowed  # type: ignore[arg-type]
    assert getattr(msgspec.convert({field: allowed}, Sampling), field) == allowed
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: beyond})  # type: ignore[arg-type]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({field: beyond}, Sampling)


def test_a_limit_says_what_it_allows() -> None:
    half_open, whole = Limit(0, 1, above=True), Limit(-3, 7, whole=True)
    assert (str(half_open), str(whole)) == ("a number above 0 to 1", "a whole number from -3 to 7")
    assert [value for value in (0, 1e-9, 1, 1.5, True, "1", None, math.nan) if half_open.allows(value)] == [
        1e-9,
        1,
    ]
    assert [value for value in (-4, -3, 7, 8, 0.0, False) if whole.allows(value)] == [-3, 7]
    with pytest.raises(ValueError, match=f"has 5000 entries: must be at most {MAX_BIASES}"):
        check_sampling("logit_bias", dict.fromkeys(range(5000), 0.0))


# --- every face ------------------------------------------------------------------------------------------


def test_the_wire_and_both_clients_refuse_with_field_value_and_limit(tmp_path) -> None:
    with running(ipc(tmp_path)) as daemon:
        with RawClient(daemon.address) as raw:
            body = msgspec.msgpack.encode({"prompt": "x", "sampling": {"temperature": 200}})
            raw.send_frames(wire.PROTOCOL, b"generate", b"1", body)
            said = raw.until(Error)
            assert (said.code, said.message) == (
                "bad_request",
                "sampling.temperature=200: must be float <= 100.0",
            )
        expected = "sampling.temperature=200: must be a number from 0 to 100"
        with Client(daemon.address, timeout_s=PATIENCE_S) as client:
            with pytest.raises(RequestFailed) as failed:
                client.text("x", temperature=200)
            assert (failed.value.code, str(failed.value)) == ("bad_request", expected)

        async def main() -> None:
            async with AsyncClient(daemon.address, timeout_s=PATIENCE_S) as client:
                with pytest.raises(RequestFailed) as failed:
                    await client.text("x", temperature=200)
                assert (failed.value.code, str(failed.value)) == ("bad_request", expected)

        asyncio.run(main())
        assert daemon.backend.runs == {}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--temperature", "200", "invalid value for '--temperature': '200': must be a number, from 0 to 100"),
        ("--top-p", "0", "invalid value for '--top-p': '0': must be a number, above 0 and at most 1"),
        ("--min-p", "1.5", "invalid value for '--min-p': '1.5': must be a number, from 0 to 1"),
        (
            "--repeat-penalty",
            "0",
            "invalid value for '--repeat-penalty': '0': must be a number, above 0 and at most 10",
        ),
        ("--top-k", "-1", "invalid value for '--top-k': '-1': must be a whole number, at least 0"),
        ("--seed", "-1", "invalid value for '--seed': '-1': must be a whole number, at least 0"),
        ("--top-k", str(1 << 25), f"top_k={1 << 25}: must be a whole number from 0 to {1 << 24}"),
        ("--seed", str(1 << 63), f"seed={1 << 63}: must be a whole number from 0 to {(1 << 63) - 1}"),
    ],
)
def test_the_command_line_refuses_with_field_value_and_limit(option: str, value: str, said: str) -> None:
    result = shoal("run", "m", "p", option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
