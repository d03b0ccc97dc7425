"""Embed the patches of images: cut, project, add positions, and apply the first block's norm, as one GPU kernel.

- `xla` defines what is computed. Platforms without the kernel run it, and every gradient.
- `api`: `embed_patches`, the public function.
- `mosaic` runs the kernel of `mosaic_embed` behind the interface of `xla`.

Letters: b images, l tokens, d channels of a token, p and q the rows and columns of pixels of a patch, r and k (rows,
columns) those of the grid of patches, c channels of a pixel.
"""

from pallas_kernels.patch_embed.api import embed_patches, embed_patches_unsupported

__all__ = ["embed_patches", "embed_patches_unsupported"]
