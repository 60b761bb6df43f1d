"""Join codes: 65 random bits as 13 characters, each good for one node and for ten minutes; kept in memory only.

Knows how a code is written, and when one counts. Does not know how a node proves that it has one (`pairing.py`).

Wrong tries are bounded for each address; the bound over all addresses is for the work alone, and is high, since whoever
reaches it keeps everybody out. A try takes the head some 2.5 ms, nearly all of it for TLS, so 6000 a minute are a
quarter of a core. Against guessing neither is needed: so many tries, for the ten minutes of 16 good codes, meet one of
them with a chance of 60 000 · 16 / 2^65 = 3e-14. Addresses of one IPv6 network are counted apart, since all machines of
a home may be in it, and one of them is not to keep the others out.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import PairingRefused

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32
CODE_CHARACTERS = 13
CODE_S = 600.0
MAX_CODES = 16  # good ones, or ones that are remembered to say what became of them
TRIES_S = 60.0  # within which failed ones count:
TRIES, TRIES_BY_ONE = 6000, 6  # of all addresses and of one

T = TypeVar("T")


def new_code() -> str:
    """A fresh code, as it is shown: `7K3M-Q9TX-2BD4F`."""
    bits = secrets.randbits(5 * CODE_CHARACTERS)
    text = "".join(ALPHABET[bits >> 5 * place & 31] for place in range(CODE_CHARACTERS))
    return f"{text[:4]}-{text[4:8]}-{text[8:]}"


def read_code(text: str) -> str:
    """The 13 characters in what somebody typed: capital or not, grouped in any way, O for 0, I and L for 1.

    PairingRefused `code` if they are not 13, or if one of them is in no code.
    """
    plain = re.sub(r"[\s_.\-‐‑‒–—]+", "", text[:200]).upper().translate(str.maketrans("OIL", "011"))
    if strange := sorted(set(plain) - set(ALPHABET)):
        raise PairingRefused("code", f"code: has {strange[0]!r}, which is in no join code")
    if len(plain) != CODE_CHARACTERS:
        raise PairingRefused("code", f"code of {len(plain)} characters: must be {CODE_CHARACTERS}")
    return plain


@dataclass
class _Issued:
    code: str
    until: float
    used: bool = False


class Codes:
    """The codes that this node gave out lately. All methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._issued: deque[_Issued] = deque(maxlen=MAX_CODES)
        self._failed: deque[tuple[float, str]] = deque()  # lately, and …
        self._failed_by: Counter[str] = Counter()  # … how many of these by whom

    def new(self) -> str:
        """A fresh code, as it is shown. Of more than 16 the oldest no longer counts."""
        code = new_code()
        with self._lock:
            self._issued.append(_Issued(read_code(code), self._clock() + CODE_S))
        return code

    @property
    def any_good(self) -> bool:
        """Whether somebody could still join by one."""
        with self._lock:
            return any(not it.used and self._clock() < it.until for it in self._issued)

    def redeem(self, tried_by: str, proven: Callable[[str], bool], store: Callable[[], T]) -> T:
        """Use up the code that is `proven`, once `store` has returned; what that returned.

        PairingRefused `code`, `used`, `expired`, or `often` if too many tries failed lately; they cost no code.
        `tried_by` is the address that tries. All codes are tried, so the time says nothing of which one it was.
        """
        with self._lock:
            self._check_rate(tried_by)
            found = [issued for issued in self._issued if proven(issued.code)]
            try:
                if not found:
                    raise PairingRefused("code", "no such join code")
                if found[0].used:
                    raise PairingRefused("used", "this join code was used already")
                if self._clock() >= found[0].until:
                    raise PairingRefused("expired", "this join code has expired")
            except PairingRefused:
                self._failed.append((self._clock(), tried_by))
                self._failed_by[tried_by] += 1
                raise
            stored = store()
            found[0].used = True
            return stored

    def _check_rate(self, tried_by: str) -> None:
        since = self._clock() - TRIES_S
        while self._failed and self._failed[0][0] <= since:
            _, address = self._failed.popleft()
            self._failed_by[address] -= 1
            if not self._failed_by[address]:
                del self._failed_by[address]
        if len(self._failed) >= TRIES or self._failed_by[tried_by] >= TRIES_BY_ONE:
            raise PairingRefused("often", "too many tries with wrong join codes")
