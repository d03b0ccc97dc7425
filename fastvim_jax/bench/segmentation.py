"""Measure UperNet by parts: backbone, neck with heads, logits to classes, the whole, and training steps.

Each part is compiled as a program of its own, so the parts' times add up to a little more than the whole's time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fastvim_jax.analysis.segmentation_flops import segmentation_gmacs
from fastvim_jax.bench.model import TOLERANCES, policy, reference_options
from fastvim_jax.bench.record import Columns
from fastvim_jax.data.segmentation_config import SegmentationData
from fastvim_jax.layers.resize import resized_argmax
from fastvim_jax.models import UperNetConfig, build_model, model_config, upernet
from fastvim_jax.models.parameters import round_products
from fastvim_jax.models.upernet import NOTHING_DROPPED
from fastvim_jax.training.optimizer import make_optimizer
from fastvim_jax.training.segmentation.config import ADE20K_OPTIMIZER, SegmentationConfig
from fastvim_jax.training.segmentation.train import make_draw, make_loss
from fastvim_jax.training.steps import Loss, TrainState, init_state, make_train_step
from pallas_kernels import timing

Part = Literal["backbone", "heads", "classes", "whole", "train"]
Setting = tuple[str, int, int, str, Part]  # model's name, pixels, batch, precision, part
BATCHES = {512: 16, 1024: 4}
"""Default number of images per batch, by the image's side in pixels."""
CHECKED = 2
"""Number of images that are compared with the reference."""
CLASSES = 150
"""Number of classes, as ADE20K has."""
LOSS_TOLERANCES = {"f32": 1e-4, "tf32": 1e-2, "bf16": 2e-2}
DISAGREEMENT = 0.02
"""Largest share of pixels whose class may differ from the reference's. Classes differ where rounding decides between
two nearly equal logits."""


def cases(
    settings: Sequence[Setting],
    *,
    neck: Literal["none", "deconvolution", "multilevel"] = "none",
    activations: str = "compute",
    blocks: str = "unroll",
    channels: int = 512,
    **options: Any,
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements for `timing.run`.

    Args:
        settings: (backbone's name, pixels, batch, precision, part) of each measurement.
        neck: field `neck` of `UperNetConfig`.
        activations: field `activations` of backbones in bf16, "compute" or "wide".
        blocks: "unroll" or "scan".
        channels: width of UPerHead.
        options: further fields of the backbones' configs.
    """
    found = []
    for name, pixels, batch, precision, part in settings:
        chosen = policy(name, precision, activations=activations, blocks=blocks)
        row = {
            "model": name, "neck": neck, "pixels": pixels, "batch": batch, "precision": precision,
            "part": part, **chosen,
        }  # fmt: skip

        def config(name=name, pixels=pixels, **how: Any) -> UperNetConfig:
            backbone = model_config(name, **options, **how)
            return upernet(
                backbone, image_size=pixels, num_classes=CLASSES, neck=neck, channels=channels
            )

        plain = config(**reference_options(name))
        case = _step if part == "train" else _forward
        found.append((row, case(row, config(**chosen), plain)))
    return found


def part_functions(config: UperNetConfig) -> dict[str, Callable[..., Any]]:
    """Return the function `f(state, *inputs)` that is measured for each part, by the part's name."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    size = config.image_size

    def backbone(state, images):
        return tuple(nnx.merge(graphdef, state).backbone(images))

    def heads(state, *maps):
        model = nnx.merge(graphdef, state)
        levels = maps if model.neck is None else model.neck(maps, train=False)
        return model.decode_head(levels)

    def classes(state, logits):
        return resized_argmax(logits, size).astype(jnp.uint8)

    def whole(state, images):
        return classes(state, heads(state, *backbone(state, images)))

    return {"backbone": backbone, "heads": heads, "classes": classes, "whole": whole}


def _forward(row: timing.Row, config: UperNetConfig, plain: UperNetConfig) -> timing.Case:
    part, batch, precision = row["part"], row["batch"], row["precision"]
    functions, reference = part_functions(config), part_functions(plain)
    state = nnx.state(build_model(config, rngs=nnx.Rngs(0)))
    once = round_products(state, config.precision.compute) if precision == "bf16" else state
    shapes: dict[str, Any] = {
        "image": jax.ShapeDtypeStruct((batch, *config.image_size, config.backbone.channels), "f4")
    }
    shapes["maps"] = jax.eval_shape(functions["backbone"], once, shapes["image"])
    shapes["logits"] = jax.eval_shape(functions["heads"], once, *shapes["maps"])

    def arguments(seed):
        key = jax.random.key(seed)
        if part in ("backbone", "whole"):
            return once, jax.random.normal(key, shapes["image"].shape)
        if part == "heads":
            return once, *(jax.random.normal(key, m.shape).astype(m.dtype) for m in shapes["maps"])
        return {}, jax.random.normal(key, shapes["logits"].shape)

    measured = timing.Measured(functions[part], arguments)
    found = measured.result()
    given, *inputs = arguments(0)
    if part == "whole":
        # Compared with its own parts, because other rows compare these with the reference.
        maps = jax.jit(functions["backbone"])(given, *inputs)
        logits = jax.jit(functions["heads"])(given, *maps)
        wanted = jax.jit(functions["classes"])(given, logits)
        error, bound = float(jnp.mean(found != wanted)), DISAGREEMENT
    else:
        few = [x[:CHECKED].astype(jnp.float32) for x in inputs]
        wanted = timing.Program(reference[part], state, *few, hasty=True)(state, *few)
        if part == "classes":
            error, bound = float(jnp.mean(found[:CHECKED] != wanted)), DISAGREEMENT
        else:
            error = timing.relative_error(jax.tree.map(lambda x: x[:CHECKED], found), wanted)
            bound = TOLERANCES[precision]
    del found, wanted, inputs
    yield None
    time = measured.time()
    gmacs = segmentation_gmacs(config)
    counted = {"backbone": gmacs["backbone"], "heads": gmacs["neck"] + gmacs["heads"]}
    counted |= {"classes": 0.0, "whole": sum(gmacs.values())}
    yield {
        "ms": time.median, "fastest_ms": time.fastest, "slowest_ms": time.slowest,
        "images_per_s": 1e3 * batch / time.median,
        "error": error, "correct": error <= bound,
        "TFLOP_per_s": 2e-3 * counted[part] * 1e3 * batch / time.median,
        **dataclasses.asdict(time), **measured.program.costs(),
    }  # fmt: skip


def _step(row: timing.Row, config: UperNetConfig, plain: UperNetConfig) -> timing.Case:
    batch, precision = row["batch"], row["precision"]
    state, program = _training(config, batch)
    batches = [_batch(config, batch, seed) for seed in range(2)]
    few = jax.tree.map(lambda x: x[:CHECKED], batches[0])
    found, wanted = (_first_loss(each, state, few) for each in (config, plain))
    error = abs(found / wanted - 1)
    yield None
    losses = []

    def one(i):
        nonlocal state
        state, metrics = program(state, batches[i % len(batches)])
        losses.append(metrics["loss"])
        return metrics["loss"]

    gpu = jax.default_backend() == "gpu"
    if gpu:
        median, fastest, slowest, _ = timing.steady_clock(one)
    else:
        median, fastest, slowest = timing.clock(one, steps=2)
    device = timing.profile(one, 5) if gpu else None
    more = {} if device is None else {"device_ms": device.median, "kernels": device.kernels}
    macs = sum(segmentation_gmacs(config, train=True).values())
    yield {
        "ms": median, "fastest_ms": fastest, "slowest_ms": slowest,
        "images_per_s": 1e3 * batch / median, **more,
        "first_loss": float(losses[0]), "last_loss": float(losses[-1]),
        "error": error, "correct": error <= LOSS_TOLERANCES[precision],
        "TFLOP_per_s": 6e-3 * macs * 1e3 * batch / median,
        **program.costs(),
    }  # fmt: skip


def _first_loss(config: UperNetConfig, state: TrainState, batch: dict[str, jax.Array]) -> float:
    """Compute the loss of a state on a few images, without dropout."""
    run = _run(config)
    model = nnx.eval_shape(lambda: build_model(run.model, rngs=nnx.Rngs(0)))
    graphdef, *_ = nnx.split(model, nnx.Param, nnx.BatchStat)
    loss_of = make_loss(graphdef, run)

    def loss(params, statistics, batch):
        found = loss_of(params, batch, NOTHING_DROPPED, statistics)
        assert isinstance(found, Loss)
        return found.loss

    given = state.params, state.model_state, batch
    return float(timing.Program(loss, *given, hasty=True)(*given))


def _run(config: UperNetConfig) -> SegmentationConfig:
    """Return a run's config without dropout and drop path, so that losses in several precisions can be compared."""
    still = dataclasses.replace(
        config, dropout=0.0, backbone=dataclasses.replace(config.backbone, drop_path=0.0)
    )
    return SegmentationConfig(
        model=still, data=SegmentationData(path=".", image_size=config.image_size, eval_stride=1)
    )


def _training(config: UperNetConfig, batch: int) -> tuple[TrainState, timing.Program]:
    """Build a train state and the compiled step."""
    run = _run(config)
    model = build_model(run.model, rngs=nnx.Rngs(0))
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    optimizer: optax.GradientTransformation = make_optimizer(
        ADE20K_OPTIMIZER, params, learning_rate=lambda step: 6e-5, total_steps=1
    )
    state = init_state(params, optimizer, ema=False, model_state=statistics)
    step = make_train_step(
        make_loss(graphdef, run), optimizer, draw=make_draw(graphdef, statistics)
    )
    shapes = jax.eval_shape(lambda: (state, _batch(config, batch, 0)))
    return state, timing.Program(partial(step, norms=False), *shapes, donate=(0,))


def _batch(config: UperNetConfig, batch: int, seed: int) -> dict[str, jax.Array]:
    images, labels = jax.random.split(jax.random.key(seed))
    shape = (batch, *config.image_size)
    return {
        "image": jax.random.normal(images, (*shape, config.backbone.channels)),
        "label": jax.random.randint(labels, shape, 0, CLASSES, jnp.int32),
    }


COLUMNS: Columns = (
    ("model", 26, lambda r: r["model"]),
    ("part", 8, lambda r: r["part"]),
    ("neck", 13, lambda r: r["neck"]),
    ("pixels", 6, lambda r: str(r["pixels"])),
    ("batch", 5, lambda r: str(r["batch"])),
    ("precision", 9, lambda r: r["precision"]),
    ("images/s", 9, lambda r: f"{r['images_per_s']:.1f}"),
    ("ms", 9, lambda r: f"{r['ms']:.3f}"),
    ("spread", 17, lambda r: f"{r['fastest_ms']:.3f}-{r['slowest_ms']:.3f}"),
    ("TFLOP/s", 8, lambda r: f"{r['TFLOP_per_s']:.2f}"),
    ("peak MB", 8, lambda r: f"{r['peak_bytes'] / 1e6:.0f}"),
    ("compile s", 10, lambda r: f"{r['compile_seconds']:.1f}"),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
)
