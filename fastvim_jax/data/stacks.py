"""Tell images of many channels from photographs, by what a file holds."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from fastvim_jax.data.decode import GREY_MODES, open_header
from fastvim_jax.data.multichannel import NPY, TIFF, MultiChannel, read_channels
from fastvim_jax.data.tiff import SeveralImages, errors_of

_PHOTOGRAPH = 4
"""Samples per pixel of a colour photograph with transparency; files of more hold channels."""
_GREY = (0, 1)
"""Values of the TIFF tag PhotometricInterpretation for pixels without colour."""


def as_stack(image: bytes, name: str) -> MultiChannel | None:
    """Decode the bytes of an image of many channels (docs/cells.md); return None for a photograph.

    Channels are what a `.npy` file holds, the grey pages of a TIFF, and the samples of a TIFF's pixels if they are more
    than a photograph has, as in satellite images. A photograph may have a second page, too: a thumbnail, or the next
    sheet of a scan.

    Raises:
        DecodeError: the image is damaged.
    """
    if image.startswith(NPY):
        return read_channels(image, name)
    if not image.startswith(TIFF):
        return None
    if _has_many_samples(image, name):
        return read_channels(image, name)
    header = open_header(image, name)
    if header.mode not in GREY_MODES or getattr(header, "n_frames", 1) == 1:
        return None
    try:
        stack = read_channels(image, name)
    except SeveralImages:
        return None
    return stack if stack.pixels.shape[-1] > 1 else None


def _has_many_samples(image: bytes, name: str) -> bool:
    """Return whether a TIFF's pixels hold more samples than Pillow reads. Without tifffile, the answer is no."""
    try:
        import tifffile
    except ImportError:
        return False
    with contextlib.suppress(Exception):  # Whoever decodes a damaged file says what is wrong.
        logger = tifffile.logger()
        with errors_of(logger, name), tifffile.TiffFile(io.BytesIO(image)) as opened:
            page: Any = opened.pages[0]
            grey = int(page.photometric) in _GREY
            most = 1 if grey and page.bitspersample > 8 else 2 if grey else _PHOTOGRAPH
            return bool(page.samplesperpixel > most)
    return False
