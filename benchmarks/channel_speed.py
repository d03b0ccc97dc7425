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
from functools import partial
from pathlib import Path
from typing import Any

TRAINED = (
    "fastchannelvim_small_patch16_224", "channelvim_small_patch16_224", "channelvit_small_patch16_224",
    "fastchannelvim_small_patch8_224", "channelvit_small_patch8_224",
)  # fmt: skip
PAPER = {  # Table 22: images per second, batch 8
    "channelvim_small_patch16_224": 234, "fastchannelvim_small_patch16_224": 318,
    "channelvim_small_patch8_224": 61, "fastchannelvim_small_patch8_224": 99,
}  # fmt: skip


def training_cases(models: list[str], batch: int) -> list[Any]:
    """List the measurements for `timing.run`: each model's training step in bf16, at every number of channels."""
    return [({"model": name, "batch": batch}, training_case(name, batch)) for name in models]


def training_case(name: str, batch: int) -> Iterator[dict[str, Any] | None]:
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

    config = model_config(name, dtype="bfloat16", activations="compute", num_classes=161)
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

    counts = range(config.channels, 0, -1)
    shapes = jax.eval_shape(initial)
    programs = {
        count: timing.Program(
            partial(step, norms=False),
            shapes,
            jax.eval_shape(lambda c=count: inputs(c)),
            donate=(0,),
        )
        for count in counts
    }
    yield None
    state = jax.jit(initial)()
    milliseconds: dict[int, float] = {}
    for count in counts:
        batch_of = inputs(count)

        def one(_: int, count: int = count, batch_of: Any = batch_of) -> Any:
            nonlocal state
            state, metrics = programs[count](state, batch_of)
            return metrics["loss"]

        milliseconds[count] = timing.steady_clock(one, seconds=0.2, repeats=3)[0]
    sampled = sum(milliseconds.values()) / len(milliseconds)
    yield {
        "ms_by_channels": milliseconds,
        "images_per_s": 1e3 * batch / milliseconds[config.channels],
        "sampled_images_per_s": 1e3 * batch / sampled,
        "peak_bytes": programs[config.channels].costs()["peak_bytes"],
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
        rows: Any = timing.run(training_cases(options.models, options.batch))
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
