"""Compile gradients of a core that holds kernels for two devices; run twice by `test_compilation_cache`."""

import jax
import jax.numpy as jnp
import numpy as np

from fastvim_jax.distributed import MeshConfig, make_mesh, place_batch, replicated
from fastvim_jax.distributed.mesh import on_mesh
from pallas_kernels import gpu
from tests.pallas_kernels import test_mosaic_sequence as sequence
from tests.pallas_kernels.mosaic_support import relative_errors

gpu.kernels_missing = lambda: None  # kernels are traced, and lowered to XLA for the CPU
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
mesh = make_mesh(MeshConfig())
(xz, *weights), out_bar = sequence.draw(np.random.default_rng(0), 4, 3, 128)
wanted = sequence.value_and_gradients((xz, *weights), out_bar, "xla")
weights = jax.device_put(weights, replicated(mesh))
batch = place_batch(mesh, {"xz": np.asarray(xz), "out_bar": np.asarray(out_bar)})


@jax.jit
def on_two_devices(weights, batch):
    return sequence.value_and_gradients((batch["xz"], *weights), batch["out_bar"], "auto")


got = on_mesh(mesh, on_two_devices)(weights, batch)
assert len(got[0].sharding.device_set) == 2
assert got[0].sharding.shard_shape(got[0].shape)[0] == 2
errors = relative_errors(jax.device_get(got), jax.device_get(wanted))
assert max(errors) < 1e-5, errors
print("done", jnp.shape(got[0]))
