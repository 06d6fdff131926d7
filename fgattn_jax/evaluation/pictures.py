"""Clips as GIFs, frames as grids, masks as black-and-white maps and heat-maps; PNG and GIF by Pillow."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

_INK = (32, 32, 32)
_PAPER = (255, 255, 255)
_FRAME = (70, 130, 200)
_GAP = 4
# Corner colours of a perceptually even dark-to-bright scale, joined by straight lines.
_SCALE = np.array([(13, 8, 64), (84, 20, 125), (163, 44, 122), (226, 89, 82), (250, 163, 56), (248, 245, 150)], float)


def to_pixels(video: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Values in [-1, 1] as 8-bit colours; values outside are clipped.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    values = np.asarray(video, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("expected finite values in a clip, got NaN or infinity: the model's output is broken")
    return np.round((np.clip(values, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def save_gif(path: Path, video: UInt8[np.ndarray, "F Y X 3"], *, zoom: int = 4, frames_per_second: float = 8.0) -> None:
    """Write a clip as an endless GIF.

    Args:
        path: File to write.
        video: 8-bit frames.
        zoom: Every pixel becomes `zoom` x `zoom` pixels.
        frames_per_second: Rounded to hundredths of a second per frame, as GIF stores it.

    Raises:
        ValueError: The frames are no 8-bit RGB clip, or `zoom` or `frames_per_second` is not positive.
    """
    _check_frames(video)
    if zoom < 1 or not frames_per_second > 0:
        raise ValueError(
            f"expected `zoom` >= 1 and `frames_per_second` > 0, got zoom={zoom} and "
            f"frames_per_second={frames_per_second}"
        )
    height, width = video.shape[1:3]
    frames = [Image.fromarray(frame).resize((width * zoom, height * zoom), Image.Resampling.NEAREST) for frame in video]
    duration = round(100 / frames_per_second) * 10
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def frame_grid(
    rows: Sequence[tuple[str, UInt8[np.ndarray, "F Y X 3"]]], *, num_frames: int = 6, zoom: int = 2
) -> Image.Image:
    """Frames of several clips, one clip per line, evenly chosen frames, titles on the left.

    Args:
        rows: Title and 8-bit frames of every line; all clips have the same number of frames.
        num_frames: Frames shown (fewer if the clips are shorter); the first and the last one are among them.
        zoom: Every pixel becomes `zoom` x `zoom` pixels.

    Raises:
        ValueError: No line, or clips of different shapes.
    """
    if not rows:
        raise ValueError("expected at least one line of frames in `rows`, got none")
    for title, video in rows:
        _check_frames(video)
        if video.shape != rows[0][1].shape:
            raise ValueError(f"expected clips of one shape, got {title!r} with shape={video.shape}")
    total, height, width = rows[0][1].shape[:3]
    chosen = np.unique(np.linspace(0, total - 1, min(num_frames, total)).round().astype(int))
    font = _font(13)
    margin = max(round(font.getlength(title)) for title, _ in rows) + 3 * _GAP
    cell_x, cell_y = width * zoom + _GAP, height * zoom + _GAP
    top = 20
    canvas = Image.new("RGB", (margin + cell_x * len(chosen), top + cell_y * len(rows)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, number in enumerate(chosen):
        x = margin + column * cell_x + (cell_x - _GAP) // 2
        draw.text((x, top // 2), f"frame {number}", fill=_INK, font=font, anchor="mm")
    for line, (title, video) in enumerate(rows):
        y = top + line * cell_y
        draw.text((_GAP, y + (cell_y - _GAP) // 2), title, fill=_INK, font=font, anchor="lm")
        for column, number in enumerate(chosen):
            frame = Image.fromarray(video[number]).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            canvas.paste(frame, (margin + column * cell_x, y))
    return canvas


def difference(
    video: UInt8[np.ndarray, "F Y X 3"], reference: UInt8[np.ndarray, "F Y X 3"], factor: float
) -> UInt8[np.ndarray, "F Y X 3"]:
    """`|video - reference| * factor` as 8-bit colours, cut off at white."""
    distance = np.abs(video.astype(np.float32) - reference.astype(np.float32))
    return np.minimum(distance * factor, 255.0).round().astype(np.uint8)


def mask_map(rows: Bool[np.ndarray, "R S"], *, width: int = 256, height: int = 256) -> Image.Image:
    """A mask as a picture: lines are rows (query blocks), columns are keys, white is kept.

    Where several keys or rows fall on one pixel the pixel is grey: the share of them that is kept.

    Args:
        rows: What every row keeps, True is keep.
        width: Columns of the picture.
        height: Lines of the picture.
    """
    image = Image.fromarray(np.where(rows, 255, 0).astype(np.uint8))
    shrunk = image.resize((min(width, image.width), min(height, image.height)), Image.Resampling.BOX)
    return shrunk.resize((width, height), Image.Resampling.NEAREST)


def map_grid(
    cells: Sequence[Sequence[Image.Image]], *, line_titles: Sequence[str], column_titles: Sequence[str], title: str
) -> Image.Image:
    """Pictures of one size in lines and columns with titles.

    Raises:
        ValueError: No picture, or titles and pictures do not match.
    """
    if not cells or not cells[0]:
        raise ValueError("expected at least one picture in `cells`, got none")
    if len(line_titles) != len(cells) or any(len(line) != len(column_titles) for line in cells):
        raise ValueError(
            f"expected a title for every line and column, got {len(line_titles)} and {len(column_titles)} titles for "
            f"{len(cells)} lines of {sorted({len(line) for line in cells})} pictures"
        )
    font, large = _font(12), _font(14)
    width, height = cells[0][0].size
    margin = max(round(font.getlength(text)) for text in line_titles) + 3 * _GAP
    top = 48
    size = (margin + (width + _GAP) * len(column_titles), top + (height + _GAP) * len(cells))
    canvas = Image.new("RGB", (max(size[0], round(large.getlength(title)) + 3 * _GAP), size[1]), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 14), title, fill=_INK, font=large, anchor="lm")
    for column, text in enumerate(column_titles):
        draw.text((margin + column * (width + _GAP) + width // 2, 36), text, fill=_INK, font=font, anchor="mm")
    for line, pictures in enumerate(cells):
        y = top + line * (height + _GAP)
        draw.text((_GAP, y + height // 2), line_titles[line], fill=_INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            x = margin + column * (width + _GAP)
            canvas.paste(picture.convert("RGB"), (x, y))
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_FRAME)
    return canvas


def heat_colours(
    values: Float[np.ndarray, "*shape"], low: float = 0.0, high: float = 1.0
) -> UInt8[np.ndarray, "*shape 3"]:
    """Colours from dark blue (`low` and below) over red to yellow (`high` and above); NaN is light grey."""
    values = np.asarray(values, float)
    place = np.nan_to_num(np.clip((values - low) / max(high - low, 1e-12), 0, 1)) * (len(_SCALE) - 1)
    left = np.minimum(place.astype(int), len(_SCALE) - 2)
    share = (place - left)[..., None]
    colours = _SCALE[left] * (1 - share) + _SCALE[left + 1] * share
    return np.where(np.isnan(values)[..., None], 225, colours).round().astype(np.uint8)


def heat_map(
    values: Float[np.ndarray, "lines columns"],
    *,
    title: str,
    line_label: str,
    column_label: str,
    low: float = 0.0,
    high: float = 1.0,
    line_names: Sequence[str] | None = None,
    cell: int = 24,
    numbers: bool = True,
) -> Image.Image:
    """A table of numbers as coloured cells with a scale beside it.

    Args:
        values: Numbers; NaN is "not there" (grey, no number).
        title: Line above the picture.
        line_label: What lines are, e.g. "layer".
        column_label: What columns are, e.g. "step"; their numbers stand on top.
        low: Value of the darkest colour.
        high: Value of the brightest colour.
        line_names: What stands left of the lines; None is their numbers.
        cell: Pixels per line and, at least, per column.
        numbers: Whether to write the values (two digits) into the cells.
    """
    values = np.asarray(values, float)
    font, large = _font(11), _font(14)
    wide = max(cell, 28) if numbers else cell
    margin, top, scale = 64, 66, 70
    lines, columns = values.shape
    names = [str(line) for line in range(lines)] if line_names is None else line_names
    width = max(margin + columns * wide + scale, round(large.getlength(title)) + 3 * _GAP)
    canvas = Image.new("RGB", (width, top + max(lines * cell, 120) + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 14), title, fill=_INK, font=large, anchor="lm")
    draw.text((margin + columns * wide // 2, 36), column_label, fill=_INK, font=font, anchor="mm")
    draw.text((_GAP, 36), line_label, fill=_INK, font=font, anchor="lm")
    colours = heat_colours(values, low, high)
    step = max(1, -(-20 // wide))
    for line in range(lines):
        y = top + line * cell
        draw.text((margin - 2 * _GAP, y + cell // 2), names[line], fill=_INK, font=font, anchor="rm")
        for column in range(columns):
            x = margin + column * wide
            if line == 0 and column % step == 0:
                draw.text((x + wide // 2, top - 12), str(column), fill=_INK, font=font, anchor="mm")
            colour = tuple(int(part) for part in colours[line, column])
            draw.rectangle((x, y, x + wide - 1, y + cell - 1), fill=colour)
            if numbers and not np.isnan(values[line, column]):
                ink = _INK if sum(colour) > 420 else _PAPER
                text = f"{values[line, column]:.2f}"
                draw.text((x + wide // 2, y + cell // 2), text, fill=ink, font=font, anchor="mm")
    _draw_scale(canvas, (margin + columns * wide + 3 * _GAP, top), max(lines * cell, 120), low, high)
    return canvas


def _draw_scale(canvas: Image.Image, corner: tuple[int, int], height: int, low: float, high: float) -> None:
    shades = heat_colours(np.linspace(1, 0, height))[:, None].repeat(12, axis=1)
    canvas.paste(Image.fromarray(shades), corner)
    draw = ImageDraw.Draw(canvas)
    for share in (0.0, 0.5, 1.0):
        y = corner[1] + round((1 - share) * (height - 1))
        text = f"{low + share * (high - low):.3g}"
        draw.text((corner[0] + 16, y), text, fill=_INK, font=_font(11), anchor="lm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _check_frames(video: np.ndarray) -> None:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(f"expected 8-bit frames [F, Y, X, 3], got {video.dtype} of shape={video.shape}")
