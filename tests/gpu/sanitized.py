"""Every kernel once with its gradients, on shapes that fill no tile: `test_memory` runs it under compute-sanitizer.

`python -m tests.gpu.sanitized FIRST STEP` runs every STEP-th case from FIRST on.
"""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mixer_core import mixer_core
from tests.pallas_kernels import test_bidirectional_scan as pair
from tests.pallas_kernels import test_known_scan as known
from tests.pallas_kernels import test_mosaic_block as block
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels import test_mosaic_project_front as project_front
from tests.pallas_kernels import test_mosaic_ragged as ragged
from tests.pallas_kernels import test_mosaic_scan as scan
from tests.pallas_kernels import test_mosaic_sequence as sequence
from tests.pallas_kernels import test_patch_embed as patches
from tests.pallas_kernels import test_projected_scan as projected


def cases(rng):
    """Yield name, function and its two arguments."""
    for shape in ((2, 37, 24, 7), (1, 2100, 72, 16), (2, 2100, 64, 16)):  # as it is; time is split
        args = scan.draw(rng, *shape)
        b, _, e, n = shape
        states = jnp.asarray(rng.standard_normal((b, e, n)), jnp.float32)
        run = lambda a, c: scan.values_and_gradients(a, c, "pallas")  # noqa: E731
        yield f"scan {shape}", run, args, (args["z"] + 1, states)
    args = pair.draw(rng, 2, 37, 24, 7)
    run = lambda a, c: pair.values_and_gradients(a, c, "pallas")  # noqa: E731
    yield "both directions", run, args, pair.of_output(rng, args)
    grid = {"rows": 5, "columns": 7}
    for options in (
        {"method": "mean"},
        {"method": "mean", "transposed": True},
        {"method": "max"},
        {"method": "max", "transposed": True},
    ):
        options |= grid
        run = lambda a, g, o=options: core.value_and_gradients(a, g, "pallas", **o)  # noqa: E731
        yield f"core {options}", run, *core.draw(rng, 2, 5, 7, 128)
    for rows, columns, width in (
        (2, 37, 128),
        (5, 7, 72),
    ):  # segments overlap; filled up with zeros
        options = {"rows": rows, "columns": columns}
        run = lambda a, g, o=options: core.value_and_gradients(a, g, "pallas", **o)  # noqa: E731
        yield f"core {options}", run, *core.draw(rng, 2, rows, columns, width)
    run = lambda a, g: ragged.value_and_gradients(a, g, "pallas", rows=12, columns=9)  # noqa: E731
    for b, kept in ((2, 21), (2, 37), (140, 13)):  # the last staged in shared memory
        yield f"ragged core, {b} x {kept} tokens", run, *ragged.draw(rng, b, kept, 12, 9, 256)
    yield "ragged core, at places", at_places, *ragged.draw(rng, 140, 13, 12, 9, 256)
    run = lambda a, g: sequence.value_and_gradients(a, g, "pallas")  # noqa: E731
    yield "unpooled core", run, *sequence.draw(rng, 3, 37, 128)
    # Two images a thread block, and one. Gradients of fewer than 8 steps would not take the kernel.
    for sizes in ((71, 13, 128), (2, 9, 256)):
        run = lambda a, _: projected.run(a, "pallas")  # noqa: E731
        yield f"projected scan {sizes}", run, projected.draw(rng, *sizes), None
        args = projected.draw(rng, *sizes)
        run = lambda a, g: projected.gradients_of(a, "pallas", g)  # noqa: E731
        yield f"gradients of projected scan {sizes}", run, args, (args[0][0], args[0][1])
    for sizes in ((16, 12, 384, 16), (8, 8, 768, 32)):
        run = lambda a, g: known.gradients_of(a, "pallas", g)  # noqa: E731
        yield f"gradients of known scan {sizes}", run, *known.draw(rng, *sizes)
    for case, by in (
        # The end of a block as one kernel. With 256 channels, loading it under the sanitizer took more than 50 s.
        ({"b": 2, "rows": 13, "columns": 9, "e": 128}, "pallas"),
        ({"b": 2, "rows": 4, "columns": 9, "e": 128, "transposed": True}, "pallas"),
        ({"b": 152, "rows": 7, "columns": 7, "e": 256}, "auto"),  # as several kernels
    ):
        run = lambda a, g, c=case, by=by: block.value_and_gradients(a, g, by, c)  # noqa: E731
        args, bars = block.draw(rng, **case)
        yield f"block {case}", run, block.rounded(args), bars
    for with_x in (False, True):
        work = project_front.work_of(6, 14, 14, with_x, 64, 64, with_x=with_x)
        run = lambda a, _, w=work: project_front.run(a, w, 1.5, False)  # noqa: E731
        yield f"project_front {work}", run, project_front.draw(rng, 6, 196, 64, 64), None
    run = lambda args, _: patches.run(args, False)  # noqa: E731
    for outputs in (64, 384):  # whole tokens, and tokens of two thread blocks; tiles overlap
        args = patches.draw(rng, 6, 12, 3, outputs, (16, 16))
        yield f"patches of {outputs} channels", run, args, None


def at_places(args, _):
    """Run the ragged core, forward, with each sample's tokens visited from the last to the first."""
    *args, ids = args
    places = (jnp.broadcast_to(jnp.arange(ids[0].shape[1])[::-1], ids[0].shape),) * 2
    options = {"rows": 12, "columns": 9, "middle": core.middle, "implementation": "pallas"}
    return mixer_core(*args, row_ids=ids, places=places, **options)


def main() -> None:
    first, step = map(int, sys.argv[1:])
    for name, run, args, cotangents in itertools.islice(
        cases(np.random.default_rng(0)), first, None, step
    ):
        compiled = jax.jit(run).lower(args, cotangents).compile()
        assert "mosaic_gpu" in compiled.as_text()
        jax.block_until_ready(compiled(args, cotangents))
        print("ran", name, flush=True)


if __name__ == "__main__":
    main()
