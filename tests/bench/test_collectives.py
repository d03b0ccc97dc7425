"""What a step sends between devices, read from compiled programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastvim_jax.bench.collectives import Traffic, traffic
from tests.support import ROOT

PROGRAM = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[4,8]{1,0} all-gather(%p), dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %r)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %all = (f32[2,3]{1,0}, f32[]) all-reduce(%b, %c), to_apply=%add
  %start = f32[10]{0} all-reduce-start(%d), to_apply=%add
  ROOT %done = f32[10]{0} all-reduce-done(%start)
}
"""

SIMULATED = """
import dataclasses, json, sys
import jax
from flax import nnx
from fastvim_jax.bench.collectives import compile_step, traffic
from fastvim_jax.distributed import MeshConfig, sharding
from fastvim_jax.models import build_model
from tests.training.tiny import tiny_config, tiny_model
sharding.SMALLEST = 4096  # so that a tiny model is spread, too
config = tiny_config(
    model=tiny_model(depth=2, blocks="scan", embed_dim=64),
    mesh=MeshConfig(data=int(sys.argv[1]), fsdp=int(sys.argv[2])),
    accumulate=int(sys.argv[3]),
)
options = dict(batch_size=128, mix_group=2, mixup=0.8, cutmix=1.0, random_erasing=0.25)
config = dataclasses.replace(config, data=dataclasses.replace(config.data, **options))
compiled, mesh = compile_step(config, 10)
assert mesh.size == 64
found = {kind: each.bytes for kind, each in traffic(compiled.as_text()).items()}
shapes = nnx.state(nnx.eval_shape(lambda: build_model(config.model, rngs=nnx.Rngs(0))))
found["parameters"] = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
print(json.dumps(found))
"""


def test_loops_tuples_and_asynchronous_forms_are_counted() -> None:
    assert traffic(PROGRAM) == {
        "all-reduce": Traffic(2, 4 * (6 + 1 + 10)),
        "all-gather": Traffic(12, 12 * 2 * 32),
    }


@pytest.mark.slow
@pytest.mark.drawn("whole models lowered")
@pytest.mark.parametrize("mesh", ["64x1x1", "64x1x2", "8x8x1"])
def test_sixty_four_devices_exchange_gradients_and_no_images(mesh: str) -> None:
    """Find one sum of all gradients and some scalars in a data-parallel step, whose batch may come in two parts.

    With fsdp the parameters are gathered as well.
    """
    flags = "--xla_force_host_platform_device_count=64 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", SIMULATED, *mesh.split("x")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    size = found.pop("parameters")
    if mesh.startswith("64x1"):
        assert set(found) <= {"all-reduce"}
        assert size <= found["all-reduce"] < 1.1 * size + 20_000
    else:
        assert 0 < found["all-gather"] < 2 * size
        assert not {"all-to-all", "collective-permute"} & set(found)
