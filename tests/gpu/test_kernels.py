"""The kernels on a real Hopper GPU: `JAX_PLATFORMS=cuda,cpu pytest tests/gpu`; skipped where there is none.

References are computed in float64 on the CPU of the same machine. On one GPU and 16 cores they take 5 minutes with
`XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.035` and `-n 14 --dist=worksteal`, which shares
the tests of a file among processes.
"""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fastvim_jax.models import create_model
from pallas_kernels import gpu, mixer_core, selective_scan
from tests.pallas_kernels import test_mosaic_block as block
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels import test_mosaic_project_front as project_front
from tests.pallas_kernels import test_mosaic_ragged as ragged
from tests.pallas_kernels import test_mosaic_scan as scan
from tests.pallas_kernels import test_mosaic_sequence as sequence
from tests.pallas_kernels.mosaic_support import relative_errors
from tests.support import x64

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX or jax.default_backend() != "gpu",
    reason="no GPU that the kernels run on",
)


def on_cpu_in_float64(function, *args):
    """Return the reference's values."""
    with jax.default_device(jax.devices("cpu")[0]), x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), args)
        return jax.device_get(function(*wide))


SCANS = [
    {"b": 128, "l": 14, "e": 384, "n": 16},
    {"b": 4, "l": 196, "e": 384, "n": 16, "dtype": "bfloat16"},
    {"b": 100, "l": 40, "e": 384, "n": 16},  # two channels per lane
    {"b": 1, "l": 2500, "e": 392, "n": 16},
    {"b": 2, "l": 2100, "e": 64, "n": 16},  # tiles as wide as the array, and time is split
    {"b": 2, "l": 2100, "e": 30, "n": 16},
    {"b": 1, "l": 1, "e": 1, "n": 1},
    {"b": 2, "l": 700, "e": 50, "n": 7},
    {"b": 2, "l": 37, "e": 24, "n": 16},
    {"b": 2, "l": 65, "e": 96, "n": 16, "g": 3},
    {"b": 1, "l": 50, "e": 64, "n": 64},
    None,
    None,
]


@pytest.mark.parametrize("case", SCANS)
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(seed, case, reverse):
    rng = np.random.default_rng(seed)
    if case is None:
        case = {
            k: int(rng.integers(1, top)) for k, top in (("b", 5), ("l", 300), ("e", 500), ("n", 33))
        }
    print(case)
    args = scan.draw(rng, **case)
    b, l, e, n = (case[k] for k in "blen")
    cotangents = (
        jnp.asarray(rng.standard_normal((b, l, e)), case.get("dtype", "float32")),
        jnp.asarray(rng.standard_normal((b, e, n)), jnp.float32),
    )
    run = jax.jit(lambda a, c: scan.values_and_gradients(a, c, "auto", reverse=reverse))
    compiled = run.lower(args, cotangents).compile()
    assert "mosaic_gpu" in compiled.as_text()
    wanted = on_cpu_in_float64(
        lambda a, c: scan.values_and_gradients(a, c, "xla_sequential", reverse=reverse),
        args,
        cotangents,
    )
    first = jax.device_get(compiled(args, cotangents))
    assert max(relative_errors(first, wanted)) < (1e-2 if "dtype" in case else 1e-5)
    again = jax.device_get(compiled(args, cotangents))
    jax.tree.map(np.testing.assert_array_equal, first, again)


CORES = [
    {"b": 8, "rows": 14, "columns": 14, "e": 384},
    {"b": 2, "rows": 12, "columns": 14, "e": 768},
    {"b": 2, "rows": 8, "columns": 10, "e": 1536, "dtype": "bfloat16"},
    {"b": 2, "rows": 5, "columns": 7, "e": 128, "taps": 3},
    {"b": 2, "rows": 9, "columns": 68, "e": 128, "taps": 8},
    {"b": 1, "rows": 33, "columns": 64, "e": 256},
    {"b": 1, "rows": 37, "columns": 41, "e": 384, "dtype": "bfloat16"},  # segments overlap
    {"b": 1, "rows": 22, "columns": 37, "e": 768, "taps": 8},
    {"b": 1, "rows": 9, "columns": 22, "e": 2048},  # 4 tokens a tile
    {"b": 5, "rows": 8, "columns": 8, "e": 192, "dtype": "bfloat16"},  # filled up with zeros
    {"b": 2, "rows": 5, "columns": 9, "e": 72},
    {"b": 2, "rows": 14, "columns": 14, "e": 384, "norm_kind": "rms"},
    {"b": 2, "rows": 14, "columns": 14, "e": 192, "norm_kind": "none"},
]


@pytest.mark.parametrize("case", CORES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["mean", "max"])
def test_core(seed, case, transposed, method):
    options = {"transposed": transposed, "method": method}
    args, out_bar = core.draw_apart(np.random.default_rng(seed), **case, **options)
    options |= {"rows": case["rows"], "columns": case["columns"]}
    options |= {"norm_kind": case.get("norm_kind", "layer")}
    run = jax.jit(lambda a, g: core.value_and_gradients(a, g, "auto", **options))
    compiled = run.lower(args, out_bar).compile()
    assert "mosaic_gpu" in compiled.as_text()
    wanted = on_cpu_in_float64(
        lambda a, g: core.value_and_gradients(a, g, "xla", **options), args, out_bar
    )
    got = jax.device_get(compiled(args, out_bar))
    assert max(relative_errors(got, wanted)) < (1e-2 if "dtype" in case else 1e-5)


BLOCKS = [
    {"b": 128, "rows": 14, "columns": 14, "e": 384},
    {"b": 3, "rows": 14, "columns": 14, "e": 384, "method": "max"},  # an incomplete tile
    {"b": 2, "rows": 13, "columns": 9, "e": 256},  # tokens twice in a tile
    {"b": 1, "rows": 32, "columns": 48, "e": 384},  # lines in segments
    {"b": 5, "rows": 8, "columns": 10, "e": 128, "taps": 3},
    {"b": 152, "rows": 7, "columns": 7, "e": 256, "by": "auto"},  # several kernels, not one
    {"b": 32, "rows": 9, "columns": 6, "e": 256, "per_position": 4, "by": "auto"},
]


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_block(seed, case, transposed):
    case = case | {"transposed": transposed}
    args, _ = block.draw(np.random.default_rng(seed), **case)
    options = {name: value for name, value in case.items() if name not in ("taps", "by")}
    by = case.get("by", "pallas")
    compiled = jax.jit(lambda a: block.block(a, by, **options)).lower(args).compile()
    assert "mosaic_gpu" in compiled.as_text()
    tokens = args[1]
    # Leave NaN where the results will be.
    jax.block_until_ready([jnp.full(tokens.shape, jnp.nan) for _ in range(8)])
    first = jax.device_get(compiled(args))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = block.wanted_of(jax.device_get(args), options)
    assert max(relative_errors(first, wanted)) < block.BOUND
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(args)))


@pytest.mark.parametrize("case", [case for case in BLOCKS if "method" not in case])
def test_block_gradients(seed, case):
    rng = np.random.default_rng(seed)
    case = case | {"transposed": bool(rng.integers(2))}
    args, bars = block.draw(rng, **case)
    args = block.rounded(args)
    if rng.integers(2):
        case["keep"] = jnp.asarray(1.25 * rng.integers(0, 2, case["b"]), jnp.float32)
    options = {name: value for name, value in case.items() if name not in ("taps", "by")}
    by = case.get("by", "pallas")
    run = jax.jit(lambda *a: block.value_and_gradients(*a, by, options))
    compiled = run.lower(args, bars).compile()
    assert "mixer_norm_gradient" in compiled.as_text()
    first = jax.device_get(compiled(args, bars))
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = block.wanted_gradients(*jax.device_get((args, bars)), options)
    print(relative_errors(first, wanted))
    assert max(relative_errors(first, wanted)) < 2 * block.BOUND
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(args, bars)))


PROJECT_FRONTS = [
    {"b": 128, "rows": 14, "columns": 14, "inputs": 192, "width": 384},
    {"b": 6, "rows": 14, "columns": 14, "inputs": 256, "width": 512},
    {"b": 201, "rows": 16, "columns": 16, "inputs": 192, "width": 384},  # an odd batch
    {"b": 72, "rows": 13, "columns": 11, "inputs": 64, "width": 64, "taps": 3},
    {"b": 16, "rows": 14, "columns": 21, "inputs": 192, "width": 128},
]


@pytest.mark.parametrize("case", PROJECT_FRONTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_x", [False, True])
def test_project_front(seed, case, transposed, with_x):
    b, rows, columns, inputs, width, *taps = case.values()
    args = project_front.draw(np.random.default_rng(seed), b, rows * columns, inputs, width, *taps)
    sizes = (b, rows, columns, transposed, inputs, width, *taps)
    work = project_front.work_of(*sizes, with_x=with_x)
    assert work.unsupported() is None
    run = lambda args: project_front.run(args, work, 1.5, False)  # noqa: E731
    compiled = jax.jit(run).lower(args).compile()
    # Leave NaN where the results will be.
    poison = (b, rows * columns, 2 * width)
    jax.block_until_ready([jnp.full(poison, jnp.nan, "bfloat16") for _ in range(8)])
    first = jax.device_get(compiled(args))
    with jax.default_device(jax.devices("cpu")[0]):
        xz, *wanted = project_front.wanted_of(jax.device_get(args), rows, columns, transposed, 1.5)
    errors = relative_errors(first, (xz if with_x else xz[..., width:], *wanted))
    assert max(errors) < project_front.BOUND and errors[2] < 1e-3
    jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(compiled(args)))


def test_project_front_under_vmap(seed):
    b, rows, columns, inputs, width = 6, 14, 14, 192, 384
    args = project_front.draw(np.random.default_rng(seed), b, rows * columns, inputs, width)
    work = project_front.work_of(b, rows, columns, False, inputs, width)
    run = lambda tokens: project_front.run((tokens, *args[1:]), work, 1.0, False)  # noqa: E731
    both = jax.device_get(jax.jit(jax.vmap(run))(both_ways_round(args[0])))
    for i, turn in enumerate((1, -1)):
        wanted = jax.device_get(jax.jit(run)(args[0][::turn]))
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), both, wanted)


def test_block_under_vmap(seed):
    case = {"b": 3, "rows": 9, "columns": 14, "e": 384}
    args, _ = block.draw(np.random.default_rng(seed), **case)
    run = lambda xz: block.block((xz, *args[1:]), "pallas", **case)  # noqa: E731
    both = jax.device_get(jax.jit(jax.vmap(run))(both_ways_round(args[0])))
    for i, turn in enumerate((1, -1)):
        wanted = jax.device_get(jax.jit(run)(args[0][::turn]))
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), both, wanted)


SEQUENCES = [
    {"b": 128, "l": 197, "e": 384, "dtype": "bfloat16"},  # blocks of several tiles
    {"b": 64, "l": 64, "e": 384},
    {"b": 3, "l": 67, "e": 256, "dtype": "bfloat16", "taps": 3},
    {"b": 3, "l": 50, "e": 128, "taps": 2},
    {"b": 1, "l": 2500, "e": 768},
    {"b": 2, "l": 33, "e": 1536, "dtype": "bfloat16"},
    {"b": 2, "l": 1, "e": 128},
    {"b": 3, "l": 65, "e": 192, "dtype": "bfloat16"},  # filled up with zeros
    {"b": 2, "l": 33, "e": 72},
    {"b": 3, "l": 197, "e": 384, "dtype": "bfloat16", "norm_kind": "none"},  # the published Vim
    {"b": 2, "l": 50, "e": 192, "norm_kind": "rms"},
    None,
]


@pytest.mark.parametrize("case", SEQUENCES)
def test_sequence(seed, case):
    rng = np.random.default_rng(seed)
    if case is None:
        case = {"b": int(rng.integers(1, 9)), "l": int(rng.integers(1, 300)), "e": 128}
        case["e"] *= int(rng.integers(1, 9))
    print(case)
    norm_kind = case.get("norm_kind", "layer")
    drawn = {name: value for name, value in case.items() if name != "norm_kind"}
    args, out_bar = sequence.draw(rng, **drawn)
    options = {"norm_kind": norm_kind}
    run = jax.jit(lambda a, g: sequence.value_and_gradients(a, g, "auto", **options))
    compiled = run.lower(args, out_bar).compile()
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == len(sequence.KERNELS)
    wanted = on_cpu_in_float64(
        lambda a, g: sequence.value_and_gradients(a, g, "xla", **options), args, out_bar
    )
    first = jax.device_get(compiled(args, out_bar))
    assert max(relative_errors(first, wanted)) < (1e-2 if "dtype" in case else 1e-5)
    again = jax.device_get(compiled(args, out_bar))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def written_in_place(rng, operation):
    """Return an operation whose gradient writes into an array in place, its arguments, and its output's gradient."""
    if operation == "sequence":
        return lambda a, g: sequence.value_and_gradients(a, g, "auto"), *sequence.draw(
            rng, 3, 21, 128
        )
    grid = {"rows": 6, "columns": 7, "method": "mean"}
    run = lambda a, g: core.value_and_gradients(a, g, "auto", **grid)  # noqa: E731
    return run, *core.draw(rng, 3, 6, 7, 128)


def both_ways_round(x):
    return jnp.stack([x, x[::-1]])


@pytest.mark.parametrize("operation", ["core", "sequence"])
def test_in_place_under_vmap(seed, operation):
    """Leave the next example alone where the tiles of one are ragged."""
    run, (xz, *weights), out_bar = written_in_place(np.random.default_rng(seed), operation)
    one = lambda xz, g: run((xz, *weights), g)  # noqa: E731
    both = jax.jit(jax.vmap(one))(both_ways_round(xz), both_ways_round(out_bar))
    for i, turn in enumerate((1, -1)):
        wanted = jax.jit(one)(xz[::turn], out_bar[::turn])
        assert max(relative_errors(jax.tree.map(lambda x, i=i: x[i], both), wanted)) < 1e-5


@pytest.mark.parametrize("operation", ["core", "sequence"])
def test_in_place_in_a_loop(seed, operation):
    """Read what a kernel writes in place back from the loop's stack."""
    run, (xz, *weights), out_bar = written_in_place(np.random.default_rng(seed), operation)
    one = lambda a: run((a[0], *weights), a[1])  # noqa: E731
    loop = jax.jit(lambda xz, g: jax.lax.map(one, (xz, g)))
    both = loop(both_ways_round(xz), both_ways_round(out_bar))
    wanted = jax.jit(one)((xz, out_bar))
    assert max(relative_errors(jax.tree.map(lambda x: x[0], both), wanted)) < 1e-5


def test_the_first_maximum_is_taken(seed):
    core.check_maxima(seed)


@pytest.mark.parametrize(
    "case",
    [
        {"b": 8, "kept": 49, "rows": 14, "columns": 14, "e": 384},
        {"b": 2, "kept": 98, "rows": 14, "columns": 14, "e": 1536, "dtype": "bfloat16"},
        {"b": 2, "kept": 21, "rows": 12, "columns": 9, "e": 768, "taps": 3},
        {"b": 3, "kept": 61, "rows": 12, "columns": 9, "e": 1024},  # segments overlap
        {"b": 3, "kept": 37, "rows": 12, "columns": 9, "e": 384, "dtype": "bfloat16"},
        # Staged in shared memory: enough samples for whole ones.
        {"b": 128, "kept": 49, "rows": 14, "columns": 14, "e": 1536, "dtype": "bfloat16"},
        {"b": 70, "kept": 37, "rows": 12, "columns": 9, "e": 512},
    ],
)
def test_ragged_core(seed, case):
    args, out_bar = ragged.draw(np.random.default_rng(seed), **case)
    options = {"rows": case["rows"], "columns": case["columns"]}
    run = jax.jit(lambda a, g: ragged.value_and_gradients(a, g, "auto", **options))
    compiled = run.lower(args, out_bar).compile()
    assert "mosaic_gpu" in compiled.as_text()
    with jax.default_device(jax.devices("cpu")[0]), x64():
        wide = ragged.in_float64(jax.device_get((args, out_bar)))
        wanted = jax.device_get(ragged.value_and_gradients(*wide, "xla", **options))
    got = jax.device_get(compiled(args, out_bar))
    assert max(relative_errors(got, wanted)) < (1e-2 if "dtype" in case else 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_core_at_places(seed, dtype):
    """Compare tokens that the staged front visits at their places with tokens that are moved, gradients too."""
    rng = np.random.default_rng(seed)
    options = {"rows": 12, "columns": 9, "middle": core.middle}
    (xz, *args, ids), out_bar = ragged.draw(rng, 70, 37, 12, 9, 512, dtype=dtype)
    there, back = ragged.draw_places(rng, 70, 37)

    def visited(xz, *args, ids=ids, places=(there, back)):
        return mixer_core(xz, *args, row_ids=ids, places=places, **options)

    def both(xz, *args):
        out, pull = jax.vjp(visited, xz, *args)
        return out, pull(out_bar)

    # In float64 on the CPU: XLA sums rows on a GPU by products in TF32.
    with jax.default_device(jax.devices("cpu")[0]), x64():
        wide, bar, rows, places = ragged.in_float64(
            jax.device_get(((xz, *args), out_bar, ids, (there, back)))
        )
        moved = functools.partial(visited, ids=rows, places=places)
        out, pull = jax.vjp(moved, *wide)
        wanted = jax.device_get((out, pull(bar)))
    bound = 1e-2 if dtype == "bfloat16" else 1e-5
    assert max(relative_errors(jax.jit(visited)(xz, *args), wanted[0])) < bound
    assert max(relative_errors(jax.jit(both)(xz, *args), wanted)) < bound


def test_vmap_remat_and_export(seed):
    args = scan.draw(np.random.default_rng(seed), 2, 30, 64, 16)
    scanned = lambda a: selective_scan(**a)  # noqa: E731
    plain = jax.jit(scanned)(args)
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), args)
    for row in jax.jit(jax.vmap(scanned))(batched):
        np.testing.assert_allclose(row, plain, rtol=1e-6, atol=1e-6)
    loss = lambda f: jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(f(a)))))  # noqa: E731
    kept, recomputed = loss(scanned)(args), loss(jax.checkpoint(scanned))(args)
    assert max(relative_errors(recomputed, kept)) < 1e-6
    allowed = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = export.export(jax.jit(scanned), platforms=["cuda"], disabled_checks=allowed)(args)
    restored = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(args), plain)


def test_donation(seed):
    """Check that the output takes the place of u, which is donated."""
    args = scan.draw(np.random.default_rng(seed), 2, 300, 64, 16)
    u = args.pop("u")
    step = lambda u, others: u + 0.5 * selective_scan(u, **others)  # noqa: E731
    wanted = jax.jit(step)(u, args)
    run = jax.jit(step, donate_argnums=0).lower(u, args).compile()
    assert "mosaic_gpu" in run.as_text()
    got = run(u, args)
    assert u.is_deleted()
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def placed(arrays, whole, types, devices):
    """Place arrays on a mesh of these devices; split axis 0 where its size is `whole`."""
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(types,), devices=devices)
    sharding = lambda x: NamedSharding(mesh, P("data") if x.shape[0] == whole else P())  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), arrays)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("operation", ["scan", "core", "sequence"])
def test_sharded(seed, operation, types, devices):
    """Compare kernels on every device's share of a batch with one device without a mesh."""
    if devices > jax.device_count():
        pytest.skip(f"there are {jax.device_count()} GPUs")
    batch, rng = 16, np.random.default_rng(seed)
    if operation == "scan":
        args = scan.draw(rng, batch, 50, 96, 12)
        cotangents = (args["z"] + 1, jnp.asarray(rng.standard_normal((batch, 96, 12)), jnp.float32))
        run = lambda a, c: scan.values_and_gradients(a, c, "auto")  # noqa: E731
    elif operation == "sequence":
        args, cotangents = sequence.draw(rng, batch, 37, 384)
        run = lambda a, c: sequence.value_and_gradients(a, c, "auto")  # noqa: E731
    else:
        args, cotangents = core.draw(rng, batch, 6, 7, 384)
        run = lambda a, c: core.value_and_gradients(a, c, "auto", rows=6, columns=7)  # noqa: E731
    wanted = jax.device_get(jax.jit(run)(args, cotangents))
    args, cotangents = placed((args, cotangents), batch, types, jax.devices()[:devices])
    program = jax.jit(run).lower(args, cotangents).compile()
    text = program.as_text()
    assert "mosaic_gpu" in text
    assert not re.search(r" all-gather(-start)?\(", text)
    got = program(args, cotangents)
    first = jax.tree.leaves(got)[0]
    assert first.sharding.shard_shape(first.shape)[0] == batch // devices
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.parametrize(("pooling", "period"), [("mean", 2), ("none", 1)])
def test_a_stack_of_blocks_runs_each_kernel_once(pooling, period):
    """Count each kernel once.

    XLA may run one twice, once for `lax.scan`'s stack of residuals and once for the next operation.
    """
    model = create_model(
        "fastvim_tiny_patch16_224", num_classes=10, depth=4, embed_dim=64, image_size=64,
        patch_size=8, pooling=pooling, blocks="scan", rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, params = nnx.split(model)
    images = jnp.zeros((4, 64, 64, 3))
    loss = lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(images)))  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call(" in line and "mosaic_gpu" in line]
    names = collections.Counter(re.search(r'op_name="[^"]*?(\w+)/mpmd_map"', c)[1] for c in calls)
    assert len(names) == 6 and set(names.values()) == {period}, names


@pytest.mark.parametrize("pooling", ["mean", "max", "none"])
def test_200_steps_in_bfloat16_stay_finite(seed, pooling):
    """Let a small FastVim learn one batch by heart, through every kernel and donated buffers."""
    model = create_model(
        "fastvim_tiny_patch16_224", num_classes=10, dtype="bfloat16", depth=4, embed_dim=64,
        image_size=64, patch_size=8, pooling=pooling, rngs=nnx.Rngs(seed),
    )  # fmt: skip
    graphdef, params = nnx.split(model)
    optimizer = optax.adamw(1e-3)
    images = jax.random.normal(jax.random.key(seed), (32, 64, 64, 3))
    labels = jax.random.randint(jax.random.key(seed + 1), (32,), 0, 10)

    def step(params, state):
        def loss_of(params):
            logits = nnx.merge(graphdef, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    assert "mosaic_gpu" in run.as_text()
    losses = []
    for _ in range(200):
        params, state, loss = run(params, state)
        losses.append(loss)
    losses = np.asarray(jax.device_get(losses))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]
