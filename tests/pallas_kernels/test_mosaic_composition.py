"""A mixer's core with all kernels in it, scans included, under JAX's transformations, without a GPU.

Every program is traced for an H100; lowered for CUDA it must hold the kernels, and lowered for this CPU, where XLA
takes their place, give the plain form's values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import selective_scan
from pallas_kernels.mixer_core import mixer_core
from tests.pallas_kernels import test_mosaic_core as core
from tests.pallas_kernels.mosaic_support import (
    abstract_device,
    abstract_h100,
    launches,
    needs_mosaic,
    relative_errors,
)

pytestmark = needs_mosaic

KERNELS = (
    "mixer_front", "mixer_front_gradients", "mixer_back", "mixer_back_gradients",
    "selective_scan", "selective_scan_gradients",
)  # fmt: skip


def middle(params, u):
    """Run both directions' scans; steps, B and C stand in for projections of u."""

    def scan(side, p, reverse):
        B, C = jnp.sin(side[..., :4]), jnp.cos(side[..., 4:8])
        A = -jnp.exp(p[:, None] + 0.1 * jnp.arange(4.0))
        return selective_scan(side, side * p, A, B, C, reverse=reverse)

    return scan(u[0], params[0], False), scan(u[1], params[1], True)


def run(args, implementation="auto"):
    return mixer_core(
        *args, middle=middle, rows=3, columns=4, transposed=True, implementation=implementation
    )


def loss(args, implementation="auto"):
    return jnp.sum(jnp.sin(run(args, implementation)))


def draw(seed, batch=2):
    return core.draw(np.random.default_rng(seed), batch, 3, 4, 128)[0]


def on_h100_and_cpu(function, *args, **options):
    """Return the program's text for CUDA, which must hold every kernel, and itself as compiled for this CPU."""
    with abstract_h100():
        traced = jax.jit(function, **options).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(launches(text, kernel) for kernel in KERNELS)
    return text, traced.lower().compile()


@pytest.mark.drawn("kernels lowered")
def test_vmap(seed):
    args = draw(seed)
    batched = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), args[:2])
    rest = args[2:]
    gradients = lambda implementation: jax.vmap(  # noqa: E731
        jax.grad(lambda a, b: loss((*a, *b), implementation), (0, 1)), (0, None)
    )
    _, program = on_h100_and_cpu(gradients("auto"), batched, rest)
    wanted = jax.jit(gradients("xla"))(batched, rest)
    assert max(relative_errors(program(batched, rest), wanted)) < 1e-5


@pytest.mark.drawn("kernels lowered")
def test_blocks_under_scan_with_remat_and_donation(seed):
    xz, *rest = draw(seed)
    x, z = jnp.split(xz, 2, -1)
    layers = jax.tree.map(lambda w: jnp.stack([w, 0.7 * w, 0.5 * w]), tuple(rest))

    def step(implementation):
        def of(x, layers):
            @jax.checkpoint
            def block(x, layer):
                xz = jnp.concatenate([x, z], -1)
                return x + run((xz, *layer), implementation), None

            total = lambda x, layers: jnp.sum(jnp.sin(jax.lax.scan(block, x, layers)[0]))  # noqa: E731
            gradients = jax.grad(total, (0, 1))(x, layers)
            return x - gradients[0], gradients[1]

        return of

    wanted = jax.jit(step("xla"))(x, layers)
    text, program = on_h100_and_cpu(step("auto"), x, layers, donate_argnums=0)
    assert "tf.aliasing_output" in text
    got = program(x, layers)
    assert x.is_deleted()
    assert max(relative_errors(got, wanted)) < 1e-5


@pytest.mark.drawn("kernels lowered")
def test_export_for_cuda(seed):
    arrays, structure = jax.tree.flatten(draw(seed))

    def gradients(*arrays):
        return jax.tree.leaves(jax.grad(loss)(structure.unflatten(arrays)))

    allowed = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with abstract_h100():
        exported = export.export(jax.jit(gradients), platforms=["cuda"], disabled_checks=allowed)(
            *arrays
        )
    text = exported.mlir_module()
    assert all(launches(text, kernel) for kernel in KERNELS)
    pytest.importorskip("flatbuffers", reason="JAX writes exported programs with it")
    assert export.deserialize(exported.serialize()).mlir_module() == text


@pytest.mark.drawn("kernels lowered")
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_one_device(types):
    """Lower what `tests/gpu` runs on one device: the kernels are in the program with either kind of axes."""
    args = jax.eval_shape(lambda: draw(0))
    if types == AxisType.Auto:  # asks for real devices when it is lowered
        mesh = jax.make_mesh((1,), ("data",), axis_types=(types,))
        context = abstract_h100()
    else:
        mesh = jax.sharding.AbstractMesh(
            (1,), ("data",), (types,), abstract_device=abstract_device()
        )
        context = jax.sharding.use_abstract_mesh(mesh)
    specs = jax.tree.map(lambda x: P("data") if x.ndim == 3 and x.shape[0] == 2 else P(), args)
    args = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        args,
        specs,
    )
    with context:
        traced = jax.jit(jax.value_and_grad(loss)).trace(args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(launches(text, kernel) for kernel in KERNELS)
