"""Time ChannelViT-S in PyTorch: timm's blocks over one token per patch and channel, compiled, with fused attention.

It needs torch with CUDA and timm. The layers are timm's; only the embedding is written here.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Iterator
from typing import Any

WIDTH, DEPTH, HEADS, CLASSES = 384, 12, 6, 161


def build(patch: int, channels: int = 8, size: int = 224) -> Any:
    """Build the module, which maps images `b channels h w` to logits `b classes`."""
    import torch
    from timm.models.vision_transformer import Block
    from torch import nn

    class ChannelViT(nn.Module):
        """Shared patch kernel, channel and position embeddings, class token, blocks, head."""

        def __init__(self) -> None:
            super().__init__()
            patches = (size // patch) ** 2
            self.embed = nn.Conv2d(1, WIDTH, patch, patch)
            self.channel = nn.Parameter(torch.randn(1, channels, 1, WIDTH) * 0.02)
            self.position = nn.Parameter(torch.randn(1, 1, patches, WIDTH) * 0.02)
            self.token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
            self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, qkv_bias=True) for _ in range(DEPTH)))
            self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, CLASSES)

        def forward(self, images: Any) -> Any:
            batch, count = images.shape[:2]
            tokens = self.embed(images.flatten(0, 1)[:, None]).flatten(2).transpose(1, 2)
            tokens = tokens.reshape(batch, count, -1, WIDTH) + self.channel + self.position
            tokens = torch.cat([self.token.expand(batch, 1, WIDTH), tokens.flatten(1, 2)], 1)
            return self.head(self.norm(self.blocks(tokens)[:, 0]))

    return ChannelViT()


def case(
    *, patch: int, batch: int, dtype: str, mode: str = "", seconds: float = 0.5
) -> Iterator[dict[str, Any] | None]:
    """Compile the forward pass in bfloat16 (parameters too) or in float32 without TF32, yield, then time it.

    `mode` is a mode of `torch.compile`, by default the one that searches most.
    """
    import torch
    import torch._inductor.config as inductor

    torch.set_float32_matmul_precision("highest")
    # Without this, Inductor of torch 2.11 fails an assertion when it analyses the layout of the embedding's channels.
    inductor.triton.coalesce_tiling_analysis = False
    model = build(patch).to("cuda", getattr(torch, dtype)).eval()
    mode = mode or ("max-autotune-no-cudagraphs" if batch > 8 else "max-autotune")
    compiled = torch.compile(model, mode=mode)
    images = torch.randn(batch, 8, 224, 224, device="cuda", dtype=getattr(torch, dtype))
    with torch.inference_mode():
        for _ in range(5):
            compiled(images)
        torch.cuda.synchronize()
    yield None
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(3):
            compiled(images)
        torch.cuda.synchronize()
        steps = max(3, round(seconds * 3 / (time.perf_counter() - start)))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(steps):
                compiled(images)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start) / steps)
    milliseconds = statistics.median(times)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    yield {"mode": mode, "ms": milliseconds, "images_per_s": 1e3 * batch / milliseconds, **versions}
