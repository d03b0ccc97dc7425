"""Measures forward passes of whole models: images per second by size, resolution, batch and precision.

Weights are prepared once, as `Classifier` does, and not at every call: in bf16 those of products are rounded
(`round_products`), and what depends on weights alone is computed (`split_weights`). The timed calls take the result.
Masked autoencoders run whole, encoder and decoder, at their mask ratio; channel models see all their channels.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.analysis.flops import gmacs
from fastvim_jax.bench.record import Columns
from fastvim_jax.models import MaskedAutoencoderConfig, ViTConfig, build_model, model_config
from fastvim_jax.models.compiling import forward_options
from fastvim_jax.models.parameters import round_products
from fastvim_jax.models.prepared import split_weights
from fastvim_jax.models.shares import run_in_shares, share_count, share_of, tracing_share_of
from pallas_kernels import timing

PRECISIONS = ("bf16", "tf32", "f32")
BATCHES = {224: 128, 512: 32, 1024: 8, 2048: 2}
"""Images at a time by resolution, unless told otherwise."""

# Of the logits, relative to float32 products in full precision by XLA at the same weights. TF32 has 10 bits of
# mantissa and bfloat16 7, both rounded in each of 24 blocks.
TOLERANCES = {"f32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}

# What the comparison takes of a batch: enough to be sure, little enough for the reference's memory.
CHECKED = 2


def policy(
    name: str,
    precision: str,
    *,
    activations: str,
    blocks: str,
    residual_in_fp32: bool | None = None,
) -> dict[str, Any]:
    """Return the model options behind "bf16", "tf32" and "f32" (products in full float32 precision).

    In bf16, `residual_in_fp32` is by default as in the fast mode (False), unless activations are "wide".

    Raises:
        UserError: there is no model of this name.
    """
    model_config(name)
    options: dict[str, Any] = {
        "bf16": {"dtype": "bfloat16"},
        "tf32": {"dtype": "float32", "matmul_precision": "tf32"},
        "f32": {"dtype": "float32", "matmul_precision": "highest"},
    }[precision]
    if precision == "bf16":
        wide = activations == "wide" if residual_in_fp32 is None else residual_in_fp32
        options |= {"residual_in_fp32": wide, "activations": activations}
    return options | {"blocks": blocks}


def reference_options(name: str) -> dict[str, Any]:
    """Return the options of the reference model: float32 throughout, by XLA, the scan step by step.

    A loop of steps compiles in seconds; an associative scan of thousands of steps takes minutes on a GPU.
    """
    return {
        "blocks": "scan",
        **({} if _is_vit(name) else {"scan_implementation": "xla_sequential"}),
    }


def _is_vit(name: str) -> bool:
    config = model_config(name)
    return isinstance(getattr(config, "encoder", config), ViTConfig)


def cases(
    settings: Sequence[tuple[str, int, int, str]],
    *,
    activations: str = "compute",
    blocks: str = "unroll",
    residual_in_fp32: bool | None = None,
    **options: Any,
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements for `timing.run`.

    Images are float32, except for bf16 models with activations "compute", whose images are bfloat16 as DeiT's are.

    Args:
        settings: (model's name, pixels, batch, precision) of each.
        activations: of models in bf16, "compute" or "wide"; see `fastvim_jax.precision`.
        blocks: "unroll" or "scan".
        residual_in_fp32: of models in bf16; see `policy`.
        options: further fields of the models' configs.
    """
    found = []
    for name, pixels, batch, precision in settings:
        chosen = policy(
            name,
            precision,
            activations=activations,
            blocks=blocks,
            residual_in_fp32=residual_in_fp32,
        )
        narrow = precision == "bf16" and activations == "compute"
        images = "bfloat16" if narrow else "float32"
        row = {"model": name, "pixels": pixels, "batch": batch, "precision": precision, **chosen}
        row |= {"images": images, "weights": "prepared"}
        found.append((row, _case(name, pixels, batch, precision, images, chosen, options)))
    return found


def forward_of(config: Any, graphdef: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """Return a forward pass, a function of parameters and images.

    A masked autoencoder needs a mask, too. The first pixel of each patch serves as its noise, so that every image has a
    mask of its own, the same in all dtypes, and XLA cannot compute the masks beforehand.
    """

    def forward(params: Any, images: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, params)
        if not isinstance(config, MaskedAutoencoderConfig):
            return model(images)
        noise = images[:, :: config.patch[0], :: config.patch[1], 0].astype(jnp.float32)
        return model(images, noise=noise.reshape(len(images), -1)).predicted

    return forward


def _case(
    name: str,
    pixels: int,
    batch: int,
    precision: str,
    images_dtype: str,
    chosen: dict[str, Any],
    options: dict[str, Any],
) -> timing.Case:
    config = model_config(name, image_size=pixels, **options, **chosen)
    graphdef, params = nnx.split(build_model(config, rngs=nnx.Rngs(0)))
    plain = model_config(name, image_size=pixels, **options, **reference_options(name))
    plain_graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(plain, rngs=nnx.Rngs(0))))

    shape = (batch, pixels, pixels, config.channels)
    once = round_products(params, config.precision.compute) if precision == "bf16" else params

    share = share_of(jax.ShapeDtypeStruct(shape, images_dtype))
    with tracing_share_of(batch):
        split = split_weights(forward_of(config, graphdef), once, share)
    prepared = jax.jit(split.prepare)(once)
    del once

    def arguments(seed):
        # Weights are rotated with the images: a small model's would stay in the cache from call to call, where another
        # program of a user's would have replaced them.
        weights = jax.tree.map(jnp.copy, prepared) if seed else prepared
        return weights, jax.random.normal(jax.random.key(seed), share.shape, images_dtype)

    measured = timing.Measured(
        split.run, arguments, compiler_options=forward_options(config.precision.compute)
    )
    images = arguments(0)[1][:CHECKED]
    reference = timing.Program(forward_of(plain, plain_graphdef), params, images, hasty=True)
    wanted = reference(params, images)
    error = timing.relative_error(measured.result()[:CHECKED], wanted)
    del images, wanted, reference
    yield None
    calls = 10
    row: timing.Row = {}
    if measured.profiled:
        sets = measured.inputs()
        run = lambda i: measured.program(*sets[i % len(sets)])  # noqa: E731
        median, fastest, slowest, queued = timing.steady_clock(run)
        device = timing.profile(run, max(calls, len(sets)))
        time = dataclasses.replace(
            device, method="clock", median=median, fastest=fastest, slowest=slowest, calls=queued,
            input_sets=len(sets),
        )  # fmt: skip
        turn = itertools.count()
        one = lambda _: run(next(turn))  # noqa: E731
        latency, _, _ = timing.clock(one, warm_up=0, steps=1, repeats=20)
        row = {
            "device_ms": device.median,
            "device_fastest_ms": device.fastest,
            "device_slowest_ms": device.slowest,
            "latency_ms": latency,
            "rotated": "weights and images" if len(sets) > 1 else "nothing",
        }
        del run, one, sets
    elif (shares := share_count(batch)) > 1:
        whole = jax.random.normal(jax.random.key(0), shape, images_dtype)
        time = _time_in_shares(measured.program, prepared, whole, share.shape[0])
        row = {"shares": shares}
    else:
        time = measured.time()
    yield {
        "ms": time.median, "fastest_ms": time.fastest, "slowest_ms": time.slowest,
        "images_per_s": 1e3 * batch / time.median,
        **row,
        "error": error, "correct": error <= TOLERANCES[precision],
        "TFLOP_per_s": 2e-3 * gmacs(config) * 1e3 * batch / time.median,
        **dataclasses.asdict(time), **measured.program.costs(),
    }  # fmt: skip


def _time_in_shares(program: Any, weights: Any, images: jax.Array, size: int) -> timing.Time:
    """Time what `Classifier` runs on a CPU of several cores, by the clock."""
    run = lambda _: run_in_shares(program, weights, images, size)  # noqa: E731
    median, fastest, slowest, calls = timing.steady_clock(run)
    return timing.Time("clock", median, fastest, slowest, calls=calls)


COLUMNS: Columns = (
    ("model", 26, lambda r: r["model"]),
    ("pixels", 6, lambda r: str(r["pixels"])),
    ("batch", 5, lambda r: str(r["batch"])),
    ("precision", 9, lambda r: r["precision"]),
    ("blocks", 6, lambda r: r["blocks"]),
    ("images/s", 9, lambda r: f"{r['images_per_s']:.1f}"),
    ("ms", 9, lambda r: f"{r['ms']:.3f}"),
    ("spread", 17, lambda r: f"{r['fastest_ms']:.3f}-{r['slowest_ms']:.3f}"),
    ("device ms", 9, lambda r: f"{r['device_ms']:.3f}" if "device_ms" in r else "-"),
    ("latency ms", 10, lambda r: f"{r['latency_ms']:.3f}" if "latency_ms" in r else "-"),
    ("TFLOP/s", 8, lambda r: f"{r['TFLOP_per_s']:.2f}"),
    ("peak MB", 8, lambda r: f"{r['peak_bytes'] / 1e6:.0f}"),
    ("compile s", 10, lambda r: f"{r['compile_seconds']:.1f}"),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
)
