"""Settings of data with any number of channels: which ones a step sees, and the cell recipe's augmentation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from fastvim_jax.config_checks import PositiveInt, Probability
from fastvim_jax.data.cells_channels import CHANNEL_ORDER
from fastvim_jax.data.config import DataConfig
from fastvim_jax.data.sources import data_folder
from fastvim_jax.data.statistics import FILE, read_statistics
from fastvim_jax.errors import UserError

ChannelSampling = Literal["none", "sorted", "unsorted"]

JUMP_CP_MEAN = tuple(
    value / 255
    for value in (
        4.031743599139058, 1.565935237087539, 3.77367898215863, 3.4605251427133257,
        4.1723172504050225, 6.780529773318951, 6.787385700135139, 6.778120829362721,
    )
)  # fmt: skip
"""Means of plate BR00116991 by channel, as the published models used them, on a pixel scale of 0 to 1."""
JUMP_CP_STD = tuple(
    value / 255
    for value in (
        17.318438884455695, 12.015918256263747, 16.966058078452495, 15.064776266287147,
        17.964118200870608, 21.638766346725316, 21.670565699654457, 21.639488585095584,
    )
)  # fmt: skip
"""Standard deviations of the same."""


@dataclasses.dataclass(frozen=True)
class CellsData(DataConfig):
    """Labelled images of any number of channels; see `DataConfig` for the fields that every task shares.

    Raises:
        UserError: on construction, for an impossible value; the message names the field.
    """

    source: str = "array_record"
    """Where records come from: array_record (what `fastvim data prepare` writes), jump_cp (a Parquet index),
    channel_files (one file per channel; `path` is a naming pattern), or another source of `DataConfig` whose images
    have the right number of channels."""
    channels: PositiveInt = 8
    """Channels of every image."""
    channel_names: tuple[str, ...] = CHANNEL_ORDER
    """Their names in order, by which subsets are chosen; (): "0", "1", ..."""
    mean: tuple[float, ...] = ()
    """Subtracted per channel, on a pixel scale of 0 to 1; (): what `fastvim data stats` stored with the data."""
    std: tuple[float, ...] = ()
    """Divides per channel, on a pixel scale of 0 to 1; (): as `mean`."""
    channel_sampling: ChannelSampling = "none"
    """Hierarchical channel sampling: every training step draws a number of channels, then that many channels, and sees
    no others; sorted: in their own order; unsorted: in the order drawn."""
    eval_channels: tuple[str, ...] = ()
    """Channels that evaluation sees, by name; (): all."""
    crop: Literal["random", "centre"] = "random"
    """Where training images are cut to the input's size; smaller ones are padded with zeros on all sides."""
    flip: Probability = 0.5
    """Probability of one of: horizontal flip, vertical flip, a turn by 90, 180 or 270 degrees."""
    defocus: Probability = 0.5
    """Probability that an image is convolved with a disk of `defocus_radius`."""
    defocus_radius: tuple[PositiveInt, PositiveInt] = (1, 3)
    """Smallest and largest radius of the disk in pixels."""
    dropout: Probability = 0.5
    """Probability that `dropout_holes` of an image are set to 0 in all channels."""
    dropout_holes: PositiveInt = 10
    """Largest number of holes; 1 to this many are drawn."""
    dropout_size: PositiveInt = 10
    """Largest height and width of a hole in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        count, distinct = len(self.channel_names), len(set(self.channel_names))
        ok = count in (0, self.channels) and distinct == count
        self._require(ok, "channel_names", f"{self.channels} different names, or ()")
        unknown = [name for name in self.eval_channels if name not in self.names]
        ok = not unknown and len(set(self.eval_channels)) == len(self.eval_channels)
        self._require(ok, "eval_channels", f"different ones of {', '.join(self.names)}")
        low, high = self.defocus_radius
        self._require(low <= high, "defocus_radius", "smallest and largest, in this order")
        height, width = self.height_width
        square = height == width or self.flip == 0
        self._require(square, "image_size", "square, or flip=0: a turned image must keep its shape")

    def _check_statistics(self) -> None:
        if self.mean or self.std:
            super()._check_statistics()

    def resolved(self) -> CellsData:
        """Return the config with the mean and deviation that `fastvim data stats` stored, if it names none.

        Raises:
            UserError: there are none, or they are of other channels, or the path is a URL.
        """
        if self.mean:
            return self
        if "://" in self.path:
            raise UserError(
                f"data.path is the URL {self.path!r}, beside which no mean and deviation are stored: set data.mean and "
                "data.std (`fastvim data stats` prints them)."
            )
        mean, std = read_statistics(data_folder(self.path), self.names, self.path)
        return dataclasses.replace(self, mean=mean, std=std)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a run says of its mean and deviation, if others are stored with the data."""
        try:
            stored = read_statistics(data_folder(self.path), self.names, self.path)
        except UserError:  # There are none, or of other channels.
            return ()
        if np.allclose(stored, (self.mean, self.std), rtol=1e-3, atol=1e-4):
            return ()
        return (
            f"Mean and deviation are those of the config, not those that {FILE} of {self.path} holds: give --data.mean "
            "and --data.std without numbers to use these.",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every channel's name."""
        return self.channel_names or tuple(str(number) for number in range(self.channels))

    @property
    def eval_ids(self) -> tuple[int, ...]:
        """Numbers of the channels that evaluation sees, in the order in which they are named."""
        return tuple(self.names.index(name) for name in self.eval_channels or self.names)
