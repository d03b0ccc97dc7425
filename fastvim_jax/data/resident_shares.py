"""Spread a resident data set over the mesh: each device keeps its shares of the images and gathers its part of a batch.

How images are shuffled. The seed deals the records into `resident_shares` shares of equal size. Records that remain
(fewer than there are shares) take no part in the run. In every epoch each share is shuffled anew, and every batch takes
equally many images from each share. So a batch is a stratified draw, an image never moves to another share, and the
batches are the same on any number of devices that divides the number of shares.

For random resized crops an image is kept as a square of `resident_size`, both sides resized to it, together with its
height and width. The step draws the box in the image's own proportions and maps it to the square.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, UInt8

from fastvim_jax.data.batches import BatchIterator, decode_record
from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.records import DecodeError, Source
from fastvim_jax.data.resident import check_memory, stored_size
from fastvim_jax.data.transforms import resized, to_array
from fastvim_jax.data.turbo import chosen_decoder
from fastvim_jax.errors import UserError
from fastvim_jax.own_cores import own_cores

# Make the two random streams differ. (A number of 2**32 or more would count as two, and streams might coincide.)
_DEAL, _SHUFFLE = 0, 1


def in_shares(config: ClassificationData) -> bool:
    """Return whether a resident set is kept in shares, each on one device. Random resized crops need shares, too."""
    return config.resident and (config.resident_shares > 1 or config.crop == "random_resized")


def sharded_training(
    source: Source, config: ClassificationData, mesh: Mesh, *, seed: int
) -> BatchIterator:
    """Return an endless iterator over training batches that are on the mesh already; see `make_train_iterator`.

    Records that cannot be decoded are replaced by others of their share.

    Raises:
        UserError: shares, devices and batch size do not fit each other, or the images not into memory.
    """
    shares, size = config.resident_shares, config.batch_size
    if shares % mesh.size or size % shares:
        raise UserError(
            f"data.resident_shares is {shares}, but must be a multiple of the {mesh.size} devices and a divisor of "
            f"data.batch_size={size}."
        )
    records = len(source) // shares
    steps = records // (size // shares)
    if steps == 0:
        raise UserError(
            f"data.batch_size is {size}, but {config.source} {config.train_split} holds only {len(source)} images."
        )
    dealt = np.random.default_rng((seed, _DEAL)).permutation(len(source))
    images = _Shares(source, config, mesh, dealt[: shares * records].reshape(shares, records))

    def stream(first: int) -> Generator[dict[str, Any], None, None]:
        number, epoch = first, -1
        each = size // shares
        orders: list[np.ndarray] = []
        while True:
            if number // steps != epoch:
                epoch = number // steps
                orders = [
                    np.random.default_rng((seed, _SHUFFLE, epoch, share)).permutation(records)
                    for share in range(shares)
                ]
            start = number % steps * each
            yield images.batch([order[start : start + each] for order in orders])
            number += 1

    return BatchIterator(
        stream,
        source,
        config,
        steps_per_epoch=steps,
        identity={
            "seed": seed, "records": len(source), "batch_size": size, "order": f"{shares} shares"
        },
    )  # fmt: skip


class _Shares:
    """Hold the shares of this process's devices. The constructor decodes the images, device by device.

    Args:
        source: data set to decode.
        config: how the images are stored.
        mesh: devices that hold them.
        dealt: indices of the records in `source`, `shares records`.
    """

    def __init__(
        self, source: Source, config: ClassificationData, mesh: Mesh, dealt: np.ndarray
    ) -> None:
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._records = dealt.shape[1]
        self._total = config.batch_size
        places = self._sharding.addressable_devices_indices_map((len(dealt),))
        self._shares = {
            device: range(len(dealt))[index[0] if index else slice(None)]
            for device, index in places.items()
        }
        most = max(len(shares) for shares in self._shares.values())
        check_memory((most * self._records, *stored_size(config), config.channels), advice="")
        self._held: dict[Any, tuple[Array, ...]] = {}
        corrupt: list[int] = []
        for device, shares in self._shares.items():
            records = dealt[shares.start : shares.stop]
            *arrays, bad = load_images(source, config, records)
            corrupt += records.reshape(-1)[bad].tolist()
            placed = tuple(jax.device_put(array, device) for array in arrays)
            self._held[device] = jax.block_until_ready(placed)
            del arrays  # Otherwise the host holds the shares of two devices at once.
        self.corrupt = np.asarray(sorted(corrupt), np.int64)

    def batch(self, orders: list[np.ndarray]) -> dict[str, Any]:
        """Gather a batch, given which records of each share it takes."""
        parts = []
        for device, shares in self._shares.items():
            index = [orders[share] + i * self._records for i, share in enumerate(shares)]
            parts.append(_gather(*self._held[device], np.concatenate(index).astype(np.int32)))
        names = ("image", "label", "source_size")
        batch = {
            name: jax.make_array_from_single_device_arrays(
                (self._total, *pieces[0].shape[1:]), self._sharding, list(pieces)
            )
            for name, pieces in zip(names, zip(*parts, strict=True), strict=True)
        }
        return {**batch, "corrupt": self.corrupt}


def load_images(
    source: Source, config: ClassificationData, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Decode the records of some shares, `shares records`, in threads.

    A record that cannot be decoded is replaced by another of its share. Otherwise the batches would depend on which
    shares a device holds.

    Returns:
        Images `n h w c` share by share, labels `n`, heights and widths `n 2`, and the positions of the records that
        were replaced.

    Raises:
        UserError: no record of a share can be decoded.
    """
    of_share = records.shape[1]
    records = records.reshape(-1)
    side = stored_size(config)
    images = np.empty((len(records), *side, config.channels), np.uint8)
    labels = np.empty(len(records), np.int32)
    sizes = np.empty((len(records), 2), np.int32)
    decoder = chosen_decoder(config)

    def load(place: int) -> bool:
        try:
            record, picture = decode_record(source, int(records[place]), config, decoder)
            images[place] = to_array(resized(picture, side))
        except DecodeError:
            return False
        labels[place], sizes[place] = record.target, (picture.height, picture.width)
        return True

    with ThreadPoolExecutor(own_cores()) as threads:
        decoded = np.fromiter(threads.map(load, range(len(records))), np.bool_, len(records))
    bad = np.flatnonzero(~decoded)
    for start in np.unique(bad // of_share) * of_share:
        share = decoded[start : start + of_share]
        if not share.any():
            raise UserError(
                f"None of the {of_share} records of a share can be decoded, among them record {records[start]} of "
                f"{config.train_split}. Mend or remove the files, or set a smaller data.resident_shares."
            )
        lost, good = start + np.flatnonzero(~share), start + np.flatnonzero(share)
        for array in (images, labels, sizes):
            array[lost] = array[np.resize(good, len(lost))]
    return images, labels, sizes, bad


@jax.jit
def _gather(
    images: UInt8[Array, "n h w c"],
    labels: Int32[Array, " n"],
    sizes: Int32[Array, "n 2"],
    indices: Int32[Array, " b"],
) -> tuple[Array, Array, Array]:
    return images[indices], labels[indices], sizes[indices]
