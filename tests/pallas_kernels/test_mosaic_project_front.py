"""in_proj, convolutions and pooling as one kernel: interpreted against float64, and lowered for an H100."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mixer_core import Unprojected
from tests.pallas_kernels import test_mosaic_block as block
from tests.pallas_kernels.mosaic_support import (
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import x64

BOUND = 1e-2  # of bfloat16
FULL = {
    "b": 80,
    "rows": 17,
    "columns": 9,
}  # segments for every processor, and a multiple of 8 tokens


def draw(rng, b, size, inputs, width, taps=4):
    """Draw tokens, in_proj's kernel transposed, both convolutions and their skips."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    tokens = normal(b, size, inputs).astype("bfloat16")
    weight = (normal(2 * width, inputs) / inputs**0.5).astype("bfloat16")
    return tokens, weight, normal(2, taps, width) / 2, normal(2, width), normal(2, width)


def wanted_of(args, rows, columns, transposed, scale):
    """Compute xz in float64, and the skips and pooled tokens of x as the kernel rounds it."""
    from pallas_kernels.mixer_core import Directions, xla
    from pallas_kernels.mixer_core.types import CoreOptions

    with x64():
        tokens, weight, *directions = (jnp.asarray(np.asarray(x, np.float64)) for x in args)
        xz = tokens @ weight.T
        x = jnp.split(xz, 2, axis=-1)[0].astype("bfloat16").astype("float64")
        options = CoreOptions(rows, columns, transposed, scale, 1e-5)
        u, skip, _ = xla.front(x, Directions(*directions), (), options)
        return jax.device_get((xz, skip, u))


def work_of(b, rows, columns, transposed, inputs, width, taps=4, **more):
    from pallas_kernels.mixer_core.mosaic_project_front import Work

    return Work(b, rows, columns, transposed, inputs, width, taps, **more)


def run(args, work, scale, interpret, **more):
    from pallas_kernels.mixer_core.mosaic_project_front import project_front

    return project_front(*args, work, scale=scale, interpret=interpret, **more)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.parametrize(("transposed", "with_x"), [(False, True), (True, False)])
def test_kernel(seed, transposed, with_x):
    """Compare with float64: one thread block, so that images follow each other.

    Two images share eight rows, and the last tile is incomplete.
    """
    rng = np.random.default_rng(seed)
    lines, tokens, b = int(rng.integers(9, 15)), 14, 4
    rows, columns = (tokens, lines) if transposed else (lines, tokens)
    work = work_of(b, rows, columns, transposed, 64, 64, processors=1, with_x=with_x)
    assert work.unsupported() is None and work.tiles * 64 > rows * columns
    pooled = jnp.dtype(str(rng.choice(["float32", "bfloat16"])))
    print(work, pooled)
    args = draw(rng, b, rows * columns, 64, 64)
    with abstract_h100(), interpreted():
        call = jax.jit(lambda args: run(args, work, 1.5, True, pooled_dtype=pooled))
        program = call.trace(args).lower().compile()
        got = jax.device_get(program(args))
    assert got[2].dtype == pooled
    xz, *wanted = wanted_of(args, rows, columns, transposed, 1.5)
    assert max(relative_errors(got, (xz if with_x else xz[..., 64:], *wanted))) < BOUND
    exact = 1e-3 if pooled == jnp.float32 else 4e-3
    assert relative_errors(got[2], wanted[1])[0] < exact  # x may be rounded to its neighbour


def draw_block(rng, case):
    """Draw arguments of `mixer_block`, and the gradients of its results."""
    (_, *others), bars = block.draw(rng, **case)
    size, inputs = case["rows"] * case["columns"], case["e"] // 2
    tokens, weight, *_ = draw(rng, case["b"], size, inputs, case["e"])
    return (Unprojected(tokens, weight.astype("float32")), *others), bars


def abstract(case):
    """Return the shapes of the arguments."""
    args = jax.eval_shape(lambda: draw_block(np.random.default_rng(0), {**case, "b": 1})[0])
    size = lambda x: (case["b"], *x.shape[1:]) if x.ndim == 3 and x.shape[0] == 1 else x.shape  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(size(x), x.dtype), args)


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "mixer_project_front"),
        ({"transposed": True}, "mixer_project_front"),
        ({"b": 127}, "mixer_front"),  # 127 x 196 is no multiple of 8
        ({"method": "max"}, "mixer_front"),
        ({"b": 32, "rows": 32, "columns": 32}, "mixer_front"),  # too large for shared memory
    ],
)
def test_lowers_for_an_h100(change, kernel):
    """Lower FastVim-T's blocks; where one kernel cannot do it, a product and `front`."""
    case = {"b": 128, "rows": 14, "columns": 14, "e": 384, **change}
    text = lower_for_h100(lambda args: block.block(args, "auto", **case), abstract(case))
    fronts = ("mixer_project_front", "mixer_front")
    assert {name: launches(text, name) for name in fronts} == {
        name: int(name == kernel) for name in fronts
    }
    assert launches(text, "mixer_back_project") == 1


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_lowers_under_vmap_and_scan():
    case = {**FULL, "e": 128}
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), abstract(case))
    one = lambda args: block.block(args, "auto", **case)  # noqa: E731
    for mapped in (jax.vmap(one), lambda args: jax.lax.map(one, args)):
        assert launches(lower_for_h100(mapped, args), "mixer_project_front") == 1


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize("method", ["mean", "max"])
def test_gradients_lower_for_an_h100(method):
    """Find the same kernels in the forward pass of a gradient; with "max" it also needs the places of the maxima."""
    case = {**FULL, "e": 128, "method": method}
    objective = lambda args: jnp.sum(block.block(args, "auto", **case)[0])  # noqa: E731
    text = lower_for_h100(jax.grad(objective), abstract(case))
    assert launches(text, "mixer_project_front") == int(method == "mean")
    assert launches(text, "mixer_front") == int(method == "max")
    assert launches(text, "mixer_back_project") == 1


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_derivative_rule(seed):
    """Compare a program traced for an H100 and run on this CPU, where XLA takes the kernels' place."""
    case = {**FULL, "e": 128}
    args, bars = draw_block(np.random.default_rng(seed), case)

    def values(args, bars, implementation):
        out, pull = jax.vjp(lambda args: block.block(args, implementation, **case), args)
        return block.block(args, implementation, **case), out, pull(bars)

    with abstract_h100():
        got = jax.jit(lambda *a: values(*a, "auto")).trace(args, bars).lower().compile()(args, bars)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, bars))
        wanted = jax.jit(lambda *a: values(*a, "xla"))(*wide)
    assert max(relative_errors(got, wanted)) < 5e-2


@needs_mosaic
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ((3, 14, 14, False, 192, 384), "no multiple of 8"),
        ((128, 14, 14, False, 384, 768), "do not fit shared memory"),
        ((128, 14, 14, False, 192, 96), "no multiples of 64"),
        ((128, 3, 56, False, 192, 384), "lines are fewer"),
        ((128, 40, 4, False, 192, 384), "shorter than the convolutions' reach"),
        ((128, 4, 40, False, 192, 384), "longer than"),
        ((128, 8, 14, True, 192, 384), "too few to share"),
    ],
)
def test_what_is_left_to_other_kernels(case, reason):
    assert reason in work_of(*case).unsupported()


def test_bad_weight_is_named(seed):
    case = {"b": 1, "rows": 3, "columns": 4, "e": 6}
    (given, *others), _ = draw_block(np.random.default_rng(seed), case)
    with pytest.raises(ValueError, match="in_proj's weight"):
        block.block((given._replace(weight=given.weight[1:]), *others), "xla", **case)
