"""The fused mixer core over ragged grids: against the equations, in the interpreter, and lowered for an H100."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.mixer_core import mixer_core, xla
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import assert_close, parity_dir, x64


def draw_ids(rng, b, kept, rows, columns):
    """Draw rows of some tokens of a grid, others in each sample, as the released masked models number them."""
    kept_ids = [np.sort(rng.permutation(rows * columns)[:kept]) // columns for _ in range(b)]
    ids = np.asarray(kept_ids, np.int32).reshape(b, kept)
    return jnp.asarray(ids), jnp.asarray(rows - 1 - ids[:, ::-1])


def draw(rng, b, kept, rows, columns, e, **more):
    """Draw arguments with the rows last, and the gradient of the output."""
    args, out_bar = core.draw(rng, b, 1, kept, e, **more)
    return (*args, draw_ids(rng, b, kept, rows, columns)), out_bar


def draw_places(rng, b, kept):
    """Draw an order of visit for each sample. Return it with its inverse."""
    order = np.stack([rng.permutation(kept) for _ in range(b)]).astype(np.int32)
    return jnp.asarray(order), jnp.asarray(np.argsort(order, axis=1))


def value_and_gradients(args, out_bar, implementation, **options):
    args, ids = args[:-1], args[-1]

    def run(args):
        return mixer_core(
            *args, middle=core.middle, row_ids=ids, implementation=implementation, **options
        )

    out, pull = jax.vjp(run, args)
    return out, pull(out_bar)[0]


def in_float64(tree):
    """Convert floats to float64; rows stay whole numbers."""
    wide = lambda x: jnp.asarray(x, None if x.dtype == jnp.int32 else jnp.float64)  # noqa: E731
    return jax.tree.map(wide, tree)


def compare(rng, bound, b, kept, rows, columns, e, **more):

    options = {"rows": rows, "columns": columns, "scale": 0.5}
    args, out_bar = draw(rng, b, kept, rows, columns, e, **more)
    with abstract_h100(), interpreted():
        run = jax.jit(lambda a, g: value_and_gradients(a, g, "pallas", **options))
        got = run.trace(args, out_bar).lower().compile()(args, out_bar)
    with x64():
        reference = jax.jit(lambda *a: value_and_gradients(*a, "xla", **options))
        wanted = reference(*in_float64((args, out_bar)))
    assert max(relative_errors(got, wanted)) < bound


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_random_rows(seed, monkeypatch):
    """Compare random rows, with sums by one block a sample, as in large batches, or by several.

    Of blocks for a whole sample some read the tokens from shared memory, others from global memory.
    """
    from pallas_kernels.mixer_core import mosaic, mosaic_ragged_staged

    rng = np.random.default_rng(seed)
    monkeypatch.setattr(mosaic, "PROCESSORS", int(rng.choice([1, 132])))
    if rng.choice([False, True]):
        monkeypatch.setattr(mosaic_ragged_staged, "fits", lambda *_: False)
    rows, columns = (int(x) for x in rng.integers(7, 9, 2))
    compare(rng, 3e-6, 1, int(rng.choice([8, 21, 37])), rows, columns, 128)


@needs_mosaic
@pytest.mark.parametrize(
    ("case", "moved"),
    [
        ({"kept": 13, "e": 256, "dtype": "bfloat16"}, True),
        ({"kept": 21, "e": 128, "taps": 3}, False),
        ({"kept": 3, "e": 128}, True),  # one turn, of fewer tokens than the rows
    ],
)
def test_fronts_agree(seed, case, moved):
    """Compare the front from shared memory with the one from global memory, but for the order of XLA's roundings."""
    from pallas_kernels.mixer_core import mosaic_ragged_common as common
    from pallas_kernels.mixer_core import mosaic_ragged_front, mosaic_ragged_staged

    rng = np.random.default_rng(seed)
    b, rows, length = 2, 9, case["kept"]
    (xz, directions, *_, ids), _ = draw(rng, b, rows=rows, columns=4, **case)
    runs = common.cut(b, length, case["e"], 1)
    assert mosaic_ragged_staged.fits(length, rows, runs, xz.dtype.itemsize)
    places = draw_places(rng, b, length)[0] if moved else None

    def run(front):
        call = functools.partial(front, runs=runs, rows=rows, share=0.25, interpret=True)
        return jax.jit(lambda *arrays: call(*arrays)).trace(xz, ids, places, *directions)

    with abstract_h100(), interpreted():
        got, wanted = (
            run(module.front).lower().compile()(xz, ids, places, *directions)
            for module in (mosaic_ragged_staged, mosaic_ragged_front)
        )
    # The skips have the tokens' dtype: of numbers in half precision a few are rounded to the other side.
    bounds = 1e-6, 1e-4 if "dtype" in case else 1e-6
    errors = relative_errors(got, wanted)
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


@needs_mosaic
def test_which_samples_are_staged():
    """Stage tokens of masked images in large batches, but no samples that are cut or fill shared memory."""
    from pallas_kernels.mixer_core import mosaic_ragged_common as common
    from pallas_kernels.mixer_core.mosaic_ragged_staged import fits

    def staged(batch, length, width=1536, rows=14, size=2):
        return fits(length, rows, common.cut(batch, length, width, 132), size)

    assert staged(128, 49) and staged(128, 64, 2560, 16) and staged(128, 49, size=4)
    assert not staged(8, 49) and not staged(128, 128) and not staged(128, 64, size=4)
    assert not staged(128, 49, rows=2**15)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [
        {"b": 2, "kept": 13, "rows": 4, "columns": 5, "e": 256, "dtype": "bfloat16"},
        {"b": 1, "kept": 12, "rows": 4, "columns": 5, "e": 128},
    ],
)
def test_tokens_are_visited_at_their_places(seed, case):
    """Compare with tokens that are moved into the order of visit, and back.

    Forward by the kernels in the interpreter, in bfloat16 with scans' outputs in bfloat16. With gradients, which move
    the tokens, as traced for an H100 and run by XLA on this CPU.
    """
    rng = np.random.default_rng(seed)
    options = {"rows": case["rows"], "columns": case["columns"], "middle": core.middle}
    (xz, *args, ids), out_bar = draw(rng, **case)
    places = draw_places(rng, case["b"], case["kept"])

    def visited(xz, *args):
        return mixer_core(xz, *args, row_ids=ids, places=places, **options)

    def moved(xz, *args):
        there, back = (of_token[:, :, None] for of_token in places)
        xz = jnp.take_along_axis(xz, there, axis=1)
        out = mixer_core(xz, *args, row_ids=ids, implementation="xla", **options)
        return jnp.take_along_axis(out, back, axis=1)

    def differentiated(run):
        def both(*args):
            out, pull = jax.vjp(run, *args)
            return out, pull(out_bar)

        return both

    def traced(run):
        return jax.jit(run).trace(xz, *args).lower().compile()(xz, *args)

    bound = 1e-2 if "dtype" in case else 3e-6
    by_name = functools.partial(mixer_core, implementation="pallas", places=places, row_ids=ids)
    narrow = lambda *args: tuple(y.astype(xz.dtype) for y in core.middle(*args))  # noqa: E731
    with abstract_h100(), interpreted():
        got = traced(lambda *args: by_name(*args, **options | {"middle": narrow}))
    wanted = differentiated(moved)(xz, *args)
    assert max(relative_errors(got, wanted[0])) < bound
    with abstract_h100():
        got = traced(differentiated(visited))
    assert max(relative_errors(got, wanted)) < bound


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"b": 2, "kept": 24, "rows": 6, "columns": 7, "e": 128, "taps": 3},
        {"b": 1, "kept": 7, "rows": 9, "columns": 3, "e": 768},
        {"b": 1, "kept": 12, "rows": 4, "columns": 5, "e": 256, "dtype": "bfloat16"},
        {"b": 2, "kept": 37, "rows": 7, "columns": 9, "e": 128, "taps": 2},  # segments overlap
    ],
)
def test_cases(seed, case):
    compare(np.random.default_rng(seed), 1e-2 if "dtype" in case else 3e-6, **case)


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [
        {"b": 2, "kept": 49, "rows": 14, "columns": 14, "e": 384},
        {"b": 2, "kept": 37, "rows": 14, "columns": 14, "e": 768},
    ],
)
def test_lowers_for_an_h100(case):
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), **case))
    options = {"rows": case["rows"], "columns": case["columns"]}
    text = lower_for_h100(lambda a, g: value_and_gradients(a, g, "auto", **options), *args)
    for kernel in ("ragged_front", "back", "back_gradients", "front_gradients"):
        assert launches(text, f"mixer_{kernel}") == 1


def test_xla_equals_the_equations(seed):
    """Compare with loops over tokens that reverse them for the second direction, and not their rows."""
    rng = np.random.default_rng(seed)
    b, kept, rows, columns, e, taps = 2, 9, 5, 4, 3, 3
    (xz, d, norm, params, row_ids), _ = draw(rng, b, kept, rows, columns, e, taps=taps)
    ids = np.asarray(row_ids[0])
    got = mixer_core(
        xz, d, norm, params, middle=core.middle, rows=rows, columns=columns, row_ids=row_ids,
        scale=0.5, implementation="xla",
    )  # fmt: skip
    xz, params = np.asarray(xz, np.float64), np.asarray(params, np.float64)
    kernels, biases, D = (np.asarray(v, np.float64) for v in d)
    x, z = xz[..., :e], xz[..., e:]
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    s = np.zeros_like(x)
    for sample in range(b):
        for side in (0, 1):
            seen = x[sample, ::-1] if side else x[sample]
            c, u = np.zeros((kept, e)), np.zeros((rows, e))
            for t in range(kept):
                for j in range(min(taps, t + 1)):
                    c[t] += kernels[side, taps - 1 - j] * seen[t - j]
                c[t] = silu(c[t] + biases[side])
                u[ids[sample, t]] += 0.5 * c[t] / columns
            out = np.tanh(u * params[side])[ids[sample]] + D[side] * c
            s[sample] += (out[::-1] if side else out) / 2
    s = (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-5)
    wanted = (s * np.asarray(norm.scale) + np.asarray(norm.shift)) * silu(z)
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.drawn("more of the kernels", one_in=6)
def test_whole_rows_are_a_grid(seed):
    """Compare rows with all their tokens with a grid, in XLA's form with its derivative."""
    args, out_bar = core.draw(np.random.default_rng(seed), 2, 3, 4, 8)
    ids = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 4)[None].repeat(2, 0)
    options = {"rows": 3, "columns": 4, "scale": 0.25}
    wanted = core.value_and_gradients(args, out_bar, "xla", **options)
    got = value_and_gradients((*args, (ids, ids)), out_bar, "xla", **options)
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.parametrize("number", ["00", "01"])
def test_golden_row_means(number):
    """Compare with the authors' sums over kept tokens, of a sequence and of one reversed under the same rows."""
    if parity_dir() is None:
        pytest.skip("the golden numbers are not here")
    golden = np.load(parity_dir() / f"masked_row_means_constant_{number}.npz")
    sizes = json.loads(str(golden["meta"]))["kwargs"]
    rows, columns = sizes["rows"], sizes["cols"]
    ids = jnp.asarray(golden["input/row_ids"], jnp.int32)
    tokens = lambda name: jnp.asarray(golden[name].swapaxes(1, 2), jnp.float32)  # noqa: E731
    forward = xla.row_sums(tokens("input/x"), ids, rows) / columns
    assert_close(forward, tokens("output/pooled"), 1e-5)
    reversed_ids = rows - 1 - ids[:, ::-1]
    backward = xla.row_sums(tokens("input/x_flip")[:, ::-1], reversed_ids, rows) / columns
    assert_close(backward[:, ::-1], tokens("output/pooled_flip"), 1e-5)


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_what_the_kernels_cannot_take_falls_back(seed, monkeypatch, caplog):
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    args, out_bar = draw(np.random.default_rng(seed), 1, 2, 9, 9, 128)
    options = {"rows": 9, "columns": 9}
    gpu.log_once.cache_clear()
    got = value_and_gradients(args, out_bar, "auto", **options)
    assert "lines of 2 tokens are shorter than the convolution's reach" in caplog.text
    assert max(relative_errors(got, value_and_gradients(args, out_bar, "xla", **options))) < 1e-6
    with pytest.raises(NotImplementedError, match="2 tokens"):
        value_and_gradients(args, out_bar, "pallas", **options)


def test_rows_outside_the_grid_are_its_first_and_last(seed):
    """Clip row ids outside the grid. No row id makes a kernel address what is not its own."""
    (xz, *rest, ids), _ = draw(np.random.default_rng(seed), 1, 6, 3, 3, 4)
    run = lambda ids: mixer_core(  # noqa: E731
        xz, *rest, row_ids=ids, middle=core.middle, rows=3, columns=3
    )
    wild = tuple(jnp.asarray([[-7, 0, 1, 1, 3, 2**30]]) for _ in ids)
    held = tuple(jnp.asarray([[0, 0, 1, 1, 2, 2]]) for _ in ids)
    np.testing.assert_array_equal(run(wild), run(held))


def test_more_rows_than_their_ids_can_count(seed):
    """Count more rows than the ids' dtype can: a bound put into so narrow a dtype would wrap around."""
    rows = 300
    (xz, *rest, _), _ = draw(np.random.default_rng(seed), 1, 6, rows, 3, 4)
    run = lambda ids: mixer_core(  # noqa: E731
        xz, *rest, row_ids=(ids, ids), middle=core.middle, rows=rows, columns=3
    )
    ids = jnp.asarray([[0, 3, 10, 50, 100, 120]])
    np.testing.assert_array_equal(run(ids.astype("int8")), run(ids))


def test_bad_calls():
    (xz, *rest, ids), _ = draw(np.random.default_rng(0), 1, 6, 3, 3, 4)
    call = {"middle": core.middle, "rows": 3, "columns": 3}
    for options in ({"method": "max"}, {"transposed": True}):
        with pytest.raises(ValueError, match="pooled by 'mean' and not transposed"):
            mixer_core(xz, *rest, row_ids=ids, **options, **call)
    with pytest.raises(ValueError, match="row_ids .* must fit"):
        mixer_core(xz[:, :5], *rest, row_ids=ids, **call)
    with pytest.raises(ValueError, match="places .* must fit"):
        mixer_core(xz, *rest, row_ids=ids, places=(ids[0], ids[0][:, :5]), **call)
