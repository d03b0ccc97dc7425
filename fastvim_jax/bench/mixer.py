"""Measure one mixer: the stages of its state-space part (Table 23 of the paper) and its whole core.

The stages are those that the paper times: pool, projection (to Δ, B and C), scan, repeat, skip, and `total`, which runs
all of them as one program. Each computes both directions of one block, without convolution, norm and gate. The core is
everything between in_proj and out_proj as the models run it, that is, with the fused kernels where these support it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.bench.record import Columns
from fastvim_jax.layers.direction import MixerConfig, ScanDirection
from fastvim_jax.layers.fused_core import runs_fused
from fastvim_jax.layers.mixer import Mixer
from fastvim_jax.layers.pooling import GridPooling, NoPooling, Pooling
from fastvim_jax.precision import Precision
from pallas_kernels import selective_scan, timing

STAGES = ("pool", "projection", "scan", "repeat", "skip", "total")
TOLERANCES = {"float32": 2e-4, "bfloat16": 2e-2}  # results and gradients of xz, relative
PATCH = 16
CHECKED = 2**25
"""Largest number of elements (images times tokens times width) at which the whole batch is compared with the
reference. Of a larger batch, only the first two images are compared."""


def cases(
    *,
    width: int,
    batch: int,
    pixels: Sequence[int],
    parts: Sequence[str] = ("stages", "core"),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    gradients: Sequence[bool] = (False, True),
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements for `timing.run`: stages in float32, the core in each of `dtypes`.

    Args:
        width: width of the model; 192 is the Tiny size.
        batch: images per batch.
        pixels: sides of the images, multiples of 16.
        parts: "stages", "core" or both.
        dtypes: dtypes of the core's products and activations.
        gradients: False measures the forward pass, True forward and backward. Of the stages, only `total` is measured
            with gradients.
    """
    found: list[tuple[timing.Row, timing.Case]] = []
    for side in pixels:
        same = {"pixels": side, "batch": batch, "width": width}
        if "stages" in parts:
            for model in ("fastvim", "vim"):
                for stage in STAGES:
                    if model == "vim" and stage in ("pool", "repeat"):
                        continue
                    for gradient in gradients:
                        if gradient and stage != "total":
                            continue
                        name = {
                            "part": stage,
                            "model": model,
                            "dtype": "float32",
                            "gradient": gradient,
                        }
                        case = _stage(model, stage, width, batch, side // PATCH, gradient)
                        found.append(({**same, **name}, case))
        if "core" in parts:
            for dtype in dtypes:
                for gradient in gradients:
                    name = {
                        "part": "core",
                        "model": "fastvim",
                        "dtype": dtype,
                        "gradient": gradient,
                    }
                    case = _core(width, batch, side // PATCH, dtype, gradient)
                    found.append(({**same, **name}, case))
    return found


def plain_core(mixer: Mixer, xz: jax.Array, pooling: Pooling) -> jax.Array:
    """Compute the core as the model runs it without fused kernels: xz `b l 2e` → `b l e`."""
    x, z = jnp.split(xz, 2, axis=-1)
    x = pooling.to_scan_order(x)
    y = (mixer.forward(x, pooling) + mixer.backward(x, pooling)) / 2
    assert mixer.post_norm is not None
    return mixer.post_norm(pooling.from_scan_order(y)) * jax.nn.silu(z)


def _core(width: int, batch: int, side: int, dtype: str, gradient: bool) -> timing.Case:
    pooling = GridPooling(side, side)
    narrow: Any = {"dtype": dtype, "activations": "wide" if dtype == "float32" else "compute"}
    policy = Precision(**narrow)
    mixer = _mixer(width, precision=policy)
    fused = runs_fused(mixer.config, pooling)
    graphdef, params = nnx.split(mixer)

    def function(core, graphdef):
        return _with_gradients(
            lambda params, xz: core(nnx.merge(graphdef, params), xz, pooling), gradient
        )

    def arguments(seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        draw = lambda key, e: jax.random.normal(key, (batch, side * side, e), dtype)  # noqa: E731
        return params, draw(keys[0], 4 * width), draw(keys[1], 2 * width)

    yield from _measure(
        function(Mixer.core if fused else plain_core, graphdef),
        function(plain_core, nnx.graphdef(_mixer(width, scan_implementation="xla_sequential"))),
        arguments,
        TOLERANCES[dtype],
        elements=batch * side * side * width,
        gradient=gradient,
        fused=fused,
        **_least(batch * side * side * width, dtype, gradient),
    )


def least_bytes(elements: int, dtype: str, gradient: bool) -> int:
    """Count the bytes that a core must move at least.

    Each tensor has `2 * elements` numbers, because it is twice as wide as the model. Forward, the core reads x twice
    and z once, and writes the result. Backward, it reads x and the result's gradient twice each and z once, and writes
    the gradients of x and z.

    Args:
        elements: images times tokens times the model's width.
        dtype: dtype of the tensors.
        gradient: count the backward pass, too.
    """
    return (8 + (14 if gradient else 0)) * elements * jnp.dtype(dtype).itemsize


def _least(elements: int, dtype: str, gradient: bool) -> timing.Row:
    moved = least_bytes(elements, dtype, gradient)
    most = timing.ceilings()
    floor = {} if most is None else {"floor_memory_ms": 1e3 * moved / most.bandwidth}
    return {"least_bytes": moved, **floor}


def _stage(
    model: str, stage: str, width: int, batch: int, side: int, gradient: bool
) -> timing.Case:
    pooling: Pooling = GridPooling(side, side) if model == "fastvim" else NoPooling(side * side)
    tokens, steps = side * side, pooling.scan_length
    graphdef, params = nnx.split(_mixer(width))
    e, n = 2 * width, MixerConfig(width).state_size

    def function(graphdef):
        def forward(params, arrays):
            mixer = nnx.merge(graphdef, params)
            pair = (mixer.forward, mixer.backward)
            return [_RUN[stage](d, pooling, *a) for d, a in zip(pair, arrays, strict=True)]

        return _with_gradients(forward, gradient)

    shapes = {
        "pool": [(tokens, e)],
        "projection": [(steps, e)],
        "scan": [(steps, e), (steps, e), (steps, n), (steps, n)],
        "repeat": [(steps, e)],
        "skip": [(tokens, e), (tokens, e)],
        "total": [(tokens, e)],
    }[stage]

    def arguments(seed):
        keys = iter(jax.random.split(jax.random.key(seed), 2 * len(shapes) + 2))
        draw = lambda *shape: jax.random.normal(next(keys), (batch, *shape))  # noqa: E731
        arrays = [tuple(draw(*shape) for shape in shapes) for _ in range(2)]
        return params, arrays, [draw(tokens, e) for _ in range(2)] if gradient else None

    yield from _measure(
        function(graphdef),
        function(nnx.graphdef(_mixer(width, scan_implementation="xla_sequential"))),
        arguments,
        TOLERANCES["float32"],
        elements=batch * tokens * width,
        gradient=gradient,
    )


def _mixer(width: int, **options: Any) -> Mixer:
    return Mixer(MixerConfig(width, **options), rngs=nnx.Rngs(0))


def _scan(d: ScanDirection, _: Pooling, u, delta, B, C):
    assert d.dt_proj.bias is not None
    A, bias = -jnp.exp(d.A_log[...]), d.dt_proj.bias[...]
    name = d.config.scan_implementation
    return selective_scan(
        u, delta, A, B, C, delta_bias=bias, reverse=d.reverse, implementation=name
    )


_RUN: dict[str, Callable[..., Any]] = {
    "pool": lambda d, pooling, c: pooling.pool(c, reverse=d.reverse),
    "projection": lambda d, pooling, u: d.select(u),
    "scan": _scan,
    "repeat": lambda d, pooling, y: pooling.unpool(y, reverse=d.reverse),
    "skip": lambda d, pooling, y, c: y + d.D[...] * c,
    "total": lambda d, pooling, c: pooling.unpool(d.scan(pooling.pool(c))) + d.D[...] * c,
}


def _with_gradients(forward: Callable[..., Any], gradient: bool) -> Callable[..., Any]:
    """Return `run(params, arrays, out_bar)`: the result of `forward(params, arrays)` and a dict of gradients.

    The dict is empty unless `gradient`. `out_bar` is the gradient with respect to the result.
    """

    def run(params, arrays, out_bar):
        if not gradient:
            return forward(params, arrays), {}
        out, pull = jax.vjp(forward, params, arrays)
        params_bar, arrays_bar = pull(jax.tree.map(lambda b, o: b.astype(o.dtype), out_bar, out))
        return out, {"params": params_bar, "arrays": arrays_bar}

    return run


def _measure(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Callable[[int], tuple],
    tolerance: float,
    *,
    elements: int,
    gradient: bool,
    **more: Any,
) -> timing.Case:
    """Time `function`, and compare it with `reference` in float32.

    Of a batch of more than `CHECKED` elements, only the first two images are compared, without the parameters'
    gradients. These are compared as one vector, because some are sums that nearly cancel.
    """
    measured = timing.Measured(function, arguments)
    images = None if elements <= CHECKED else 2
    some = lambda tree: jax.tree.map(lambda x: x[:images], tree)  # noqa: E731

    def checked(params, *sequences):
        return params, *jax.tree.map(lambda x: x.astype(jnp.float32), some(sequences))

    shapes = jax.eval_shape(lambda: checked(*arguments(0)))
    plain = timing.Program(reference, *shapes, hasty=True)
    yield None
    out, grads = measured.result()
    wanted, wanted_grads = plain(*checked(*arguments(0)))
    errors = {"error": timing.relative_error(some(out), wanted)}
    if gradient:
        grad, wanted_grad = some(grads["arrays"]), wanted_grads["arrays"]
        errors["gradient_error"] = timing.relative_error(grad, wanted_grad)
        if images is None:
            errors["parameters_gradient_error"] = timing.relative_error(
                grads["params"], wanted_grads["params"], together=True
            )
        del grad, wanted_grad
    del out, grads, wanted, wanted_grads, plain
    time = measured.time(calls=8)
    costs = measured.program.costs()
    moved = more.get("least_bytes", costs["argument_bytes"] + costs["output_bytes"])
    yield {
        **errors,
        "correct": max(errors.values()) <= tolerance,
        "checked_images": images,
        "GB_per_s": moved / time.median / 1e6,
        **more,
        **dataclasses.asdict(time),
        **costs,
    }


COLUMNS: Columns = (
    ("pixels", 6, lambda r: str(r["pixels"])),
    ("model", 8, lambda r: r["model"]),
    ("part", 10, lambda r: r["part"]),
    ("dtype", 9, lambda r: r["dtype"]),
    ("what", 8, lambda r: "fwd+bwd" if r["gradient"] else "fwd"),
    ("ms", 9, lambda r: f"{r['median']:.4f}"),
    ("spread", 16, lambda r: f"{r['fastest']:.4f}-{r['slowest']:.4f}"),
    ("warm", 8, lambda r: "-" if r["warm"] is None else f"{r['warm']:.4f}"),
    ("GB/s", 7, lambda r: f"{r['GB_per_s']:.0f}"),
    ("peak MB", 8, lambda r: f"{r['peak_bytes'] / 1e6:.0f}"),
    ("compile s", 10, lambda r: f"{r['compile_seconds']:.1f}"),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
)
