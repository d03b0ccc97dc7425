"""Build the train state and compile the train step of every task, with plain `jax.jit`.

The state holds the arrays of a model that `nnx.split` took apart. Nothing here waits for the device: metrics are device
scalars, which the loop fetches when it logs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fastvim_jax.data.device_transforms import Augment
from fastvim_jax.distributed import (
    Reduction,
    gather,
    on_every_device,
    require_same_program,
    split_batch,
    state_shardings,
)
from fastvim_jax.models.parameters import map_parameters, stacked_key
from fastvim_jax.training.accumulation import in_parts, mean_value_and_grad
from fastvim_jax.training.ema import init_ema, update_ema
from fastvim_jax.training.parameter_norms import parameter_norms, whole_norm
from fastvim_jax.training.reduction import (
    averaged_gradient,
    gradient_by_device,
    mean_over_devices,
    sum_over_devices,
)
from pallas_kernels.sharding import mark_varying

Batch = Mapping[str, Any]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a train step changes and a checkpoint saves.

    Attributes:
        step: number of updates made, int32.
        params: the model's parameters, an `nnx.State`.
        optimizer: state of the optax optimizer.
        ema: exponential moving average of the parameters, or None.
        model_state: an `nnx.State` of what the loss updates besides parameters, such as running statistics of batch
            norms; or None. It is not averaged: averaged parameters are evaluated with the latest `model_state`.
    """

    step: Any  # Any, because the same tree is also built of shapes, shardings and masks.
    params: Any
    optimizer: Any
    ema: Any
    model_state: Any = None


class Loss(NamedTuple):
    """Result of a loss function that returns more than one number.

    Attributes:
        loss: the mean over the batch, a scalar.
        metrics: further scalars to log, by name; means over the batch as well.
        model_state: the updated `TrainState.model_state`, if the train state has one.
    """

    loss: jax.Array
    metrics: Mapping[str, jax.Array] = {}
    model_state: Any = None


_LARGE = 2**18
"""Entries from which on a kernel of its own for an array costs less than what it saves."""
LossOf = Callable[..., jax.Array | Loss]
"""`loss_of(params, batch, drawn)`, or `loss_of(params, batch, drawn, model_state)`; see `make_train_step`."""
Draw = Callable[[Any, jax.Array, Batch], Any]
"""`draw(params, key, batch) -> drawn`; see `make_train_step`."""


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool = True,
    model_state: Any = None,
) -> TrainState:
    """Build the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=jax.jit(optimizer.init)(params),
        ema=init_ema(params) if ema else None,
        model_state=model_state,
    )


def state_shapes(mesh: Mesh, begin: Callable[[], TrainState]) -> TrainState:
    """Return shapes and shardings of the state that `begin` builds, without computing it."""
    shapes = jax.eval_shape(begin)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(mesh, shapes, stacked_key=stacked_key),
    )


def build_state(begin: Callable[[], TrainState], shapes: TrainState) -> TrainState:
    """Build the state that `begin` builds, with the shardings of `shapes` (from `state_shapes`)."""
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    # Compile with few optimisations: random bits compile slowly, and this program runs only once.
    quick = {"xla_backend_optimization_level": 1}
    return jax.jit(begin, out_shardings=places, compiler_options=quick)()


def draw_key(seed: int | jax.Array, step: jax.Array) -> jax.Array:
    """Return the key of one step's draws, folded from seed and step.

    Drop-path masks also fold in the number of the block, and are drawn for every sample.
    """
    return jax.random.fold_in(jax.random.key(seed), step)


def augment_key(seed: int | jax.Array, step: jax.Array) -> jax.Array:
    """Return the key of one step's augmentation on the device. Its stream differs from that of `draw_key`."""
    stream = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)  # no run has that many steps
    return jax.random.fold_in(stream, step)


def make_train_step(
    loss_of: LossOf,
    optimizer: optax.GradientTransformation,
    *,
    draw: Draw | None = None,
    augment: Augment | None = None,
    ema_decay: float | None = None,
    seed: int = 0,
    accumulate: int = 1,
    shardings: TrainState | None = None,
    reduction: Reduction = "computed",
    by_device: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compile `step(state, batch, norms=True) -> (state, metrics)`, which makes one update. It donates `state`.

    The step runs, in this order: `augment`, `draw`, `loss_of` with its gradient, the average of the weights (if the
    state has one), `optimizer`. So the average takes in the weights before the update.

    Args:
        loss_of: `loss_of(params, batch, drawn)` returns the mean loss over the batch, a scalar or a `Loss`. If the
            train state has a `model_state`, it is the fourth argument, and the returned `Loss` must hold the updated
            one. If the mesh shards parameters, those of the blocks arrive sharded, because the stack gathers them
            block by block; all others arrive gathered.
        optimizer: an optax optimizer.
        draw: `draw(params, key, batch)` draws all that is random in the loss, such as drop-path masks, masks of tokens
            and keys of images. Every array of the pytree it returns has the batch as its *first* axis, because these
            arrays are split together with the batch (see `accumulation.batch_first`). The key is folded from seed and
            step. Without `draw`, `drawn` is None.
        augment: `augment(key, batch) -> batch` on the device, before all else
            (`data.device_transforms.make_augment`).
        ema_decay: decay of the average, if the train state has one.
        seed: seed of all keys.
        accumulate: number of parts that the batch is cut into. The parts pass through the loss one after the other, and
            one update is made with the mean of their gradients. `draw` runs before the cut, for the whole batch, so a
            sample gets the same draws with any number of parts, devices and processes. A `model_state` passes from
            part to part.
        shardings: shardings of the new state. None lets the compiler choose.
        reduction: dtype in which the devices' gradients are summed; see `reduction`. Another one than "computed" wants
            a mesh that shards no parameters, a loss that is a mean over images, and no `model_state`.
        by_device: whether every device computes the gradient of its own images, with the parameters gathered whole
            before; see `reduction.runs_by_device`. Otherwise XLA's partitioner splits the program. Ignored without
            `shardings`, and for a state with a `model_state`.

    Returns:
        The compiled step. Its metrics are scalars on the device: `loss`, those of `Loss.metrics`, `grad_norm` (before
        clipping), `param_norm` (before the update), `update_norm` and `finite_input` (whether every float of the batch
        is finite). The metric `norms` holds three vectors, `grad`, `param` and `update`, with one norm per parameter.
        `step(state, batch, norms=False)` is another program. It makes the same update faster, and has only `grad_norm`
        of the norms.
    """

    places = [] if shardings is None else jax.tree.leaves(shardings.params)
    replicated = all(place.is_fully_replicated for place in places)

    def loss_and_gradient(
        state: TrainState, batch: Batch, drawn: Any, *, over_devices: bool = False
    ) -> Any:
        def part_loss(params: Any, model_state: Any, part: tuple[Batch, Any]) -> Any:
            batch, drawn = part
            # Rebuild the state, so that its variables belong to this trace and the model may assign to them.
            carried = () if model_state is None else (jax.tree.map(lambda leaf: leaf, model_state),)
            found = loss_of(gather_outside_blocks(params), batch, drawn, *carried)
            found = found if isinstance(found, Loss) else Loss(found)
            loss, metrics = found.loss, dict(found.metrics)
            if over_devices:
                loss, metrics = mean_over_devices((loss, metrics))
            return loss, (metrics, found.model_state)

        if accumulate > 1:
            parts = in_parts((batch, drawn), accumulate)
            # Over devices, gradients are summed once, after all parts.
            params = mark_varying(state.params, batch) if over_devices else state.params
            found, grads = mean_value_and_grad(part_loss, params, state.model_state, parts)
            return found, sum_over_devices(grads) if over_devices else grads
        value_and_grad = jax.value_and_grad(part_loss, has_aux=True)
        (loss, more), grads = value_and_grad(state.params, state.model_state, (batch, drawn))
        return (loss, *more), grads

    def reduced_loss_and_gradient(state: TrainState, batch: Batch, drawn: Any) -> Any:
        def compute(params: Any, part: Any, **how: Any) -> Any:
            return loss_and_gradient(replace(state, params=params), *part, **how)

        arguments = state.params, (batch, drawn)
        if reduction != "computed":
            return averaged_gradient(compute, reduction)(*arguments)
        if by_device and places and state.model_state is None:
            return gradient_by_device(compute)(*arguments)
        return compute(*arguments)

    def norms_of(tree: Any) -> jax.Array:
        return on_every_device(parameter_norms(tree))

    def step(
        state: TrainState, batch: Batch, *, seed: jax.Array, norms: bool = True
    ) -> tuple[TrainState, Metrics]:
        if augment is not None:
            batch = augment(augment_key(seed, state.step), batch)
        batch = split_batch(batch)
        key = draw_key(seed, state.step)
        drawn = None if draw is None else draw(state.params, key, batch)
        (loss, more, model_state), grads = reduced_loss_and_gradient(state, batch, drawn)
        params = state.params
        ema = None if state.ema is None else update_ema(state.ema, params, ema_decay or 0.0)
        # Read large parameters before the update overwrites them; otherwise XLA copies them.
        params_norms = norms_of(params) if norms else None
        params = _after((params_norms, ema), params)
        # Join the blocks' gradients first: XLA joins them much more slowly where it fuses that with the update.
        grads = _after((), grads, flat=replicated)
        grad_norm = None
        if not norms:
            # Read large gradients before the update does; otherwise XLA sums and updates in one kernel, and copies.
            grad_norm = on_every_device(_joint_norm(grads, packed=replicated))
            grads = _after(grad_norm, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, params)
        new = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(params, updates),
            optimizer=optimizer_state,
            ema=ema,
            model_state=model_state,
        )
        metrics = {"loss": loss, **more, "finite_input": _finite(batch)}
        if params_norms is not None:
            found = {"grad": norms_of(grads), "param": params_norms, "update": norms_of(updates)}
            metrics |= {f"{kind}_norm": whole_norm(norm) for kind, norm in found.items()}
            metrics["norms"] = found
        else:
            metrics["grad_norm"] = grad_norm
        return new, metrics

    compiled = jax.jit(
        step,
        donate_argnums=0,
        static_argnames="norms",
        out_shardings=(shardings, None),
        compiler_options=_compiler_options(shardings),
    )
    return TrainStep(compiled, seed)


class TrainStep:
    """A compiled step that passes its seed along: as a constant, every seed would need a compiled program of its own.

    Args:
        func: the compiled function, `func(state, batch, seed=..., norms=...)`.
        seed: seed of all keys.

    Attributes:
        keywords: the seed, as the keyword that `func` takes, for who calls `func`.
    """

    def __init__(self, func: Any, seed: int) -> None:
        self.func, self.keywords = func, {"seed": np.uint32(seed)}
        self._placed: jax.Array | None = None
        self._compared: list[Any] = []

    def __call__(
        self, state: TrainState, batch: Batch, **options: bool
    ) -> tuple[TrainState, Metrics]:
        """Make one update. The seed is copied to the devices once; else every step would wait for a copy of it.

        Raises:
            UserError: this process's program does not fit that of process 0.
        """
        if not isinstance(state.step, jax.Array) or isinstance(state.step, jax.core.Tracer):
            return self.func(state, batch, **self.keywords, **options)
        if self._placed is None:
            seed = self.keywords["seed"]
            copy = jax.jit(lambda: jnp.asarray(seed), out_shardings=state.step.sharding)
            self._placed = copy()
        if not state.step.is_fully_addressable:  # Several processes run it.
            self._compare(state, batch, options)
        return self.func(state, batch, seed=self._placed, **options)

    def _compare(self, state: TrainState, batch: Batch, options: dict[str, bool]) -> None:
        """Compare each new program with the other processes before anything runs. It is lowered once all the same."""
        program = jax.tree.map(jnp.shape, batch), options
        if program not in self._compared:
            self._compared.append(program)
            lowered = self.func.lower(state, batch, seed=self._placed, **options)
            require_same_program("training step", lowered.as_text())


def measures_norms(due: bool) -> bool:
    """Return whether a step measures all norms: on GPUs only if they are `due`, because there they cost time.

    With them XLA does not update in place, and launches a hundred small kernels more.
    """
    return due or jax.default_backend() != "gpu"


def _joint_norm(tree: Any, *, packed: bool) -> jax.Array:
    """Compute the norm of all leaves together, in float32 or wider. With `packed`, launch few kernels for small leaves.

    Then the small leaves are written one behind the other, and their squares are summed as one array.
    """
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(tree)]
    small = [leaf.reshape(-1) for leaf in leaves if leaf.size < _LARGE]
    if packed and small:
        large = [leaf for leaf in leaves if leaf.size >= _LARGE]
        leaves = [jax.lax.optimization_barrier(jnp.concatenate(small)), *large]
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in leaves))


def _after(done: Any, tree: Any, *, flat: bool = False) -> Any:
    """Return `tree`. What reads its large leaves runs after them and after `done`, in kernels of its own.

    With `flat`, the large leaves are written with the last axis in one piece. Otherwise XLA may leave them transposed,
    and transpose them inside of the kernel that reads them.
    """
    leaves, structure = jax.tree.flatten(tree)
    large = [i for i, leaf in enumerate(leaves) if leaf.size >= _LARGE]
    laid = [leaves[i].reshape(-1) if flat else leaves[i] for i in large]
    held, _ = jax.lax.optimization_barrier((laid, done))
    for i, leaf in zip(large, held, strict=True):
        leaves[i] = leaf.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, leaves)


def _compiler_options(shardings: TrainState | None) -> dict[str, str] | None:
    """Return the compiler's options for a step on several GPUs, or None.

    By default XLA copies all gradients into a few long arrays, reduces these, and copies each gradient out again by a
    kernel of its own: 415 kernels in a step of FastVim-S, 1 ms of 20. Without that pass NCCL reduces a group of arrays
    where they lie. FastVim-S, which reduces stacks of all blocks' gradients since, is 0.12 ms of 17.7 faster with the
    pass; but a ViT reduces its matrices one by one.
    """
    if shardings is None:
        return None
    place: Any = jax.tree.leaves(shardings)[0]
    mesh = place.mesh
    if mesh.size == 1 or mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return None
    return {"xla_disable_hlo_passes": "all-reduce-contiguous"}


def gather_outside_blocks(params: Any) -> Any:
    """Gather the sharded parameters outside the blocks. The stack gathers those of the blocks, block by block."""
    return map_parameters(lambda info, leaf: leaf if info.stacked else gather(leaf), params)


def require_normalised(images: jax.Array) -> jax.Array:
    """Return `images` unchanged.

    Raises:
        TypeError: if they are integers, that is, pixels that were not preprocessed.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images of dtype {images.dtype} reached the model: preprocess them first")
    return images


def _finite(batch: Batch) -> jax.Array:
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(batch):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            finite &= jnp.isfinite(leaf).all()
    return finite
