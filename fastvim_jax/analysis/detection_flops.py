"""Count a detector's multiply-adds by parts: those of the backbone, and one per weight and output cell of the rest."""

from __future__ import annotations

from fastvim_jax.analysis.flops import gmacs
from fastvim_jax.models import DetectorConfig
from fastvim_jax.models.detection.heads import BOX_SIZE, MASK_SIZE


def detection_gmacs(config: DetectorConfig) -> dict[str, float]:
    """Return billions of multiply-adds per image of each part of detection, and of the `whole`.

    Products of heads and pyramid are counted. RoIAlign, norms and the selection of boxes are not, so `proposals` and
    `detections` are 0.
    """
    height, width = config.image_size
    d, c, classes = config.backbone.embed_dim, config.width, config.num_classes
    cells = [(height // s) * (width // s) for s in config.strides]
    tokens = cells[2]
    # Level p2 takes two up-convolutions, the first to d/2 channels, p3 one.
    neck = tokens * 4 * d * (d // 2) * 2 + cells[1] * 4 * (d // 2) * (d // 4)
    for pixels, channels in zip(cells, (d // 4, d // 2, d, d), strict=False):
        neck += pixels * (channels * c + 9 * c * c)
    rpn = sum(cells) * (config.rpn.convs * 9 * c * c + c * 5 * len(config.rpn.ratios))
    bins, sets = BOX_SIZE**2, 1 if config.class_agnostic else classes
    box = bins * (config.box_convs * 9 * c * c + c * config.hidden)
    box += config.hidden * (classes + 1 + 4 * sets)
    mask = MASK_SIZE**2 * (config.mask_convs * 9 * c * c + 4 * c * c + 4 * c * classes)
    stages = len(config.stages)
    found = {
        "backbone": gmacs(config.backbone, config.image_size),
        "neck": neck / 1e9,
        "rpn": rpn / 1e9,
        "proposals": 0.0,
        "boxes": stages * config.rpn.test_after * box / 1e9,
        "detections": 0.0,
        "masks": stages * config.detections * mask / 1e9 if config.masks else 0.0,
    }
    return found | {"whole": sum(found.values())}
