"""How long a train step takes to trace and to compile, with the blocks scanned and written out.

    python -m fastvim_jax.training.compile_time fastvim_huge_patch14_224 --batch 2

Nothing is allocated or run, so that it works for models larger than this machine's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastvim_jax.models import ModelConfig, build_model, list_models, model_config
from fastvim_jax.training.config import OptimizerConfig
from fastvim_jax.training.optimizer import make_optimizer
from fastvim_jax.training.steps import init_state, make_train_step


@dataclass(frozen=True)
class CompileTime:
    """Seconds of wall-clock time, and lines of the program handed to XLA."""

    trace: float
    compile: float
    lines: int


def measure_train_step(config: ModelConfig, batch: int) -> CompileTime:
    """Trace and compile forward, backward and AdamW with an average of the weights, for `batch` images."""

    def shapes():
        params = nnx.state(build_model(config, rngs=nnx.Rngs(0)))
        return init_state(params, optimizer_for(params)), params

    def optimizer_for(params):
        return make_optimizer(
            OptimizerConfig(), params, learning_rate=lambda step: 1e-3, total_steps=1
        )

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    state, params = jax.eval_shape(shapes)
    step: Any = make_train_step(graphdef, optimizer_for(params), ema_decay=0.9999)
    height, width = config.grid[0] * config.patch[0], config.grid[1] * config.patch[1]
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, height, width, config.channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    begin = time.perf_counter()
    lowered = step.lower(state, inputs)
    traced = time.perf_counter()
    lowered.compile()
    return CompileTime(
        trace=traced - begin,
        compile=time.perf_counter() - traced,
        lines=lowered.as_text().count("\n"),
    )


def main() -> None:
    """Print the two modes of one model side by side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=list_models(), metavar="MODEL")
    parser.add_argument("--batch", type=int, default=2, help="images a step (default 2)")
    parser.add_argument(
        "--modes", nargs="+", default=["scan", "unroll"], choices=["scan", "unroll"]
    )
    arguments = parser.parse_args()
    print(
        f"{arguments.model}, batch {arguments.batch}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    )
    for mode in arguments.modes:
        config = dataclasses.replace(model_config(arguments.model), blocks=mode)
        seconds = measure_train_step(config, arguments.batch)
        print(
            f"blocks={mode:7} trace {seconds.trace:7.1f} s   compile {seconds.compile:7.1f} s   "
            f"{seconds.lines} lines",
            flush=True,
        )


if __name__ == "__main__":
    main()
