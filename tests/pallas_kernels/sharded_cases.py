"""The operations on eight simulated devices; run by `test_sharded` in a process that has them.

Where a test says "asked", XLA's partitioner asks the operation how it splits, as it does for kernels; the shares are
then computed by XLA, since the kernels' interpreter knows one device only. The kernels themselves are lowered.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import causal_conv1d, gpu, selective_scan, sharding
from pallas_kernels.mixer_core import mixer_core, sequence_core
from pallas_kernels.selective_scan import implementations
from pallas_kernels.selective_scan.sharded import Sharded
from tests.pallas_kernels import test_bidirectional_scan as pair
from tests.pallas_kernels import test_mosaic_block as block
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels import test_mosaic_ragged as ragged
from tests.pallas_kernels import test_mosaic_sequence as sequence
from tests.pallas_kernels.mosaic_support import abstract_device, needs_mosaic, relative_errors
from tests.pallas_kernels.test_mosaic_scan import draw

BOUND = 2e-6
TYPES = pytest.mark.parametrize(
    "types", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
BATCH = ("data", "fsdp")


def mesh_of(types: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(types,) * 3)


def put(arrays, specs, mesh):
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, arrays, specs)


def compiled(function, *args, **options):
    """The program, and how many numbers each of its all-gathers makes."""
    program = jax.jit(function, **options).lower(*args).compile()
    shapes = re.findall(r"\w+\[([\d,]*)\]\S* all-gather\(", program.as_text())
    return program, [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def objective(args, **options):
    y, last = selective_scan(**args, **options, return_last_state=True)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last.astype(jnp.float32)))


def scan_specs(args, batch, channels, weights):
    spec = {
        "A": P(weights),
        "D": P(weights),
        "delta_bias": P(weights),
        "B": P(batch),
        "C": P(batch),
    }
    return {name: spec.get(name, P(batch, None, channels)) for name in args}


def asked(monkeypatch):
    """As if the XLA scans held kernels."""
    monkeypatch.setattr(implementations, "Sharded", lambda backend, opaque: Sharded(backend, True))


# How u and the weights are split, and how many groups B and C have.
SCANS = {
    "data": (BATCH, None, None, 1),
    "fsdp": (BATCH, None, "fsdp", 1),
    "channels": ("data", "model", "model", 1),
    "channels 4 ways, 2 groups": ("data", ("model", "fsdp"), ("model", "fsdp"), 2),
}
MORE_SCANS = {
    "channels 2 ways, 3 groups": (BATCH, "model", "model", 3),
    "channels 2 ways, 4 groups": (BATCH, "model", "model", 4),
}


def check_scan(seed, types, place, length=9, implementation="xla_sequential", dtype="float32"):
    rng = np.random.default_rng(seed)
    batch, channels, weights, groups = (SCANS | MORE_SCANS)[place]
    args = draw(rng, 8, length, 48, 2, groups, dtype)
    options = {"reverse": bool(rng.integers(2))}
    wanted = jax.jit(
        jax.value_and_grad(lambda a: objective(a, **options, implementation="xla_sequential"))
    )(args)
    mesh = mesh_of(types)
    args = put(args, scan_specs(args, batch, channels, weights), mesh)
    run, gathers = compiled(
        jax.value_and_grad(lambda a: objective(a, **options, implementation=implementation)), args
    )
    # Of u's shape, or any larger part of it, nothing; weights may be.
    share = args["u"].sharding.shard_shape(args["u"].shape)
    assert all(size < math.prod(share) for size in gathers)
    assert (weights == "fsdp") <= bool(gathers)
    got = run(args)
    for x, gradient in zip(jax.tree.leaves(args), jax.tree.leaves(got[1]), strict=True):
        assert gradient.dtype == x.dtype
        if types == AxisType.Explicit:
            assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)
    assert max(relative_errors(got, wanted)) < (BOUND if dtype == "float32" else 1e-2)


@TYPES
@pytest.mark.parametrize(
    "place", [*SCANS, *(pytest.param(place, marks=pytest.mark.slow) for place in MORE_SCANS)]
)
def test_scan(seed, monkeypatch, types, place):
    asked(monkeypatch)
    check_scan(seed, types, place, length=70 if place == "channels" else 9)


@TYPES
def test_both_directions(seed, monkeypatch, types):
    """Each device scans its sequences and channels of both."""
    asked(monkeypatch)
    rng = np.random.default_rng(seed)
    args = pair.draw(rng, 8, 9, 48, 2, int(rng.integers(1, 3)))
    gradients = jax.grad(lambda a: pair.loss(a, "xla_sequential"))
    wanted = jax.jit(gradients)(args)
    of_weights = {name: P(None, "model") for name in ("A", "D", "delta_bias")}
    of_steps = {name: P(None, BATCH) for name in "BC"}
    specs = {
        name: (of_weights | of_steps).get(name, P(None, BATCH, None, "model")) for name in args
    }
    args = put(args, specs, mesh_of(types))
    run, gathers = compiled(gradients, args)
    share = args["u"].sharding.shard_shape(args["u"].shape)
    assert all(size < math.prod(share) for size in gathers)  # groups of B and C
    assert max(relative_errors(run(args), wanted)) < BOUND


@pytest.mark.slow
def test_scan_in_bfloat16(seed, monkeypatch):
    asked(monkeypatch)
    check_scan(seed, AxisType.Auto, "channels", dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data", "channels"])
def test_the_partitioner_splits_xla_scans_by_itself(seed, place):
    check_scan(seed, AxisType.Auto, place)


@pytest.mark.slow
def test_associative_scan(seed):
    check_scan(seed, AxisType.Explicit, "channels 4 ways, 2 groups", 9, "xla_associative")


def test_sharding_known_from_the_ambient_mesh_only(seed, monkeypatch):
    """No argument is sharded when the program starts."""
    asked(monkeypatch)
    args = draw(np.random.default_rng(seed), 8, 9, 48, 2)
    wanted = objective(args, implementation="xla_sequential")
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        split = jax.lax.with_sharding_constraint

        def run(args):
            args = {name: split(x, P(BATCH)) if x.ndim > 2 else x for name, x in args.items()}
            return objective(args, implementation="xla_sequential")

        run, gathers = compiled(run, args)
        assert not gathers
        np.testing.assert_allclose(run(args), wanted, rtol=1e-5)


def test_vmap(seed, monkeypatch):
    """The mapped axis is split too."""
    asked(monkeypatch)
    rng = np.random.default_rng(seed)
    args = draw(rng, 4, 9, 48, 2)
    shared = args.pop("A")
    stacked = jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), args)
    gradients = jax.vmap(
        jax.grad(lambda a, A: objective({**a, "A": A}, implementation="xla_sequential"), (0, 1)),
        (0, None),
    )
    wanted = jax.jit(gradients)(stacked, shared)
    mesh = mesh_of(AxisType.Auto)
    specs = {name: P("data", "fsdp") if x.ndim > 3 else P("data") for name, x in stacked.items()}
    stacked = put(stacked, specs, mesh)
    run, gathers = compiled(gradients, stacked, jax.device_put(shared, NamedSharding(mesh, P())))
    assert not gathers
    assert max(relative_errors(run(stacked, shared), wanted)) < BOUND


def test_blocks_under_scan_with_remat_and_donation(seed, monkeypatch):
    asked(monkeypatch)
    args = draw(np.random.default_rng(seed), 8, 9, 48, 2)
    u = args.pop("u")
    layers = jax.tree.map(lambda x: jnp.stack([x * s for s in (0.5, 0.8, 1.0)]), args)

    def step(u, layers):
        @jax.checkpoint
        def block(u, layer):
            return selective_scan(u, **layer, implementation="xla_sequential"), None

        loss = lambda u, layers: jnp.sum(jnp.sin(jax.lax.scan(block, u, layers)[0]))  # noqa: E731
        gradients = jax.grad(loss, (0, 1))(u, layers)
        return u - gradients[0], gradients[1]

    wanted = jax.jit(step)(u, layers)
    mesh = mesh_of(AxisType.Auto)
    u = jax.device_put(u, NamedSharding(mesh, P(BATCH)))
    specs = {name: P(None, BATCH) if x.ndim > 3 else P() for name, x in layers.items()}
    layers = put(layers, specs, mesh)
    run, gathers = compiled(step, u, layers, donate_argnums=0)
    assert not gathers
    got = run(u, layers)
    assert u.is_deleted()
    assert max(relative_errors(got, wanted)) < BOUND


@pytest.mark.parametrize("weights", [None, "fsdp"])
def test_convolution(seed, weights):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    args = (normal(8, 9, 16), normal(3, 16), normal(16))
    gradients = jax.grad(lambda a: jnp.sum(jnp.sin(causal_conv1d(*a))))
    wanted = jax.jit(gradients)(args)
    channels = None if weights else "model"
    specs = (P(BATCH, None, channels), P(None, weights or channels), P(weights or channels))
    args = put(args, specs, mesh_of(AxisType.Explicit))
    assert max(relative_errors(jax.jit(gradients)(args), wanted)) < BOUND


@needs_mosaic
@pytest.mark.parametrize("mesh_is", ["auto", "explicit", "ambient"])
@pytest.mark.parametrize("pooled", [True, False])
def test_mixer_core(seed, monkeypatch, mesh_is, pooled, weights="fsdp"):
    """Ambient: Auto axes, with the batch's known when the program is traced."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    rng = np.random.default_rng(seed)
    if pooled:
        args, out_bar = core.draw(rng, 8, 3, 4, 128)
        options = {"rows": 3, "columns": 4, "transposed": bool(rng.integers(2))}
        options["method"] = str(rng.choice(["mean", "max"]))
        run = lambda a, g, name: core.value_and_gradients(a, g, name, **options)  # noqa: E731
    else:
        args, out_bar = sequence.draw(rng, 8, 9, 128)
        run = sequence.value_and_gradients
    wanted = jax.jit(lambda a, g: run(a, g, "xla"))(args, out_bar)
    mesh = mesh_of(AxisType.Explicit if mesh_is == "explicit" else AxisType.Auto)
    spread = lambda x: P(*[None] * (x.ndim - 1), weights)  # noqa: E731
    xz, *others, middle = args
    specs = (P(BATCH), *jax.tree.map(spread, others), P())
    args = put((xz, *others, middle), specs, mesh)
    out_bar = jax.device_put(out_bar, NamedSharding(mesh, P(BATCH)))
    with contextlib.ExitStack() as stack:
        if mesh_is == "ambient":
            stack.enter_context(jax.set_mesh(mesh))
            stack.enter_context(sharding.batch_over(*BATCH))
        program, gathers = compiled(lambda a, g: run(a, g, "auto"), args, out_bar)
        text = jax.jit(lambda a, g: run(a, g, "auto")).lower(args, out_bar).as_text()
    assert ("CustomSPMDPartitioning" in text) == (mesh_is == "auto")
    assert all(size <= 2 * 4 * 128 for size in gathers)  # convolutions
    assert gathers
    assert max(relative_errors(program(args, out_bar), wanted)) < BOUND


@needs_mosaic
@pytest.mark.parametrize("mesh_is", ["auto", "explicit", "callers"])
def test_mixer_block(seed, monkeypatch, mesh_is):
    """Callers: inside a shard_map of the caller's, with JAX's check of what varies over devices."""
    from pallas_kernels.mixer_core import mosaic

    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    monkeypatch.setattr(mosaic, "block_unsupported", lambda *arrays, fills: None)
    case = {"b": 8, "rows": 3, "columns": 8, "e": 128}
    args, bars = block.draw(np.random.default_rng(seed), **case)

    def run(args, bars, implementation="auto"):
        objective = lambda args: block.block(args, implementation, **case)  # noqa: E731
        _, pull = jax.vjp(objective, args)
        return objective(args), pull(bars)

    wanted = jax.jit(lambda *a: run(*a, "xla"))(args, bars)
    mesh = mesh_of(AxisType.Explicit if mesh_is == "explicit" else AxisType.Auto)
    specs = (P(BATCH), P(BATCH), *jax.tree.map(lambda x: P(), args[2:]))
    both = (P(BATCH), P(BATCH))
    args, bars = put((args, bars), (specs, both), mesh)
    if mesh_is == "callers":
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs, both), out_specs=(both, (specs,)))
    program, gathers = compiled(run, args, bars)
    assert not gathers
    assert max(relative_errors(program(args, bars), wanted)) < 1e-2


@needs_mosaic
def test_ragged_core(seed, monkeypatch):
    """The rows of the tokens are split with them."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    rng = np.random.default_rng(seed)
    types = (AxisType.Auto, AxisType.Explicit)[rng.integers(2)]
    args, out_bar = ragged.draw(rng, 8, 12, 5, 4, 128)
    run = lambda a, g, name: ragged.value_and_gradients(a, g, name, rows=5, columns=4)  # noqa: E731
    wanted = jax.jit(lambda a, g: run(a, g, "xla"))(args, out_bar)
    mesh = mesh_of(types)
    args = put(args, jax.tree.map(lambda x: P(BATCH) if len(x) == 8 else P(), args), mesh)
    out_bar = jax.device_put(out_bar, NamedSharding(mesh, P(BATCH)))
    program, gathers = compiled(lambda a, g: run(a, g, "auto"), args, out_bar)
    assert not gathers
    assert max(relative_errors(program(args, out_bar), wanted)) < BOUND


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_mosaic)])
def test_inside_a_shard_map_of_the_callers(seed, monkeypatch, kernels):
    """With JAX's check of what varies over devices, which sums the weights' gradients too."""
    if kernels:
        monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    args = draw(np.random.default_rng(seed), 8, 70, 32, 4)
    wanted = jax.jit(jax.grad(lambda a: objective(a, implementation="xla_sequential")))(args)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = scan_specs(args, "data", None, None)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(specs,), out_specs=specs)
    def run(args):
        return jax.grad(lambda a: jax.lax.psum(objective(a), "data"))(args)

    args = put(args, specs, mesh)
    assert max(relative_errors(run(args), wanted)) < BOUND
    if kernels:
        text = run.trace(args).lower(lowering_platforms=("cuda",)).as_text()
        assert all(call.startswith("(tensor<1x") for call in kernels_in(text))
        assert kernels_in(text)


@needs_mosaic
@pytest.mark.parametrize("operation", ["core", "sequence"])
def test_kernels_that_write_in_place_inside_a_shard_map_of_the_callers(
    seed, monkeypatch, operation
):
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    rng = np.random.default_rng(seed)
    if operation == "core":
        args, out_bar = core.draw(rng, 8, 3, 5, 128)
        run = functools.partial(core.value_and_gradients, rows=3, columns=5)
    else:
        args, out_bar = sequence.draw(rng, 8, 5, 128)
        run = sequence.value_and_gradients
    wanted = jax.jit(lambda a, g: run(a, g, "xla"))(args, out_bar)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), *jax.tree.map(lambda _: P(), args[1:]))
    mapped = jax.shard_map(
        lambda a, g: run(a, g, "auto"),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=(P("data"), specs),
    )
    traced = jax.jit(mapped).trace(put(args, specs, mesh), out_bar)
    assert max(relative_errors(traced.lower().compile()(args, out_bar), wanted)) < BOUND
    assert kernels_in(traced.lower(lowering_platforms=("cuda",)).as_text())


@needs_mosaic
@pytest.mark.parametrize(
    ("types", "blocks"),
    [
        (AxisType.Explicit, "scan"),
        pytest.param(AxisType.Auto, "scan", marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, "unroll", marks=pytest.mark.slow),
    ],
)
def test_model(seed, monkeypatch, types, blocks):
    """A FastVim with every parameter split over half the mesh."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    check_model(seed, types, "fastvim_tiny_patch16_224", blocks=blocks, remat="block")


@pytest.mark.slow
def test_vit(seed):
    check_model(seed, AxisType.Explicit, "vit_tiny_patch16_224", num_heads=4)


def test_model_inside_a_partly_manual_shard_map(seed):
    """Axes that are still Explicit there become Auto; the caller's own stay Manual."""
    from flax import nnx

    from fastvim_jax.models import create_model

    model = create_model(
        "fastvim_tiny_patch16_224", num_classes=4, depth=2, embed_dim=32, image_size=16,
        patch_size=8, rngs=nnx.Rngs(seed),
    )  # fmt: skip
    graphdef, params = nnx.split(model)
    images = jax.random.normal(jax.random.key(seed), (8, 16, 16, 3))
    run = lambda params, images: nnx.merge(graphdef, params)(images)  # noqa: E731
    wanted = jax.jit(run)(params, images)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    own = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}
    )
    placed = put(params, jax.tree.map(lambda _: P(), params), mesh)
    images = jax.device_put(images, NamedSharding(mesh, P(("data", "fsdp"))))
    assert max(relative_errors(jax.jit(own)(placed, images), wanted)) < 1e-5


def check_model(seed, types, name, **options):
    """Training and evaluation, against one device; gradients lie like parameters, features like images."""
    from flax import nnx

    from fastvim_jax.models import create_model

    model = create_model(
        name, num_classes=4, depth=2, embed_dim=64, image_size=32,
        patch_size=8, drop_path=0.3, rngs=nnx.Rngs(seed), **options,
    )  # fmt: skip
    graphdef, params = nnx.split(model)
    images = jax.random.normal(jax.random.key(seed), (8, 32, 32, 3))
    keep = model.draw_drop_path(jax.random.key(seed), 8)

    def loss(params, images):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(images, drop_path_keep=keep)))

    def features(params, images):
        model = nnx.merge(graphdef, params)
        return model.features(images), model.intermediates(images)

    run, look = jax.jit(jax.value_and_grad(loss)), jax.jit(features)
    wanted, seen = run(params, images), look(params, images)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(types,) * 2)
    spread = lambda x: P(*[None] * (x.ndim - 1), None if x.shape[-1] % 2 else "fsdp")  # noqa: E731
    params = put(params, jax.tree.map(spread, params), mesh)
    images = jax.device_put(images, NamedSharding(mesh, P(BATCH)))
    got = run(params, images)
    assert max(relative_errors(got, wanted)) < 1e-4
    looked = look(params, images)
    assert max(relative_errors(looked, seen)) < 1e-4
    if types == AxisType.Explicit:
        assert jax.tree.map(jax.typeof, got[1]) == jax.tree.map(jax.typeof, params)
        assert all(jax.typeof(x).sharding.spec[0] == BATCH for x in jax.tree.leaves(looked))


def shapes_on(mesh, arrays, specs):
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        arrays,
        specs,
    )


def kernels_in(text: str) -> list[str]:
    """The types of the calls of Mosaic kernels in a lowered program."""
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    return [line.rpartition(" : ")[2] for line in calls]


@needs_mosaic
@pytest.mark.parametrize(
    "axes", [("data", "model"), pytest.param(("batch", "block"), marks=pytest.mark.slow)]
)
def test_kernels_for_several_gpus_with_explicit_axes(axes):
    """Mesh axes may have the names of the kernels' own."""
    mesh = jax.sharding.AbstractMesh(
        (4, 2), axes, (AxisType.Explicit,) * 2, abstract_device=abstract_device()
    )
    args = jax.eval_shape(lambda: draw(np.random.default_rng(0), 8, 32, 128, 16))
    args = shapes_on(mesh, args, scan_specs(args, *axes, axes[1]))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(objective)).trace(args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = kernels_in(text)
    assert len(calls) == 3  # forward, backward, and the ungated output for z's gradient
    assert all(call.startswith("(tensor<2x32x64xf32>, tensor<2x32x64xf32>") for call in calls)
    assert "all_reduce" in text


@needs_mosaic
@pytest.mark.parametrize("pooled", [True, False])
def test_core_kernels_for_several_gpus_with_explicit_axes(pooled):
    mesh = jax.sharding.AbstractMesh(
        (4,), ("data",), (AxisType.Explicit,), abstract_device=abstract_device()
    )
    if pooled:
        args = jax.eval_shape(lambda: core.draw(np.random.default_rng(0), 8, 6, 4, 128))
        run = lambda a, g: core.value_and_gradients(a, g, "auto", rows=6, columns=4)  # noqa: E731
        shares = r"\(tensor<2x6x4x(256|2x128)xf32>"
    else:
        args = jax.eval_shape(lambda: sequence.draw(np.random.default_rng(0), 8, 24, 128))
        run = lambda a, g: sequence.value_and_gradients(a, g, "auto")  # noqa: E731
        shares = r"\(tensor<(2x24x256|48x2x128)xf32>"
    specs = jax.tree.map(lambda x: P("data") if x.shape[0] == 8 else P(), args)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run).trace(*shapes_on(mesh, args, specs))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = kernels_in(text)
    assert len(calls) == 4
    assert all(re.match(shares, call) for call in calls)
    assert "all_reduce" in text


@needs_mosaic
@pytest.mark.parametrize("operation", ["scan", "core", "sequence"])
def test_kernels_for_several_gpus_with_auto_axes(monkeypatch, operation):
    """The partitioner asks, gets kernels for the shares, and only then finds that a CPU cannot run them."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    seen = []
    run = sharding._Operation.run

    def watched(self, shard, *arrays):
        seen.append((dict(shard.axes), [x.shape for x in arrays]))
        return run(self, shard, *arrays)

    monkeypatch.setattr(sharding._Operation, "run", watched)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    if operation == "scan":
        args = jax.eval_shape(lambda: draw(np.random.default_rng(0), 8, 32, 128, 16))
        args = shapes_on(mesh, args, scan_specs(args, "data", "model", "model"))
        lowered = jax.jit(jax.grad(objective)).trace(args).lower(lowering_platforms=("cuda",))
        axes, first, calls = {"b": ("data",), "e": ("model",)}, (2, 32, 64), 2
    else:
        if operation == "core":
            args = jax.eval_shape(lambda: core.draw(np.random.default_rng(0), 8, 6, 4, 128)[0])
            operation = functools.partial(mixer_core, middle=core.middle, rows=6, columns=4)
        else:
            args = jax.eval_shape(lambda: sequence.draw(np.random.default_rng(0), 8, 24, 128)[0])
            operation = functools.partial(sequence_core, middle=sequence.middle)
        specs = jax.tree.map(lambda x: P("data") if x.shape[0] == 8 else P(), args)

        def loss(args):
            return jnp.sum(operation(*args) ** 2)

        traced = jax.jit(jax.grad(loss)).trace(shapes_on(mesh, args, specs))
        lowered = traced.lower(lowering_platforms=("cuda",))
        axes, first, calls = {"b": ("data",)}, (2, 24, 256), 4
    assert "CustomSPMDPartitioning" in lowered.as_text()
    seen.clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match="mosaic_gpu"):
        lowered.compile()
    assert len(seen) == calls
    for split, shapes in seen:
        assert split == axes
        assert shapes[0] == first
