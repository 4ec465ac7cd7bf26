"""Pictures of the report: floats to pixels, pixels to PNG, and the amplified difference of two pictures.

Shapes: H height, W width, C = 3 colour channels (red, green, blue).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fewstep.errors import ContractError

FloatPicture = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

NOT_FINITE = (255, 0, 255)
"""The colour of a pixel that is NaN or infinite: a broken picture must look broken."""

LARGEST_AMPLIFICATION = 256
"""One level of an 8-bit picture becomes white at this amplification; anything finer cannot be seen in a picture."""

_BACKGROUND, _INK = (255, 255, 255), (40, 44, 50)
_FONT_SIZE = 12


def to_uint8(picture_HWC: FloatPicture) -> Pixels:
    """Returns a [H, W, 3] picture in [-1, 1] as uint8, clipped and rounded; pixels that are not finite are magenta."""
    _require_picture(picture_HWC)
    pixels_HWC = np.rint((_clipped(picture_HWC) + 1.0) * 127.5).astype(np.uint8)
    pixels_HWC[~_finite(picture_HWC)] = NOT_FINITE
    return pixels_HWC


def png_bytes(pixels_HWC: Pixels) -> bytes:
    """Returns a uint8 [H, W, 3] picture as a PNG file."""
    _require_pixels(pixels_HWC)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """Returns a PNG file as a ``data:`` address, for the ``src`` of an ``img``."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def amplification(reference_HWC: FloatPicture, bundle_HWC: FloatPicture) -> int:
    """Returns the power of two that makes the difference of two pictures visible, from 1 to 256.

    The largest one that leaves 98 % of the values unsaturated, so that a few stray pixels do not hide the rest.
    """
    error_HWC, finite_HW = _absolute_error(reference_HWC, bundle_HWC)
    if not finite_HW.any():
        return 1
    typical = float(np.quantile(error_HWC[finite_HW], 0.98))
    if typical * LARGEST_AMPLIFICATION <= 1.0:
        return LARGEST_AMPLIFICATION
    return 1 << max(0, math.floor(-math.log2(typical)))


def difference(reference_HWC: FloatPicture, bundle_HWC: FloatPicture, amplify: int | None = None) -> tuple[Pixels, int]:
    """Returns the absolute difference of two pictures in [-1, 1] as uint8 [H, W, 3], and its amplification.

    Black is equal; at amplification 1 white is the whole range. Pixels that are not finite in either are magenta.

    Args:
        reference_HWC: The reference, float32 in [-1, 1]; values outside are clipped, as they are when shown.
        bundle_HWC: What the bundle computed, of the same shape.
        amplify: The amplification to use, to make several differences comparable; None chooses ``amplification``.
    """
    chosen = amplification(reference_HWC, bundle_HWC) if amplify is None else amplify
    error_HWC, finite_HW = _absolute_error(reference_HWC, bundle_HWC)
    pixels_HWC = np.rint(np.minimum(error_HWC * chosen, 1.0) * 255.0).astype(np.uint8)
    pixels_HWC[~finite_HW] = NOT_FINITE
    return pixels_HWC, chosen


def reduce_mean(pixels_HWC: Pixels, factor: int) -> Pixels:
    """Returns a picture ``factor`` times smaller: the mean of each block (edges are repeated to fill the last)."""
    mean: Pixels = np.rint(_blocks(pixels_HWC, factor).mean(axis=(1, 3))).astype(np.uint8)
    return mean


def reduce_max(pixels_HWC: Pixels, factor: int) -> Pixels:
    """Returns a picture ``factor`` times smaller: the largest of each block, so that no difference is averaged away."""
    largest: Pixels = _blocks(pixels_HWC, factor).max(axis=(1, 3))
    return largest


def grid(rows: Sequence[Sequence[Pixels]], labels: Sequence[str], *, gap: int = 6) -> Pixels:
    """Returns one uint8 [H, W, 3] picture: rows of pictures on white, each row under its caption.

    Args:
        rows: uint8 [H, W, 3] pictures; rows may differ in length and pictures in size.
        labels: One caption per row, cut with an ellipsis where it is wider than the grid; "" leaves no room for one.
        gap: Pixels between pictures and round the grid.
    """
    if not rows or not all(rows):
        raise ContractError("a picture grid has no pictures, expected at least one in every row")
    if len(rows) != len(labels):
        raise ContractError(f"a picture grid has {len(rows)} rows and {len(labels)} labels, expected one per row")
    for pixels_HWC in (pixels_HWC for row in rows for pixels_HWC in row):
        _require_pixels(pixels_HWC)
    font = ImageFont.load_default(_FONT_SIZE)
    caption_heights = [_FONT_SIZE + 4 if label else 0 for label in labels]
    row_heights = [max(pixels_HWC.shape[0] for pixels_HWC in row) for row in rows]
    width = gap + max(sum(pixels_HWC.shape[1] + gap for pixels_HWC in row) for row in rows)
    canvas = Image.new("RGB", (width, gap + sum(caption_heights) + sum(row_heights) + gap * len(rows)), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    top = gap
    for row, label, caption_height, row_height in zip(rows, labels, caption_heights, row_heights, strict=True):
        draw.text((gap, top), _shortened(label, font, width - 2 * gap), fill=_INK, font=font)
        left = gap
        for pixels_HWC in row:
            canvas.paste(Image.fromarray(pixels_HWC), (left, top + caption_height))
            left += pixels_HWC.shape[1] + gap
        top += caption_height + row_height + gap
    return np.asarray(canvas)


def _shortened(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = " ".join(label.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _blocks(pixels_HWC: Pixels, factor: int) -> Pixels:
    """Returns [H / factor, factor, W / factor, factor, C]."""
    height, width, channels = pixels_HWC.shape
    padded_HWC = np.pad(pixels_HWC, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="edge")
    return padded_HWC.reshape(padded_HWC.shape[0] // factor, factor, padded_HWC.shape[1] // factor, factor, channels)


def _absolute_error(
    reference_HWC: FloatPicture, bundle_HWC: FloatPicture
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Returns the error as a share of the whole range, [H, W, C] in [0, 1], and where both are finite, [H, W]."""
    _require_picture(reference_HWC)
    _require_picture(bundle_HWC)
    if reference_HWC.shape != bundle_HWC.shape:
        raise ContractError(
            f"the bundle's picture has shape {bundle_HWC.shape}, expected the reference's {reference_HWC.shape}"
        )
    error_HWC = np.abs(_clipped(reference_HWC) - _clipped(bundle_HWC)) / 2.0
    return error_HWC, _finite(reference_HWC) & _finite(bundle_HWC)


def _clipped(picture_HWC: FloatPicture) -> npt.NDArray[np.float64]:
    return np.clip(np.nan_to_num(picture_HWC.astype(np.float64)), -1.0, 1.0)


def _finite(picture_HWC: FloatPicture) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(picture_HWC).all(axis=-1), dtype=np.bool_)


def _require_picture(picture_HWC: FloatPicture) -> None:
    if picture_HWC.ndim != 3 or picture_HWC.shape[-1] != 3 or picture_HWC.size == 0:
        raise ContractError(f"a picture has shape {picture_HWC.shape}, expected [height, width, 3]")
    if not np.issubdtype(picture_HWC.dtype, np.floating):
        raise ContractError(f"a picture has dtype {picture_HWC.dtype}, expected floats in [-1, 1]")


def _require_pixels(pixels_HWC: Pixels) -> None:
    if pixels_HWC.ndim != 3 or pixels_HWC.shape[-1] != 3 or pixels_HWC.size == 0 or pixels_HWC.dtype != np.uint8:
        raise ContractError(
            f"pixels are {pixels_HWC.dtype} of shape {pixels_HWC.shape}, expected uint8 [height, width, 3]"
        )
