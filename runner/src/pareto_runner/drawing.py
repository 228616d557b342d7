"""Pictures of lines, areas and words, written as SVG and as PNG.

A report over thousands of results holds hundreds of figures. A plotting library spends half a second on each; these
few primitives take milliseconds, and their SVG is a tenth of the size. Lengths are CSS pixels, y points downwards.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Dot = tuple[float, float]
Anchor = Literal["start", "middle", "end"]
#: the colour of text and axes: whatever the page, or the reader's colour scheme, writes with
INK = "currentColor"
#: what ``INK`` is in a PNG, and in an SVG of its own on light and on dark screens
INK_RGB, LIGHT, DARK = (31, 35, 40), "#1f2328", "#e6edf3"
#: pixels of a PNG for each CSS pixel; lines are drawn so many times finer, then averaged
PNG_SCALE, FINER, PNG_COLOURS = 1.4, 2, 128
#: from the middle of a line of text down to its baseline, in parts of the size
BASELINE = 0.35


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline."""

    dots: tuple[Dot, ...]
    colour: str = INK
    width: float = 1.0
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Area:
    """A filled polygon."""

    dots: tuple[Dot, ...]
    colour: str = INK
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """A line of text whose ``anchor`` (start, middle or end) lies at x, and whose middle lies at y.

    ``upwards`` turns it around that place, to be read from below.
    """

    x: float
    y: float
    text: str
    size: float = 12.0
    anchor: Anchor = "start"
    opacity: float = 1.0
    upwards: bool = False


@dataclasses.dataclass
class Picture:
    """A sheet of ``width`` by ``height`` pixels, and what is drawn on it, the hindmost first."""

    width: float
    height: float
    items: list[Line | Area | Words] = dataclasses.field(default_factory=list)

    def svg(self, title: str, standalone: bool = False) -> str:
        """Return SVG text with a transparent ground; ``title`` is what a screen reader says.

        A ``standalone`` picture has a size, and ink that turns light on dark screens; otherwise the page that it
        stands in decides both.
        """
        body = "".join(_svg_item(item) for item in self.items)
        box = f'viewBox="0 0 {_short(self.width)} {_short(self.height)}"'
        label = f'role="img" aria-label="{html.escape(title)}"'
        if not standalone:
            return f"<svg {box} {label}>{body}</svg>"
        rule = f"svg{{color:{LIGHT};font-family:system-ui,sans-serif}}"
        rule += f"@media(prefers-color-scheme:dark){{svg{{color:{DARK}}}}}"
        size = f'width="{_short(self.width)}" height="{_short(self.height)}"'
        return (
            f'<?xml version="1.0" encoding="utf-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" {box} {size} {label}>'
            f"<style>{rule}</style>{body}</svg>\n"
        )

    def save_png(self, path: Path) -> None:
        """Write the picture on white."""
        from PIL import Image, ImageDraw

        size = (round(self.width * PNG_SCALE), round(self.height * PNG_SCALE))
        sheet = Image.new("RGB", (size[0] * FINER, size[1] * FINER), "white")
        pen = ImageDraw.Draw(sheet, "RGBA")
        for item in self.items:
            if not isinstance(item, Words):
                _draw_shape(pen, item, PNG_SCALE * FINER)
        sheet = sheet.reduce(FINER)
        for item in self.items:
            if isinstance(item, Words):
                _draw_words(sheet, item)
        few = sheet.quantize(PNG_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        palette = few.getpalette() or []
        lightest = max(range(0, len(palette), 3), key=lambda place: sum(palette[place : place + 3]))
        palette[lightest : lightest + 3] = 255, 255, 255  # the ground, which came out a little darker
        few.putpalette(palette)
        few.save(path, "PNG", compress_level=3)


def beside(pictures: Sequence[Picture]) -> Picture:
    """Set pictures side by side on one sheet."""
    whole = Picture(sum(picture.width for picture in pictures), max(picture.height for picture in pictures))
    x = 0.0
    for picture in pictures:
        whole.items += [_moved(item, x) for item in picture.items]
        x += picture.width
    return whole


@functools.lru_cache(maxsize=10_000)
def text_width(text: str, size: float) -> float:
    """Pixels that a line of text takes in DejaVu Sans, which is wider than what most screens use."""
    return float(_font(100.0).getlength(text)) * size / 100


def _moved(item: Line | Area | Words, right: float) -> Line | Area | Words:
    if isinstance(item, Words):
        return dataclasses.replace(item, x=item.x + right)
    return dataclasses.replace(item, dots=tuple((x + right, y) for x, y in item.dots))


def _short(value: float) -> str:
    """Write a coordinate to a tenth of a pixel, without needless digits."""
    return f"{value:.1f}".removesuffix(".0")


def _svg_item(item: Line | Area | Words) -> str:
    faint = f' opacity="{item.opacity:.2g}"' if item.opacity < 1 else ""
    if isinstance(item, Words):
        x, y = _short(item.x), _short(item.y)
        down = _short(BASELINE * item.size)
        turn = f' transform="rotate(-90 {x} {y})"' if item.upwards else ""
        anchor = f' text-anchor="{item.anchor}"' if item.anchor != "start" else ""
        style = f'font-size="{_short(item.size)}" fill="{INK}"{anchor}{turn}{faint}'
        return f'<text x="{x}" y="{y}" dy="{down}" {style}>{html.escape(item.text)}</text>'
    path = "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in item.dots)
    if isinstance(item, Area):
        return f'<path d="{path}Z" fill="{item.colour}"{faint}/>'
    return f'<path d="{path}" fill="none" stroke="{item.colour}" stroke-width="{_short(item.width)}"{faint}/>'


def _rgb(colour: str) -> tuple[int, int, int]:
    return INK_RGB if colour == INK else (int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16))


def _on_white(colour: str, opacity: float) -> tuple[int, ...]:
    return tuple(round(255 + (part - 255) * opacity) for part in _rgb(colour))


def _draw_shape(pen: Any, item: Line | Area, scale: float) -> None:
    dots = [(x * scale, y * scale) for x, y in item.dots]
    if isinstance(item, Area):
        pen.polygon(dots, fill=(*_rgb(item.colour), round(255 * item.opacity)))
    else:
        # blended beforehand: the joints of a translucent line would show where its pieces overlap
        pen.line(dots, _on_white(item.colour, item.opacity), max(1, round(item.width * scale)), joint="curve")


def _draw_words(sheet: Any, item: Words) -> None:
    from PIL import Image, ImageDraw

    font = _font(item.size * PNG_SCALE)
    colour = _on_white(INK, item.opacity)
    if not item.upwards:
        place = (item.x * PNG_SCALE, (item.y + BASELINE * item.size) * PNG_SCALE)
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[item.anchor]
        ImageDraw.Draw(sheet).text(place, item.text, fill=colour, font=font, anchor=anchor)
        return
    long, high = (round(value) for value in (font.getlength(item.text), 1.4 * font.size))
    mask = Image.new("L", (long, high), 0)
    ImageDraw.Draw(mask).text((0, high / 2 + BASELINE * font.size), item.text, fill=255, font=font, anchor="ls")
    part = {"start": 1.0, "middle": 0.5, "end": 0.0}[item.anchor]
    corner = (round(item.x * PNG_SCALE - high / 2), round(item.y * PNG_SCALE - part * long))
    sheet.paste(colour, corner, mask.rotate(90, expand=True))


@functools.cache
def _font(size: float) -> FreeTypeFont:
    """DejaVu Sans out of matplotlib's folder, without importing matplotlib, which takes half a second."""
    from PIL import ImageFont

    package = importlib.util.find_spec("matplotlib")
    assert package, "the runner depends on matplotlib"
    return ImageFont.truetype(Path(str(package.origin)).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)
