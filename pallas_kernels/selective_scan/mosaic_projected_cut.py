"""How `mosaic_projected` cuts its work into thread blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import PROCESSORS, SHARED_MEMORY
from pallas_kernels.selective_scan.mosaic_walk import Plan

STATES = 16
CHANNELS = 128  # that a warpgroup scans at a time, one a lane
TALL = 64  # rows of a wgmma instruction
MOST_TOKENS = 64
"""Tokens of a thread block. For 128 in bfloat16 a lane would need all of its 255 registers."""
RANK_TILE = 16  # columns of p that a swizzled row of 64 bytes holds
PADDING = 4  # channels; keeps neighbouring rows of step sizes in different banks
UNROLL = 2  # steps per iteration of the walk's loop
START = 6000  # clocks of a thread block beside loads and exponentials, as measured
OVERHEAD = 3 * 1024  # bytes of shared memory for barriers, alignment and the driver


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the work is cut into thread blocks: static numbers that shape the kernel.

    Attributes:
        batch: Number of images.
        lines: Steps of a scan.
        width: Channels.
        rank: Columns of p, a multiple of 16.
        images: Images of a thread block.
        splits: Thread blocks that share an image's channels. Each computes all of p, B and C.
        warpgroups: Warpgroups of a thread block that share its channels.
        part: Channels of a part of W_x.
        slots: Parts of W_x on their way.
        narrow: Whether tokens and weights are bfloat16, not float32.
    """

    batch: int
    lines: int
    width: int
    rank: int
    images: int
    splits: int
    warpgroups: int
    part: int
    slots: int
    narrow: bool = False

    @property
    def rows(self) -> int:
        """Steps of an image as the products see them: whole eights."""
        return pl.cdiv(self.lines, 8) * 8

    @property
    def tokens(self) -> int:
        return self.images * self.rows

    @property
    def columns(self) -> int:
        """Rows of W_x, transposed: p, B and C."""
        return self.rank + 2 * STATES

    @property
    def tall(self) -> int:
        return pl.cdiv(self.columns, TALL) * TALL

    @property
    def parts(self) -> int:
        return self.width // self.part

    @property
    def blocks(self) -> int:
        """Blocks of 128 channels that a thread block scans."""
        return self.width // CHANNELS // self.splits

    @property
    def groups(self) -> int:
        """Thread blocks along the batch."""
        return pl.cdiv(self.batch, self.images)

    @property
    def plan(self) -> Plan:
        """The walk over an image's steps."""
        return Plan(
            batch=self.batch,
            length=self.lines,
            width=self.width,
            groups=1,
            channels=CHANNELS,
            chunk=self.rows,
            splits=1,
            warps=1,
            rest=STATES,
            unroll=UNROLL,
            slots=1,
            reverse=False,
            softplus=True,
        )

    @property
    def shared_memory(self) -> int:
        """Bytes of a thread block's tiles."""
        size = self.itemsize
        walk = 4 * self.warpgroups * self.tokens * (CHANNELS + PADDING)
        product = size * self.part * (self.slots * self.tall + 2 * self.tokens)
        small = 4 * self.tokens * (self.tall + self.rank)
        steps = size * self.warpgroups * CHANNELS * self.rank
        return size * self.width * self.tokens + max(walk, product) + small + steps

    @property
    def itemsize(self) -> int:
        """Bytes of a number of tokens and weights."""
        return 2 if self.narrow else 4

    @property
    def clocks(self) -> int:
        """Estimate a processor's clocks: loads at 64 bytes a clock, then exponentials at 16 a clock."""
        blocks = self.splits * self.groups * 2
        resident = SHARED_MEMORY // (self.shared_memory + OVERHEAD)
        resident = min(resident, pl.cdiv(blocks, PROCESSORS))
        waves = pl.cdiv(blocks, PROCESSORS * resident)
        own = self.width // self.splits
        values = self.width * (self.columns + self.tokens) + own * self.rank
        walk = own * self.images * self.lines * STATES // 16 * resident
        missing = max(
            0, 3 - self.warpgroups * resident
        )  # warpgroups that would hide each other's latencies
        return waves * (START + values * self.itemsize * resident // 64 + walk * (4 + missing) // 4)

    def unsupported(self) -> str | None:
        """Return why no thread block can do this work, or None."""
        if self.width % (CHANNELS * self.splits):
            return f"{self.width} channels are not made of whole blocks of {CHANNELS}"
        if self.tokens > MOST_TOKENS:
            return f"{self.images} images of {self.lines} lines are more than {MOST_TOKENS} tokens"
        if self.shared_memory + OVERHEAD > SHARED_MEMORY:
            return f"{self.lines} lines of {self.width} channels do not fit shared memory"
        return None

    def scratch(self) -> list[Any]:
        """Return the shared memory and the barriers of a thread block."""
        transforms: Any = plgpu  # mypy takes them for abstract classes
        size = self.itemsize
        wide = (transforms.TilingTransform((8, 128 // size)), transforms.SwizzleTransform(128))
        narrow = (
            transforms.TilingTransform((8, RANK_TILE)),
            transforms.SwizzleTransform(RANK_TILE * size),
        )
        f32, pieces = jnp.float32, self.width // CHANNELS
        dtype = jnp.bfloat16 if self.narrow else f32
        terms = 2 if self.narrow else 1
        return [
            plgpu.SMEM((pieces, self.images, self.rows, CHANNELS), dtype),
            plgpu.SMEM((self.tokens, self.tall // STATES, STATES), f32),
            plgpu.SMEM((terms, self.tokens, self.rank), dtype, transforms=narrow),
            plgpu.SMEM((self.warpgroups, CHANNELS, self.rank), dtype, transforms=narrow),
            plgpu.RefUnion(
                [
                    plgpu.SMEM((self.slots, self.tall, self.part), dtype, transforms=wide),
                    plgpu.SMEM((2, self.tokens, self.part), dtype, transforms=wide),
                ],
                [plgpu.SMEM((self.warpgroups, self.tokens, CHANNELS + PADDING), f32)],
            ),
            plgpu.Barrier(num_arrivals=1, num_barriers=pieces),  # u
            plgpu.Barrier(num_arrivals=1, num_barriers=self.slots),  # parts of W_x
            plgpu.Barrier(num_arrivals=1, num_barriers=self.warpgroups),  # W_Δ
            plgpu.Barrier(num_arrivals=1),  # p, B and C
        ]


def choose_cut(batch: int, lines: int, width: int, rank: int, narrow: bool = False) -> Cut | None:
    """Choose the thread blocks that take the fewest clocks by `Cut.clocks`; None if none fits shared memory."""
    blocks = width // CHANNELS
    fitting = []
    for images in (1, 2, 4):
        for splits in (d for d in range(1, blocks + 1) if blocks % d == 0):
            cuts = (
                Cut(
                    batch=batch,
                    lines=lines,
                    width=width,
                    rank=rank,
                    images=images,
                    splits=splits,
                    warpgroups=warpgroups,
                    part=part,
                    slots=slots,
                    narrow=narrow,
                )
                for warpgroups in range(min(3, blocks // splits), 0, -1)
                for part, slots in ((128, 3), (128, 2), (64, 3), (64, 2), (32, 2))
                if part >= 64 or not narrow
            )
            fitting += [cut for cut in cuts if cut.unsupported() is None][:1]
    return min(fitting, key=lambda cut: cut.clocks, default=None)
