"""Define the base class of all models: embed, run the blocks, pool, classify; also under the names that timm uses.

    tokens, grid = embed(images)
    residual     = encode(tokens, poolings(grid))
    logits       = forward_head(forward_features(images))

Each model defines the steps `_embed`, `_poolings`, `_final_norm`, `_pool`, `_classify` and `_as_image`. The methods
here call these steps and not the public methods, because `nnx.tabulate` runs every public method under `jit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from fastvim_jax.distributed.sharding import with_auto_axes
from fastvim_jax.errors import UserError
from fastvim_jax.layers.drop_path import draw_masks, keep_factors
from fastvim_jax.layers.head import make_head
from fastvim_jax.layers.patch_embed import GridSize, grid_of
from fastvim_jax.layers.pooling import Pooling
from fastvim_jax.models import saving
from fastvim_jax.models.names import POOLS
from fastvim_jax.models.rngs import RngsLike, as_rngs
from fastvim_jax.models.stack import run_blocks
from fastvim_jax.typing import Images, Tokens
from pallas_kernels.gpu import log_once

SLOW_DEFAULT = (
    "this model computes in true float32 on the GPU, the exact and slow default; "
    "create_model(..., fast=True) is several times faster (docs/models.md says how exact it is)"
)


class Stream(NamedTuple):
    """The residual stream `b l d`; and its tokens after an RMSNorm without a scale, if a kernel has computed them."""

    residual: Tokens
    normed: Tokens | None = None


class Backbone(nnx.Module):
    """The base of all models. Subclasses set `config`, `blocks`, `norm`, `head`, `out_norms` and the steps above."""

    config: Any
    blocks: Any
    norm: Any
    head: Any
    out_norms: Any
    save_pretrained = saving.save_pretrained
    deterministic: bool | None = None
    """Set by `train()` (False) and `eval()` (True). None: a call with a key drops paths, a call without does not."""
    _mask_axes: tuple[int, ...] = ()
    """Leading shape of a block's drop-path masks: `(2,)` in a ViT, whose attention and MLP drop separately."""
    _head_init: Callable[[float], Initializer]
    """The head's initial distribution, given its standard deviation."""

    @with_auto_axes
    def __call__(
        self,
        images: Images,
        *,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth *branches b"] | None = None,
    ):
        """Classify images, or extract dense features where `out_indices` are set.

        Args:
            images: `b h w c`, normalised, any float dtype; any size of at least one patch.
            key: PRNG key of this step's drop path (training), or None (evaluation).
            drop_path_keep: 0/1 masks as `draw_drop_path` makes them, to use instead of drawing them from `key`.

        Returns:
            Logits `b classes` (`b l classes` for head_pool="all") in float32 or wider; pooled features `b d` if
            num_classes is 0; or the tuple of dense features `b rows columns d`.

        Raises:
            UserError: images of another rank, dtype or channel count, or smaller than a patch; no key after `train()`.
        """
        key, drop_path_keep = self._drop_path(key, drop_path_keep)
        output_blocks = self.config.out_indices
        # 1) Embed patches and positions; 2) run the blocks over the residual stream.
        stream, outputs, grid = self._run(images, output_blocks, key, drop_path_keep)
        # 3) Dense features, or final norm, pooling and head.
        return self._answer(stream, outputs, grid)

    @with_auto_axes
    def features(self, images: Images, **embed: Any) -> Array:
        """Return what the head reads: `b d` after the final norm (`b l d` for head_pool "max" and "all").

        Args:
            images: as for a call.
            **embed: what `embed` takes besides, such as the `channel_ids` of channel models.
        """
        self._require_head("features")
        return self._features(self._run(images, **embed)[0])

    @with_auto_axes
    def intermediates(self, images: Images, **embed: Any) -> list[tuple[Tokens, Tokens]]:
        """Return, for every block, the residual stream before it and its output, both in stored token order.

        The output of a block is its mixer's output in FastVim and Vim, and the new residual stream in a ViT.
        """
        _, outputs, _ = self._run(images, range(self.config.depth), **embed)
        return [outputs[i] for i in range(self.config.depth)]

    def embed(self, images: Images, **embed: Any) -> tuple[Tokens, Any]:
        """Make tokens `b l d`, with class token and position embedding, and the stored grid; float32 or wider."""
        return self._embed(images, **embed)

    def classify(self, residual: Tokens) -> Array:
        """Map the last residual stream to logits, or to pooled features if there is no head."""
        return self._answer_of(self._features(Stream(residual)))

    def poolings(self, grid: Any) -> tuple[Pooling, ...]:
        """Return one period of the stack's poolings over a stored `grid`."""
        return self._poolings(grid)

    def encode(
        self,
        tokens: Tokens,
        poolings: Sequence[Pooling],
        *,
        key: jax.Array | None = None,
        drop_path_keep: Float[Array, "depth *branches b"] | None = None,
        output_blocks: Sequence[int] = (),
    ) -> tuple[Tokens, dict[int, tuple[Tokens, Tokens]]]:
        """Run all blocks over tokens `b l d`, as `embed` makes them or any others.

        Args:
            tokens: floats in stored order; the residual stream holds them in the dtype that `residual_in_fp32` says.
            poolings: one period of the stack's poolings, for example `self.poolings(grid)`.
            key, drop_path_keep: as for a call of the model.
            output_blocks: indices of the blocks to return values of.

        Returns:
            The residual stream before the final norm; and for each of `output_blocks`, by index, the residual stream
            before the block and the block's output.
        """
        stream, outputs = self._encode(Stream(tokens), poolings, output_blocks, key, drop_path_keep)
        return stream.residual, outputs

    def draw_drop_path(
        self, key: jax.Array, batch: int
    ) -> Float[Array, "depth *branches b"] | None:
        """Draw the masks that a call with this key draws for `batch` images; None if the model drops nothing.

        `depth b`; `depth 2 b` in a ViT, one mask for the attention and one for the MLP of each block.
        """
        return draw_masks(key, self.config.drop_path, (self.config.depth, *self._mask_axes, batch))

    # Names that timm uses.

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return self.config.embed_dim

    @property
    def num_classes(self) -> int:
        """Number of classes of the head; 0 for none."""
        return self.config.num_classes

    @property
    def feature_info(self) -> FeatureInfo:
        """Describe the dense features of a call, or those of every block for a model without `out_indices`."""
        each = self.config.out_indices or range(self.config.depth)
        patch = self.config.patch
        reduction = patch[0] if patch[0] == patch[1] else patch
        return FeatureInfo(
            {"num_chs": self.config.embed_dim, "reduction": reduction, "module": f"blocks.{i}"}
            for i in each
        )

    @with_auto_axes
    def forward_features(self, images: Images, **embed: Any) -> Tokens:
        """Return all tokens `b l d` after the final norm, not pooled; a class token is among them."""
        return self._tokens(images, **embed)

    def forward_head(self, tokens: Tokens, *, pre_logits: bool = False) -> Array:
        """Pool the tokens of `forward_features` and classify them.

        Args:
            tokens: `b l d`.
            pre_logits: return the pooled features `b d` instead of logits.
        """
        self._require_head("forward_head")
        return self._head_features(tokens) if pre_logits else self._logits(tokens)

    def feature_maps(self, tokens: Tokens, size: tuple[int, int]) -> Float[Array, "b h w d"]:
        """Lay the tokens of `forward_features` out as the grid of patches, without the class token.

        Args:
            tokens: `b l d`.
            size: pixels of the images, height and width.
        """
        rows, columns = grid_of(size, self.config.patch)
        by_columns = getattr(self.config, "token_order", "row") == "column"
        grid = GridSize(columns, rows) if by_columns else GridSize(rows, columns)
        return with_auto_axes(lambda self, tokens: self._as_image(tokens, grid))(self, tokens)

    @with_auto_axes
    def class_maps(self, maps: Float[Array, "b h w d"]) -> Float[Array, "b h w classes"]:
        """Apply the head to every patch of `feature_maps`: which class each patch speaks for.

        If a FastVim's head reads the mean of the tokens, the mean of these logits over all patches is the image's
        logits.

        Raises:
            UserError: the model has no head.
        """
        if self.head is None:
            raise UserError("class_maps needs a head, which this model has not.")
        norm = getattr(self, "fc_norm", None)  # Of a ViT that classifies the mean.
        return self.head(maps if norm is None else norm(maps))

    def get_intermediate_layers(
        self,
        images: Images,
        n: int | np.integer | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> tuple[Any, ...]:
        """Return the residual stream after some blocks, without the class token; nothing is dropped.

        Args:
            images: as for a call.
            n: the last n blocks, or the blocks' indices (negative ones count from the last).
            reshape: return `b rows columns d` instead of `b rows*columns d`.
            return_prefix_tokens: return pairs (tokens, class token `b 1 d`); needs a class token.
            norm: apply the final norm.
        """
        depth = self.config.depth
        indices = [i - int(n) for i in range(n)] if isinstance(n, int | np.integer) else list(n)
        bad = [i for i in indices if not -depth <= i < depth]
        if bad or not indices:
            raise UserError(
                f"n={n!r}: choose 1 to {depth} last blocks, or of the blocks 0..{depth - 1}."
            )
        if norm:
            self._require_head("norm=True")
        chosen = [i % depth for i in indices]
        return_class = return_prefix_tokens

        def run(self: Backbone, images: Images) -> tuple[Any, ...]:
            _, outputs, grid = self._run(images, chosen)
            found = []
            for i in chosen:
                tokens = self._after_block(*outputs[i])
                tokens = self._final_norm(tokens) if norm else tokens
                image = self._as_image(tokens, grid)
                flat = image if reshape else jax.lax.collapse(image, 1, 3)
                found.append((flat, self._class_token_of(tokens)) if return_class else flat)
            return tuple(found)

        return with_auto_axes(run)(self, images)

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, *, rngs: RngsLike | None = None
    ) -> Backbone:
        """Replace the head by a fresh one, in place, and return the model.

        Args:
            num_classes: classes of the new head; 0 for none.
            global_pool: another `head_pool`, or None to keep it.
            rngs: source of the new head's weights; not needed for 0 classes.

        Raises:
            UserError: there are no `rngs` for a new head; the model has dense features instead of a head, or a norm
                that another pooling does not fit.
        """
        self._require_head("reset_classifier")
        changes: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:
            changes["head_pool"] = POOLS.get(global_pool, global_pool)
        config = dataclasses.replace(self.config, **changes)
        self._check_head_pool(config)
        self.config = config
        self.head = nnx.data(self._make_head(config, as_rngs(rngs)) if num_classes else None)
        return self

    def _answer(self, stream: Stream, outputs: dict[int, tuple[Tokens, Tokens]], grid: Any) -> Any:
        """Return what a call returns: dense features if the config names blocks, else logits or pooled features."""
        blocks = self.config.out_indices
        if not blocks:
            return self._answer_of(self._features(stream))
        pairs = zip(self.out_norms, blocks, strict=True)
        return tuple(self._as_image(outputs[i][1], grid, norm) for norm, i in pairs)

    def _answer_of(self, features: Array) -> Array:
        return features if self.head is None else self._classify(features)

    def _features(self, stream: Stream) -> Array:
        return self._pool(self._final_norm(stream.residual))

    # Steps that each model defines.

    def _embed(self, images: Images) -> tuple[Tokens, Any]:
        raise NotImplementedError

    def _poolings(self, grid: Any) -> tuple[Pooling, ...]:
        raise NotImplementedError

    def _final_norm(self, residual: Tokens) -> Tokens:
        return self.norm(residual)

    def _pool(self, tokens: Tokens) -> Array:
        raise NotImplementedError

    def _classify(self, features: Array) -> Array:
        return self.head(features)

    def _as_image(self, tokens: Tokens, grid: GridSize, norm: Any = None) -> Array:
        raise NotImplementedError

    def _class_token_of(self, tokens: Tokens) -> Float[Array, "b 1 d"]:
        raise NotImplementedError

    def _after_block(self, before: Tokens, output: Tokens) -> Tokens:
        raise NotImplementedError

    def _prepared(self, poolings: Sequence[Pooling]) -> Any:
        return self.blocks

    def _check_head_pool(self, config: Any) -> None:
        """Raise if the norms that the model has do not fit the config's `head_pool`."""

    def _make_head(self, config: Any, rngs: nnx.Rngs) -> nnx.Linear:
        return make_head(
            config.embed_dim,
            config.num_classes,
            kernel_init=self._head_init(config.head_std),
            precision=config.precision,
            rngs=rngs,
        )

    def _run(
        self,
        images: Images,
        output_blocks: Sequence[int] = (),
        key: Any = None,
        drop_path_keep: Any = None,
        **embed: Any,
    ) -> tuple[Stream, dict[int, tuple[Tokens, Tokens]], Any]:
        p = self.config.precision
        exact = p.dtype == "float32" and p.matmul_precision == "highest"
        if exact and jax.default_backend() == "gpu":
            log_once(SLOW_DEFAULT)
        stream, grid = self._start(images, output_blocks, **embed)
        return *self._encode(stream, self._poolings(grid), output_blocks, key, drop_path_keep), grid

    def _start(
        self, images: Images, output_blocks: Sequence[int], **embed: Any
    ) -> tuple[Stream, Any]:
        """Return the residual stream before the first block, and the stored grid."""
        del output_blocks
        tokens, grid = self._embed(images, **embed)
        return Stream(tokens), grid

    def _encode(
        self,
        stream: Stream,
        poolings: Sequence[Pooling],
        output_blocks: Sequence[int],
        key: jax.Array | None,
        drop_path_keep: jax.Array | None,
    ) -> tuple[Stream, dict[int, tuple[Tokens, Tokens]]]:
        config = self.config
        masks = (config.depth, *self._mask_axes, stream.residual.shape[0])
        p = config.precision
        if drop_path_keep is not None and np.shape(drop_path_keep) != masks:
            raise UserError(
                f"drop_path_keep has shape {np.shape(drop_path_keep)}, but must have {masks}, as "
                "draw_drop_path makes it."
            )
        keep = keep_factors(key, drop_path_keep, config.drop_path, masks, p.wide)
        stream = stream._replace(residual=stream.residual.astype(p.residual))
        return self._run_blocks(stream, poolings, output_blocks, keep)

    def _run_blocks(
        self,
        stream: Stream,
        poolings: Sequence[Pooling],
        output_blocks: Sequence[int],
        keep: jax.Array | None,
    ) -> tuple[Stream, dict[int, tuple[Tokens, Tokens]]]:
        config = self.config
        residual, outputs = run_blocks(
            self._prepared(poolings),
            stream.residual,
            poolings,
            depth=config.depth,
            keep=keep,
            mode=config.blocks,
            remat=config.remat,
            output_blocks=output_blocks,
        )
        return Stream(residual), outputs

    def _tokens(self, images: Images, **embed: Any) -> Tokens:
        self._require_head("features")
        return self._final_norm(self._run(images, **embed)[0].residual)

    @with_auto_axes
    def _head_features(self, tokens: Tokens) -> Array:
        return self._pool(tokens)

    @with_auto_axes
    def _logits(self, tokens: Tokens) -> Array:
        return self._answer_of(self._pool(tokens))

    def _drop_path(self, key: Any, keep: Any) -> tuple[Any, Any]:
        """Honour `train()` and `eval()`."""
        if self.deterministic:
            return None, None
        missing = key is None and keep is None and self.config.drop_path > 0
        if self.deterministic is False and missing:
            raise UserError(
                "the model is in training mode (model.train()) and drops paths, so a call needs a key: "
                "model(images, key=key), another key in every step. For evaluation call model.eval()."
            )
        return key, keep

    def _require_head(self, what: str) -> None:
        if self.config.out_indices:
            raise UserError(
                f"{what} needs the final norm and the head, which a model with out_indices="
                f"{self.config.out_indices} has not; build it without out_indices."
            )


class FeatureInfo(list):
    """A list of dicts, one for each dense feature map: `num_chs`, `reduction` (pixels per cell) and `module`."""

    def channels(self) -> list[int]:
        """Return the channels of each."""
        return [each["num_chs"] for each in self]

    def reduction(self) -> list[Any]:
        """Return the pixels that a cell of each covers, a pair (height, width) for patches that are not square."""
        return [each["reduction"] for each in self]

    def module_name(self) -> list[str]:
        """Return the block that each comes from."""
        return [each["module"] for each in self]
