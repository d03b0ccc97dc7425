"""Define the letters of dimensions, and jaxtyping aliases of the arrays that many signatures use.

b batch   h w image or grid height and width   c image channels   l tokens   s scan length
d model width   e inner width (expand * d)   n state size   k convolution width   r dt rank
"""

from __future__ import annotations

from jaxtyping import Array, Float

Images = Float[Array, "b h w c"]
Grid = Float[Array, "b rows columns d"]
FeatureMap = Float[Array, "b _ _ _"]
"""As `Grid`, of any size and width: what convolutions and resizing change."""
Tokens = Float[Array, "b l d"]
Inner = Float[Array, "b l e"]
Pooled = Float[Array, "b s e"]
Scores = Float[Array, "b l 1"]
Keep = Float[Array, "b"]
