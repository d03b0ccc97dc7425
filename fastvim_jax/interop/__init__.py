"""Weights from and to other implementations."""

from fastvim_jax.interop.state_dict import (
    from_torch_state_dict,
    to_torch_names,
    to_torch_state_dict,
)

__all__ = ["from_torch_state_dict", "to_torch_names", "to_torch_state_dict"]
