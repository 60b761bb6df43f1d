"""Plots as SVG and as PNG show the same shapes."""

from io import BytesIO
from pathlib import PurePath
from xml.etree import ElementTree

import pytest
from PIL import Image

from shoal.cli.throughput.shapes import Area, Dot, Drawn, Stroke, Words, png, svg, writer_for

WHITE = (255, 255, 255)


def painted(*shapes: Drawn) -> Image.Image:
    """100 × 50, read back at the size that was asked for."""
    picture = Image.open(BytesIO(png(100, 50, shapes)))
    assert picture.size == (200, 100)
    return picture.resize((100, 50), Image.Resampling.BOX)


def dark(picture: Image.Image) -> tuple[int, int, int, int]:
    """The box of what isn't white."""
    found = picture.convert("L").point(lambda value: 255 if value < 200 else 0).getbbox()
    assert found is not None
    return found


def test_a_line_is_where_its_points_are() -> None:
    picture = painted(Stroke(((10, 20), (90, 20)), "#ff0000", 2))
    assert picture.getpixel((50, 20)) == pytest.approx((255, 0, 0), abs=40)
    assert picture.getpixel((50, 25)) == WHITE
    assert picture.getpixel((5, 20)) == WHITE


def test_a_dashed_line_has_gaps() -> None:
    picture = (
        painted(Stroke(((0, 20), (100, 20)), "#000000", 2, dashed=True))
        .point(lambda value: 255 if value > 128 else 0)
        .convert("L")
    )
    assert [picture.getpixel((x, 20)) for x in range(14)] == 2 * (4 * [0] + 3 * [255])


def test_an_area_lets_through_what_is_below() -> None:
    picture = painted(
        Stroke(((0, 25), (100, 25)), "#000000", 4),
        Area(((20, 10), (80, 10), (80, 40), (20, 40)), "#0000ff", 0.5),
    )
    assert picture.getpixel((50, 15)) == pytest.approx((127, 127, 255), abs=3)
    assert picture.getpixel((50, 25)) == pytest.approx((0, 0, 127), abs=6)
    assert picture.getpixel((10, 15)) == WHITE


@pytest.mark.parametrize("text", ["b\udcffd", "b\x1b\x01d", "\u043c\u4e2d", "a < b & c"])
def test_names_of_files_may_have_any_bytes(text: str) -> None:
    words = Words((10, 20), text)
    (found,) = ElementTree.fromstring(svg(100, 50, [words])).iter("{http://www.w3.org/2000/svg}text")
    assert len(found.text or "") == len(text)
    assert dark(painted(words))


def test_a_dot_is_round() -> None:
    picture = painted(Dot((50, 25), 10, "#00aa00"))
    assert picture.getpixel((50, 25)) == pytest.approx((0, 170, 0), abs=3)
    assert picture.getpixel((42, 17)) == pytest.approx(WHITE, abs=3)


@pytest.mark.parametrize(("anchor", "begins"), [("start", 50), ("middle", 34), ("end", 18)])
def test_words_are_anchored(anchor: str, begins: int) -> None:
    left, top, right, bottom = dark(painted(Words((50, 25), "tokens", anchor)))
    assert left == pytest.approx(begins, abs=4)
    assert right - left == pytest.approx(34, abs=8)
    assert (top, bottom) == (pytest.approx(16, abs=3), pytest.approx(25, abs=2))


def test_words_upwards_stand_on_their_left() -> None:
    left, top, right, bottom = dark(painted(Words((20, 25), "tokens", "middle", upwards=True)))
    assert (left, right) == (pytest.approx(11, abs=3), pytest.approx(20, abs=2))
    assert (top + bottom) / 2 == pytest.approx(25, abs=2)
    assert bottom - top == pytest.approx(34, abs=8)


def test_svg_has_each_shape_and_escapes_words() -> None:
    shapes = (
        Stroke(((0, 0), (10, 5)), "#000000", dashed=True),
        Area(((0, 0), (1, 0), (1, 1)), "#ff0000", 0.5),
        Dot((3, 4), 5, "#00ff00"),
        Words((1, 2), "<a & b>", upwards=True),
    )
    root = ElementTree.fromstring(svg(100, 50, shapes))
    kinds = [it.tag.rpartition("}")[2] for it in root]
    assert kinds == ["rect", "polyline", "polygon", "circle", "text"]
    assert root[1].attrib["points"] == "0,0 10,5"
    assert root[1].attrib["stroke-dasharray"]
    assert root[4].text == "<a & b>"


def test_the_name_says_how_it_is_written() -> None:
    assert writer_for(PurePath("a.SVG")) is svg
    assert writer_for(PurePath("a.png")) is png
    with pytest.raises(
        ValueError, match=r"^a\.pdf: plots are written as \.png or \.svg, so the name must end so$"
    ):
        writer_for(PurePath("a.pdf"))
