"""The tables of bench/README.md, made from the results that `compare.py` and `offload.py` keep.

    python bench/table.py [RESULT.json …]      prints the tables; default: all in bench/results
    python bench/table.py --write              puts them into bench/README.md, between their marks, and draws plots

Knows results and Markdown. Measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from harness.figures import Figure, spread
from harness.plot import svg

HERE = Path(__file__).parent
README = HERE / "README.md"
SECTIONS = {"figures": HERE / "results", "offload": HERE / "results" / "offload"}
MARKS = "<!-- {}: made by table.py -->", "<!-- end of {} -->"


def table(result: dict[str, Any]) -> str:
    """The results of one machine as Markdown."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    yield (
        f"{machine['cores']} × {machine['cpu']} ({', '.join(machine['flags'])}"
        f"{', virtual' if machine['virtual'] else ''}), {machine['memory_gb']} GB, {machine['system']}"
        f"{'; Shoal with SHOAL_KERNELS=' + machine['kernels'] if 'kernels' in machine else ''}."
    )
    yield ""
    on_disk = any(row.get("disk_gb_per_s") for row in result["rows"].values())
    last = "must; the disk gives GB/s" if on_disk else "weights read, GB/s: Shoal, peer; memory gives"
    yield f"| what | model | Shoal | peer | ratio | {last} |"
    yield "|---|---|---|---|---|---|"
    for row in result["rows"].values():
        for figure in map(Figure.from_json, row["figures"]):
            yield _line(row, figure)
    yield ""
    yield _runs(list(result["rows"].values()))


def _line(row: dict[str, Any], figure: Figure) -> str:
    ours, peer = figure.values.get("shoal", []), figure.peer()
    theirs = figure.values[peer] if peer else []
    cells = [
        f"{figure.name}, {figure.unit}" if figure.unit else figure.name,
        row["model"]["name"],
        spread(ours),
        f"{peer} {spread(theirs)}" if peer else "",
        f"**{spread(ratios)}**" if (ratios := figure.ratios()) else "",
        _bandwidth(row, figure) if figure.weights_gb_per_s else _must(row, figure),
    ]
    return f"| {' | '.join(cells)} |"


def _bandwidth(row: dict[str, Any], figure: Figure) -> str:
    per_token = row["model"]["bytes_per_token"] / 1e9
    read = (f"{per_token * median(values):.1f}" for values in figure.values.values())
    return f"{', '.join(read)}; {spread(row['dram_gb_per_s'])}"


def _must(row: dict[str, Any], figure: Figure) -> str:
    """The least ratio that was asked for, and the speed of the disk."""
    return f"≥ {figure.must:.2f}; {spread(row['disk_gb_per_s'])}" if figure.must else ""


def _runs(rows: list[dict[str, Any]]) -> str:
    """When and with what the rows were measured; if rows differ, all the values."""
    every = (facts for row in rows for name, facts in row["engines"].items() if name != "shoal")
    peers = {facts["version"] for facts in every if "version" in facts}
    parts = (
        {row["date"] for row in rows},
        {f"commit {row['versions']['commit']}" for row in rows},
        {f"{row['threads']} threads" for row in rows},
        {f"{row['rounds']} rounds" for row in rows},
        {f"scheduling {row['versions']['scheduling']}" for row in rows},
        peers,
    )
    return "; ".join(", ".join(sorted(part)) for part in parts if part) + "."


def write(readme: Path, section: str, text: str) -> None:
    """Replace the text between the marks of a section."""
    begin, end = (mark.format(section) for mark in MARKS)
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{readme} lacks the marks {begin} and {end}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def _draw(path: Path) -> None:
    """Writes a plot beside the results, of figures that were measured along an axis."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"].values()
    for row in rows:
        figures = [Figure.from_json(fields) for fields in row["figures"]]
        if drawn := svg(figures, "budget, GB", "s per token"):
            path.with_suffix(".svg").write_text(drawn, encoding="utf-8")


def tables(paths: list[Path]) -> str:
    return "\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser(description="results → Markdown")
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--write", action="store_true", help="into bench/README.md")
    options = parser.parse_args()
    if options.results:
        print(tables(options.results))
        return
    for section, directory in SECTIONS.items():
        text = tables(sorted(directory.glob("*.json")))
        if options.write:
            write(README, section, text)
            for path in directory.glob("*.json"):
                _draw(path)
        else:
            print(text)


if __name__ == "__main__":
    main()
