"""Time a masked autoencoder in PyTorch: a ViT-B encoder and the usual decoder (8 blocks of width 512), timm's blocks.

    python benchmarks/peers/mae_vit.py --json FILE

It needs torch with CUDA and timm. It times the pre-training step (forward, backward, fused AdamW) in bfloat16 autocast
at mask ratio 0.75, eager and compiled. The blocks are timm's; masking and decoder are written here from the equations.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTH, DEPTH, HEADS = 768, 12, 12
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 512, 8, 16
PATCH, SIDE, KEPT = 16, 14, 49


def build() -> Any:
    """Build the module, which maps images `b 3 224 224` and noise `b 196` to the loss."""
    import torch
    from timm.models.vision_transformer import Block
    from torch import nn

    class MaskedAutoencoder(nn.Module):
        """Embedding, blocks over a quarter of the patches, decoder over all, normalised-pixel loss."""

        def __init__(self) -> None:
            super().__init__()
            length = SIDE * SIDE
            self.embed = nn.Linear(3 * PATCH * PATCH, WIDTH)
            self.token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
            self.mask = nn.Parameter(torch.randn(1, 1, DECODER_WIDTH) * 0.02)
            self.register_buffer("positions", torch.randn(1, length, WIDTH) * 0.02)
            self.register_buffer(
                "decoder_positions", torch.randn(1, length + 1, DECODER_WIDTH) * 0.02
            )
            self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, qkv_bias=True) for _ in range(DEPTH)))
            self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
            self.decoder_embed = nn.Linear(WIDTH, DECODER_WIDTH)
            decoder = (
                Block(DECODER_WIDTH, DECODER_HEADS, qkv_bias=True) for _ in range(DECODER_DEPTH)
            )
            self.decoder = nn.Sequential(*decoder)
            self.decoder_norm = nn.LayerNorm(DECODER_WIDTH, eps=1e-6)
            self.pixels = nn.Linear(DECODER_WIDTH, 3 * PATCH * PATCH)

        def forward(self, images: Any, noise: Any) -> Any:
            batch = images.shape[0]
            patches = images.reshape(batch, 3, SIDE, PATCH, SIDE, PATCH)
            patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, SIDE * SIDE, -1)
            order = noise.argsort(1)
            restore = order.argsort(1)
            chosen = order[:, :KEPT, None]
            tokens = self.embed(patches.gather(1, chosen.expand(-1, -1, patches.shape[2])))
            tokens = tokens + self.positions.expand(batch, -1, -1).gather(
                1, chosen.expand(-1, -1, WIDTH)
            )
            tokens = torch.cat([self.token.expand(batch, -1, -1), tokens], 1)
            latent = self.decoder_embed(self.norm(self.blocks(tokens)))
            rest = self.mask.to(latent.dtype).expand(batch, SIDE * SIDE - KEPT, -1)
            whole = torch.cat([latent[:, 1:], rest], 1)
            whole = whole.gather(1, restore[:, :, None].expand(-1, -1, DECODER_WIDTH))
            whole = torch.cat([latent[:, :1], whole], 1) + self.decoder_positions
            predicted = self.pixels(self.decoder_norm(self.decoder(whole)))[:, 1:]
            mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
            target = (patches - mean) / (variance + 1e-6).sqrt()
            removed = (restore >= KEPT).float()
            error = (predicted.float() - target).square().mean(-1)
            return (error * removed).sum() / removed.sum()

    return MaskedAutoencoder()


def case(*, batch: int, mode: str | None, seconds: float = 0.7) -> Iterator[dict[str, Any] | None]:
    """Compile the training step, yield, then time it.

    Args:
        batch: images per batch.
        mode: a mode of `torch.compile`; "blocks" compiles each block by itself; None compiles nothing.
        seconds: time of one repeat.
    """
    import torch

    model = build().to("cuda").train()
    loss_of = model if mode in (None, "blocks") else torch.compile(model, mode=mode)
    if mode == "blocks":
        for block in (*model.blocks, *model.decoder):
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = torch.randn(batch, 3, 224, 224, device="cuda")

    def step() -> Any:
        noise = torch.rand(batch, SIDE * SIDE, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(images, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    start = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    print(f"{mode or 'eager'}: first steps {time.perf_counter() - start:.0f} s", flush=True)
    yield None
    start = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    count = max(3, round(seconds * 3 / (time.perf_counter() - start)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            loss = step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / count)
    ms = statistics.median(times)
    yield {
        "ms": ms, "images_per_s": 1e3 * batch / ms, "last_loss": loss.item(),
        "torch": torch.__version__,
    }  # fmt: skip


def cases(batch: int, modes: list[str]) -> list[Any]:
    """List the measurements for `timing.run`: the eager step, then one for each mode."""
    return [
        (
            {"row": "step", "model": f"pytorch mae vit-b, {mode or 'eager'}", "batch": batch},
            case(batch=batch, mode=mode),
        )
        for mode in (None, *modes)
    ]


def main() -> None:
    """Measure and print the rows, and write them to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--modes", nargs="+", default=["default"], help="modes of torch.compile, or blocks"
    )
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    from fastvim_jax.bench.record import show
    from pallas_kernels import timing

    columns: Any = (
        ("model", 46, lambda r: r["model"]),
        ("batch", 5, lambda r: str(r["batch"])),
        ("images/s", 9, lambda r: f"{r['images_per_s']:.0f}"),
        ("ms", 9, lambda r: f"{r['ms']:.2f}"),
    )
    rows = timing.run(cases(chosen.batch, chosen.modes))
    show("masked_peer", rows, columns, command=" ".join(sys.argv), file=chosen.json)


if __name__ == "__main__":
    main()
