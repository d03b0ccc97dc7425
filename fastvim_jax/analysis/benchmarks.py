"""The project's measurements on a GPU: scan, mixer core, model and training step.

    python -m fastvim_jax.analysis.benchmarks scan|mixer|model|train [--json FILE] [--quick]

Inputs of `scan` and `mixer` are read cold and their times are the device's; `model` and `train` are
timed by the clock over queued steps, as a user meets them. Outputs are checked in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fastvim_jax.analysis import device_time
from fastvim_jax.layers.fused_core import fused_core, runs_fused
from fastvim_jax.layers.mixer import Mixer, MixerConfig
from fastvim_jax.layers.pooling import GridPooling
from fastvim_jax.models import create_model
from fastvim_jax.precision import Precision
from pallas_kernels import selective_scan

BANDWIDTH = 3.0e12  # bytes a second an H100 copies at
EXPONENTIALS = 132 * 16 * 1.755e9  # a second

NARROW = {"dtype": "bfloat16", "activations": "compute"}

SCANS = ((128, 14, 384), (128, 196, 384), (32, 1024, 384), (8, 4096, 384), (2, 16384, 384))
STATES = 16


def _error(actual: Any, expected: Any) -> float:
    """Largest over all arrays of ‖actual - expected‖ / ‖expected‖."""

    def one(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    return float(max(jax.tree.leaves(jax.tree.map(one, actual, expected))))


def scan(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every implementation at the shapes of the targets, softplus and bias inside, as the peers' were."""
    for shape in SCANS:
        for dtype in ("float32", "bfloat16"):
            for gradient in (False, True):
                yield from _scan_rows(shape, dtype, gradient, options.quick)


def _scan_rows(shape, dtype, gradient, quick) -> Iterator[dict[str, Any]]:
    b, l, e = shape

    def arguments(seed):
        keys = jax.random.split(jax.random.key(seed), 7)
        draw = lambda i, *s: jax.random.normal(keys[i], s, jnp.float32)  # noqa: E731
        u, delta, out_bar = (draw(i, b, l, e).astype(dtype) for i in range(3))
        B, C = (draw(i, b, l, STATES).astype(dtype) for i in (3, 4))
        return (u, delta - 1, -jnp.exp(draw(5, e, STATES)), B, C, draw(6, e)), out_bar

    def function(implementation):
        def forward(u, delta, A, B, C, bias):
            return selective_scan(u, delta, A, B, C, delta_bias=bias, implementation=implementation)

        def both(args, out_bar):
            y, pull = jax.vjp(forward, *args)
            return y, pull(out_bar)

        return both if gradient else lambda args, out_bar: forward(*args)

    expected = None
    alone = quick or dtype != "float32"
    for implementation in ("pallas",) if alone else ("xla_associative", "pallas"):
        time, result = device_time.measure(
            function(implementation), arguments, max_sets=12 if l < 100 else 4
        )
        if expected is None:  # XLA's, float32 inside
            expected = (
                result
                if implementation != "pallas"
                else jax.jit(function("xla_associative"))(*arguments(0))
            )
        tensors = (3 if not gradient else 8) * b * l * e * jnp.dtype(dtype).itemsize
        exponentials = (1 if not gradient else 3) * b * l * e * STATES
        yield {
            "shape": shape,
            "dtype": dtype,
            "gradient": gradient,
            "implementation": implementation,
            "error": _error(result, expected),
            "floor_memory_ms": tensors / BANDWIDTH * 1e3,
            "floor_exponentials_ms": exponentials / EXPONENTIALS * 1e3,
            "GB_per_s": tensors / time.median / 1e6,
            **dataclasses.asdict(time),
        }


def mixer(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The core of one FastVim-T mixer, from in_proj's output to out_proj's input, batch 128."""
    width, batch = 192, 128
    cases = [
        (dtype, pixels, gradient)
        for dtype in ("float32", "bfloat16")
        for pixels in (224, 512, 1024, 2048)
        for gradient in (False, True)
    ]
    for dtype, pixels, gradient in _share(cases, options):
        module = Mixer(MixerConfig(width, precision=Precision(dtype=dtype)), rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(module)
        side = pixels // 16
        pooling = GridPooling(side, side)
        if not runs_fused(module, pooling):
            raise RuntimeError("the fused core does not run here")

        def arguments(seed, side=side, dtype=dtype):
            keys = jax.random.split(jax.random.key(seed), 2)
            draw = lambda key, e: jax.random.normal(key, (batch, side * side, e), dtype)  # noqa: E731
            return draw(keys[0], 4 * width), draw(keys[1], 2 * width)

        def function(
            xz, out_bar, pooling=pooling, graphdef=graphdef, gradient=gradient, params=params
        ):
            def forward(params, xz):
                return fused_core(nnx.merge(graphdef, params), xz, pooling)

            if not gradient:
                return forward(params, xz)
            out, pull = jax.vjp(forward, params, xz)
            return out, pull(out_bar)

        sets = 4 if pixels < 1024 else 2
        time, _ = device_time.measure(function, arguments, max_sets=sets, calls=8)
        yield {
            "pixels": pixels, "batch": batch, "dtype": dtype, "gradient": gradient,
            **dataclasses.asdict(time),
        }  # fmt: skip


MODELS = (
    ("fastvim_tiny_patch16_224", 224, 128),
    ("fastvim_tiny_patch16_224", 512, 32),
    ("fastvim_tiny_patch16_224", 1024, 8),
    ("fastvim_tiny_patch16_224", 2048, 2),
    ("fastvim_tiny_patch16_224", 224, 1),
    ("fastvim_small_patch16_224", 224, 128),
    ("fastvim_base_patch16_224", 224, 128),
    ("vim_tiny_patch16_224", 224, 128),
    ("vim_tiny_patch16_224", 2048, 2),
    ("vit_tiny_patch16_224", 224, 128),
)


def model(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Images a second of forward passes, by size, resolution and precision."""
    cases = []
    for name, pixels, batch in MODELS:
        if name.startswith("vit"):
            policies = [{"dtype": "bfloat16"}]
        elif name.startswith("fastvim_tiny") and batch > 1:
            policies = [NARROW, {"dtype": "bfloat16"}, {"dtype": "float32"}]
        else:
            policies = [NARROW]
        blocks = {} if name.startswith("vit") else {"blocks": "unroll"}
        cases += [(name, pixels, batch, policy | blocks) for policy in policies]
    for name, pixels, batch, policy in _share(cases, options):
        built = create_model(name, image_size=pixels, rngs=nnx.Rngs(0), **policy)
        graphdef, params = nnx.split(built)
        run = jax.jit(lambda params, x, graphdef=graphdef: nnx.merge(graphdef, params)(x))
        images = [
            jax.random.normal(jax.random.key(i), (batch, pixels, pixels, 3)) for i in range(4)
        ]
        logits = run(params, images[0])
        if not bool(jnp.isfinite(logits).all()):
            raise RuntimeError(f"{name} gave values that are not finite")
        median, fastest, slowest = device_time.wall_time(
            lambda i, run=run, params=params, images=images: run(params, images[i % 4])  # type: ignore[misc]
        )
        yield {
            "model": name, "pixels": pixels, "batch": batch, **policy,
            "ms": median * 1e3, "fastest_ms": fastest * 1e3, "slowest_ms": slowest * 1e3,
            "images_per_s": batch / median,
        }  # fmt: skip


def train(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Images a second of training steps: forward, backward and AdamW, 224 px, batch 128."""
    names = ("fastvim_tiny_patch16_224", "fastvim_small_patch16_224", "fastvim_base_patch16_224")
    batch = 128
    cases = [(name, NARROW | {"blocks": "unroll"}) for name in names]
    cases += [(names[0], NARROW), (names[0], {"dtype": "bfloat16", "blocks": "unroll"})]
    for name, policy in _share(cases, options):
        graphdef, params = nnx.split(create_model(name, rngs=nnx.Rngs(0), **policy))
        optimizer = optax.adamw(1e-4)

        def step(params, state, x, y, graphdef=graphdef, optimizer=optimizer):
            def loss_of(params):
                logits = nnx.merge(graphdef, params)(x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            loss, gradients = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        images = [jax.random.normal(jax.random.key(i), (batch, 224, 224, 3)) for i in range(2)]
        labels = jax.random.randint(jax.random.key(9), (batch,), 0, 1000)
        state = optimizer.init(params)
        start = device_time.time.perf_counter()
        run = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, images[0], labels).compile()
        compile_seconds = device_time.time.perf_counter() - start
        held = [params, state]
        losses: list[jax.Array] = []

        def one(i, run=run, held=held, images=images, labels=labels, losses=losses):
            held[0], held[1], loss = run(*held, images[i % 2], labels)
            losses.append(loss)
            return loss

        median, fastest, slowest = device_time.wall_time(one, steps=5)
        yield {
            "model": name, "batch": batch, **policy,
            "ms": median * 1e3, "fastest_ms": fastest * 1e3, "slowest_ms": slowest * 1e3,
            "images_per_s": batch / median, "compile_seconds": compile_seconds,
            "temporary_bytes": getattr(run.memory_analysis(), "temp_size_in_bytes", None),
            "first_loss": float(losses[0]), "last_loss": float(losses[-1]),
        }  # fmt: skip


def _share(cases: list[Any], options: argparse.Namespace) -> list[Any]:
    index, count = (int(x) for x in options.share.split("/"))
    return cases[:1] if options.quick else cases[index::count]


BENCHES = {"scan": scan, "mixer": mixer, "model": model, "train": train}


def main(arguments: list[str] | None = None) -> None:
    """Run one measurement, print its rows, and keep them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bench", choices=list(BENCHES))
    parser.add_argument("--json", type=Path, help="file for the rows and the circumstances")
    parser.add_argument("--quick", action="store_true", help="the first few rows only")
    parser.add_argument(
        "--share", default="0/1", help="I/N: of model and train, only every N-th case from the I-th"
    )
    options = parser.parse_args(arguments)
    command = f"python -m fastvim_jax.analysis.benchmarks {' '.join(arguments or sys.argv[1:])}"
    rows = []
    for row in BENCHES[options.bench](options):
        rows.append(row)
        shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        print({k: v for k, v in shown.items() if k != "kernels"}, flush=True)
        if options.json:  # after every row: a run cut short keeps what it has
            record = {"circumstances": device_time.surroundings(command), "rows": rows}
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
