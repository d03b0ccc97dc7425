"""Time torchvision's Mask R-CNN (ResNet-50 FPN v2) with random weights, as a yardstick for `bench detect`."""

from __future__ import annotations

import statistics

from fastvim_jax.errors import UserError
from pallas_kernels import timing

NAME = "torchvision Mask R-CNN v2"


def cases(
    settings: list[tuple[int, int]], repeats: int = 20
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements in bfloat16, one for each (pixels, batch), timed by CUDA events.

    Images have the size that the model works on, so that its own resize does nothing.

    Raises:
        UserError: torchvision or a GPU is missing.
    """
    try:
        import torch
        import torchvision
    except ImportError:
        raise UserError("--peer needs torch and torchvision: pip install torchvision.") from None
    if not torch.cuda.is_available():
        raise UserError("--peer needs a CUDA device that torch can use.")

    def case(pixels: int, batch: int) -> timing.Case:
        model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, min_size=pixels, max_size=pixels
        )
        model = model.eval().cuda()
        # Only the backbone is compiled, because the shapes of what follows vary from image to image.
        model.backbone = torch.compile(model.backbone)
        images = list(torch.rand(batch, 3, pixels, pixels, device="cuda"))

        def once() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                begin.record()
                model(images)
                end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end))

        for _ in range(5):
            once()
        yield None
        times = sorted(once() for _ in range(repeats))
        median = statistics.median(times)
        yield {
            "ms": median, "fastest_ms": times[0], "slowest_ms": times[-1],
            "images_per_s": 1e3 * batch / median, "error": 0.0, "correct": True,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }  # fmt: skip

    return [
        (
            {"model": NAME, "pixels": pixels, "batch": batch, "precision": "bf16", "part": "whole"},
            case(pixels, batch),
        )
        for pixels, batch in settings
    ]
