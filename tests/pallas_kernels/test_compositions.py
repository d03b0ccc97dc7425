"""Operations under vmap, loops, remat and shard_map: by XLA, and by the kernels in the interpreter."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mixer_core.grid import Grid
from tests.pallas_kernels import compositions
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    needs_mosaic,
    relative_errors,
)

OPERATIONS = compositions.operations(128, batch=2)


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("scan", "core, ragged", "sequence")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in OPERATIONS
    ],
)
def test_xla_under_transformations(seed, name):
    case = compositions.draw(np.random.default_rng(seed), OPERATIONS[name])
    wanted = case.wanted()

    @jax.jit
    def all_of_them(leaves):
        return {k: f(case, "xla", leaves) for k, f in compositions.COMPOSITIONS.items()}

    for composition, got in all_of_them(case.leaves).items():
        assert max(relative_errors(got, wanted)) < 1e-5, composition


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("composition", ["vmapped", "vmapped_twice"])
def test_kernels_in_the_interpreter(seed, name, composition):
    small = compositions.operations(128, batch=1)
    case = compositions.draw(np.random.default_rng(seed), small[name])
    with abstract_h100(), interpreted():
        run = jax.jit(lambda leaves: getattr(compositions, composition)(case, "pallas", leaves))
        got = run.trace(case.leaves).lower().compile()(case.leaves)
    assert max(relative_errors(got, case.wanted())) < 1e-5


@needs_mosaic
@pytest.mark.parametrize(
    ("transposed", "per_position"), [(False, 1), (False, 3), (True, 1), (True, 4)]
)
def test_halo_asks_for_no_index_that_does_not_exist(seed, monkeypatch, transposed, per_position):
    """Ask for no index past the last line. Under vmap Mosaic joins indexed axes, so it would be another image's.

    In a scattered grid the line is sliced and the position indexed.
    """
    from pallas_kernels.mixer_core import grid as module

    rng = np.random.default_rng(seed)
    positions, segments, lines = (int(rng.integers(low, low + 4)) for low in (3, 1, 1))
    segment = positions * per_position
    tokens, positions = segment * segments, positions * segments
    shape = (positions, lines) if transposed else (lines, positions)
    grid = Grid(
        batch=1,
        rows=shape[0],
        columns=shape[1],
        width=128,
        transposed=transposed,
        taps=4,
        segment=segment,
        per_block=1,
        per_position=per_position,
    )
    image = rng.standard_normal((*shape, per_position))
    by_line = (image.swapaxes(0, 1) if transposed else image).reshape(lines, tokens)
    in_order = np.pad(by_line.reshape(-1), grid.halo)
    asked: list = []
    part = lambda ref, batch, line, start, size, channels: (int(line), int(start), size)  # noqa: E731
    monkeypatch.setattr(Grid, "part", staticmethod(part))
    monkeypatch.setattr(
        module.plgpu, "copy_gmem_to_smem", lambda source, *_, **__: asked.append(source)
    )

    for line in range(lines):
        for start in range(0, tokens, segment):
            asked.clear()
            grid.fetch_with_halo(
                None, mock.MagicMock(), None, 0, jnp.int32(line), jnp.int32(start), None
            )
            got = []
            for at_line, at, size in asked:
                if grid.scattered:  # of one position, and past the end of the lines' axis or not
                    assert 0 <= at_line <= lines and 0 <= at <= tokens - size
                    assert at // per_position == (at + size - 1) // per_position
                else:
                    assert 0 <= at_line < lines
                    assert 0 <= at <= tokens - size or at == tokens  # the whole of it past the end
                row = np.pad(by_line, ((0, 1), (0, size)))[at_line]
                got.append(row[at : at + size])
            first = line * tokens + start
            np.testing.assert_array_equal(
                np.concatenate(got), in_order[first : first + segment + 2 * grid.halo]
            )


def shapes_of_gradients(operation, floats, ids):
    """Trace an operation with its gradients; nothing is compiled."""

    def run(floats):
        out, pull = jax.vjp(lambda floats: operation.run(floats, ids, "auto"), floats)
        return pull(out)[0]

    return jax.eval_shape(run, floats)


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "sequence"])
def test_tokens_in_bfloat16_under_strict_promotion(seed, name):
    """Compare dtypes of gradients and arguments. "sequence" is left out: the stand-in for its scans mixes dtypes."""
    floats, ids = OPERATIONS[name].draw(np.random.default_rng(seed))
    first = jax.tree.leaves(floats)[0]
    narrow = lambda x: x.astype(jnp.bfloat16) if x.shape == first.shape else x  # noqa: E731
    floats = jax.tree.map(narrow, floats)
    with jax.numpy_dtype_promotion("strict"):
        gradients = shapes_of_gradients(OPERATIONS[name], floats, ids)
    assert jax.tree.map(lambda x: x.dtype, gradients) == jax.tree.map(lambda x: x.dtype, floats)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "core, max"])
def test_an_empty_batch(seed, name):
    """Compare shapes of an empty batch's gradients. The maxima are left out, because of how they are drawn."""
    empty = compositions.operations(128, batch=0)[name]
    floats, ids = empty.draw(np.random.default_rng(seed))
    gradients = shapes_of_gradients(empty, floats, ids)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, floats)
