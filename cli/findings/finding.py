"""A finding: one thing that `shoal doctor` looked at, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `broken`: Shoal does not work without it; `note`: it works, with a limit."""

    name: str
    state: Verdict
    found: str
    mend: str = ""  # one command or action; "" when nothing is to be mended
