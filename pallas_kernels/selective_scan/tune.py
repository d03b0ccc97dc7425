"""Try the kernels' block sizes on the local GPU, and keep those that beat the rules: `fastvim bench scan --tune`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from pallas_kernels import gpu, timing
from pallas_kernels.selective_scan import bench, tuned
from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.selective_scan.tuned import Blocks

# Chunk lengths to try, without and with gradients. The gradients' kernel holds no longer chunk in registers.
CHUNKS = {False: (8, 16, 24, 32, 40), True: (8, 16)}
GAIN = 0.97  # blocks are kept if their time is below this share of the rules' time; smaller gains are noise


def rule(spec: ScanSpec, gradient: bool) -> Blocks:
    """Return the blocks that the rules in `mosaic` choose."""
    with tuned.forced(None):
        cut = bench.kernel_plan(spec, gradient)
    return Blocks(cut.chunk, cut.channels, cut.splits)


def candidates(spec: ScanSpec, gradient: bool) -> list[Blocks]:
    """List the blocks to try: the rules' choice first, then other chunks, channels and splits of the time axis."""
    first = rule(spec, gradient)
    found = [first]
    for chunk in CHUNKS[gradient]:
        for channels in (32, 64):
            if chunk >= spec.length + 8 or (
                channels == 64 and (spec.channels % 64 or spec.states > 16)
            ):
                continue
            for splits in {1, first.splits // 2, first.splits, 2 * first.splits}:
                if splits < 1 or (splits > 1 and 2 * splits * chunk > spec.length):
                    continue
                if splits == 1 and first.splits > 4:  # the time must be cut
                    continue
                found.append(Blocks(chunk, channels, splits))
    return list(dict.fromkeys(found))


def cases(
    specs: Sequence[ScanSpec], gradients: Sequence[bool] = (False, True)
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements for `timing.run`, in float32.

    Raises:
        NotImplementedError: the kernels do not run here.
    """
    missing = gpu.kernels_missing()
    if missing is not None:
        raise NotImplementedError(f"there is nothing to tune: {missing}")
    found = []
    for spec in specs:
        for gradient in gradients:
            for blocks in candidates(spec, gradient):
                name = {
                    "shape": [spec.batch, spec.length, spec.channels], "states": spec.states,
                    "dtype": "float32", "gradient": gradient, **blocks._asdict(),
                    "rule": blocks == rule(spec, gradient),
                }  # fmt: skip
                found.append((name, _case(spec, gradient, blocks)))
    return found


def _case(spec: ScanSpec, gradient: bool, blocks: Blocks) -> timing.Case:
    with tuned.forced(blocks):
        measured, error = bench.checked(spec, "float32", gradient, "pallas")
    yield None
    time = measured.time()
    yield {
        "error": error,
        "correct": error <= bench.TOLERANCES["float32"],
        **dataclasses.asdict(time),
    }


def keep(rows: Sequence[timing.Row], file: Path, command: str) -> list[str]:
    """Write the blocks that beat the rules into `file`, which keeps blocks of other shapes. Return their names."""
    measured = [r for r in rows if "median" in r and r["correct"]]
    record = json.loads(file.read_text()) if file.exists() else {"blocks": {}}
    kept = []
    for ruled in (r for r in measured if r["rule"]):
        same = [
            r for r in measured if all(r[k] == ruled[k] for k in ("shape", "states", "gradient"))
        ]
        best = min(same, key=lambda r: r["median"])
        batch, length, channels = ruled["shape"]
        name = tuned.key(batch, length, channels, ruled["states"], ruled["gradient"])
        record["blocks"].pop(name, None)
        if best["median"] < GAIN * ruled["median"]:
            blocks = {k: best[k] for k in Blocks._fields}
            record["blocks"][name] = {**blocks, "ms": best["median"], "ms_by_rule": ruled["median"]}
            kept.append(name)
    record = {"circumstances": timing.circumstances(command), "blocks": record["blocks"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    return kept


def default_file() -> Path:
    """Return the file in which the kernels look for this device's blocks."""
    return tuned.file_of(jax.devices()[0].device_kind)


COLUMNS = (
    ("batch x length x channels", 26, lambda r: "x".join(map(str, r["shape"]))),
    ("what", 8, lambda r: "fwd+bwd" if r["gradient"] else "fwd"),
    ("chunk", 5, lambda r: str(r["chunk"])),
    ("channels", 8, lambda r: str(r["channels"])),
    ("splits", 6, lambda r: str(r["splits"])),
    ("ms", 9, lambda r: f"{r['median']:.4f}"),
    ("spread", 16, lambda r: f"{r['fastest']:.4f}-{r['slowest']:.4f}"),
    ("error", 8, lambda r: f"{r['error']:.0e}"),
    ("", 4, lambda r: "rule" if r["rule"] else ""),
)
