"""List the named architectures of the paper: their sizes only. Everything else is a default or an option."""

from __future__ import annotations

from typing import Any

from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.config import ModelConfig, VisionMambaConfig, ViTConfig
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig

AnyModelConfig = ModelConfig | MaskedAutoencoderConfig

MAMBA_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 24},
    "small": {"embed_dim": 384, "depth": 24},
    "base": {"embed_dim": 768, "depth": 24},
    "large": {"embed_dim": 1024, "depth": 48},
}
VIT_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

CHANNEL_SIZES = {name: MAMBA_SIZES[name] for name in ("tiny", "small", "base")}

# The paper's decoder, 2 blocks of 512, from Base on; the small ones are ours.
DECODERS: dict[str, dict[str, Any]] = {"tiny": {"decoder_dim": 192}, "small": {"decoder_dim": 256}}

PRESETS: dict[str, AnyModelConfig] = {
    **{
        f"fastvim_{name}_patch16_224": VisionMambaConfig(**size)
        for name, size in MAMBA_SIZES.items()
    },
    "fastvim_huge_patch14_224": VisionMambaConfig(embed_dim=1280, depth=64, patch_size=14),
    **{
        f"vim_{name}_patch16_224": VisionMambaConfig(pooling="none", class_token="middle", **size)
        for name, size in MAMBA_SIZES.items()
    },
    **{
        f"fastchannelvim_{name}_patch{patch}_224": ChannelMambaConfig(patch_size=patch, **size)
        for patch in (16, 8)
        for name, size in CHANNEL_SIZES.items()
    },
    **{
        f"channelvim_{name}_patch{patch}_224": ChannelMambaConfig(
            patch_size=patch, pooling="none", class_token="middle", **size
        )
        for patch in (16, 8)
        for name, size in CHANNEL_SIZES.items()
    },
    **{
        f"channelvit_{name}_patch{patch}_224": ChannelViTConfig(patch_size=patch, **VIT_SIZES[name])
        for patch in (16, 8)
        for name in CHANNEL_SIZES
    },
    **{f"vit_{name}_patch16_224": ViTConfig(**size) for name, size in VIT_SIZES.items()},
    **{
        f"mae_fastvim_{name}_patch16_224": MaskedAutoencoderConfig(
            encoder=VisionMambaConfig(num_classes=0, **size), **DECODERS.get(name, {})
        )
        for name, size in MAMBA_SIZES.items()
    },
    "mae_fastvim_huge_patch14_224": MaskedAutoencoderConfig(
        encoder=VisionMambaConfig(num_classes=0, embed_dim=1280, depth=64, patch_size=14)
    ),
    **{
        f"mae_vim_{name}_patch16_224": MaskedAutoencoderConfig(
            encoder=VisionMambaConfig(num_classes=0, pooling="none", class_token="middle", **size),
            **DECODERS.get(name, {}),
        )
        for name, size in MAMBA_SIZES.items()
    },
    **{
        f"mae_vit_{name}_patch16_224": MaskedAutoencoderConfig(
            encoder=ViTConfig(num_classes=0, **size),
            decoder_depth=8,
            **DECODERS.get(name, {}),
        )
        for name, size in VIT_SIZES.items()
    },
}
