"""A console that is no terminal: what it prints has no blanks at the ends of lines."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

_BLANK_ENDS = re.compile(" +$", re.MULTILINE)


class PipedConsole(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        with self.capture() as printed:
            super().print(*objects, **options)
        self.file.write(_BLANK_ENDS.sub("", printed.get()))
