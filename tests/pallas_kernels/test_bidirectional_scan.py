"""The scans of both directions as one operation: by XLA, in the kernels' interpreter, and lowered for an H100.

The interpreter fills fresh buffers with NaN, so that an element nobody wrote shows.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import gpu
from pallas_kernels.selective_scan import IMPLEMENTATIONS, bidirectional_scan, selective_scan, tuned
from tests.pallas_kernels.mosaic_support import (
    abstract_device,
    abstract_h100,
    interpreted,
    launches,
    lower_for_h100,
    needs_mosaic,
    relative_errors,
)
from tests.support import x64

KERNELS = ("selective_scan", "selective_scan_gradients")


def draw(rng, b, l, e, n, g=None, dtype="float32"):
    """Draw arguments, by their names."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)  # noqa: E731
    streamed = lambda *shape: normal(*shape).astype(dtype)  # noqa: E731
    of_step = (b, l, n) if g is None else (b, l, g, n)
    return {
        "u": streamed(b, l, e), "delta": streamed(b, l, e) - 1, "A": -jnp.exp(normal(e, n)),
        "B": streamed(*of_step), "C": streamed(*of_step),
        "D": normal(e), "delta_bias": normal(e),
    }  # fmt: skip


def of_output(rng, args):
    """Draw the gradients of both outputs."""
    draw = lambda: jnp.asarray(rng.standard_normal(args["u"].shape[1:]), args["u"].dtype)  # noqa: E731
    return draw(), draw()


def values_and_gradients(args, cotangents, implementation, **options):
    y, pull = jax.vjp(
        lambda a: bidirectional_scan(**a, **options, implementation=implementation), args
    )
    return y, pull(cotangents)[0]


def one_by_one(args, cotangents, implementation, **options):
    """Compute the same by two scans."""

    def run(args):
        sides = ({name: x[d] for name, x in args.items()} for d in (0, 1))
        return tuple(
            selective_scan(**side, **options, reverse=reverse, implementation=implementation)
            for side, reverse in zip(sides, (False, True), strict=True)
        )

    y, pull = jax.vjp(run, args)
    return y, pull(cotangents)[0]


@pytest.mark.drawn("more of the kernels", one_in=6)
@pytest.mark.parametrize(
    "implementation", [i for i in IMPLEMENTATIONS if i not in ("pallas", "triton")]
)
def test_bidirectional_scan_equals_two_scans(seed, implementation):
    rng = np.random.default_rng(seed)
    groups = (None, 1, 2)[rng.integers(3)]
    args = draw(rng, 2, 70, 6, 3, groups)
    if rng.integers(2):
        del args["D"]
    cotangents = of_output(rng, args)
    got = values_and_gradients(args, cotangents, implementation)
    wanted = one_by_one(args, cotangents, implementation)
    assert max(relative_errors(got, wanted)) < 1e-6


@pytest.mark.parametrize("implementation", ["xla_sequential", "reference"])
def test_outputs_rounded_once(seed, implementation):
    """Compare outputs of another dtype with rounded ones, and gradients that are given in it."""
    args = draw(np.random.default_rng(seed), 2, 9, 6, 3)
    cotangents = tuple(g.astype(jnp.bfloat16) for g in of_output(np.random.default_rng(seed), args))
    y, gradients = values_and_gradients(args, cotangents, implementation, y_dtype="bfloat16")
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), cotangents)
    wanted, wanted_gradients = values_and_gradients(args, wide, implementation)
    for narrow, side in zip(y, wanted, strict=True):
        np.testing.assert_array_equal(narrow, side.astype(jnp.bfloat16))
    assert max(relative_errors(gradients, wanted_gradients)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"u": (3, 2, 5, 6)},
            r"the first axis of u must be the two directions \(2\), got shape \(3, ",
        ),
        ({"D": (6,)}, r"the first axis of D must be the two directions"),
        (
            {"u": (2, 5, 6)},
            r"^bidirectional_scan, one direction's arrays: .*u must have 3 dimensions",
        ),
        ({"A": (2, 5, 3)}, r"A must have shape \(6, 3\) \(e n\)"),
        ({"B": (2, 2, 5, 4, 3)}, r"6 channels of u do not split evenly into the 4 groups"),
    ],
)
def test_wrong_shapes(change, message):
    shapes = {"u": (2, 5, 6), "delta": (2, 5, 6), "A": (6, 3), "B": (2, 5, 3), "C": (2, 5, 3)}
    arrays = {k: jnp.ones(s) for k, s in ({k: (2, *s) for k, s in shapes.items()} | change).items()}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(bidirectional_scan)(**arrays)


def test_outputs_are_floats():
    """Refuse integers, to which y would be cut, and names of no dtype."""
    u, weights = jnp.ones((2, 1, 3, 4)), jnp.ones((2, 1, 3, 2))
    for wrong in ("int32", "floot32"):
        with pytest.raises(ValueError, match=f"y_dtype must be a dtype of floats, got '{wrong}'"):
            bidirectional_scan(u, u, -jnp.ones((2, 4, 2)), weights, weights, y_dtype=wrong)


def test_names():
    args = draw(np.random.default_rng(0), 1, 2, 3, 1)
    with pytest.raises(
        ValueError, match=r"'auto', 'xla', .*'reference'; got 'pallas_bidirectional'"
    ):
        bidirectional_scan(**args, implementation="pallas_bidirectional")
    if gpu.kernels_missing():
        with pytest.raises(NotImplementedError, match="cannot run here"):
            bidirectional_scan(**args, implementation="pallas")


def compare(rng, bound, *, drop=(), delta_softplus=True, **case):
    """Compare kernels in the interpreter with the reference in float64."""

    args = {k: x for k, x in draw(rng, **case).items() if k not in drop}
    options = {"delta_softplus": delta_softplus}
    if not delta_softplus:  # steps are then the numbers themselves
        args |= {"delta": jnp.abs(args["delta"]), "delta_bias": jnp.abs(args["delta_bias"])}
    cotangents = of_output(rng, args)
    with abstract_h100(), interpreted():
        run = jax.jit(lambda a, c: values_and_gradients(a, c, "pallas", **options))
        got = run.trace(args, cotangents).lower().compile()(args, cotangents)
    with x64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (args, cotangents))
        reference = jax.jit(lambda *a: values_and_gradients(*a, "reference", **options))
        wanted = reference(*wide)
    assert max(relative_errors(got, wanted)) < bound


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_random_ragged_pair(seed):
    rng = np.random.default_rng(seed)
    length, width, states = (int(rng.integers(*ends)) for ends in ((3, 12), (33, 50), (1, 17)))
    compare(rng, 3e-6, b=1, l=length, e=width, n=states)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"b": 3, "l": 7, "e": 24, "n": 16},
        {"b": 2, "l": 21, "e": 64, "n": 5, "g": 2, "delta_softplus": False},  # kept states
        {"b": 1, "l": 9, "e": 33, "n": 20, "drop": ("D",)},
        {"b": 1, "l": 8, "e": 32, "n": 64, "drop": ("delta_bias",)},
        {"b": 2, "l": 20, "e": 40, "n": 16, "dtype": "bfloat16"},
    ],
)
def test_options(seed, case):
    compare(np.random.default_rng(seed), 1e-2 if "dtype" in case else 3e-6, **case)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_time_cut_into_splits(seed):
    """Carry states of both directions, forward and backward; the last tile is ragged."""
    with tuned.forced(tuned.Blocks(chunk=8, channels=32, splits=2)):
        compare(np.random.default_rng(seed), 3e-6, b=1, l=19, e=32, n=3)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
def test_blocks_of_several_sequences(seed, monkeypatch):
    """Scan several sequences in a block. All sequences of one block have the same direction."""
    from pallas_kernels.selective_scan import mosaic

    monkeypatch.setattr(mosaic, "_sequences", lambda *_: 2)
    length = int(np.random.default_rng(seed).integers(1, 17))
    compare(np.random.default_rng(seed), 3e-6, b=4, l=length, e=33, n=4)


@pytest.mark.drawn("kernel shapes", one_in=20)
@needs_mosaic
@pytest.mark.slow
def test_two_channels_a_lane(seed, monkeypatch):
    """Scan blocks of 64 channels, as large batches have them."""
    from pallas_kernels.selective_scan import mosaic

    monkeypatch.setattr(mosaic, "_two_channels_a_lane", lambda inputs: True)
    compare(np.random.default_rng(seed), 3e-6, b=1, l=11, e=100, n=7)


@needs_mosaic
def test_forward_of_64_channels(seed, monkeypatch):
    """Scan blocks of 64 channels where nothing is kept and a batch is as large as FastVim-B's; otherwise of 32."""
    from pallas_kernels.selective_scan import mosaic
    from pallas_kernels.selective_scan.types import ScanInputs, ScanOptions

    def channels(keep_boundaries, b=128, l=14, e=1536):
        args = jax.eval_shape(lambda: draw(np.random.default_rng(0), b, l, e, 16, 1))
        folded = {name: args[name] for name in ("A", "D", "delta_bias")} | {
            name: jax.ShapeDtypeStruct((2 * b, *args[name].shape[2:]), args[name].dtype)
            for name in ("u", "delta", "B", "C")
        }
        options = ScanOptions(True, False, False, 16, keep_boundaries)
        return mosaic.plan(ScanInputs(**folded, z=None), options, 16).channels

    assert channels(False) == 64
    assert channels(True) == channels(False, b=16) == channels(False, l=40) == 32
    assert channels(False, b=2000, e=96) == 32
    monkeypatch.setattr(mosaic, "MANY_BLOCKS", 2)
    args = draw(np.random.default_rng(seed), 1, 14, 128, 16)
    args["delta"] = args["delta"].astype(jnp.bfloat16)
    call = functools.partial(bidirectional_scan, y_dtype=jnp.bfloat16, implementation="pallas")
    with abstract_h100(), interpreted():
        got = jax.jit(lambda args: call(**args)).trace(args).lower().compile()(args)
    assert all(y.dtype == jnp.bfloat16 for y in got)
    # The sums are float32, so both differ by one rounding only.
    assert max(relative_errors(got, bidirectional_scan(**args, implementation="xla"))) < 3e-3


def kernels_in(text: str) -> list[int]:
    """Return how often a program launches each of the scan's kernels."""
    return [launches(text, kernel) for kernel in (*KERNELS, "selective_scan_split_ends")]


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
@pytest.mark.parametrize(
    "case",
    [
        {"b": 128, "l": 14, "e": 384, "n": 16},
        {"b": 2, "l": 128, "e": 1536, "n": 16, "dtype": "bfloat16"},
    ],
)
def test_lowers_to_one_kernel_forward_and_one_backward(case):
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), **case))
    cotangents = (jax.ShapeDtypeStruct(args["u"].shape[1:], args["u"].dtype),) * 2
    text = lower_for_h100(lambda a, c: values_and_gradients(a, c, "auto"), args, cotangents)
    assert kernels_in(text) == [1, 1, 0]


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
def test_long_scans_have_one_kernel_more_each_way():
    """Count one more kernel each way for long scans: it finds the states at the splits' ends."""
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), 1, 4096, 384, 16))
    text = lower_for_h100(lambda a: jax.value_and_grad(loss)(a), args)
    assert kernels_in(text) == [1, 1, 2]


def loss(args, implementation="auto"):
    return sum(
        jnp.sum(jnp.sin(y)) for y in bidirectional_scan(**args, implementation=implementation)
    )


def on_h100_and_cpu(function, *args, **options):
    """Return the program's text for CUDA, which must hold both kernels, and itself compiled for this CPU."""
    with abstract_h100():
        traced = jax.jit(function, **options).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(launches(text, kernel) for kernel in KERNELS)
    return text, traced.lower().compile()


@pytest.mark.drawn("more of the kernels", one_in=6)
@needs_mosaic
def test_auto_on_the_cpu_uses_the_same_residuals(seed):
    """Compare a program traced for a GPU and run on a CPU: XLA's states pass through the kernels' form and back."""
    args = draw(np.random.default_rng(seed), 2, 19, 40, 4)
    _, program = on_h100_and_cpu(jax.grad(loss), args)
    wanted = jax.grad(lambda a: loss(a, "reference"))(args)
    assert max(relative_errors(program(args), wanted)) < 1e-5


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
def test_vmap(seed):
    args = draw(np.random.default_rng(seed), 1, 5, 32, 4)
    shared = args.pop("A")
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), args)
    gradients = lambda implementation: jax.vmap(  # noqa: E731
        jax.grad(lambda a, A: loss({**a, "A": A}, implementation), (0, 1)), (0, None)
    )
    _, program = on_h100_and_cpu(gradients("auto"), stacked, shared)
    wanted = jax.jit(gradients("xla"))(stacked, shared)
    assert max(relative_errors(program(stacked, shared), wanted)) < 1e-5


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
def test_blocks_under_scan_with_remat_and_donation(seed):
    args = draw(np.random.default_rng(seed), 2, 7, 32, 4)
    u = args.pop("u")
    layers = jax.tree.map(lambda x: jnp.stack([x * s for s in (0.5, 0.8, 1.0)]), args)

    def step(implementation):
        def of(u, layers):
            @jax.checkpoint
            def block(u, layer):
                y = bidirectional_scan(u, **layer, implementation=implementation)
                return u + jnp.stack(y), None

            total = lambda u, layers: jnp.sum(jnp.sin(jax.lax.scan(block, u, layers)[0]))  # noqa: E731
            gradients = jax.grad(total, (0, 1))(u, layers)
            return u - gradients[0], gradients[1]

        return of

    wanted = jax.jit(step("xla"))(u, layers)
    text, program = on_h100_and_cpu(step("auto"), u, layers, donate_argnums=0)
    assert "tf.aliasing_output" in text
    got = program(u, layers)
    assert u.is_deleted()
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
def test_export_for_cuda():
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), 2, 14, 32, 4))
    allowed = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with abstract_h100():
        exported = export.export(
            jax.jit(jax.grad(loss)), platforms=["cuda"], disabled_checks=allowed
        )(args)
    assert kernels_in(exported.mlir_module()) == [1, 1, 0]


@pytest.mark.drawn("kernels lowered")
@needs_mosaic
def test_several_gpus_with_explicit_axes():
    """Give every device's kernels its share of both directions."""
    mesh = jax.sharding.AbstractMesh(
        (4, 2), ("data", "model"), (AxisType.Explicit,) * 2, abstract_device=abstract_device()
    )
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), 8, 14, 256, 16))
    spec = {
        "u": P(None, "data", None, "model"), "delta": P(None, "data", None, "model"),
        "B": P(None, "data"), "C": P(None, "data"),
    }  # fmt: skip
    args = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec.get(name, P(None, "model")))
        )
        for name, x in args.items()
    }
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss)).trace(args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    types = [line.rpartition(" : ")[2] for line in calls]
    assert len(types) == 2
    assert all(call.startswith("(tensor<4x14x128xf32>, tensor<4x14x128xf32>") for call in types)
    assert "all_reduce" in text
