"""Define the dtype policy: the dtypes of parameters, matrix products, and everything between them.

Parameters are kept in `param_dtype` (float32; float64 in tests), and `dtype` is that of the operands of products
(`fastvim_jax.layers.linear`; in a ViT of the activations between them too). Everything else — results of products,
convolution, Δ, B, C, scan, gate, norms, residual stream, pooled sums, head, losses — is held in `wide`, that is
float32 or more. `matmul_precision` says how float32 products are carried out on a GPU, whose default would be TF32:
"highest" is true float32, "tf32" gives 10 mantissa bits and more speed. `activations` = "compute" gives up the wide
results of linear layers: images and tokens are rounded once and results stored in `dtype`, for half the memory
traffic; pooled tokens, steps, state and norms stay wide, and with a half-precision `dtype` the
few pooled tokens' projections are TF32 products. Where nothing is differentiated and one GPU kernel computes these and
the scans, means are rounded to bfloat16 for it. The GPU kernels then take the logistic function of SiLU from the
hardware's tanh, wrong by up to 2^-12. `residual_in_fp32` = False stores the residual stream in `dtype` between blocks:
sums are still computed in `wide`, and rounded once. How far both are from exact values stands at
`VisionMambaConfig.activations` and `BackboneConfig.residual_in_fp32`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import BeforeValidator

from fastvim_jax.config_checks import check_fields

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def dtype_name(dtype: Any) -> Any:
    """Return the name of a dtype given as an object (`jnp.bfloat16`, `np.dtype("float32")`); names pass through."""
    try:
        return dtype if dtype is None or isinstance(dtype, str) else jnp.dtype(dtype).name
    except (TypeError, ValueError):
        return dtype  # refused, with the names that there are, by the field


DtypeName = Annotated[Literal["float32", "bfloat16", "float64"], BeforeValidator(dtype_name)]
ParamDtypeName = Annotated[Literal["float32", "float64"], BeforeValidator(dtype_name)]
MatmulPrecision = Literal["highest", "tf32"]
Activations = Literal["wide", "compute"]
MATMUL_PRECISIONS = {"highest": jax.lax.Precision.HIGHEST, "tf32": jax.lax.Precision.DEFAULT}


@dataclass(frozen=True)
class Precision:
    """Name the compute and parameter dtypes and the float32 matmul mode; see the module docstring."""

    dtype: DtypeName = "float32"
    param_dtype: ParamDtypeName = "float32"
    matmul_precision: MatmulPrecision = "highest"
    activations: Activations = "wide"
    residual_in_fp32: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def compute(self) -> jnp.dtype:
        """Dtype of the operands of products (in a ViT, of the activations between them too)."""
        return jnp.dtype(DTYPES[self.dtype])

    @property
    def params(self) -> jnp.dtype:
        """Dtype in which parameters are stored."""
        return jnp.dtype(DTYPES[self.param_dtype])

    @property
    def wide(self) -> jnp.dtype:
        """Dtype of everything else: float32, or the compute dtype where that is wider."""
        return jnp.dtype(jnp.float64 if self.dtype == "float64" else jnp.float32)

    @property
    def residual(self) -> jnp.dtype:
        """Dtype in which the residual stream is stored between blocks."""
        return self.wide if self.residual_in_fp32 else self.compute

    @property
    def lax(self) -> jax.lax.Precision:
        """The `precision=` argument of every product."""
        return MATMUL_PRECISIONS[self.matmul_precision]
