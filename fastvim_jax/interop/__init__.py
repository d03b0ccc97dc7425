"""Read and write the weights of other implementations: their file formats, names and layouts."""

from fastvim_jax.interop.recognise import recognise
from fastvim_jax.interop.state_dict import (
    from_torch_state_dict,
    to_torch_names,
    to_torch_state_dict,
)
from fastvim_jax.interop.weights_file import WeightsFile, read_weights_file

__all__ = [
    "WeightsFile",
    "from_torch_state_dict",
    "read_weights_file",
    "recognise",
    "to_torch_names",
    "to_torch_state_dict",
]
