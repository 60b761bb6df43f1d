"""A console that is no terminal: what it prints has no blanks at the ends of lines."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class PipedConsole(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        with self.capture() as printed:
            super().print(*objects, **options)
        self.file.write("".join(line.rstrip(" ") for line in _cut(printed.get())))


def _cut(text: str) -> list[str]:
    """Its lines, and each end of a line by itself."""
    return [
        part
        for line in text.splitlines(keepends=True)
        for part in (line.rstrip("\n"), "\n" * line.endswith("\n"))
    ]
