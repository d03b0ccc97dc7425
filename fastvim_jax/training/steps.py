"""The train state and the compiled steps: plain `jax.jit` over split state.

Nothing here waits for the device: metrics come back as device scalars, to be fetched when they are logged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from fastvim_jax.data.device_transforms import Augment, Preprocess
from fastvim_jax.distributed import gather, on_every_device, split_batch, state_shardings
from fastvim_jax.models.parameters import map_parameters, stacked_key
from fastvim_jax.training.accumulation import in_parts, mean_value_and_grad
from fastvim_jax.training.ema import init_ema, update_ema
from fastvim_jax.training.losses import classification_loss
from fastvim_jax.training.norms import parameter_norms, whole_norm

Batch = Mapping[str, Any]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes, and a checkpoint holds.

    Attributes:
        step: number of updates made, int32.
        params: the model's parameters, an `nnx.State`.
        optimizer: optax's state.
        ema: the average of the parameters, or None.
    """

    step: Any  # like all of a pytree's leaves also a shape, a sharding or a mask
    params: Any
    optimizer: Any
    ema: Any


def init_state(
    params: Any, optimizer: optax.GradientTransformation, *, ema: bool = True
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=jax.jit(optimizer.init)(params),
        ema=init_ema(params) if ema else None,
    )


def state_shapes(mesh: Mesh, begin: Callable[[], TrainState]) -> TrainState:
    """Shapes, and places on the mesh, of the state that `begin` builds; nothing is computed."""
    shapes = jax.eval_shape(begin)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(mesh, shapes, stacked_key=stacked_key),
    )


def build_state(begin: Callable[[], TrainState], shapes: TrainState) -> TrainState:
    """The state that `begin` builds, every part made where `shapes` (from `state_shapes`) says."""
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    # Random bits compile slowly, and a program that runs once repays no optimisation.
    quick = {"xla_backend_optimization_level": 1}
    return jax.jit(begin, out_shardings=places, compiler_options=quick)()


def drop_path_key(seed: int | jax.Array, step: jax.Array) -> jax.Array:
    """The key of one step's drop-path masks; the model folds in the block, and draws for every sample."""
    return jax.random.fold_in(jax.random.key(seed), step)


def augment_key(seed: int | jax.Array, step: jax.Array) -> jax.Array:
    """The key of one step's augmentation on the device; another stream than `drop_path_key`."""
    stream = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)  # no run has that many steps
    return jax.random.fold_in(stream, step)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: float = 0.0,
    ema_decay: float | None = None,
    seed: int = 0,
    augment: Augment | None = None,
    accumulate: int = 1,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled `step(state, batch) -> (state, metrics)`; the given state's buffers are reused.

    A batch holds what `augment` takes (`data.device_transforms.make_augment`: uint8 images). Without it, and
    after it, that is `image` `b h w c`, normalised, and `label`: class numbers `b`, or soft targets `b classes`.
    The metrics are scalars on the device: `loss`, `grad_norm` (before clipping), `param_norm` (before the update),
    `update_norm`, `finite_input`; and of each parameter, as vectors, `norms`: `grad`, `param`, `update`.
    The average of the weights, if kept, takes in the weights before the update.

    With `accumulate=k` the batch passes through the model in k parts, and one update is made with the mean of
    their gradients. Whatever is random is drawn for the whole batch first, so neither k nor the number of devices
    and processes decides who gets which draw. `shardings` says where the new state lies; None: up to the compiler.
    """

    def loss_of(params: Any, part: tuple[Batch, Mapping[str, Any]]) -> jax.Array:
        batch, drawn = part
        model = nnx.merge(graphdef, whole_outside_blocks(params))
        logits = model(normalised(batch["image"]), **drawn)
        return classification_loss(logits, batch["label"], label_smoothing=label_smoothing)

    def loss_and_gradient(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        if accumulate == 1:
            return jax.value_and_grad(loss_of)(params, (batch, {"key": key}))
        masks = nnx.merge(graphdef, params).draw_drop_path(key, len(batch["label"]))
        drawn = {"drop_path_keep": in_parts(masks, accumulate, axis=-1)}
        return mean_value_and_grad(loss_of, params, (in_parts(batch, accumulate), drawn))

    def step(state: TrainState, batch: Batch, *, seed: jax.Array) -> tuple[TrainState, Metrics]:
        key = drop_path_key(seed, state.step)
        if augment is not None:
            batch = augment(augment_key(seed, state.step), batch)
        loss, grads = loss_and_gradient(state.params, split_batch(batch), key)
        ema = None if state.ema is None else update_ema(state.ema, state.params, ema_decay or 0.0)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        new = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
            ema=ema,
        )
        trees = {"grad": grads, "param": state.params, "update": updates}
        norms = {kind: on_every_device(parameter_norms(tree)) for kind, tree in trees.items()}
        metrics = {
            "loss": loss,
            **{f"{kind}_norm": whole_norm(norm) for kind, norm in norms.items()},
            "norms": norms,
            "finite_input": jnp.isfinite(batch["image"]).all(),
        }
        return new, metrics

    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    # No constant of the program, so that runs which differ in the seed share a compiled one.
    return partial(compiled, seed=np.uint32(seed))


def whole_outside_blocks(params: Any) -> Any:
    """Parameters made whole for their use, but for those of the blocks, which the stack gathers block by block."""
    return map_parameters(lambda info, leaf: leaf if info.stacked else gather(leaf), params)


def make_eval_step(
    graphdef: nnx.GraphDef, *, preprocess: Preprocess | None = None, per_class: bool = False
) -> Callable[[Any, Batch], Metrics]:
    """A compiled `step(params, batch) -> counts` of one evaluation batch.

    A batch holds `image` `b h w c`, as `preprocess` takes them (`data.device_transforms.make_preprocess`: uint8)
    or normalised, `label` `b` and `valid` `b`, false for padding. The counts are sums over
    the valid images: `count`, `top1`, `top5` (int32) and `loss` (cross entropy, float32 or wider); with `per_class`
    also `class_count` `classes` by label and `confusion` `classes classes` by label and prediction (int32), from
    which images whose logits hold a NaN are missing.
    """

    @jax.jit
    def step(params: Any, batch: Batch) -> Metrics:
        images = batch["image"] if preprocess is None else preprocess(batch["image"])
        logits = nnx.merge(graphdef, whole_outside_blocks(params))(normalised(images))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        label, valid = batch["label"], batch["valid"]
        rank = label_rank(logits, label)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        counts = {
            "count": valid.sum(dtype=jnp.int32),
            "top1": (valid & (rank < 1)).sum(dtype=jnp.int32),
            "top5": (valid & (rank < 5)).sum(dtype=jnp.int32),
            "loss": jnp.where(valid, loss, 0.0).sum(),
        }
        if per_class:
            classes = logits.shape[-1]
            counted = valid & ~jnp.isnan(logits).any(-1)
            zeros = jnp.zeros((classes, classes), jnp.int32)
            counts["class_count"] = zeros[0].at[label].add(valid.astype(jnp.int32))
            counts["confusion"] = zeros.at[label, logits.argmax(-1)].add(counted.astype(jnp.int32))
        return on_every_device(counts)

    return step


def normalised(images: jax.Array) -> jax.Array:
    """The images, once it is sure that they are no pixels.

    Raises:
        TypeError: for whole numbers.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images of dtype {images.dtype} reached the model: preprocess them first")
    return images


def label_rank(logits: jax.Array, label: jax.Array) -> jax.Array:
    """How many classes come before the label: `b classes`, `b` → `b`. Equal logits rank by class number.

    A row that holds a NaN ranks last, so that a broken model is never counted as right.
    """
    own = jnp.take_along_axis(logits, label[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < label[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(-1)
    return jnp.where(jnp.isnan(logits).any(-1), logits.shape[-1], rank)
