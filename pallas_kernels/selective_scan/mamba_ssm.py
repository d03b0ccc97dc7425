"""The authors' CUDA kernel, where PyTorch and `mamba_ssm` are installed: a peer for the benchmark, nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selective_scan.arg_specs import ScanSpec
from pallas_kernels.timing import COLD_BYTES, Time


def missing() -> str | None:
    """Return why the kernel cannot be called, or None if it can."""
    for name in ("torch", "mamba_ssm"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if not importlib.import_module("torch").cuda.is_available():
        return "PyTorch sees no GPU"
    return None


class Peer:
    """One scan of `spec`, its layout `b e l` and its inputs resident in PyTorch."""

    def __init__(self, spec: ScanSpec, dtype: str, gradient: bool):
        if spec.groups is not None:
            raise NotImplementedError("the peer is measured without groups")
        self.torch: Any = importlib.import_module("torch")
        self.interface: Any = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        self.spec, self.dtype, self.gradient = spec, dtype, gradient
        size = 5 * spec.batch * spec.length * spec.channels * jnp.dtype(dtype).itemsize
        self.sets = [self._inputs(seed) for seed in range(max(2, int(COLD_BYTES // size)))]

    def _inputs(self, seed: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
        arrays, options = self.spec.arguments(seed, self.dtype)
        out_bar = jax.random.normal(jax.random.key(seed), arrays["u"].shape).astype(self.dtype)

        def there(x):
            tensor = self.torch.tensor(np.asarray(x.astype(jnp.float32)), device="cuda")
            return tensor.to(getattr(self.torch, str(x.dtype)))

        tensors = {}
        for name, x in arrays.items():
            x = jnp.swapaxes(x, 1, 2) if x.ndim == 3 else x
            tensors[name] = there(x).requires_grad_(self.gradient)
        return tensors, options, there(jnp.swapaxes(out_bar, 1, 2))

    def call(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Call it on the set `index`: y, and the gradients by name."""
        tensors, options, out_bar = self.sets[index % len(self.sets)]
        y = self.interface.selective_scan_fn(**tensors, delta_softplus=options["delta_softplus"])
        if not self.gradient:
            return y, {}
        grads = self.torch.autograd.grad(y, list(tensors.values()), out_bar)
        return y, dict(zip(tensors, grads, strict=True))

    def result(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the values for seed 0, in the layout of `selective_scan`."""

        def back(x):
            x = jnp.asarray(x.detach().float().cpu().numpy())
            return jnp.swapaxes(x, 1, 2) if x.ndim == 3 else x

        y, grads = self.call(0)
        return back(y), {name: back(g) for name, g in grads.items()}

    def time(self, calls: int = 20) -> Time:
        """Time eager calls, with device events around each."""
        cuda = self.torch.cuda
        for i in range(3):
            self.call(i)
        events = [
            (cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(calls)
        ]
        for i, (start, end) in enumerate(events):
            start.record()
            self.call(i)
            end.record()
        cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
        median = statistics.median(times)
        return Time(
            "events", median, min(times), max(times), calls=calls, input_sets=len(self.sets)
        )
