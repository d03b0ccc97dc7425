"""Measures training steps: images per second, the largest batch that fits, and how long tracing and compiling take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastvim_jax.bench.model import policy, reference_options
from fastvim_jax.bench.overlap import overlap
from fastvim_jax.bench.record import Columns
from fastvim_jax.data import ClassificationData
from fastvim_jax.data.device_draws import draw_augmentation
from fastvim_jax.data.device_transforms import Augment, make_augment
from fastvim_jax.distributed import MeshConfig, make_mesh, on_mesh, place_batch
from fastvim_jax.distributed.sharding import batch_sharding
from fastvim_jax.errors import UserError
from fastvim_jax.models import MaskedAutoencoderConfig, ModelConfig, build_model, model_config
from fastvim_jax.training.classification.train import make_draw, make_loss
from fastvim_jax.training.config import OptimizerConfig
from fastvim_jax.training.masked import pretrain
from fastvim_jax.training.masked.config import PretrainConfig
from fastvim_jax.training.optimizer import make_optimizer
from fastvim_jax.training.reduction import runs_by_device
from fastvim_jax.training.steps import (
    Draw,
    LossOf,
    TrainState,
    augment_key,
    build_state,
    draw_key,
    init_state,
    make_train_step,
    state_shapes,
)
from pallas_kernels import timing

# Of the first step's loss and gradient (all parameters as one vector), relative to float32 by XLA.
LOSS_TOLERANCES = {"f32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
GRADIENT_TOLERANCES = {"f32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}
CHECKED = 16  # images of the reference's part batches
BETA1 = 0.9
RECIPE: dict[str, Any] = {
    "flip": 0.5, "rand_augment": 9.0, "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "augment_on": "device",
}  # fmt: skip
"""Augmentation of a step with `recipe`, all of it on the device. The host's crops are left out."""
SMOOTHING = 0.1
DROP_PATH = 0.1
EMA_DECAY = 0.9999

Config = ModelConfig | MaskedAutoencoderConfig
Setting = tuple[str, int, int, str]  # model's name, pixels, batch, precision


def step_cases(settings: Sequence[Setting], **how: Any) -> list[tuple[timing.Row, timing.Case]]:
    """List the timed steps for `timing.run`: forward, backward and AdamW. See `rows_and_configs` for `how`.

    The steps of masked autoencoders are those of masked pre-training.
    """
    return [(row, _step(row, config)) for row, config in rows_and_configs(settings, **how)]


def compile_cases(settings: Sequence[Setting], **how: Any) -> list[tuple[timing.Row, timing.Case]]:
    """List steps that are traced and compiled only. Nothing is allocated, so models may be larger than the memory."""
    return [(row, _compile(row, config)) for row, config in rows_and_configs(settings, **how)]


def largest_batch_cases(
    settings: Sequence[Setting], **how: Any
) -> list[tuple[timing.Row, timing.Case]]:
    """Find the largest batch of which a step fits, for each model, size and precision.

    Of several batches, the first that fits is taken. Between the two of a pair in rising order, the largest that fits
    is found by bisection, to a sixteenth of the larger one.
    """
    batches: dict[tuple[str, int, str], list[int]] = {}
    for name, pixels, batch, precision in settings:
        batches.setdefault((name, pixels, precision), []).append(batch)
    found = []
    for (name, pixels, precision), tried in batches.items():
        ((row, config),) = rows_and_configs([(name, pixels, 0, precision)], **how)
        del row["batch"]
        case = _largest_batch(config, tried, "recipe" in row)
        found.append((row | {"largest_batch_of": tried}, case))
    return found


def rows_and_configs(
    settings: Sequence[Setting],
    *,
    activations: str = "compute",
    blocks: str = "unroll",
    recipe: bool = False,
    data: int = 1,
    fsdp: int = 1,
    residual_in_fp32: bool | None = None,
    **options: Any,
) -> list[tuple[timing.Row, Config]]:
    """List rows and configs.

    Args:
        settings: what to measure.
        activations: of models in bf16, "compute" or "wide".
        blocks: "unroll" or "scan".
        recipe: take uint8 images, augment them, drop paths and average the weights, as the supervised recipe does.
        data: groups of devices, as in `MeshConfig`. The batch is that of one device.
        fsdp: devices of a group.
        residual_in_fp32: of models in bf16; see `bench.model.policy`.
        options: further options of models.

    Raises:
        UserError: more devices than there are; or the recipe of a masked autoencoder, whose pre-training has none of
            all that.
    """
    if recipe:
        masked = [name for name, *_ in settings if name.startswith("mae_")]
        if masked:
            raise UserError(f"--recipe is classification's: measure {masked[0]} without it.")
        options = {"drop_path": DROP_PATH, **options}
    if data * fsdp > 1:
        make_mesh(MeshConfig(data, fsdp))  # refuses more devices than there are
    found = []
    for name, pixels, batch, precision in settings:
        chosen = policy(
            name,
            precision,
            activations=activations,
            blocks=blocks,
            residual_in_fp32=residual_in_fp32,
        )
        row = {"model": name, "pixels": pixels, "batch": batch, "precision": precision, **chosen}
        row |= {"recipe": True} if recipe else {}
        row |= {"data": data, "fsdp": fsdp} if data * fsdp > 1 else {}
        config = model_config(name, image_size=pixels, **options, **chosen)
        remat = getattr(config, "encoder", config).remat
        found.append((row | {"remat": remat}, config))
    return found


def _optimizer(params: Any) -> optax.GradientTransformation:
    return make_optimizer(
        OptimizerConfig(beta1=BETA1), params, learning_rate=lambda step: 1e-4, total_steps=1
    )


def _state(config: Config, recipe: bool) -> TrainState:
    params = nnx.state(build_model(config, rngs=nnx.Rngs(0)))
    return init_state(params, _optimizer(params), ema=recipe)


def _size_of(config: Config) -> tuple[int, int]:
    return config.grid[0] * config.patch[0], config.grid[1] * config.patch[1]


def _data(config: Config) -> ClassificationData:
    options: dict[str, Any] = {"channels": config.channels, **RECIPE}
    return ClassificationData(image_size=_size_of(config), **options)


def make_batch(config: Config, batch: int, seed: int, recipe: bool) -> dict[str, jax.Array]:
    """Draw a batch of random images and labels; with `recipe` uint8 images and what augmentation draws for them."""
    images, labels, draws, flips = jax.random.split(jax.random.key(seed), 4)
    shape = (batch, *_size_of(config), config.channels)
    if isinstance(config, MaskedAutoencoderConfig):
        return {"image": jax.random.normal(images, shape)}
    label = jax.random.randint(labels, (batch,), 0, config.num_classes, jnp.int32)
    if not recipe:
        return {"image": jax.random.normal(images, shape), "label": label}
    return {
        "image": jax.random.bits(images, shape, jnp.uint8),
        "label": label,
        "flip": jax.random.bernoulli(flips, RECIPE["flip"], (batch,)),
        **draw_augmentation(draws, _data(config), batch),
    }


def _graphdef(config: Config) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))


def _augment(config: Config) -> Augment:
    return make_augment(_data(config), config.num_classes, label_smoothing=SMOOTHING)


def _loss_and_draw(config: Config, recipe: bool) -> tuple[LossOf, Draw | None]:
    graphdef = _graphdef(config)
    if isinstance(config, MaskedAutoencoderConfig):
        size: dict[str, Any] = {"image_size": _size_of(config), "channels": config.channels}
        run = PretrainConfig(model=config, data=ClassificationData(**size))
        return pretrain.make_loss(graphdef, run), pretrain.make_draw(graphdef)
    return make_loss(graphdef), make_draw(graphdef) if recipe else None


def _train_step(
    config: Config, params: Any, recipe: bool, places: TrainState | None = None
) -> Callable[..., Any]:
    loss_of, draw = _loss_and_draw(config, recipe)
    more: dict[str, Any] = {"augment": _augment(config), "ema_decay": EMA_DECAY} if recipe else {}
    if places is not None:
        mesh: Any = jax.tree.leaves(places)[0].mesh
        more["by_device"] = runs_by_device(config, MeshConfig(**mesh.shape), averages_images=True)
    return make_train_step(loss_of, _optimizer(params), draw=draw, shardings=places, **more)


def mesh_of(row: timing.Row) -> Mesh | None:
    """Return the mesh of a row that measures several devices."""
    return make_mesh(MeshConfig(row["data"], row["fsdp"])) if "data" in row else None


def step_program(
    config: Config, batch: int, recipe: bool, mesh: Mesh | None = None
) -> timing.Program:
    """Compile the step for `batch` images in all: the program of steps that log nothing."""
    state, inputs = jax.eval_shape(
        lambda: (_state(config, recipe), make_batch(config, batch, 0, recipe))
    )
    if mesh is not None:
        state = state_shapes(mesh, lambda: _state(config, recipe))
        inputs = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=batch_sharding(mesh)
            ),
            inputs,
        )
    places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, state)
    step: Any = _train_step(config, state.params, recipe, places)

    # The jitted function inside has compiler options on several GPUs, which another `jit` around it would refuse.
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    seed = jax.device_put(step.keywords, place)
    more: dict[str, Any] = {"keywords": seed, "static": {"norms": False}}
    compile_step = lambda: timing.Program(step.func, state, inputs, **more)  # noqa: E731
    return compile_step() if mesh is None else on_mesh(mesh, compile_step)()


def placed_state(config: Config, recipe: bool, mesh: Mesh | None) -> TrainState:
    """Build the state before the first step, on the devices of the mesh."""
    if mesh is None:
        return _state(config, recipe)

    def begin() -> TrainState:
        return _state(config, recipe)

    return build_state(begin, state_shapes(mesh, begin))


def bytes_on_a_device(tree: Any) -> int:
    """Return the bytes that arrays take on their first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _compile(row: timing.Row, config: Config) -> timing.Case:
    mesh = mesh_of(row)
    batch = row["batch"] * (1 if mesh is None else mesh.size)
    program = step_program(config, batch, "recipe" in row, mesh)
    costs = program.costs()
    lines = program.lowered.as_text().count("\n")
    yield None
    yield {**costs, "lines": lines}


def _step(row: timing.Row, config: Config) -> timing.Case:
    mesh = mesh_of(row)
    devices = 1 if mesh is None else mesh.size
    batch = row["batch"] * devices
    recipe = "recipe" in row
    program = step_program(config, batch, recipe, mesh)
    # The reference runs on one device, some images at a time. All else is allocated only when it is this step's turn,
    # because other programs wait on the same GPUs.
    loss, gradient = _reference_result(row, config, batch)
    yield None

    before = bytes_in_use()
    state = jax.block_until_ready(placed_state(config, recipe, mesh))
    memory = {
        "state_bytes": bytes_on_a_device(state),
        "state_bytes_in_use": bytes_in_use() - before,
    }
    batches = [make_batch(config, batch, seed, recipe) for seed in range(2)]
    batches = batches if mesh is None else [place_batch(mesh, each) for each in batches]
    held, metrics = program(state, batches[0])
    # After one step, Adam's first moment is the gradient times 1 - beta1.
    moment = optax.tree.get(held.optimizer, "mu")
    moment = jax.device_put(moment, jax.local_devices()[0])
    errors = {
        "loss_error": abs(float(metrics["loss"]) / float(loss) - 1),
        "gradient_error": timing.relative_error(_scaled(moment), gradient, together=True),
    }
    del gradient, moment, state
    losses = [metrics["loss"]]

    def one(i):
        nonlocal held
        held, metrics = program(held, batches[i % len(batches)])
        losses.append(metrics["loss"])
        return metrics["loss"]

    gpu = jax.default_backend() == "gpu"
    if gpu:
        median, fastest, slowest, _ = timing.steady_clock(one)
    else:
        median, fastest, slowest = timing.clock(one, steps=2)
    more: dict[str, Any] = {}
    if gpu and mesh is None:
        device = timing.profile(one, 5)
        more = {"device_ms": device.median, "kernels": device.kernels}
    elif gpu:
        more = {"overlap": overlap(timing.device_events(one, 5), 5)}
    precision = row["precision"]
    yield {
        "ms": median, "fastest_ms": fastest, "slowest_ms": slowest,
        "images_per_s": 1e3 * batch / median, "images_per_s_of_a_device": 1e3 * row["batch"] / median,
        **memory, **more,
        "first_loss": float(losses[0]), "last_loss": float(losses[-1]), **errors,
        "correct": errors["loss_error"] <= LOSS_TOLERANCES[precision]
        and errors["gradient_error"] <= GRADIENT_TOLERANCES[precision],
        **program.costs(),
    }  # fmt: skip


def _reference_result(row: timing.Row, config: Config, batch: int) -> Any:
    """Return the reference's loss and gradient of the first step."""
    recipe = "recipe" in row
    run = _reference(config, reference_options(row["model"]), recipe)
    arguments = _state(config, recipe).params, make_batch(config, batch, 0, recipe)
    return jax.block_until_ready(timing.Program(run, *arguments, hasty=True)(*arguments))


def bytes_in_use() -> int:
    """Return the bytes in use on the first device, 0 where it counts none."""
    return int((jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0))


def _reference(config: Config, options: dict[str, Any], recipe: bool) -> Callable[..., Any]:
    """Compute the mean loss of the first step and its gradient, some images at a time, in float32 by XLA."""
    loss_of, draw = _loss_and_draw(_plain(config, options), recipe)

    def run(params, batch):
        first = jnp.zeros((), jnp.int32)  # with the draws of the first step
        if recipe:
            batch = _augment(config)(augment_key(0, first), batch)
        drawn = None if draw is None else draw(params, draw_key(0, first), batch)
        size = batch["image"].shape[0]
        count = size // CHECKED if size % CHECKED == 0 else 1
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), (batch, drawn))

        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(params, *part)), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / count, total)

    return run


def _plain(config: Config, options: dict[str, Any]) -> Config:
    if isinstance(config, MaskedAutoencoderConfig):
        encoder: Any = _plain(config.encoder, options)
        return dataclasses.replace(config, encoder=encoder)
    wide: dict[str, Any] = {"dtype": "float32", "matmul_precision": "highest"}
    return dataclasses.replace(config, **wide, **options)


@jax.jit
def _scaled(moment: Any) -> Any:
    return jax.tree.map(lambda m: m / (1 - BETA1), moment)


def _largest_batch(config: Config, batches: Sequence[int], recipe: bool) -> timing.Case:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    tried: list[dict[str, Any]] = []
    best: dict[str, Any] = {"largest_batch": None}

    def fits(batch: int) -> bool:
        nonlocal best
        attempt: dict[str, Any] = {"batch": batch, "fits": False}
        tried.append(attempt)
        try:
            program = step_program(config, batch, recipe)
            costs = program.costs()
            attempt |= costs
            if limit is not None and costs["peak_bytes"] > limit:
                return False
            ran = _run_once(program, config, batch, recipe)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # The allocator had less to give than the program's count says, for instance between other arrays.
            attempt["refused"] = str(error).split("\n")[0][:300]
            return False
        attempt["fits"] = True
        best = {"largest_batch": batch, **ran, **costs}
        return True

    yield None
    # The tries run while nobody else uses the device, because whether a batch fits is known only once it has run.
    if len(batches) == 2 and batches[0] < batches[1]:
        bisect(fits, *batches)
    else:
        any(map(fits, batches))
    yield {**best, "limit_bytes": limit, "tried": tried}


def _run_once(program: timing.Program, config: Config, batch: int, recipe: bool) -> dict[str, Any]:
    """Run one step and return its loss and milliseconds. Every array is freed before this returns or raises."""
    state, inputs = _state(config, recipe), make_batch(config, batch, 0, recipe)
    jax.block_until_ready((state, inputs))
    start = time.perf_counter()
    try:
        # The new state is dropped here, because the next try needs its memory.
        loss = float(program(state, inputs)[1]["loss"])
    finally:
        # An exception's traceback holds this frame, and with it the arrays.
        for array in jax.tree.leaves((state, inputs)):
            array.delete()
        del state, inputs
    return {
        "loss": loss,
        "correct": bool(jnp.isfinite(loss)),
        "ms": 1e3 * (time.perf_counter() - start),
    }


def bisect(fits: Callable[[int], bool], low: int, high: int) -> None:
    """Call `fits` on batches from `low` to `high`, until the largest that fits is known to a sixteenth of `high`.

    The batches between are multiples of that sixteenth, or of 1.
    """
    grain = max(high // 16, 1)
    if not fits(low) or fits(high):
        return
    while high - low > grain:
        middle = max((low + high) // 2 // grain * grain, low + 1)
        low, high = (middle, high) if fits(middle) else (low, middle)


def _size(row: timing.Row) -> str:
    return str(row.get("batch", row.get("largest_batch")))


COLUMNS: Columns = (
    ("model", 26, lambda r: r["model"]),
    ("pixels", 6, lambda r: str(r["pixels"])),
    ("batch", 5, _size),
    ("precision", 9, lambda r: r["precision"]),
    ("blocks", 6, lambda r: r["blocks"]),
    ("step", 6, lambda r: "recipe" if "recipe" in r else "bare"),
    ("mesh", 5, lambda r: f"{r['data']} × {r['fsdp']}" if "data" in r else "1"),
    ("images/s", 9, lambda r: f"{r['images_per_s']:.1f}" if "images_per_s" in r else "-"),
    ("ms", 9, lambda r: f"{r['ms']:.2f}" if "ms" in r else "-"),
    ("device ms", 9, lambda r: f"{r['device_ms']:.2f}" if "device_ms" in r else "-"),
    ("peak MB", 8, lambda r: f"{r['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in r else "-"),
    ("trace s", 8, lambda r: f"{r['trace_seconds']:.1f}" if "trace_seconds" in r else "-"),
    ("compile s", 9, lambda r: f"{r['compile_seconds']:.1f}" if "compile_seconds" in r else "-"),
    ("lines", 6, lambda r: str(r.get("lines", "-"))),
    ("loss error", 10, lambda r: f"{r['loss_error']:.0e}" if "loss_error" in r else "-"),
    (
        "gradient error",
        14,
        lambda r: f"{r['gradient_error']:.0e}" if "gradient_error" in r else "-",
    ),
)
