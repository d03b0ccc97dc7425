"""Time torchvision's Mask R-CNN (ResNet-50 FPN v2) with random weights, as a yardstick for `bench detect`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from fastvim_jax.errors import UserError
from pallas_kernels import timing

NAME = "torchvision Mask R-CNN v2"
CANDIDATES = 1000
"""Pairs of box and class per image whose score reaches the threshold, as many as on a crowded photograph."""
Mode = Literal["eager", "parts", "whole"]
MODES: dict[Mode, str] = {
    "eager": "eager",
    "parts": "backbone and heads compiled",
    "whole": "compiled",
}
"""What torch.compile gets. The whole breaks into several graphs, because shapes depend on what is found."""


def cases(
    settings: list[tuple[int, int]], modes: Sequence[Mode] = ("eager", "parts"), repeats: int = 20
) -> list[tuple[timing.Row, timing.Case]]:
    """List the measurements in bfloat16, one for each mode and (pixels, batch), timed by CUDA events.

    Images have the size that the model works on, so that its own resize does nothing. Random weights give every pair of
    box and class a low score, so the threshold is set to where `CANDIDATES` pairs per image pass.

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

    def detect(model: Any, images: Any) -> Any:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            return model(images)

    def choose_threshold(model: Any, images: Any) -> None:
        logits: list[Any] = []
        hook = model.roi_heads.box_predictor.register_forward_hook(
            lambda module, given, found: logits.append(found[0])
        )
        detect(model, images)
        hook.remove()
        scores = logits[0].float().softmax(-1)[:, 1:].flatten()
        model.roi_heads.score_thresh = float(scores.topk(CANDIDATES * len(images)).values[-1])

    def case(pixels: int, batch: int, mode: Mode) -> timing.Case:
        model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, min_size=pixels, max_size=pixels
        )
        model = model.eval().cuda()
        images = list(torch.rand(batch, 3, pixels, pixels, device="cuda"))
        choose_threshold(model, images)
        if mode == "parts":
            model.backbone = torch.compile(model.backbone)
            model.rpn.head = torch.compile(model.rpn.head)
            for name in ("box_head", "mask_head"):
                setattr(
                    model.roi_heads,
                    name,
                    torch.compile(getattr(model.roi_heads, name), dynamic=True),
                )
        elif mode == "whole":
            model = torch.compile(model)

        def once() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            detect(model, images)
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end))

        for _ in range(5):
            once()
        found = sum(len(each["boxes"]) for each in detect(model, images)) / batch
        yield None
        torch.cuda.reset_peak_memory_stats()
        times = sorted(once() for _ in range(repeats))
        median = statistics.median(times)
        yield {
            "ms": median, "clock_ms": median, "fastest_ms": times[0], "slowest_ms": times[-1],
            "images_per_s": 1e3 * batch / median, "detections": found, "error": 0.0, "correct": True,
            "peak_bytes": torch.cuda.max_memory_allocated(), "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }  # fmt: skip

    return [
        (
            {
                "model": f"{NAME}, {MODES[mode]}", "pixels": pixels, "batch": batch, "precision": "bf16",
                "part": "whole",
            },
            case(pixels, batch, mode),
        )
        for mode in modes
        for pixels, batch in settings
    ]  # fmt: skip
