"""Mixer cores on eight simulated devices, and the programs of several GPUs; run by `test_sharded`.

The shares of cores are computed by XLA, since the kernels' interpreter knows one device only; the kernels themselves
are lowered.
"""

from __future__ import annotations

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import gpu, sharding
from pallas_kernels.mixer_core import Unprojected, mixer_core, sequence_core
from tests.pallas_kernels import test_known_scan as known
from tests.pallas_kernels import test_mosaic_block as block
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels import test_mosaic_project_front as project_front
from tests.pallas_kernels import test_mosaic_ragged as ragged
from tests.pallas_kernels import test_mosaic_sequence as sequence
from tests.pallas_kernels import test_patch_embed as patches
from tests.pallas_kernels import test_projected_scan as projected
from tests.pallas_kernels.mosaic_support import abstract_device, needs_mosaic, relative_errors
from tests.pallas_kernels.sharded_support import (
    BATCH,
    BOUND,
    compiled,
    kernels_in,
    mesh_of,
    objective,
    put,
    scan_specs,
    shapes_on,
)
from tests.pallas_kernels.test_mosaic_scan import draw


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize("mesh_is", ["auto", "explicit", "ambient"])
@pytest.mark.parametrize("pooled", [True, False])
def test_mixer_core(seed, monkeypatch, mesh_is, pooled, weights="fsdp"):
    """Compare a sharded core with an unsharded one.

    "ambient" has Auto axes; the batch's axes are known when the program is traced.
    """
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


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize(
    ("mesh_is", "projected"), [("auto", True), ("explicit", False), ("callers", True)]
)
def test_mixer_block(seed, monkeypatch, mesh_is, projected):
    """Compare a sharded block with an unsharded one, with in_proj or behind it.

    "callers" runs inside a shard_map of the caller's, with JAX's check of what varies over devices.

    Auto: images so large that at inference z takes the place of xz.
    """
    from pallas_kernels.mixer_core import mosaic

    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    monkeypatch.setattr(mosaic, "block_unsupported", lambda *arrays, by_name: None)
    rows, columns = (10, 14) if mesh_is == "auto" else (3, 8)
    case = {"b": 8, "rows": rows, "columns": columns, "e": 128}
    draw = project_front.draw_block if projected else lambda rng, case: block.draw(rng, **case)
    args, bars = draw(np.random.default_rng(seed), case)

    def run(args, bars, implementation="auto"):
        objective = lambda args: block.block(args, implementation, **case)  # noqa: E731
        _, pull = jax.vjp(objective, args)
        return objective(args), pull(bars)

    wanted = jax.jit(lambda *a: run(*a, "xla"))(args, bars)
    mesh = mesh_of(AxisType.Explicit if mesh_is == "explicit" else AxisType.Auto)
    given = Unprojected(P(BATCH), P()) if projected else P(BATCH)  # type: ignore[arg-type]
    specs = (given, P(BATCH), *jax.tree.map(lambda x: P(), args[2:]))
    both = (P(BATCH), P(BATCH))
    args, bars = put((args, bars), (specs, both), mesh)
    if mesh_is == "callers":
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs, both), out_specs=(both, (specs,)))
    program, gathers = compiled(run, args, bars)
    assert not gathers
    assert max(relative_errors(program(args, bars), wanted)) < 1e-2


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize("mesh_is", ["auto", "explicit", "callers"])
def test_projected_scan(seed, monkeypatch, mesh_is):
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    rng = np.random.default_rng(seed)
    steps = int(
        rng.choice([5, 9])
    )  # The gradient of 9 steps reads arrays that the forward pass kept.
    args = projected.draw(rng, 8, steps, 128)
    bars = args[0][0], args[0][1]
    wanted = jax.jit(lambda *a: projected.gradients_of(a[0], "xla", a[1]))(args, bars)
    mesh = mesh_of(AxisType.Explicit if mesh_is == "explicit" else AxisType.Auto)
    specs = (P(None, BATCH), jax.tree.map(lambda _: P(), args[1]))
    both = (P(BATCH), P(BATCH))
    run = lambda args, bars: projected.gradients_of(args, "auto", bars)  # noqa: E731
    if mesh_is == "callers":
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs, both), out_specs=(both, (specs,)))
    args, bars = put((args, bars), (specs, both), mesh)
    program, gathers = compiled(run, args, bars)
    assert not gathers
    assert max(relative_errors(program(args, bars), wanted)) < projected.GRADIENT_BOUND


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize("mesh_is", ["auto", "explicit", "callers"])
def test_known_scan(seed, monkeypatch, mesh_is):
    """Compare gradients around known results; those of the weights are summed over the devices."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    args, bars = known.draw(np.random.default_rng(seed), 8, 8, 384)
    wanted = jax.jit(lambda *a: known.gradients_of(a[0], "xla", a[1]))(args, bars)
    mesh = mesh_of(AxisType.Explicit if mesh_is == "explicit" else AxisType.Auto)
    specs = (P(None, BATCH), jax.tree.map(lambda _: P(), args[1]))
    both = (P(BATCH), P(BATCH))
    run = lambda args, bars: known.gradients_of(args, "auto", bars)  # noqa: E731
    if mesh_is == "callers":
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs, both), out_specs=(both, (specs,)))
    args, bars = put((args, bars), (specs, both), mesh)
    program, gathers = compiled(run, args, bars)
    assert not gathers
    assert max(relative_errors(program(args, bars), wanted)) < projected.GRADIENT_BOUND


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize("images", [16, 64])
def test_kernels_of_known_scan_for_several_gpus(images):
    """Lower shares of 16 tokens, whose products are XLA's, and of 64 or more, whose products are kernels."""
    mesh = jax.sharding.AbstractMesh(
        (8,), ("data",), (AxisType.Explicit,), abstract_device=abstract_device()
    )
    args, bars = jax.eval_shape(lambda: known.draw(np.random.default_rng(0), images, 8, 384))
    specs = ((P(None, "data"), jax.tree.map(lambda _: P(), args[1])), (P("data"), P("data")))
    with jax.sharding.use_abstract_mesh(mesh):
        run = jax.jit(lambda args, bars: known.gradients_of(args, "auto", bars))
        traced = run.trace(*shapes_on(mesh, (args, bars), specs))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(kernels_in(text)) == (2 if images == 16 else 4)
    assert "all_reduce" in text


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize("mesh_is", ["auto", "explicit", "ambient"])
def test_embed_patches(seed, monkeypatch, mesh_is):
    """Compare sharded images with the whole batch; no device gathers any."""
    monkeypatch.setattr(gpu, "kernels_missing", lambda: None)
    args = patches.draw(np.random.default_rng(seed), 32, 8, 2)
    run = patches.embed_as("bfloat16")
    wanted = jax.jit(patches.embed_as("bfloat16", "xla"))(*args)
    mesh = mesh_of(AxisType.Explicit if mesh_is == "explicit" else AxisType.Auto)
    args = put(args, (P(BATCH), P(), P()), mesh)
    with contextlib.ExitStack() as stack:
        if mesh_is == "ambient":
            stack.enter_context(jax.set_mesh(mesh))
            stack.enter_context(sharding.batch_over(*BATCH))
        program, gathers = compiled(run, *args)
        text = jax.jit(run).lower(*args).as_text()
        got = program(*args)
    assert ("CustomSPMDPartitioning" in text) == (mesh_is == "auto")
    assert not gathers
    assert all(x.sharding.spec[0] == BATCH for x in got)
    assert max(relative_errors(got, wanted)) < 1e-3  # sums in another order round differently


@needs_mosaic
def test_ragged_core(seed, monkeypatch):
    """Split the rows of the tokens together with the tokens."""
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


@pytest.mark.drawn("sharded cores")
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_mosaic)])
def test_inside_a_shard_map_of_the_callers(seed, monkeypatch, kernels):
    """Run inside a caller's shard_map, with JAX's check of what varies over devices.

    That check sums the weights' gradients, too.
    """
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


@pytest.mark.drawn("sharded cores")
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


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize(
    "axes", [("data", "model"), pytest.param(("batch", "block"), marks=pytest.mark.slow)]
)
def test_kernels_for_several_gpus_with_explicit_axes(axes):
    """Lower for several GPUs. Mesh axes may have the names of the kernels' own."""
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


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize("pooled", [True, False])
def test_core_kernels_for_several_gpus_with_explicit_axes(pooled):
    mesh = jax.sharding.AbstractMesh(
        (4,), ("data",), (AxisType.Explicit,), abstract_device=abstract_device()
    )
    if pooled:
        args = jax.eval_shape(lambda: core.draw(np.random.default_rng(0), 8, 6, 4, 128))
        run = lambda a, g: core.value_and_gradients(a, g, "auto", rows=6, columns=4)  # noqa: E731
        shares = r"\(tensor<(2x6x4x(256|2x128)|48x2x128)xf32>"
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


@pytest.mark.drawn("sharded cores")
@needs_mosaic
@pytest.mark.parametrize("operation", ["scan", "core", "sequence"])
def test_kernels_for_several_gpus_with_auto_axes(monkeypatch, operation):
    """Lower for several GPUs: the partitioner asks and gets kernels for the shares.

    Only then does it find that a CPU cannot run them.
    """
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
