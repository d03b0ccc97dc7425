"""Time training steps of the channel models with and without channel sampling, and a compiled PyTorch ChannelViT.

    python benchmarks/channel_speed.py train --json benchmarks/results/CARD/family/channel_train.json
    python benchmarks/channel_speed.py peer --json benchmarks/results/CARD/family/channel_peer.json

Forward passes have the general command:

    fastvim bench model --models channelvim_small_patch16_224 fastchannelvim_small_patch16_224 \
        channelvim_small_patch8_224 fastchannelvim_small_patch8_224 channelvit_small_patch16_224 \
        channelvit_small_patch8_224 --batches 8 64 --precisions bf16 tf32 f32 --json ...

Channel sampling draws 1 to 8 channels, each number equally often. So its images per second are those of eight steps
together, one with each number of channels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TRAINED = (
    "fastchannelvim_small_patch16_224", "channelvim_small_patch16_224", "channelvit_small_patch16_224",
    "fastchannelvim_small_patch8_224", "channelvit_small_patch8_224",
)  # fmt: skip


def training_cases(models: list[str], batch: int, blocks: str) -> list[Any]:
    """List the measurements for `timing.run`: each model's training step in bf16, at every number of channels."""
    return [
        ({"model": name, "batch": batch, "blocks": blocks}, training_case(name, batch, blocks))
        for name in models
    ]


def training_case(name: str, batch: int, blocks: str) -> Iterator[dict[str, Any] | None]:
    """Compile the step for every number of channels. Then time all, and yield the rates of all and sampled channels."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from fastvim_jax.models import build_model, model_config
    from fastvim_jax.training import OptimizerConfig
    from fastvim_jax.training.classification.train import make_loss
    from fastvim_jax.training.optimizer import make_optimizer
    from fastvim_jax.training.steps import init_state, make_train_step
    from pallas_kernels import timing

    more = {"activations": "compute", "blocks": blocks}
    config = model_config(name, dtype="bfloat16", num_classes=161, **more)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
    params = jax.eval_shape(lambda: nnx.state(build_model(config, rngs=nnx.Rngs(0))))
    optimizer = make_optimizer(
        OptimizerConfig(), params, learning_rate=lambda step: 1e-4, total_steps=1
    )
    step = make_train_step(make_loss(graphdef), optimizer)

    def initial() -> Any:
        params = nnx.state(build_model(config, rngs=nnx.Rngs(0)))
        return init_state(params, optimizer, ema=False)

    def inputs(count: int) -> dict[str, jax.Array]:
        shape = (batch, *config.image_size, count)
        return {
            "image": jax.random.normal(jax.random.key(count), shape),
            "label": jnp.zeros((batch,), jnp.int32),
            "channel_ids": jnp.asarray(np.tile(np.arange(count, dtype=np.int32), (batch, 1))),
        }

    # As the trainer does, steps with sampled channels measure all norms, and other steps only what they need.
    steps = [(config.channels, False), *((count, True) for count in range(config.channels, 0, -1))]
    shapes = jax.eval_shape(initial)
    with ThreadPoolExecutor() as pool:
        programs = {
            (count, norms): timing.Program(
                step.func,
                shapes,
                jax.eval_shape(lambda c=count: inputs(c)),
                keywords=jax.device_put(step.keywords),
                static={"norms": norms},
                pool=pool,
            )
            for count, norms in steps
        }
    yield None
    state = jax.jit(initial)()
    milliseconds: dict[tuple[int, bool], float] = {}
    for which in steps:
        program, batch_of = programs[which], inputs(which[0])

        def one(_: int, program: Any = program, batch_of: Any = batch_of) -> Any:
            nonlocal state
            state, metrics = program(state, batch_of)
            return metrics["loss"]

        milliseconds[which] = timing.steady_clock(one, seconds=0.2, repeats=3)[0]
    unsampled = milliseconds.pop(steps[0])
    sampled = sum(milliseconds.values()) / len(milliseconds)
    yield {
        "ms_by_channels": {count: ms for (count, _), ms in milliseconds.items()},
        "images_per_s": 1e3 * batch / unsampled,
        "sampled_images_per_s": 1e3 * batch / sampled,
        "peak_bytes": programs[steps[0]].costs()["peak_bytes"],
    }


def peer_cases(options: argparse.Namespace) -> list[Any]:
    """List the measurements for `timing.run`: forward passes of a compiled PyTorch ChannelViT-S."""
    from benchmarks.peers.channel_vit import case

    return [
        (
            {"model": f"ChannelViT-S/{patch} (timm)", "batch": batch, "dtype": dtype},
            case(patch=patch, batch=batch, dtype=dtype, mode=options.mode),
        )
        for patch in options.patches
        for batch in options.batches
        for dtype in options.dtypes
    ]


def main() -> int:
    """Measure, print the rows and write them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "peer"))
    parser.add_argument("--models", nargs="*", default=list(TRAINED))
    parser.add_argument("--batch", type=int, default=32, help="batch of training steps")
    parser.add_argument("--blocks", default="unroll", help="of training: unroll or scan")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 64], help="peer's batches")
    parser.add_argument("--patches", type=int, nargs="*", default=[16, 8], help="peer's patches")
    parser.add_argument(
        "--dtypes", nargs="*", default=["bfloat16", "float32"], help="peer's dtypes"
    )
    parser.add_argument(
        "--mode", default="", help="mode of torch.compile; by default the one that searches most"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from fastvim_jax.bench.record import show
    from pallas_kernels import timing

    if options.what == "train":
        rows: Any = timing.run(training_cases(options.models, options.batch, options.blocks))
        columns: Any = (
            ("model", 34, lambda r: r["model"]),
            ("batch", 5, lambda r: str(r["batch"])),
            ("images/s", 9, lambda r: f"{r['images_per_s']:.1f}" if "images_per_s" in r else ""),
            (
                "sampled",
                9,
                lambda r: f"{r['sampled_images_per_s']:.1f}" if "images_per_s" in r else "",
            ),
            ("", 0, lambda r: r.get("failed", "")),
        )
    else:
        rows = timing.run(peer_cases(options))
        columns = (
            ("model", 24, lambda r: r["model"]),
            ("batch", 5, lambda r: str(r["batch"])),
            ("dtype", 9, lambda r: r["dtype"]),
            ("images/s", 9, lambda r: f"{r['images_per_s']:.1f}" if "ms" in r else ""),
            ("ms", 9, lambda r: f"{r['ms']:.3f}" if "ms" in r else ""),
            ("", 0, lambda r: r.get("failed", "")),
        )
    show(f"channel_{options.what}", rows, columns, command=" ".join(sys.argv), file=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
