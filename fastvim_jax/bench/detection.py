"""Measure a Cascade Mask R-CNN by parts: backbone, neck, heads, post-processing, the whole, and training steps.

Post-processing selects proposals (top-k, decoding, suppression) and detections. Each part is a program of its own, so
the parts' times add up to a little more than the time of the whole. The weights are random, so all scores are small and
similar. The least score of a detection is therefore 0: suppression works on as many candidates as it can get, which is
more than on real images, and the mask heads on as many boxes.

Every program of a detector is compiled once, all of them side by side in threads, before the first is timed. A part's
inputs are made by the programs of the parts before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.analysis.detection_flops import detection_gmacs
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
    chains: dict[tuple[str, int, int, str], _Chain] = {}
    pool = ThreadPoolExecutor(_THREADS)

    @cache
    def state_of(config: DetectorConfig, precision: str) -> Any:
        """Draw the weights, once for all batches, because this runs operation by operation."""
        state = nnx.state(build_model(config, rngs=nnx.Rngs(0)))
        return round_products(state, config.precision.compute) if precision == "bf16" else state

    def start() -> None:
        for each in chains.values():
            each.start(pool, state_of(each.config, each.precision))

    for name, pixels, batch, precision, part in settings:
        chosen = policy(name, precision, activations=activations, blocks=blocks)
        row = {
            "model": name, "pixels": pixels, "batch": batch, "precision": precision, "part": part,
            **chosen,
        }  # fmt: skip
        backbone = model_config(name, image_size=pixels, **options, **chosen)
        config = cascade_mask_rcnn(backbone, **{"score": 0.0, **(detector or {})})
        if part == "train":
            found.append((row, _step(row, config)))
            continue
        place = (name, pixels, batch, precision)
        chain = chains.setdefault(place, _Chain(config, batch, precision))
        chain.parts.append(part)
        found.append((row, _forward(row, chain, start)))
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


_BEFORE: dict[Part, tuple[Part, ...]] = {
    "neck": (), "rpn": ("neck",), "proposals": ("neck", "rpn"), "boxes": ("neck", "proposals"),
    "detections": ("boxes",), "masks": ("neck", "detections"), "backbone": (), "whole": (),
}  # fmt: skip
"""The parts whose results a part reads. Without any, it reads random numbers."""
_THREADS = 16


class _Chain:
    """Compile the programs of one detector, those that are measured and those that make their inputs.

    Attributes:
        parts: the parts that are measured.
    """

    def __init__(self, config: DetectorConfig, batch: int, precision: str):
        self.config, self.batch, self.precision = config, batch, precision
        self.parts: list[Part] = []
        self._programs: dict[Part, timing.Measured] = {}
        self._state: Any = None

    def start(self, pool: ThreadPoolExecutor, state: Any) -> None:
        """Lower all programs and begin to compile them, if that is not done yet."""
        if self._programs:
            return
        functions = part_functions(self.config)
        self._state = state
        needed = set(self.parts)
        while more := {before for part in needed for before in _BEFORE[part]} - needed:
            needed |= more
        height, width = self.config.image_size
        image = jax.ShapeDtypeStruct(
            (self.batch, height, width, self.config.backbone.channels), "f4"
        )
        self._random = {
            "backbone": image, "whole": image,
            "neck": jax.eval_shape(functions["backbone"], state, image),
        }  # fmt: skip
        results: dict[str, Any] = {}
        shapes: dict[Part, tuple] = {}
        for part in (part for part in PARTS if part in needed):
            if _BEFORE[part]:
                shapes[part] = self._select(part, results)
            else:
                shapes[part] = (self._random[part],)
            results[part] = jax.eval_shape(functions[part], state, *shapes[part])

        # The longest programs first.
        for part in sorted(shapes, key=("whole", "boxes", "masks", "backbone").__contains__)[::-1]:
            self._programs[part] = timing.Measured(
                functions[part],
                partial(self._arguments, part),
                shapes=(state, *shapes[part]),
                pool=pool,
            )

    def measured(self, part: Part) -> timing.Measured:
        """Return a part's program."""
        return self._programs[part]

    def _arguments(self, part: Part, seed: int) -> tuple:
        return (self._state, *self.inputs(part, seed))

    def inputs(self, part: Part, seed: int) -> tuple:
        """Make the inputs of a part: random numbers, or the results of the parts before it."""
        if not _BEFORE[part]:
            like = self._random[part]
            return (jax.random.normal(jax.random.key(seed), like.shape).astype(like.dtype),)
        results: dict[str, Any] = {}
        for each in PARTS:
            if each in self._upstream(part):
                given = self._select(each, results) if _BEFORE[each] else self.inputs(each, seed)
                results[each] = self.measured(each).program(self._state, *given)
        return self._select(part, results)

    def _upstream(self, part: Part) -> set[Part]:
        return {each for before in _BEFORE[part] for each in (before, *self._upstream(before))}

    @staticmethod
    def _select(part: Part, results: dict[str, Any]) -> tuple:
        """Pick the arguments of a part from the results of the parts before it."""
        if part == "proposals":
            return results["neck"], *results["rpn"]
        if part == "boxes":
            return results["neck"], results["proposals"].boxes
        if part == "masks":
            return results["neck"], results["detections"].boxes, results["detections"].labels
        (before,) = _BEFORE[part]
        return results[before] if part == "detections" else (results[before],)


def _forward(row: timing.Row, chain: _Chain, start: Callable[[], None]) -> timing.Case:
    part, batch = row["part"], row["batch"]
    start()  # Programs of all detectors compile at the same time.
    measured = chain.measured(part)
    error = _check(chain, part)
    yield None
    time = measured.time()
    more: timing.Row = {}
    if part == "whole":
        # The profiler's time leaves out the gaps between kernels, which matter for what a user waits for.
        arguments = measured.make_arguments(0)
        more["clock_ms"] = timing.steady_clock(lambda i: measured.program(*arguments))[0]
    macs = detection_gmacs(chain.config)
    yield {
        "ms": time.median, "fastest_ms": time.fastest, "slowest_ms": time.slowest,
        "images_per_s": 1e3 * batch / time.median, **more,
        "error": error, "correct": error <= TOLERANCES[row["precision"]],
        "gmacs": macs[part], "TFLOP_per_s": 2e-3 * macs[part] * 1e3 * batch / time.median,
        **dataclasses.asdict(time), **measured.program.costs(),
    }  # fmt: skip


def _check(chain: _Chain, part: Part) -> float:
    """Return 0.0 if a part's result is sound, else 1.0. Values have their own tests against golden numbers.

    All numbers must be finite. Detections of the whole must lie inside the image, in the order of their scores.
    """
    found = chain.measured(part).result()
    if not all(bool(jnp.isfinite(x).all()) for x in _floats(found)):
        return 1.0
    if part != "whole":
        return 0.0
    inside = np.asarray(found.boxes).max() <= max(chain.config.image_size)
    ordered = (np.diff(np.asarray(found.scores), axis=1) <= 0).all()
    return 0.0 if inside and ordered else 1.0


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
    return state, timing.Program(partial(step, norms=False), *shapes, donate=(0,))


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
    ("TFLOP/s", 8, lambda r: f"{r['TFLOP_per_s']:.1f}" if "TFLOP_per_s" in r else ""),
    ("peak MB", 8, lambda r: f"{r.get('peak_bytes', 0) / 1e6:.0f}"),
    ("compile s", 10, lambda r: f"{r.get('compile_seconds', 0):.1f}"),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
)
