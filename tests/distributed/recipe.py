"""Run as a program: train with everything that the recipe has, or repeat the steps by hand and compare.

python tests/distributed/recipe.py train FOLDER     one or several processes
python tests/distributed/recipe.py compare FOLDER   afterwards, one process
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from fastvim_jax.data import ClassificationData, make_train_iterator
from fastvim_jax.data.device_transforms import mix_weights, random_erasing
from fastvim_jax.data.sources import image_folder
from fastvim_jax.distributed import MeshConfig, barrier, initialize_distributed, is_first_process
from fastvim_jax.models import build_model
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.training import OptimizerConfig, TrainConfig, read_metrics, train
from fastvim_jax.training.run_folder import load_run
from tests.training.tiny import tiny_model

BATCH, STEPS, PER_EPOCH, PARTS, GROUP, CLASSES, SEED = 16, 6, 2, 2, 4, 3, 7
SMOOTHING, DECAY, CLIP, WEIGHT_DECAY, EPS = 0.1, 0.8, 0.25, 0.3, 1e-6
RATES = (1e-3, 1e-2, *(1e-4 + (1e-2 - 1e-4) * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2))
MEAN, STD = np.asarray((0.5, 0.4, 0.3)), np.asarray((0.2, 0.25, 0.3))


def write_images(root: Path) -> None:
    rng = np.random.default_rng(3)
    for split, count in (("train", 12), ("test", 3)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(14, 30, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def recipe(folder: Path) -> TrainConfig:
    return TrainConfig(
        model=tiny_model(
            depth=2, image_size=16, channels=3, num_classes=CLASSES, blocks="scan", dtype="float64",
            param_dtype="float64",
        ),
        data=ClassificationData(
            source="image_folder", path=str(folder / "images"), image_size=16, batch_size=BATCH, eval_batch_size=8,
            rand_augment=9, random_erasing=0.6, mixup=0.8, cutmix=1.0, mix_group=GROUP,
            mean=tuple(MEAN), std=tuple(STD),
        ),
        optimizer=OptimizerConfig(
            learning_rate=RATES[1], learning_rate_scaling="none", warmup_epochs=1.0, warmup_start=RATES[0],
            final_learning_rate=1e-4, weight_decay=WEIGHT_DECAY, clip_grad_norm=CLIP, eps=EPS,
        ),
        mesh=MeshConfig(data=4), label_smoothing=SMOOTHING, accumulate=PARTS, epochs=STEPS // PER_EPOCH,
        ema_decay=DECAY, seed=SEED, log_every_steps=1,
    )  # fmt: skip


@jax.jit
def augmented(batch: dict[str, Any], step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Normalise, erase and mix one global batch: images and soft targets."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 2**32 - 1), step)
    *_, erase_key, mix_key = jax.random.split(key, 4)
    images = ((batch["image"] / 255 - MEAN) / STD).astype(np.float32)
    images = random_erasing(erase_key, jnp.asarray(images), probability=0.6)
    mixed, targets = [], []
    for group in range(BATCH // GROUP):
        own = slice(GROUP * group, GROUP * (group + 1))
        weight, share = mix_weights(
            jax.random.fold_in(mix_key, group), (16, 16), mixup=0.8, cutmix=1.0
        )
        weight = weight[:, :, None] if weight.ndim else weight
        mixed.append(images[own] * weight + images[own][::-1] * (1 - weight))
        smooth = jnp.eye(CLASSES)[batch["label"][own]] * (1 - SMOOTHING) + SMOOTHING / CLASSES
        targets.append(smooth * share + smooth[::-1] * (1 - share))
    return jnp.concatenate(mixed), jnp.concatenate(targets)


def by_hand(config: TrainConfig) -> dict[str, Any]:
    """Make every step in plain JAX: losses, norms of the gradients, parameters and their average."""
    sources = [
        make_train_iterator(config.data, seed=SEED, process_index=i, process_count=2)
        for i in (0, 1)
    ]
    graphdef, params = nnx.split(build_model(config.model, rngs=nnx.Rngs(SEED)))
    average = params
    first = second = jax.tree.map(jnp.zeros_like, params)

    def is_decayed(path: Any, leaf: jax.Array) -> bool:
        """Return whether a parameter is decayed. A stack of blocks counts as the parameters of one block."""
        keys = [str(getattr(key, "key", key)) for key in path]
        return leaf.ndim - ("blocks" in keys) > 1 and "bias" not in keys

    decayed = jax.tree_util.tree_map_with_path(is_decayed, params)

    def loss_of(params: Any, images: Any, targets: Any, masks: Any) -> jax.Array:
        logits = nnx.merge(graphdef, params)(images, drop_path_keep=masks)
        return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss_of))
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        shares = [next(source) for source in sources]
        batch = {key: np.concatenate([share[key] for share in shares]) for key in shares[0]}
        images, targets = augmented(batch, step)
        key = jax.random.fold_in(jax.random.key(SEED), step)
        masks = nnx.merge(graphdef, params).draw_drop_path(key, BATCH)
        results = [
            value_and_grad(
                params, images[i::PARTS], targets[i::PARTS], jax.tree.map(lambda m, i=i: m[..., i::PARTS], masks)
            )
            for i in range(PARTS)
        ]  # fmt: skip
        loss, grads = jax.tree.map(lambda *parts: sum(parts) / PARTS, *results)
        norm = optax.global_norm(grads)
        grads = jax.tree.map(lambda g, n=norm: g * jnp.minimum(1.0, CLIP / n), grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        average = jax.tree.map(lambda e, p: DECAY * e + (1 - DECAY) * p, average, params)
        rate, t = RATES[step], step + 1

        def updated(p: Any, m: Any, v: Any, decays: bool, rate: float = rate, t: int = t) -> Any:
            direction = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + EPS)
            return p * (1 - rate * WEIGHT_DECAY * decays) - rate * direction

        params = jax.tree.map(updated, params, first, second, decayed)
        found["loss"].append(float(loss))
        found["grad_norm"].append(float(norm))
    return {**found, "raw": named_parameters(params), "ema": named_parameters(average)}


def compare(folder: Path) -> None:
    config = recipe(folder)
    expected = by_hand(config)
    assert min(expected["grad_norm"]) < CLIP < max(expected["grad_norm"]), expected["grad_norm"]
    records = read_metrics(folder / "run", "train")
    for name in ("loss", "grad_norm"):
        seen = [record[name] for record in records]
        np.testing.assert_allclose(seen, expected[name], rtol=1e-6, err_msg=name)
    for weights in ("raw", "ema"):
        found = named_parameters(nnx.state(load_run(folder / "run", weights=weights).model))
        assert found.keys() == expected[weights].keys()
        for name, value in found.items():
            np.testing.assert_allclose(
                value, expected[weights][name], rtol=0, atol=1e-7, err_msg=f"{weights} {name}"
            )


def refuse_to_list(*_: Any, **__: Any) -> Any:
    raise AssertionError("lists the images, as the first process does")


def main(what: str, folder: str) -> None:
    jax.config.update("jax_enable_x64", True)
    if what == "compare":
        compare(Path(folder))
        return
    initialize_distributed()
    if is_first_process():
        write_images(Path(folder) / "images")
    barrier("images")
    if not is_first_process():
        image_folder.walk = refuse_to_list
    train(recipe(Path(folder)), Path(folder) / "run", progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
