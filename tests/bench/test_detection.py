"""Detectors are timed by parts: each compiled once, its inputs made by the parts before it, its products counted."""

from __future__ import annotations

import math
from collections import Counter
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fastvim_jax.analysis.detection_flops import detection_gmacs
from fastvim_jax.bench import detection as bench
from fastvim_jax.models import build_model, cascade_mask_rcnn, model_config
from fastvim_jax.models.detection import ProposalConfig
from fastvim_jax.models.detection.heads import BOX_SIZE, MASK_SIZE
from pallas_kernels import timing

NAME = "vit_tiny_patch16_224"
SMALL = {
    "width": 8, "hidden": 8, "num_classes": 3, "box_convs": 1, "mask_convs": 1, "candidates": 20,
    "detections": 5, "rpn": ProposalConfig(convs=1, test_before=20, test_after=20),
}  # fmt: skip


def products(jaxpr) -> int:
    """Count the multiply-adds of matrix products and convolutions."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
            if eqn.primitive.name == "dot_general":
                (_, contracted), _ = eqn.params["dimension_numbers"]
                each = math.prod(kernel[axis] for axis in contracted)
            else:
                each = math.prod(kernel[:-1])  # rows, columns, inputs
            total += math.prod(out) * each
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                total += products(value.jaxpr)
    return total


def test_products_are_those_of_the_program():
    config = cascade_mask_rcnn(model_config(NAME, image_size=64, depth=1), **SMALL)
    model = nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    found = detection_gmacs(config)

    def counted(part, *shapes):
        graphdef, state = nnx.split(part)
        return products(
            jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, *shapes).jaxpr
        )

    levels = tuple(jax.ShapeDtypeStruct((1, 64 // s, 64 // s, 8), "f4") for s in config.strides)
    boxes, masks = (
        jax.ShapeDtypeStruct((n, size, size, 8), "f4")
        for n, size in ((20, BOX_SIZE), (5, MASK_SIZE))
    )
    stage = model.stages[0]
    wanted = {
        "neck": counted(model.neck, jax.ShapeDtypeStruct((1, 4, 4, 192), "f4")),
        "rpn": counted(model.rpn, levels),
        "boxes": 3 * counted(stage.box_head, boxes),
        "masks": 3 * counted(stage.mask_head, masks),
    }
    assert {part: round(1e9 * found[part]) for part in wanted} == wanted
    rest = found["backbone"] + sum(found[part] for part in wanted)
    assert found["whole"] == pytest.approx(rest)


class Fake:
    """Stand for a compiled program: check the arguments' shapes and return zeros."""

    made: ClassVar[Counter[str]] = Counter()

    def __init__(self, function, *arguments, **options):
        self.made[function.__name__] += 1
        self.shapes = jax.eval_shape(lambda: arguments) if arguments else ()
        self.results = jax.eval_shape(function, *arguments)

    def __call__(self, *arguments):
        assert jax.eval_shape(lambda: arguments) == self.shapes
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.results)


@pytest.mark.drawn("more of the models", one_in=6)
def test_every_part_is_compiled_once_and_reads_the_parts_before_it(monkeypatch):
    monkeypatch.setattr(timing, "Program", Fake)
    monkeypatch.setattr(timing, "repeated", lambda function: lambda arguments, n: n)
    Fake.made.clear()
    parts = ("proposals", "detections", "masks", "whole")
    settings = [(NAME, 64, batch, "f32", part) for batch in (1, 2) for part in parts]
    cases = bench.cases(settings, blocks="scan", depth=1, detector=SMALL)
    for _, case in cases:
        assert next(case) is None  # The part has run, on inputs of the right shapes.
    programs = {"neck", "rpn_head", "proposals", "boxes", "detections", "masks", "whole"}
    assert Fake.made.pop("<lambda>") == 2 * len(
        programs
    )  # outside of GPUs, the loops that are timed
    assert Fake.made == dict.fromkeys(programs, 2)
