"""Measure a Cascade Mask R-CNN by parts: backbone, neck, heads, post-processing, the whole, and training steps.

Post-processing selects proposals (top-k, decoding, suppression) and detections. Each part is a program of its own, so
the parts' times add up to a little more than the time of the whole. The weights are random, so all scores are similar,
and suppression works on as many candidates as it can get: more than on real images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.bench.model import TOLERANCES, policy
from fastvim_jax.bench.record import Columns
from fastvim_jax.models import DetectorConfig, build_model, cascade_mask_rcnn, model_config
from fastvim_jax.models.detection.rpn import propose
from fastvim_jax.models.parameters import round_products
from fastvim_jax.training.detection.config import COCO_OPTIMIZER
from fastvim_jax.training.detection.train import make_draw, make_loss
from fastvim_jax.training.optimizer import make_optimizer
from fastvim_jax.training.steps import TrainState, init_state, make_train_step
from pallas_kernels import timing

Part = Literal[
    "backbone", "neck", "rpn", "proposals", "boxes", "detections", "masks", "whole", "train"
]
Setting = tuple[str, int, int, str, Part]  # model's name, pixels, batch, precision, part
PARTS: tuple[Part, ...] = (
    "backbone", "neck", "rpn", "proposals", "boxes", "detections", "masks", "whole", "train",
)  # fmt: skip
OBJECTS = 20
"""Objects of every image in training steps."""
_ROOM = 100  # slots for objects, as in the COCO recipe; the others are padding


def cases(
    settings: Sequence[Setting],
    *,
    activations: str = "compute",
    blocks: str = "unroll",
    detector: dict[str, Any] | None = None,
    **options: Any,
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements for `timing.run`.

    Args:
        settings: one tuple (backbone's name, pixels, batch, precision, part) per measurement.
        activations: the option of that name for backbones in bf16: "compute" or "wide".
        blocks: "unroll" or "scan".
        detector: fields of `DetectorConfig`.
        options: further fields of the backbones' configs.
    """
    found = []
    for name, pixels, batch, precision, part in settings:
        chosen = policy(name, precision, activations=activations, blocks=blocks)
        row = {
            "model": name, "pixels": pixels, "batch": batch, "precision": precision, "part": part,
            **chosen,
        }  # fmt: skip
        backbone = model_config(name, image_size=pixels, **options, **chosen)
        config = cascade_mask_rcnn(backbone, **(detector or {}))
        case = _step if part == "train" else _forward
        found.append((row, case(row, config)))
    return found


def part_functions(config: DetectorConfig) -> dict[str, Callable[..., Any]]:
    """Return one function per part: of the detector's state and of the results of the parts before it."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    padded = config.image_size
    rpn = config.rpn

    def size_of(x):
        return jnp.broadcast_to(jnp.asarray(padded, jnp.float32), (len(x), 2))

    def backbone(state, images):
        return nnx.merge(graphdef, state).backbone(images)[0]

    def neck(state, level):
        return nnx.merge(graphdef, state).neck(level)

    def rpn_head(state, levels):
        return nnx.merge(graphdef, state).rpn(levels)

    def proposals(state, levels, scores, deltas):
        anchors = nnx.merge(graphdef, state).anchors(levels, padded)
        return propose(
            scores, deltas, anchors, size_of(scores[0]),
            before=rpn.test_before, after=rpn.test_after, threshold=rpn.nms,
        )  # fmt: skip

    def boxes(state, levels, proposals):
        return nnx.merge(graphdef, state).cascade(levels, proposals, size_of(proposals))

    def detections(state, boxes, logits, deltas):
        valid = jnp.ones(boxes.shape[:2], bool)
        ones = jnp.ones((len(boxes), 2), jnp.float32)
        model = nnx.merge(graphdef, state)
        return model.suppress(boxes, logits, deltas, valid, size_of(boxes), ones)

    def masks(state, levels, boxes, labels):
        return nnx.merge(graphdef, state).mask_probabilities(levels, boxes, labels)

    def whole(state, images):
        return nnx.merge(graphdef, state)(images)

    return {
        "backbone": backbone, "neck": neck, "rpn": rpn_head, "proposals": proposals, "boxes": boxes,
        "detections": detections, "masks": masks, "whole": whole,
    }  # fmt: skip


def _forward(row: timing.Row, config: DetectorConfig) -> timing.Case:
    part, batch, precision = row["part"], row["batch"], row["precision"]
    functions = part_functions(config)
    state = nnx.state(build_model(config, rngs=nnx.Rngs(0)))
    if precision == "bf16":
        state = round_products(state, config.precision.compute)

    def arguments(seed):
        return (state, *_inputs(functions, state, config, part, batch, seed))

    measured = timing.Measured(functions[part], arguments)
    found = measured.result()
    if part == "whole":
        # Valid detections lie inside the image and are ordered: values have their own tests against golden numbers.
        scores = np.asarray(found.scores)
        inside = np.asarray(found.boxes).max() <= max(config.image_size)
        error = 0.0 if inside and (np.diff(scores, axis=1) <= 0).all() else 1.0
    else:
        again = jax.jit(functions[part])(*arguments(0))
        error = timing.relative_error(_floats(found), _floats(again))
        del again
    del found
    yield None
    time = measured.time()
    yield {
        "ms": time.median, "fastest_ms": time.fastest, "slowest_ms": time.slowest,
        "images_per_s": 1e3 * batch / time.median,
        "error": error, "correct": error <= TOLERANCES[precision],
        **dataclasses.asdict(time), **measured.program.costs(),
    }  # fmt: skip


def _inputs(functions, state, config: DetectorConfig, part: str, batch: int, seed: int) -> tuple:
    """Draw the inputs of a part. Where their values matter, run the parts before it on a random feature map."""
    key = jax.random.key(seed)
    images = jax.random.normal(key, (batch, *config.image_size, config.backbone.channels))
    if part in ("backbone", "whole"):
        return (images,)
    shapes = jax.eval_shape(functions["backbone"], state, images)
    level = jax.random.normal(key, shapes.shape).astype(shapes.dtype)
    if part == "neck":
        return (level,)
    levels = jax.jit(functions["neck"])(state, level)
    if part == "rpn":
        return (levels,)
    scores, deltas = jax.jit(functions["rpn"])(state, levels)
    if part == "proposals":
        return levels, scores, deltas
    proposals = jax.jit(functions["proposals"])(state, levels, scores, deltas).boxes
    if part == "boxes":
        return levels, proposals
    if part == "masks":
        count = config.detections
        labels = jax.random.randint(key, (batch, count), 0, config.num_classes, jnp.int32)
        return levels, proposals[:, :count], labels
    return jax.jit(functions["boxes"])(state, levels, proposals)


def _floats(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def _step(row: timing.Row, config: DetectorConfig) -> timing.Case:
    batch = row["batch"]
    state, program = _training(config, batch)
    batches = [_batch(config, batch, seed) for seed in range(2)]
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
    finite = bool(np.isfinite([float(loss) for loss in losses]).all())
    yield {
        "ms": median, "fastest_ms": fastest, "slowest_ms": slowest,
        "images_per_s": 1e3 * batch / median,
        "first_loss": float(losses[0]), "last_loss": float(losses[-1]),
        "error": 0.0 if finite else 1.0, "correct": finite, **program.costs(),
    }  # fmt: skip


def _training(config: DetectorConfig, batch: int) -> tuple[TrainState, timing.Program]:
    model = build_model(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(
        COCO_OPTIMIZER, params, learning_rate=lambda step: 1e-4, total_steps=1
    )
    state = init_state(params, optimizer, ema=False)
    step = make_train_step(make_loss(graphdef), optimizer, draw=make_draw(graphdef))
    shapes = jax.eval_shape(lambda: (state, _batch(config, batch, 0)))
    return state, timing.Program(step, *shapes, donate=(0,))


def _batch(config: DetectorConfig, batch: int, seed: int) -> dict[str, jax.Array]:
    """Draw random images with `OBJECTS` objects, whose masks are random bits."""
    keys = jax.random.split(jax.random.key(seed), 4)
    height, width = config.image_size
    sides = jnp.asarray([width, height], jnp.float32)
    low = jax.random.uniform(keys[0], (batch, _ROOM, 2), maxval=0.7) * sides
    high = low + jax.random.uniform(keys[1], low.shape, minval=0.05, maxval=0.3) * sides
    present = jnp.broadcast_to(jnp.arange(_ROOM) < OBJECTS, (batch, _ROOM))
    boxes = jnp.where(present[..., None], jnp.concatenate([low, high], -1), 0)
    found = {
        "image": jax.random.normal(keys[2], (batch, height, width, config.backbone.channels)),
        "boxes": boxes,
        "label": jax.random.randint(keys[3], (batch, _ROOM), 0, config.num_classes, jnp.int32),
        "present": present,
        "left_out": jnp.zeros(batch, jnp.int32),
    }
    if config.masks:
        shape = (batch, _ROOM, height, -(-width // 8))
        found["masks"] = jax.random.bits(keys[3], shape, jnp.uint8)
    return found


COLUMNS: Columns = (
    ("model", 26, lambda r: r["model"]),
    ("part", 10, lambda r: r["part"]),
    ("pixels", 6, lambda r: str(r["pixels"])),
    ("batch", 5, lambda r: str(r["batch"])),
    ("precision", 9, lambda r: r["precision"]),
    ("images/s", 9, lambda r: f"{r['images_per_s']:.1f}"),
    ("ms", 9, lambda r: f"{r['ms']:.3f}"),
    ("spread", 17, lambda r: f"{r['fastest_ms']:.3f}-{r['slowest_ms']:.3f}"),
    ("peak MB", 8, lambda r: f"{r.get('peak_bytes', 0) / 1e6:.0f}"),
    ("compile s", 10, lambda r: f"{r.get('compile_seconds', 0):.1f}"),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
)
