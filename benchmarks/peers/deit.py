"""Time FastVim's peer on one GPU: timm's DeiT, compiled by PyTorch and captured as one CUDA graph, in bfloat16.

    python benchmarks/peers/deit.py --models tiny small base --json benchmarks/results/CARD/peer_deit.json

It needs torch with CUDA and timm. It times the forward pass (weights stored in bfloat16, no autocast), or with
--rows step the whole training step: forward in bfloat16 autocast, backward and fused AdamW in one graph.
`benchmarks/report.py` divides the rows of `fastvim bench model` and `fastvim bench train` by these. --autotune takes
minutes. Programs that share $FASTVIM_BENCH_LOCK compile side by side and are timed in turn. Records that name --train
are older: it stood for --rows forward step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pallas_kernels import timing

WARM_UP = 3  # calls before a graph is captured: they compile the model and choose its kernels
SETS = (
    4  # sets of input images that calls take in turn, so that no call finds its images in the cache
)


def captured(step: Callable[[], Any]) -> Any:
    """Capture `step` as a CUDA graph, and return the graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def compiled(model: Any, autotune: bool) -> Any:
    """Compile a model, without CUDA graphs: `captured` makes these."""
    import torch

    return torch.compile(model, mode="max-autotune-no-cudagraphs" if autotune else None)


def forward_graphs(name: str, pixels: int, batch: int, autotune: bool) -> list[Any]:
    """Capture the forward pass on `SETS` sets of images."""
    import timm
    import torch

    model = timm.create_model(name, img_size=pixels).to("cuda", torch.bfloat16).eval()
    run = compiled(model, autotune)

    def of(images: Any) -> Any:
        def step() -> Any:
            with torch.inference_mode():
                return run(images)

        return captured(step)

    shape = (batch, 3, pixels, pixels)
    return [of(torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(SETS)]


def step_graph(name: str, pixels: int, batch: int, autotune: bool) -> list[Any]:
    """Capture a whole training step."""
    import timm
    import torch

    model = timm.create_model(name, img_size=pixels).to("cuda").train()
    run = compiled(model, autotune)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.05, fused=True, capturable=True
    )
    images = torch.randn(batch, 3, pixels, pixels, device="cuda")
    labels = torch.randint(1000, (batch,), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = run(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return [captured(step)]


def milliseconds(graphs: list[Any], replays: int = 20, repeats: int = 5) -> tuple[float, float]:
    """Return the median and the fastest time of a replay, in milliseconds."""
    import torch

    times = []
    for repeat in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(replays):
            graphs[i % len(graphs)].replay()
        end.record()
        torch.cuda.synchronize()
        if repeat:  # the first one warms up
            times.append(start.elapsed_time(end) / replays)
    return statistics.median(times), min(times)


def case(name: str, pixels: int, batch: int, what: str, autotune: bool) -> timing.Case:
    """Compile and capture one row, then time it: `what` is "forward" or "step"."""
    graphs = {"forward": forward_graphs, "step": step_graph}[what](name, pixels, batch, autotune)
    yield None
    median, fastest = milliseconds(graphs)
    yield {"ms": median, "fastest_ms": fastest, "images_per_s": 1e3 * batch / median}


def circumstances() -> dict[str, str]:
    """Name the device, versions, date and command."""
    import timm
    import torch

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "timm": timm.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def main() -> None:
    """Measure and print all rows, and write them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rows", nargs="+", choices=("forward", "step"), default=["forward"])
    parser.add_argument("--autotune", action="store_true", help="let PyTorch try more kernels")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    cases = [
        (
            {"row": what, "model": name, "pixels": chosen.pixels, "batch": chosen.batch,
             "precision": "bf16", "autotuned": chosen.autotune},
            case(name, chosen.pixels, chosen.batch, what, chosen.autotune),
        )
        for name in (f"deit_{size}_patch16_224" for size in chosen.models)
        for what in chosen.rows
    ]  # fmt: skip
    rows: list[timing.Row] = []
    for row in timing.run(cases):
        rows.append(row)
        print(json.dumps(row), flush=True)
        record = {"bench": "peer", "circumstances": circumstances(), "rows": rows}
        record["complete"] = len(rows) == len(cases)
        if chosen.json:
            chosen.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
