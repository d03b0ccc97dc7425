"""Read the images of a plate: one file per channel or one for all, on disk or in an object store."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from fastvim_jax.data.files import read_file
from fastvim_jax.data.multichannel import MultiChannel, read_channels
from fastvim_jax.data.records import DecodeError
from fastvim_jax.data.sources.object_store import KeptFiles
from fastvim_jax.data.sources.plate_index import Site
from fastvim_jax.errors import UserError


class PlateImages:
    """Reader of the sites of an index. Files of an object store are kept on the local disk (`KeptFiles`).

    Args:
        index: path or URL of the index; errors name it.
    """

    def __init__(self, index: str) -> None:
        self.index = index

    def name(self, site: Site) -> str:
        """Return a site's name for messages."""
        return f"{self.index}[{site.name}]"

    def read(
        self, site: Site, channels: Sequence[str] | None = None
    ) -> tuple[MultiChannel, tuple[str, ...]]:
        """Read a site's channels, in the file's integers, and correct their illumination.

        Args:
            site: where the files are.
            channels: names of the channels to read, in this order; None: all. A file of all channels is read whole.

        Returns:
            The image, and the channels that were saturated before they were corrected: their names, or their numbers
            where the file names none.

        Raises:
            DecodeError: a channel is missing, or a file damaged or of another size or type than the first.
        """
        name = self.name(site)
        if not site.channels:
            image = read_channels(self._read(site.files[0], name), name)
            names = image.names or tuple(str(i) for i in range(image.pixels.shape[-1]))
            return image, tuple(names[i] for i in image.saturated())
        image = self._stack(site, site.channels if channels is None else channels, name)
        saturated = tuple(image.names[i] for i in image.saturated())
        return MultiChannel(self._corrected(image, site, name), image.names), saturated

    def encoded(self, site: Site) -> bytes:
        """Return the bytes of a site's file of all channels.

        Raises:
            DecodeError: it cannot be read.
        """
        return self._read(site.files[0], self.name(site))

    def versions(self, files: Sequence[str]) -> list[str]:
        """Return the version of each file of object stores (`KeptFiles.version`), asked for side by side."""
        if not files:
            return []
        with ThreadPoolExecutor(len(files)) as threads:
            return list(threads.map(self._kept.version, files))

    @cached_property
    def _kept(self) -> KeptFiles:
        """Files of an object store on the local disk; each user has an own folder, and each index one in it.

        Raises:
            UserError: the folder belongs to somebody else, who could have put other files there.
        """
        digest = hashlib.blake2b(self.index.encode(), digest_size=8).hexdigest()
        own = Path(tempfile.gettempdir()) / f"fastvim-jump-cp-{os.getuid()}"
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        if own.stat().st_uid != os.getuid():
            raise UserError(
                f"{str(own)!r} belongs to another user: name another folder for temporary files in TMPDIR."
            )
        (own / digest).mkdir(exist_ok=True)
        return KeptFiles(own / digest)

    def _stack(self, site: Site, channels: Sequence[str], name: str) -> MultiChannel:
        planes: list[np.ndarray] = []
        for channel in channels:
            file = site.file(channel)
            if not file:
                raise DecodeError(f"{name}: the channel {channel} is missing.")
            pixels = read_channels(self._read(file, name), f"{name} {channel} ({file})").pixels
            if pixels.shape[-1] != 1:  # Otherwise channels would take each other's names.
                raise DecodeError(
                    f"{name}: {file} holds {pixels.shape[-1]} planes, but one file per channel was expected."
                )
            if planes and (pixels.shape, pixels.dtype) != (planes[0].shape, planes[0].dtype):
                raise DecodeError(
                    f"{name}: the channel {channel} is {pixels.dtype} {pixels.shape}, the first one "
                    f"{planes[0].dtype} {planes[0].shape}."
                )
            planes.append(pixels)
        return MultiChannel(np.concatenate(planes, axis=-1), tuple(channels))

    def _corrected(self, image: MultiChannel, site: Site, name: str) -> np.ndarray:
        """Divide each channel by its illumination function, whose mean is near 1, and clip to the dtype's range."""
        if not site.illumination:
            return image.pixels
        top = np.iinfo(image.pixels.dtype).max
        corrected = image.pixels.copy()
        for place, channel in enumerate(image.names):
            file = site.illumination[site.channels.index(channel)]
            if not file:
                continue
            try:
                function = np.load(io.BytesIO(self._read(file, name)), allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise DecodeError(
                    f"{name}: {file} is no illumination function ({error})."
                ) from None
            if function.shape != image.pixels.shape[:2] or not (function > 0).all():
                raise DecodeError(f"{name}: {file} is no illumination function of this image.")
            divided = image.pixels[..., place] / function
            corrected[..., place] = np.clip(np.round(divided), 0, top)
        return corrected

    def _read(self, file: str, name: str) -> bytes:
        """Return a file's bytes."""
        if "://" not in file:
            try:
                return read_file(file)
            except DecodeError as error:
                raise DecodeError(f"{name}: {error}") from None
        return self._kept.read(file)
