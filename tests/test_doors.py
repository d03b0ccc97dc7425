"""Bad arguments at the doors of models and operations, in a process without this suite's shape-checking hook."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

# Each case: a name, a call, and words that the message must hold.
CALLS = """
import json, logging
import jax, jax.numpy as jnp, numpy as np
import fastvim_jax
from fastvim_jax.models import VisionMambaConfig, ViTConfig
from fastvim_jax.data import open_source
from fastvim_jax.inference import Classifier
from fastvim_jax.models.saving import default_preprocessing
from fastvim_jax.training.start_from import load_weights
from pallas_kernels import *
from pallas_kernels.mixer_core import add_norm, norm_stream
from pallas_kernels.patch_embed import embed_patches

small = dict(image_size=8, patch_size=4, embed_dim=8, depth=1, num_classes=2, rngs=0)
models = {
    "fastvim": fastvim_jax.create_model("fastvim_tiny_patch16_224", **small),
    "vit": fastvim_jax.create_model("vit_tiny_patch16_224", num_heads=2, **small),
    "channels": fastvim_jax.create_model("fastchannelvim_tiny_patch16_224", channels=3, **small),
}
cases = {}
looks = default_preprocessing(models["fastvim"].config)
images = jnp.ones((1, 8, 8, 3))
for name, model in models.items():
    for method in ("__call__", "features", "intermediates", "embed"):
        run = getattr(model, method)
        cases |= {
            f"{name} {method} {kind}": (lambda run=run, bad=bad: run(bad), words)
            for kind, bad, words in (
                ("pixels", images.astype(jnp.uint8), ["uint8", "normalise"]),
                ("int32", images.astype(jnp.int32), ["int32", "normalise"]),
                ("bool", images.astype(bool), ["bool", "normalise"]),
                ("complex", images.astype(complex), ["complex64", "floats"]),
                ("unbatched", images[0], ["(8, 8, 3)", "images[None]"]),
                ("five axes", images[None], ["(1, 1, 8, 8, 3)", "b h w c"]),
                ("a list", [[1.0]], ["list", "b h w c"]),
                ("none", None, ["NoneType"]),
                ("small", images[:, :3], ["3x8", "4x4"]),
                ("many channels", jnp.ones((1, 8, 8, 4)), ["4", "3"]),
            )
        }
    if name != "channels":
        cases[f"{name} channels first"] = (
            lambda model=model: model(images.transpose(0, 3, 1, 2)), ["transpose(0, 2, 3, 1)"]
        )

u, A, B = jnp.ones((2, 5, 4)), -jnp.ones((4, 3)), jnp.ones((2, 5, 3))
scan = dict(u=u, delta=u, A=A, B=B, C=B)
conv = dict(x=u, kernel=jnp.ones((4, 4)))
both = {name: jnp.stack([x, x]) for name, x in scan.items()}
weights = Directions(jnp.ones((2, 4, 4)), jnp.ones((2, 4)), jnp.ones((2, 4)))
norm = Norm(jnp.ones(4), jnp.ones(4))
middle = lambda params, u: (u[0], u[1])
core = dict(
    xz=jnp.ones((2, 6, 8)), directions=weights, norm=norm, middle_params=(), middle=middle, rows=2,
    columns=3,
)
sequence = dict(
    xz=jnp.ones((2, 6, 8)), convolutions=Convolutions(*weights[:2]), norm=norm, middle_params=(),
    middle=middle,
)
operations = {
    "selective_scan": (selective_scan, scan, list(scan)),
    "bidirectional_scan": (bidirectional_scan, both, list(both)),
    "causal_conv1d": (causal_conv1d, conv, list(conv)),
    "mixer_core": (mixer_core, core, ["xz"]),
    "sequence_core": (sequence_core, sequence, ["xz"]),
    "embed_patches": (
        embed_patches,
        dict(images=jnp.ones((2, 4, 6, 3)), weight=jnp.ones((2, 3, 3, 4)), table=jnp.ones((2, 2, 4))),
        ["images", "weight", "table"],
    ),
    "add_norm": (
        add_norm,
        dict(update=u, residual=u, gain=jnp.ones(4), shift=jnp.ones(4), bias=jnp.ones(4)),
        ["update", "residual", "gain", "shift"],
    ),
    "norm_stream": (norm_stream, dict(residual=u, gain=jnp.ones(4), dtype="float32"), ["residual", "gain"]),
}
for name, (run, good, arrays) in operations.items():
    jax.block_until_ready(run(**good))
    for argument in arrays:
        x = good[argument]
        for kind, bad in (
            ("int", x.astype(jnp.int32)), ("rank", x[None]), ("short", x[..., :-1]),
            ("none", None), ("text", "text"), ("empty", x[..., :0]),
        ):
            # A kernel or a state may be of any width.
            if kind in ("short", "empty") and argument in ("A",):
                continue
            cases[f"{name} {argument} {kind}"] = (
                lambda run=run, good=good, argument=argument, bad=bad: run(**{**good, argument: bad}),
                [name],
            )
for option, bad, words in (
    ("rows", 2.0, ["rows", "positive integer"]), ("columns", 0, ["columns"]), ("rows", 3, ["3 x 3"]),
    ("norm", Norm(jnp.ones(3), jnp.ones(4)), ["scale", "(4,)", "(3,)"]),
    ("directions", weights._replace(D=jnp.ones((2, 3))), ["D", "(2, 4)", "(2, 3)"]),
    ("directions", weights._replace(kernels=jnp.ones((1, 4, 4))), ["kernels"]),
    ("method", "men", ["method"]), ("implementation", "cuda", ["implementation"]),
    ("row_ids", (jnp.ones((2, 6)),) * 2, ["row_ids", "integers"]),
    ("places", (jnp.ones((2, 6), int),) * 2, ["places", "row_ids"]),
):
    cases[f"mixer_core {option} {bad}"] = (lambda o=option, b=bad: mixer_core(**{**core, o: b}), words)
ids = (jnp.zeros((2, 6), int),) * 2
for bad, words in (
    ((jnp.ones((2, 6)),) * 2, ["places", "integers"]), ((ids[0][:, :5],) * 2, ["places", "(2, 5)"]),
    (ids[:1], ["places"]),
):
    cases[f"mixer_core places {words} {len(bad)}"] = (
        lambda b=bad: mixer_core(**{**core, "row_ids": ids, "places": b}), words,
    )

cases |= {
    f"config {cls.__name__} {changes}": (lambda cls=cls, changes=changes: cls(**changes), list(changes))
    for cls, changes in (
        (ViTConfig, {"mlp_ratio": "4"}), (VisionMambaConfig, {"proj_bias": "false"}),
        (VisionMambaConfig, {"num_classes": 2.5}), (VisionMambaConfig, {"conv_width": 1.5}),
        (VisionMambaConfig, {"norm_eps": float("nan")}), (VisionMambaConfig, {"norm_eps": -1.0}),
        (VisionMambaConfig, {"pool_scale": float("inf")}), (VisionMambaConfig, {"dtype": jnp.float16}),
    )
}
cases["fast as text"] = (
    lambda: fastvim_jax.create_model("vit_tiny_patch16_224", fast="false", **small), ["fast='false'"]
)
# A single text is no list of its letters: allow="head.*" would allow everything by its "*".
one = models["fastvim"]
cases |= {
    "class names, saved": (
        lambda: fastvim_jax.save_pretrained(one, "/none", class_names="ab"), ["class_names='ab'", "['ab']"]
    ),
    "class names, loaded": (lambda: load_weights(one, "/none", class_names="ab"), ["class_names='ab'"]),
    "allow": (lambda: load_weights(one, "/none", allow="head.*"), ["allow='head.*'", "['head.*']"]),
    "class names": (lambda: Classifier(one, looks, "ab"), ["class_names='ab'"]),
    "numbers as class names": (lambda: Classifier(one, looks, [0, 1]), ["class_names", "0"]),
    "outputs": (lambda: Classifier(one, looks, outputs="embeddings"), ["outputs='embeddings'"]),
    "channels": (
        lambda: open_source("channel_files", "train", path="/x{channel}", channels="DNA"), ["channels='DNA'"]
    ),
}
assert VisionMambaConfig(dtype=jnp.bfloat16).dtype == "bfloat16"
wrong = []
for name, (call, words) in cases.items():
    try:
        call()
        wrong.append(f"{name}: taken")
    except ValueError as error:  # UserError is one
        missing = [word for word in words if word not in str(error)]
        if missing:
            wrong.append(f"{name}: {missing} not in: {error}")
    except Exception as error:
        wrong.append(f"{name}: {type(error).__name__}: {error}")
empty = dict(
    scan=selective_scan(**{k: v if k == "A" else v[:0] for k, v in scan.items()}),
    both=bidirectional_scan(**{k: v if k == "A" else v[:, :0] for k, v in both.items()})[0],
    conv=causal_conv1d(u[:0], conv["kernel"]), core=mixer_core(**{**core, "xz": core["xz"][:0]}),
    sequence=sequence_core(**{**sequence, "xz": sequence["xz"][:0]}),
)
shapes = {name: list(y.shape) for name, y in empty.items()}
print(json.dumps({"cases": len(cases), "wrong": wrong, "empty": shapes}))
"""


@pytest.fixture(scope="module")
def answers():
    done = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.drawn("more of the models", one_in=6)
def test_every_bad_argument_is_refused_by_name(answers):
    assert answers["cases"] > 150
    assert answers["wrong"] == []


def test_empty_batches_have_empty_results(answers):
    five, six = [0, 5, 4], [0, 6, 4]
    assert answers["empty"] == {
        "scan": five, "both": five, "conv": five, "core": six, "sequence": six
    }  # fmt: skip
