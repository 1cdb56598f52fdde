"""Reads photos as a model wants them.

A photo is turned upright as its EXIF data say, what is transparent lies on white, and the whole of it is resized to the
model's size (bilinear, with antialiasing when it shrinks); its proportions are not kept.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from compress.errors import CompressError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Formats that are opened: those that take no other program to be read."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm"),
)
_UNREADABLE = (
    *(OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError, OverflowError, MemoryError),
    *(struct.error, zlib.error, NotImplementedError, RuntimeError),
)
"""What Pillow raises on damaged files."""


def read_photo(photo: Path | bytes, name: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """Return the pixels [rows, columns, channels], 0 to 255, of an image file or of its content.

    Args:
        photo: where it is, or what is in it.
        name: of the photo, for errors.
        size: rows and columns.
        channels: 1 for gray, 3 for RGB.

    Raises:
        CompressError: if it is no image, is damaged, or is too large to be opened safely.
    """
    rows, columns = size
    try:
        # Pillow warns from 89 million pixels on, which a telephone's camera may have, and refuses twice as many.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(photo) if isinstance(photo, bytes) else photo, formats=FORMATS) as image:
                pixels = _plain(ImageOps.exif_transpose(image), channels)
                pixels = pixels.resize((columns, rows), Image.Resampling.BILINEAR)
    except Image.DecompressionBombError as error:
        raise CompressError(
            name,
            expected=f"an image of at most {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels",
            received=str(error),
            fix="Make it smaller, if you trust whoever made it.",
        ) from error
    except FileNotFoundError as error:
        raise CompressError(name, expected="an image file", received="no such file", fix="Check the path.") from error
    except _UNREADABLE as error:
        # Pillow names the object in memory, which says nothing.
        reason = "a file that is none of these" if isinstance(error, UnidentifiedImageError) else str(error)
        raise CompressError(
            name,
            expected=f"an image ({', '.join(FORMATS)})",
            received=reason[:200] or type(error).__name__,
            fix="Check the file, or save the image again.",
        ) from error
    return np.asarray(pixels, np.uint8).reshape(rows, columns, channels)


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """Return the image with 8 bits for each pixel and channel, without transparency."""
    if image.mode.startswith("I"):
        # 16 bits; 65535 becomes 255.
        image = Image.fromarray(np.clip(np.asarray(image, np.float64) / 257, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")
