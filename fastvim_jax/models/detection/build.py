"""Build detectors from configurations or from the name of a backbone."""

from __future__ import annotations

from typing import Any

from flax import nnx

from fastvim_jax.models.config import replace_options
from fastvim_jax.models.detection.cascade import CascadeRCNN
from fastvim_jax.models.detection.config import DetectorConfig
from fastvim_jax.models.registry import build_model, model_config


def build_detector(config: DetectorConfig, *, rngs: nnx.Rngs) -> CascadeRCNN:
    """Build a freshly initialised detector from its configuration."""
    return CascadeRCNN(config, build_model(config.backbone, rngs=rngs), rngs=rngs)


def cascade_mask_rcnn(
    backbone: str,
    *,
    num_classes: int = 80,
    rngs: nnx.Rngs,
    backbone_options: dict[str, Any] | None = None,
    **options: Any,
) -> CascadeRCNN:
    """Build a Cascade Mask R-CNN on the backbone called `backbone`, with fresh parameters.

    Args:
        backbone: One of `fastvim_jax.list_models()`; its last block is read.
        num_classes: Classes of objects.
        rngs: Source of the parameters' randomness, for example `nnx.Rngs(0)`.
        backbone_options: Fields of the backbone's config to change, for example `{"image_size": 1024}`.
        **options: Fields of `DetectorConfig` to change: `stages=(StageConfig(),)` makes a Mask R-CNN, `masks=False`
            besides a Faster R-CNN.

    Raises:
        UserError: an unknown name or option, or an impossible value.
    """
    config = model_config(backbone, num_classes=0, **(backbone_options or {}))
    if not config.out_indices:
        config = replace_options(config, out_indices=(config.depth - 1,))
    return build_detector(DetectorConfig(config, num_classes=num_classes, **options), rngs=rngs)
