"""Join codes: how they may be typed, and when they count."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.group.errors import PairingRefused
from shoal.comm.group.join_code import (
    ALPHABET,
    CODE_S,
    MAX_CODES,
    TRIES,
    TRIES_BY_ONE,
    Codes,
    new_code,
    read_code,
)

WRONG = "0000000000000"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def codes(clock) -> Codes:
    return Codes(clock)


def redeem(codes: Codes, code: str, address: str = "192.168.1.5", store=lambda: None):
    return codes.redeem(address, read_code(code).__eq__, store)


def reason(codes: Codes, code: str, address: str = "192.168.1.5") -> str:
    with pytest.raises(PairingRefused) as caught:
        redeem(codes, code, address)
    return caught.value.reason


def test_a_code_is_65_bits_and_fresh_each_time():
    codes = [new_code() for _ in range(2000)]
    assert all(re.fullmatch(f"[{ALPHABET}]{{4}}-[{ALPHABET}]{{4}}-[{ALPHABET}]{{5}}", code) for code in codes)
    assert len(set(codes)) == len(codes)
    for place in range(15):  # each character takes all values
        assert len({code[place] for code in codes}) == (1 if codes[0][place] == "-" else 32)


@given(st.text(ALPHABET, min_size=13, max_size=13), st.data())
def test_it_is_read_however_it_is_typed(plain, data):
    typed = ""
    for character in plain:
        alike = {"0": "0Oo", "1": "1IiLl"}.get(character, character + character.lower())
        typed += data.draw(st.sampled_from(alike)) + data.draw(
            st.sampled_from(["", "", "-", " ", "–", "_", "\n", "."])
        )
    assert read_code(typed) == plain
    assert read_code(f" {plain[:6]}-{plain[6:]} ") == plain


@given(st.text(max_size=40).filter(lambda text: len(re.sub(r"\W", "", text)) != 13))
def test_what_is_no_code_is_refused_in_one_line(text):
    with pytest.raises(PairingRefused) as caught:
        read_code(text)
    assert caught.value.reason == "code"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "0 characters"), ("7K3M-Q9TX-2BD4", "12 characters"), ("7K3M-Q9TX-2BD4FF", "14 characters"),
     ("7K3M-Q9TX-2BD4U", "'U'"), ("7K3M-Q9TX-2BD4é", "'É'"), ("x" * 10_000, "200 characters")],
)  # fmt: skip
def test_what_is_wrong_is_named(text, problem):
    with pytest.raises(PairingRefused, match=problem):
        read_code(text)


def test_a_code_counts_once(codes):
    code = codes.new()
    assert redeem(codes, code.lower(), store=lambda: "stored") == "stored"
    assert reason(codes, code) == "used"


def test_a_code_counts_for_ten_minutes(codes, clock):
    codes.new()
    code, other = codes.new(), codes.new()
    clock.now = CODE_S - 1
    redeem(codes, code)
    clock.now = CODE_S
    assert reason(codes, other) == "expired"


def test_failed_tries_burn_no_code(codes):
    code = codes.new()
    for _ in range(3):
        assert reason(codes, WRONG) == "code"
    redeem(codes, code)


def test_a_failure_to_store_burns_no_code(codes):
    code = codes.new()

    def fail() -> None:
        raise PairingRefused("stored", "no room")

    with pytest.raises(PairingRefused, match="no room"):
        redeem(codes, code, store=fail)
    redeem(codes, code)


def test_tries_are_bounded_and_others_are_not_kept_out(codes, clock):
    code = codes.new()
    for _ in range(TRIES_BY_ONE):
        assert reason(codes, WRONG, "192.168.1.66") == "code"
    assert reason(codes, code, "192.168.1.66") == "often"  # or one could guess on
    redeem(codes, code, "192.168.1.5")
    clock.now = 61
    assert reason(codes, WRONG, "192.168.1.66") == "code"


def test_nobody_stops_pairing_by_wrong_codes(codes, clock):
    """2.3 a second from 40 addresses of the network in which the new machine is, too."""
    code = codes.new()
    for number in range(500):
        clock.now = number / 2.3
        with pytest.raises(PairingRefused):
            redeem(codes, WRONG, f"fd00::{number % 40:x}")
    redeem(codes, code, "fd00::99")


def test_what_is_remembered_of_tries_is_bounded(codes, clock):
    codes.new()
    for number in range(3 * TRIES):
        clock.now = 100 * (number // TRIES)
        assert reason(codes, WRONG, f"a{number}") == "code"
    assert len(codes._failed) == len(codes._failed_by) == TRIES


def test_tries_of_all_are_bounded(codes, clock):
    code = codes.new()
    for number in range(TRIES):
        assert reason(codes, WRONG, f"10.0.0.{number}") == "code"
    for number in range(1000):
        assert reason(codes, WRONG, f"10.0.1.{number}") == "often"
    clock.now = 61
    redeem(codes, code)


def test_there_are_at_most_so_many(codes):
    issued = [codes.new() for _ in range(MAX_CODES + 1)]
    assert reason(codes, issued[0]) == "code"
    for number, code in enumerate(issued[1:]):
        redeem(codes, code, f"10.0.0.{number}")
