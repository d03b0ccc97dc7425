"""The fused mixer core without a GPU: in the interpreter against float64, and lowered for an H100."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gpu
from pallas_kernels.mixer_core import Convolutions, Directions, Norm, mixer_core, sequence_core
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import x64


def middle(params, u):
    """Stand in for projections and scans."""
    return tuple(jnp.tanh(side * p) for side, p in zip(u, params, strict=True))


def draw(rng, b, rows, columns, e, taps=4, dtype="float32", per_position=1):
    """Draw arguments, and the gradient of the output."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    args = (
        normal(b, rows * columns * per_position, 2 * e).astype(dtype),
        Directions(normal(2, taps, e), normal(2, e), normal(2, e)),
        Norm(normal(e), normal(e)),
        normal(2, e),
    )
    return args, normal(b, rows * columns * per_position, e).astype(dtype)


def draw_apart(
    rng, rows, columns, transposed=False, method="mean", norm_kind="layer", per_position=1, **case
):
    """Draw the same, and no line's largest two tokens so close that float32 may take the other one for the maximum."""
    from pallas_kernels.mixer_core import xla
    from pallas_kernels.mixer_core.types import CoreOptions

    options = CoreOptions(rows, columns, transposed, 1.0, 1e-5, method, per_position=per_position)
    while True:
        args, out_bar = draw(rng, rows=rows, columns=columns, per_position=per_position, **case)
        if method == "mean":
            return args, out_bar
        x, directions = np.split(np.asarray(args[0], np.float32), 2, axis=-1)[0], args[1]
        with x64():
            x, directions = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (x, directions))
            both = xla._convolved(x, directions, options)
            lines = np.asarray([xla._on_lines(c, options) for c in both])
        second, first = np.moveaxis(np.partition(lines, (-2, -1), axis=3)[:, :, :, -2:], 3, 0)
        if np.min(first - second) > 5e-6:
            return args, out_bar


def value_and_gradients(args, out_bar, implementation, **options):
    def run(args):
        return mixer_core(*args, middle=middle, implementation=implementation, **options)

    out, pull = jax.vjp(run, args)
    return out, pull(out_bar)[0]


def compare(rng, bound, b, e, taps=4, dtype="float32", scale=1.0, **options):

    args, out_bar = draw_apart(rng, b=b, e=e, taps=taps, dtype=dtype, **options)
    options["scale"] = scale
    with abstract_h100(), interpreted():
        run = jax.jit(lambda a, g: value_and_gradients(a, g, "pallas", **options))
        got = run.trace(args, out_bar).lower().compile()(args, out_bar)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, out_bar))
        wanted = jax.jit(lambda *a: value_and_gradients(*a, "xla", **options))(*wide)
    assert max(relative_errors(got, wanted)) < bound


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_random_grid(seed):
    rng = np.random.default_rng(seed)
    rows, columns = (int(x) for x in rng.integers(3, 7, 2))
    transposed, method = bool(rng.integers(2)), str(rng.choice(["mean", "max"]))
    case = {"b": 1, "rows": rows, "columns": columns, "e": 128, "scale": 0.25}
    compare(rng, 3e-6, **case, transposed=transposed, method=method)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_tokens_of_many_channels(seed):
    """Keep sums over the tokens of a line in shared memory instead of registers."""
    from pallas_kernels.mixer_core.mosaic_back_gradients import HELD

    width = 128 * (HELD + 1)
    compare(np.random.default_rng(seed), 3e-6, b=1, rows=3, columns=4, e=width)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_segments_that_overlap(seed):
    """Cut lines into overlapping segments: what is computed twice is added once, and written twice in order."""
    from pallas_kernels.mixer_core import mosaic
    from pallas_kernels.mixer_core.types import CoreOptions

    rng = np.random.default_rng(seed)
    transposed, method = bool(rng.integers(2)), str(rng.choice(["mean", "max"]))
    rows, columns = (37, 2) if transposed else (2, 37)
    taps = int(rng.integers(3, 9))  # a halo that is longer than what only the last segment has
    options = CoreOptions(rows, columns, transposed, 1.0, 1e-5, method)
    xz = jax.ShapeDtypeStruct((1, 74, 256), jnp.float32)
    for kind in ("front", "front_gradients"):
        assert mosaic.cut(kind, xz, taps, options).overlaps
    case = {"b": 1, "rows": rows, "columns": columns, "e": 128, "scale": 0.25, "taps": taps}
    compare(rng, 3e-6, **case, transposed=transposed, method=method)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_several_tokens_at_a_position(seed):
    """Compare several tokens at each position; some segments overlap, and a transposed line lies in many pieces."""
    from pallas_kernels.mixer_core import mosaic
    from pallas_kernels.mixer_core.types import CoreOptions

    rng = np.random.default_rng(seed)
    transposed, method = bool(rng.integers(2)), str(rng.choice(["mean", "max"]))
    rows, columns = (int(x) for x in rng.integers(2, 4, 2))
    taps, per_position = int(rng.integers(2, 6)), int(rng.integers(5, 9))
    if rng.integers(2):  # two segments of a line overlap
        taps = min(taps, 4)
        rows, columns, per_position = (13, 2, 3) if transposed else (2, 13, 3)
        options = CoreOptions(
            rows, columns, transposed, 1.0, 1e-5, method, per_position=per_position
        )
        xz = jax.ShapeDtypeStruct((1, 78, 256), jnp.float32)
        assert mosaic.cut("front_gradients", xz, taps, options).overlaps
    case = {"b": 1, "rows": rows, "columns": columns, "e": 128, "scale": 0.25, "taps": taps}
    compare(rng, 3e-6, **case, transposed=transposed, method=method, per_position=per_position)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_lines_of_several_segments(seed, monkeypatch):
    """Carry gradients from segment to segment and from line to line, here through every image of the batch."""
    from pallas_kernels.mixer_core import mosaic
    from pallas_kernels.mixer_core.types import CoreOptions

    monkeypatch.setattr(mosaic, "PROCESSORS", 1)
    rng = np.random.default_rng(seed)
    transposed, method = bool(rng.integers(2)), str(rng.choice(["mean", "max"]))
    rows, columns = (24, 2) if transposed else (2, 24)
    options = CoreOptions(rows, columns, transposed, 1.0, 1e-5, method)
    grid = mosaic.cut(
        "front_gradients", jax.ShapeDtypeStruct((4, 48, 256), jnp.float32), 4, options
    )
    assert (grid.segment, grid.per_block) == (12, 4)
    case = {"b": 4, "rows": rows, "columns": columns, "e": 128, "scale": 0.25}
    compare(rng, 3e-6, **case, transposed=transposed, method=method)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_channels_of_no_whole_block(seed):
    """Fill channels up to a whole block with zeros, which count in no norm."""
    rng = np.random.default_rng(seed)
    case = {"b": 1, "rows": 2, "columns": 4, "e": int(rng.choice([64, 72, 192, 200]))}
    compare(rng, 3e-6, **case, method=str(rng.choice(["mean", "max"])))


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize("norm_kind", ["rms", "none"])
def test_other_norms(seed, norm_kind):
    rng = np.random.default_rng(seed)
    case = {"b": 1, "rows": 2, "columns": 4, "e": int(rng.choice([72, 128]))}
    compare(rng, 3e-6, **case, norm_kind=norm_kind)


@pytest.mark.drawn("kernel shapes", one_in=20)
@pytest.mark.parametrize("norm_kind", ["layer", "rms", "none"])
@pytest.mark.parametrize("operation", ["core", "sequence"])
def test_narrow_widths_without_kernels(rng, monkeypatch, operation, norm_kind):
    """Compare XLA's stages, which stand beside the kernels, on arrays that are filled up with zeros."""
    (xz, directions, norm, params), out_bar = draw(rng, 2, 3, 4, 72)

    def run(args):
        xz, directions, norm, params = args
        if operation == "core":
            grid = {"rows": 3, "columns": 4, "norm_kind": norm_kind}
            return mixer_core(xz, directions, norm, params, middle=middle, **grid)
        convolutions = Convolutions(directions.kernels, directions.biases)
        skip = lambda D, c: (c[0] * D[0], c[1] * D[1])  # noqa: E731
        return sequence_core(xz, convolutions, norm, directions.D, middle=skip, norm_kind=norm_kind)

    def with_gradients(args):
        out, pull = jax.vjp(run, args)
        return out, pull(out_bar)

    args = (xz, directions, norm, params)
    wanted = jax.jit(lambda args: with_gradients(args))(args)
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    got = jax.jit(lambda args: with_gradients(args))(args)
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_the_first_maximum_is_taken(seed):

    with abstract_h100(), interpreted():
        check_maxima(seed)


def check_maxima(seed):
    """Check that the first of equal maxima is taken, and that none hides a NaN; lines in two segments."""
    from pallas_kernels.mixer_core import mosaic, xla
    from pallas_kernels.mixer_core.types import CoreOptions

    rng = np.random.default_rng(seed)
    small = lambda *shape: jnp.asarray(rng.integers(0, 3, shape), jnp.float32)  # noqa: E731
    lines, e = 3, 128
    transposed = bool(rng.integers(2))
    rows, columns = (34, lines) if transposed else (lines, 34)
    xz = small(1, rows * columns, 2 * e).at[0, rng.integers(rows * columns), 5].set(jnp.nan)
    # Convolutions of small integers are exact, so that equal ones are equal everywhere.
    directions = Directions(small(2, 3, e), small(2, e), small(2, e))
    options = CoreOptions(rows, columns, transposed, 1.0, 1e-5, "max")
    assert mosaic.cut("front", xz, 3, options).segments == 2
    got = jax.device_get(mosaic.front(xz, directions, (), options))
    u, _, places = jax.device_get(xla.front(xz[..., :e], directions, (), options))
    assert sum(np.isnan(side).sum() for side in u) >= 2
    for side, wanted, place, first in zip(got[0], u, got[2], places, strict=True):
        np.testing.assert_allclose(side, wanted, rtol=1e-5)
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(place[finite], first[finite])
        assert np.all((place >= 0) & (place < 34))


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"b": 2, "rows": 4, "columns": 6, "e": 128, "transposed": True, "taps": 3},
        {"b": 1, "rows": 2, "columns": 68, "e": 128, "taps": 8},  # a halo is longer than 4
        {"b": 1, "rows": 3, "columns": 5, "e": 1152},  # blocks of channels are read ahead
        {"b": 1, "rows": 3, "columns": 34, "e": 128, "transposed": False},  # lines in segments
        {"b": 1, "rows": 5, "columns": 4, "e": 256, "dtype": "bfloat16"},
        {"b": 2, "rows": 34, "columns": 3, "e": 128, "transposed": True, "method": "max"},
        {"b": 1, "rows": 4, "columns": 5, "e": 256, "dtype": "bfloat16", "method": "max"},
        {"b": 1, "rows": 2, "columns": 37, "e": 384, "dtype": "bfloat16", "taps": 8},
        {
            "b": 1,
            "rows": 4,
            "columns": 3,
            "e": 640,
            "transposed": True,
        },  # one block of channels at a time
    ],
)
def test_cases(seed, case):
    compare(np.random.default_rng(seed), 1e-2 if "dtype" in case else 3e-6, **case)


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [
        {"b": 128, "rows": 14, "columns": 14, "e": 384},
        {"b": 2, "rows": 128, "columns": 128, "e": 1536, "dtype": "bfloat16"},
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["mean", "max"])
def test_lowers_for_an_h100(case, transposed, method):
    check_lowering(case, transposed, method)


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize(
    ("case", "transposed", "method"),
    [
        ({"b": 2, "rows": 37, "columns": 37, "e": 384, "dtype": "bfloat16"}, True, "max"),
        ({"b": 2, "rows": 22, "columns": 22, "e": 2048}, False, "mean"),
        ({"b": 2, "rows": 8, "columns": 8, "e": 192, "dtype": "bfloat16"}, False, "mean"),
    ],
)
def test_ragged_and_narrow_ones_lower_for_an_h100(case, transposed, method):
    check_lowering(case, transposed, method)


def check_lowering(case, transposed, method):
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), **{**case, "b": 1}))
    args = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct((case["b"], *x.shape[1:]), x.dtype)
            if x.ndim == 3 and x.shape[0] == 1
            else x
        ),
        args,
    )
    options = {"rows": case["rows"], "columns": case["columns"], "transposed": transposed}
    options["method"] = method
    text = lower_for_h100(lambda a, g: value_and_gradients(a, g, "auto", **options), *args)
    for kernel in ("mixer_front", "mixer_back", "mixer_back_gradients", "mixer_front_gradients"):
        assert launches(text, kernel) == 1


@pytest.mark.drawn("XLA operations")
@pytest.mark.parametrize("method", ["mean", "max"])
def test_xla_equals_the_equations(seed, method):
    """Compare the definition itself with a loop over tokens."""
    rng = np.random.default_rng(seed)
    rows, columns, e, taps = 3, 4, 5, 3
    (xz, d, norm, params), _ = draw(rng, 2, rows, columns, e, taps)
    got = mixer_core(
        xz, d, norm, params, middle=middle, rows=rows, columns=columns, transposed=True,
        method=method, scale=0.5, implementation="xla",
    )  # fmt: skip
    xz, params = np.asarray(xz, np.float64), np.asarray(params, np.float64)
    kernels, biases, D = (np.asarray(v, np.float64) for v in d)
    order = [r * columns + c for c in range(columns) for r in range(rows)]
    x, z = xz[:, order, :e], xz[:, :, e:]
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    total = np.zeros_like(x)
    for side in (0, 1):
        seen = x[:, ::-1] if side else x
        c = np.zeros_like(x)
        for t in range(rows * columns):
            for j in range(taps):
                if t - (taps - 1 - j) >= 0:
                    c[:, t] += kernels[side, j] * seen[:, t - (taps - 1 - j)]
        c = silu(c + biases[side])
        c = c[:, ::-1] if side else c
        lines = c.reshape(2, columns, rows, e)
        u = lines.mean(2) * 0.5 if method == "mean" else lines.max(2)
        total += np.repeat(np.tanh(u * params[side]), rows, axis=1) + D[side] * c
    s = np.zeros_like(total)
    s[:, order] = total / 2
    s = (s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-5)
    wanted = (s * np.asarray(norm.scale) + np.asarray(norm.shift)) * silu(z)
    assert max(relative_errors(got, wanted)) < 1e-5


@needs_mosaic
def test_an_empty_batch_is_left_to_xla():
    (xz, *rest), _ = draw(np.random.default_rng(0), 0, 3, 4, 128)
    with abstract_h100():
        out = mixer_core(xz, *rest, middle=lambda _, u: (u[0], u[1]), rows=3, columns=4)
    assert out.shape == (0, 12, 128)


@needs_mosaic
def test_tiny_images_are_left_to_xla_in_a_batch_too():
    """Leave tiny images to XLA: the kernel behind the scans takes four tokens at a time.

    A device's share may be one image.
    """
    from pallas_kernels.mixer_core import mosaic
    from pallas_kernels.mixer_core.types import CoreOptions

    for columns, refused in ((3, True), (4, False)):
        (xz, directions, *_), _ = draw(np.random.default_rng(0), 8, 1, columns, 128)
        options = CoreOptions(1, columns, False, 1.0, 1e-5, "mean")
        reason = mosaic.unsupported(xz, directions.kernels, (), options)
        assert ("tokens are fewer" in (reason or "")) == refused


def test_bad_calls():
    (xz, *rest), _ = draw(np.random.default_rng(0), 1, 3, 3, 4)
    with pytest.raises(ValueError, match="must hold 3 x 4 tokens"):
        mixer_core(xz, *rest, middle=middle, rows=3, columns=4)
    # One channel would be repeated over all of them.
    for wrong in (lambda _, u: (u[0, :, :, :1], u[1]), lambda _, u: u[0]):
        with pytest.raises(ValueError, match="middle must return a pair of arrays of shape"):
            mixer_core(xz, *rest, middle=wrong, rows=3, columns=3)
    with pytest.raises(ValueError, match="method must be one of"):
        mixer_core(xz, *rest, middle=middle, rows=3, columns=3, method="median")
    with pytest.raises(ValueError, match="norm_kind must be one of"):
        mixer_core(xz, *rest, middle=middle, rows=3, columns=3, norm_kind="batch")
    with pytest.raises(ValueError, match="implementation must be one of"):
        mixer_core(xz, *rest, middle=middle, rows=3, columns=3, implementation="cuda")
    with pytest.raises(NotImplementedError, match="cannot run here"):
        mixer_core(xz, *rest, middle=middle, rows=3, columns=3, implementation="pallas")
