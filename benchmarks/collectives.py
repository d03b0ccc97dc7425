"""List what GPUs send each other in a train step, from a program compiled for simulated devices. Nothing is run.

    python benchmarks/collectives.py --devices 64 --json benchmarks/results/cpu/collectives.json

Each mesh takes one to three minutes of processor time. A collective's bytes are the size of its result on one device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path


def main() -> None:
    """Compile the steps and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--experiment", default="imagenet/fastvim_tiny")
    parser.add_argument("--fsdp", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flags = f"--xla_force_host_platform_device_count={options.devices} --xla_backend_optimization_level=0"
    os.environ |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}  # before JAX is imported

    import jax

    from fastvim_jax.bench.collectives import compile_step, traffic
    from fastvim_jax.distributed import MeshConfig
    from fastvim_jax.training import load_experiment

    experiment = load_experiment(options.experiment)
    data = dataclasses.replace(experiment.data, batch_size=16 * options.devices, mix_group=16)
    # Unrolled blocks have the same collectives, and take longer to compile.
    model = dataclasses.replace(experiment.model, blocks="scan")
    rows = []
    for fsdp in options.fsdp:
        mesh = MeshConfig(data=options.devices // fsdp, fsdp=fsdp)
        config = dataclasses.replace(experiment, model=model, data=data, mesh=mesh)
        begin = time.perf_counter()
        compiled, _ = compile_step(config, config.model.num_classes)
        seconds = time.perf_counter() - begin
        for kind, found in traffic(compiled.as_text()).items():
            rows.append(
                {"data": mesh.data, "fsdp": fsdp, "kind": kind, **dataclasses.asdict(found)}
            )
            print(
                f"data {mesh.data:4d}  fsdp {fsdp:3d}  {kind:20} {found.count:5d} times {found.bytes / 1e6:10.2f} MB",
                flush=True,
            )
        print(f"  compiled in {seconds:.0f} s", flush=True)
    if options.json:
        about = {
            "experiment": options.experiment,
            "devices": options.devices,
            "jax": jax.__version__,
        }
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
