"""Train a masked autoencoder or a linear probe, depending on the config's class."""

from __future__ import annotations

from fastvim_jax.training.masked.config import PretrainConfig, ProbeConfig
from fastvim_jax.training.masked.pretrain import pretrain
from fastvim_jax.training.masked.probe import probe
from fastvim_jax.training.runs import RunResult, TrainCall


def train(config: PretrainConfig | ProbeConfig, call: TrainCall) -> RunResult:
    """Run the task of `config`; `fastvim_jax.training.train` calls this."""
    if isinstance(config, PretrainConfig):
        return pretrain(config, call)
    return probe(config, call)
