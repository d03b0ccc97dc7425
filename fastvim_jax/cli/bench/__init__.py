"""`fastvim bench BENCH`: measurements, printed as tables and kept as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from fastvim_jax.cli.bench.data import data
from fastvim_jax.cli.bench.detect import detect
from fastvim_jax.cli.bench.mixer import mixer
from fastvim_jax.cli.bench.model import model, train
from fastvim_jax.cli.bench.predict import predict
from fastvim_jax.cli.bench.scan import scan
from fastvim_jax.cli.bench.segment import segment
from fastvim_jax.cli.usage import UsageError
from fastvim_jax.errors import suggest

HELP = """\
Usage: fastvim bench BENCH [--json FILE] [OPTIONS]

Measure on this machine's device (device time on a GPU, wall-clock time elsewhere), check the results, and print a
table. Without options the shapes fit the device; `fastvim bench BENCH --help` lists the options.

Benches:
  scan     the selective scan: every implementation over lengths 7 to 16384
  mixer    one mixer: pool, projection, scan, repeat, skip, and its whole core
  model    images per second of FastVim, Vim and ViT
  train    images per second of training steps; largest batch; trace and compile time
  segment  segmentation models by parts: backbone, heads, classes, whole; training steps
  detect   detectors by parts: backbone, neck, heads, post-processing, whole; training steps
  predict  predictions of image files: decoding alone, the model alone, the whole, and which of the two limits
  data     reading images: each stage, the whole pipeline, a PyTorch DataLoader on the same files (on the host)
"""

BENCHES: dict[str, Callable[[Sequence[str]], int]] = {
    "scan": scan,
    "mixer": mixer,
    "model": model,
    "train": train,
    "data": data,
    "segment": segment,
    "detect": detect,
    "predict": predict,
}


def run(arguments: Sequence[str]) -> int:
    """Measure something."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHES:
        hint = suggest(name, BENCHES) or f" Benches: {', '.join(BENCHES)}."
        raise UsageError(f"unknown bench {name!r}.{hint}")
    with _no_compilation_cache():
        return BENCHES[name](rest)


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Turn the persistent compilation cache off, because benches measure how long compiling takes.

    JAX decides at the first compilation of a process whether it uses the cache. `reset_cache` lets it decide again.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
