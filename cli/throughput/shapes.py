"""What a plot is made of, and the two ways to write it down: SVG, and PNG through Pillow. Sizes are in pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from math import dist
from pathlib import PurePath
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from PIL.Image import Image

Point = tuple[float, float]
_FINER = 2  # times as many pixels in a PNG, for screens that have them
_DASH, _GAP = 4.0, 3.0
_ANCHORS = {"start": "l", "middle": "m", "end": "r"}  # SVG's names, and Pillow's


@dataclass(frozen=True)
class Stroke:
    """Straight from point to point."""

    points: Sequence[Point]
    colour: str  # "#rrggbb", as everywhere here
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True)
class Area:
    """Inside of its points."""

    points: Sequence[Point]
    colour: str
    opacity: float = 1.0


@dataclass(frozen=True)
class Dot:
    at: Point
    radius: float
    colour: str


@dataclass(frozen=True)
class Words:
    """Written from `at`, their baseline; around it or up to it, by `anchor` (start, middle, end). Or from below."""

    at: Point
    text: str
    anchor: str = "start"
    colour: str = "#000000"
    size: float = 12.0
    upwards: bool = False


Drawn = Stroke | Area | Dot | Words


def svg(width: int, height: int, shapes: Iterable[Drawn]) -> bytes:
    """The document, in UTF-8."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *map(_element, shapes),
        "</svg>\n",
    ]
    return "\n".join(lines).encode()


def _element(shape: Drawn) -> str:
    match shape:
        case Stroke(points, colour, width, dashed):
            dashes = f' stroke-dasharray="{_DASH:g} {_GAP:g}"' if dashed else ""
            return (
                f'<polyline points="{_listed(points)}" fill="none" stroke="{colour}" '
                f'stroke-width="{width:g}"{dashes}/>'
            )
        case Area(points, colour, opacity):
            return f'<polygon points="{_listed(points)}" fill="{colour}" fill-opacity="{opacity:g}"/>'
        case Dot((x, y), radius, colour):
            return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>'
        case Words((x, y), text, anchor, colour, size, upwards):
            turned = f' transform="rotate(-90 {x:g} {y:g})"' if upwards else ""
            return (
                f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" '
                f'font-size="{size:g}"{turned}>{escape(_legible(text))}</text>'
            )


def _legible(text: str) -> str:
    """Without what no document may have: names of files may have any bytes."""
    return "".join(it if it.isprintable() else "\N{REPLACEMENT CHARACTER}" for it in text)


def _listed(points: Sequence[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def png(width: int, height: int, shapes: Iterable[Drawn]) -> bytes:
    """The picture, of twice as many pixels each way."""
    from PIL import Image

    # Drawn larger and made smaller, as Pillow's lines have hard edges.
    scale = 2 * _FINER
    picture = Image.new("RGB", (width * scale, height * scale), "#ffffff")
    for shape in shapes:
        picture = _painted(picture, shape, scale)
    to = BytesIO()
    picture.resize((width * _FINER, height * _FINER), Image.Resampling.LANCZOS).save(to, "PNG", optimize=True)
    return to.getvalue()


def _painted(picture: Image, shape: Drawn, scale: int) -> Image:
    """With the shape on it."""
    from PIL import Image, ImageDraw, ImageFont

    def at(point: Point) -> Point:
        return point[0] * scale, point[1] * scale

    draw = ImageDraw.Draw(picture)
    match shape:
        case Stroke(points, colour, width, dashed):
            strokes = list(_dashes(points)) if dashed else [points]
            for part in strokes:
                draw.line([at(it) for it in part], colour, round(width * scale), "curve")
        case Area(points, colour, opacity):
            over = Image.new("L", picture.size)
            ImageDraw.Draw(over).polygon([at(it) for it in points], round(255 * opacity))
            picture.paste(Image.new("RGB", picture.size, colour), mask=over)
        case Dot(point, radius, colour):
            draw.circle(at(point), radius * scale, colour)
        case Words(point, text, anchor, colour, size, upwards):
            text, font = _legible(text), ImageFont.load_default(size * scale)
            side = _ANCHORS[anchor] + "s"
            if not upwards:
                draw.text(at(point), text, colour, font, side)
            else:
                mask = Image.new("L", picture.size[::-1])
                x, y = at(point)
                ImageDraw.Draw(mask).text((picture.height - y, x), text, 255, font, side)
                turned = mask.transpose(Image.Transpose.ROTATE_90)
                picture.paste(Image.new("RGB", picture.size, colour), mask=turned)
    return picture


def _dashes(points: Sequence[Point]) -> Iterable[tuple[Point, Point]]:
    for (x0, y0), (x1, y1) in pairwise(points):
        length = dist((x0, y0), (x1, y1))
        begin = 0.0
        while begin < length:
            end = min(begin + _DASH, length)
            yield (
                (x0 + (x1 - x0) * begin / length, y0 + (y1 - y0) * begin / length),
                (x0 + (x1 - x0) * end / length, y0 + (y1 - y0) * end / length),
            )
            begin += _DASH + _GAP


Writer = Callable[[int, int, Iterable[Drawn]], bytes]
_WRITERS: dict[str, Writer] = {".png": png, ".svg": svg}


def writer_for(path: PurePath) -> Writer:
    """By how the name ends. ValueError for what is not drawn."""
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"{path}: plots are written as {' or '.join(_WRITERS)}, so the name must end so")
    return writer
