"""List which mixers of a config run as fused GPU kernels around the scan, and which fall back to XLA.

The answer comes from the checks that the models make themselves: `layers.fused_core.unsupported` for the options, and
`unsupported` of the kernels' modules for the sizes. Where a mixer falls back, its scan still runs as a kernel.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fastvim_jax.errors import UserError
from fastvim_jax.layers.channel_pooling import ChannelPooling, channel_poolings
from fastvim_jax.layers.direction import MixerConfig
from fastvim_jax.layers.fused_core import unsupported
from fastvim_jax.layers.masking import kept_count
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.layers.ragged_pooling import RaggedPooling, ragged_pooling
from fastvim_jax.models import (
    AnyModelConfig,
    MaskedAutoencoderConfig,
    VisionMambaConfig,
    model_config,
)
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.vision_mamba import grid_poolings
from pallas_kernels import gpu
from pallas_kernels.mixer_core.narrow import missing_channels
from pallas_kernels.mixer_core.sequence_xla import Convolutions
from pallas_kernels.mixer_core.types import CoreOptions, Directions, RowIds

SMALLEST, LARGEST = 32, 1088
"""Smallest and largest square size that `coverage` examines, in pixels."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16", "activations": "compute"},
}
"""The options of each column. bfloat16 with activations="wide" passes on float32 and is covered like f32."""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The image sizes at which the fused kernels run.

    Attributes:
        sizes: the square image sizes that were examined, in pixels.
        fallbacks: for each reason, the sizes at which at least one block falls back for this reason.
    """

    sizes: tuple[int, ...]
    fallbacks: dict[str, tuple[int, ...]]

    @property
    def fused(self) -> tuple[int, ...]:
        """Sizes at which every block runs fused."""
        lost = {size for sizes in self.fallbacks.values() for size in sizes}
        return tuple(size for size in self.sizes if size not in lost)


def coverage(config: AnyModelConfig, sizes: Sequence[int] | None = None) -> Coverage:
    """Find the square sizes at which a Mamba model runs fused on a Hopper GPU.

    Args:
        config: the model, with its dtype and activations. A masked autoencoder counts with its decoder.
        sizes: pixels; by default every whole number of patches from 32 to 1,088.

    Raises:
        UserError: the model has no mixers (a ViT), or this JAX is older than the kernels.
    """
    if jax.__version_info__ < gpu.OLDEST_JAX:
        oldest = ".".join(map(str, gpu.OLDEST_JAX))
        raise UserError(f"the GPU kernels need JAX {oldest}; this is {jax.__version__}.")
    if not has_mixers(config):
        raise UserError(f"{type(config).__name__}: a ViT has no mixers.")
    if sizes is None:
        patch = config.patch[0]
        sizes = range(-(-SMALLEST // patch) * patch, LARGEST + 1, patch)
    found: dict[str, list[int]] = defaultdict(list)

    def collect() -> None:
        for size in sizes:
            reasons = {_reason(*mixer) for mixer in _mixers(config, size)}
            for reason in sorted(reason for reason in reasons if reason):
                found[reason].append(size)

    jax.eval_shape(collect)  # The checks read shapes and dtypes of arrays that need not exist.
    return Coverage(tuple(sizes), {reason: tuple(lost) for reason, lost in found.items()})


def preset_coverage(names: Sequence[str]) -> dict[str, dict[str, Coverage]]:
    """Return the coverage of those presets that have mixers, by name and then by key of `PRECISIONS`."""
    return {
        name: {
            precision: coverage(model_config(name, **options))
            for precision, options in PRECISIONS.items()
        }
        for name in names
        if has_mixers(model_config(name))
    }


def fallback_table(found: dict[str, dict[str, Coverage]]) -> str:
    """Return a Markdown table of the presets that do not run fused at every size, as in docs/gpus.md."""
    lines = [
        f"| model | {' | '.join(PRECISIONS)} | blocks fall back where |",
        f"|---|{'---|' * len(PRECISIONS)}---|",
    ]
    for name, of_precision in found.items():
        counts = [f"{len(c.fused)} of {len(c.sizes)}" for c in of_precision.values()]
        lost: dict[str, set[int]] = defaultdict(set)
        for precision in of_precision.values():
            for reason, sizes in precision.fallbacks.items():
                lost[reason].update(sizes)
        if lost:
            reasons = "; ".join(map(_with_few_sizes, lost, lost.values()))
            lines.append(f"| `{name}` | {' | '.join(counts)} | {reasons} |")
    return "\n".join(lines)


def _with_few_sizes(reason: str, sizes: set[int]) -> str:
    return f"{reason} ({', '.join(map(str, sorted(sizes)))} px)" if len(sizes) < 4 else reason


def has_mixers(config: AnyModelConfig) -> bool:
    """Return whether the model is made of Mamba mixers."""
    encoder = config.encoder if isinstance(config, MaskedAutoencoderConfig) else config
    return isinstance(encoder, VisionMambaConfig)


def _mixers(config: Any, size: int) -> Iterator[tuple[MixerConfig, Pooling, int]]:
    """List mixer, pooling and number of tokens of one period of blocks at a square size."""
    if isinstance(config, MaskedAutoencoderConfig):
        yield from _masked_mixers(config, size)
        return
    config = dataclasses.replace(config, image_size=size)
    tokens = math.prod(config.grid)
    if isinstance(config, ChannelMambaConfig):
        tokens *= config.channels
        poolings = channel_poolings(
            config.grid,
            config.channels,
            scan_order=config.scan_order,
            pool_axes=config.pool_axes,
            method=config.pooling,
            class_token=config.class_token != "none",
        )
    else:
        poolings = grid_poolings(config, config.grid)
    for pooling in poolings:
        yield config.mixer, pooling, tokens + (config.class_token != "none")


def _masked_mixers(
    config: MaskedAutoencoderConfig, size: int
) -> Iterator[tuple[MixerConfig, Pooling, int]]:
    encoder: Any = dataclasses.replace(config.encoder, image_size=size)
    patches, token = math.prod(encoder.grid), encoder.class_token != "none"
    kept = kept_count(patches, config.mask_ratio)
    poolings: tuple[Pooling, ...] = (NoPooling(kept + token),)
    if encoder.pooling != "none":
        ids = jnp.zeros((1, kept), jnp.int32)
        options = {"method": encoder.pooling, "divisor": config.divisor}
        poolings = (ragged_pooling(ids, encoder.grid, reversal=config.reversal, **options),)
    for pooling in poolings:
        yield encoder.mixer, pooling, kept + token
    decoder = dataclasses.replace(encoder, embed_dim=config.decoder_dim)
    yield decoder.mixer, NoPooling(patches + token), patches + token


def _reason(config: MixerConfig, pooling: Pooling, tokens: int) -> str | None:
    """Return why a mixer falls back, or None if it runs fused. Call it while JAX traces."""
    from pallas_kernels.mixer_core import mosaic, mosaic_sequence

    reason = unsupported(config, pooling)
    if reason is not None:
        return reason
    p = config.precision
    e = config.inner + missing_channels(config.inner)
    dtype = p.compute if p.activations == "compute" else p.wide  # that of in_proj's output
    xz = jnp.zeros((1, tokens, 2 * e), dtype)
    kernels, of_channels = jnp.zeros((2, config.conv_width, e)), jnp.zeros((2, e))
    if isinstance(pooling, NoPooling):
        reason = mosaic_sequence.unsupported(xz, Convolutions(kernels, of_channels))
    else:
        directions = Directions(kernels, of_channels, of_channels)
        ids: RowIds = ()
        if isinstance(pooling, RaggedPooling):
            ids = (pooling.row_ids, pooling.reverse_ids)
        reason = mosaic.unsupported(xz, directions.kernels, ids, _options(pooling, config))
    # One reason for all sizes that share it.
    return reason and re.sub(r" of \d+ tokens( of \d+ channels)?", "", reason)


def _options(pooling: Any, config: MixerConfig) -> CoreOptions:
    eps = config.norm_eps
    if isinstance(pooling, ChannelPooling):
        lines = pooling.lines(config.conv_width)
        return CoreOptions(
            *lines[:3], pooling.scale, eps, pooling.method, per_position=lines.per_position
        )
    transposed = isinstance(pooling, GridPooling) and pooling.transposed
    return CoreOptions(
        pooling.rows, pooling.columns, transposed, pooling.scale, eps, pooling.method
    )
