"""Checkers of the segmentation fixtures, by the class that made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastvim_jax.data.config import IMAGENET_MEAN, IMAGENET_STD
from fastvim_jax.data.geometry import Scene, crop, fitted_size, pad, resize
from fastvim_jax.data.photometric import Distortion, distort
from fastvim_jax.data.segmentation import IGNORED, choose_crop, normalise, relabel
from fastvim_jax.interop import from_torch_state_dict, to_torch_names
from fastvim_jax.interop.state_dict import TABLES
from fastvim_jax.interop.torch_names import PATCH, SAME, NameTable
from fastvim_jax.layers.resize import resize_bilinear
from fastvim_jax.models import ViTConfig
from fastvim_jax.models.segmentation.heads import FCNHead, PyramidPooling, UPerHead
from fastvim_jax.models.segmentation.necks import DeconvolutionNeck, MultiLevelNeck
from fastvim_jax.models.segmentation.slide import Slide, merge_windows, window_corners
from fastvim_jax.models.upernet import UperNet, UperNetConfig
from fastvim_jax.precision import Precision
from fastvim_jax.training.segmentation.losses import pixel_accuracy, pixel_loss
from fastvim_jax.training.segmentation.metrics import Areas, as_areas, count_areas
from tests.dense.golden import Checker, Golden, dtypes_of
from tests.parity.compare import Comparison
from tests.support import x64


def last(x: np.ndarray) -> np.ndarray:
    """Turn channels-first arrays `b c h w` into `b h w c`, and leave others as they are."""
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def first(x: Any) -> Any:
    """Turn channels-last arrays `b h w c` into `b c h w`, and leave others as they are."""
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def precision(dtype: str) -> Precision:
    return Precision(dtype, dtype)


def check_module(
    golden: Golden,
    build: Callable[[Precision], nnx.Module],
    call: Callable[..., Iterable[jax.Array]],
) -> list[Comparison]:
    """Compare outputs, gradients and running statistics of a head or neck in the fixture's dtypes.

    `call(module, inputs, train, keep)` returns outputs in the order of the fixture's cotangents.
    """
    results = []
    for dtype in dtypes_of(golden):
        with x64():
            comparison = Comparison(golden.name, golden.kind, dtype)
            module = build(precision(dtype))
            from_torch_state_dict(module, golden.state)
            graphdef, params, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)
            inputs = {k: jnp.asarray(last(v), dtype) for k, v in golden.inputs.items()}
            keep = inputs.pop("dropout_keep", None)
            cotangents = {k: jnp.asarray(last(v), dtype) for k, v in golden.cotangents.items()}

            def run(params, inputs, statistics, graphdef=graphdef, keep=keep, c=cotangents):
                # Copied, since only variables made inside the gradient's trace can be changed there.
                module = nnx.merge(graphdef, params, jax.tree.map(jnp.copy, statistics))
                outputs = call(module, inputs, golden.meta["train_mode"], keep)
                outputs = dict(zip(c, outputs, strict=True))
                total = sum(jnp.sum(outputs[name] * c[name]) for name in c)
                return total, (outputs, nnx.state(module, nnx.BatchStat))

            step = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
            (_, (outputs, after)), (grads, input_grads) = step(params, inputs, statistics)
            compare_outputs(comparison, golden, outputs)
            compare_state(comparison, golden, module, grads, after, "after/")
            for name, expected in golden.input_grads().items():
                comparison.grad(f"input/{name}", first(input_grads[name]), expected)
            results.append(comparison)
    return results


def compare_outputs(comparison: Comparison, golden: Golden, outputs: dict[str, Any]) -> None:
    """Compare every stored output but the running statistics."""
    for name, expected in golden.outputs.items():
        if not name.startswith("after/"):
            comparison.output(name, first(outputs[name]), expected)


def compare_state(
    comparison: Comparison, golden: Golden, module: nnx.Module, grads: Any, after: Any, prefix: str
) -> None:
    """Compare parameter gradients and the running statistics after the call."""
    named = to_torch_names(module, jax.device_get(grads))
    stored = golden.parameter_grads()
    largest = max((np.abs(grad).max() for grad in stored.values()), default=1.0)
    for name, expected in stored.items():
        if np.abs(expected).max() < 1e-12 * largest:
            # A bias before a batch norm changes nothing: its gradient is rounding, here and in the reference.
            noise = np.asarray(named[name]) / largest
            comparison.grad(name, 1 + noise, np.ones_like(noise))
        else:
            comparison.grad(name, named[name], expected)
    missing = set(golden.meta["grads_stored"]) - set(golden.grads)
    for name in missing:
        comparison.missing(f"gradient {name}")
    stored = {k.removeprefix(prefix): v for k, v in golden.outputs.items() if k.startswith(prefix)}
    statistics = to_torch_names(module, jax.device_get(after))
    for name, expected in stored.items():
        comparison.output(prefix + name, statistics[name], expected)


class FourConvs(nnx.Module):
    """The stand-in backbone of the fixtures: four patch convolutions of one stride."""

    def __init__(self, patch: int, dims: list[int], p: Precision):
        self.convs = nnx.List(
            nnx.Conv(3, d, (patch, patch), strides=(patch, patch), padding="VALID", dtype=p.compute,
                     param_dtype=p.params, precision=p.lax, rngs=nnx.Rngs(0))
            for d in dims
        )  # fmt: skip

    def __call__(self, images: jax.Array, *, drop_path_keep: None = None) -> list[jax.Array]:
        return [conv(images) for conv in self.convs]


TABLES[FourConvs] = NameTable(
    (("convs.{i}.weight", "convs.{i}.kernel", PATCH), ("convs.{i}.bias", "convs.{i}.bias", SAME))
)


def build_segmentor(golden: Golden, dtype: str) -> UperNet:
    """Build the whole model of a fixture with its weights."""
    kwargs = golden.kwargs
    head, auxiliary, stand_in = (
        kwargs[name] for name in ("decode_head", "auxiliary_head", "backbone")
    )
    backbone = ViTConfig(
        embed_dim=stand_in["dims"][0], num_heads=1, depth=4, image_size=64, dtype=dtype,
        param_dtype=dtype, out_indices=(0, 1, 2, 3),
    )  # fmt: skip
    config = UperNetConfig(
        backbone,
        num_classes=head["num_classes"],
        channels=head["channels"],
        pool_scales=tuple(head["pool_scales"]),
        auxiliary_channels=auxiliary["channels"],
        auxiliary_level=auxiliary["in_index"],
        dropout=head["dropout_ratio"],
    )
    model = UperNet(
        config,
        backbone=FourConvs(stand_in["p"], stand_in["dims"], config.precision),
        widths=stand_in["dims"],
        rngs=nnx.Rngs(0),
    )
    from_torch_state_dict(model, golden.state)
    return model


def check_model(golden: Golden) -> list[Comparison]:
    weights = [
        golden.kwargs[h]["loss_decode"]["loss_weight"] for h in ("decode_head", "auxiliary_head")
    ]
    results = []
    for dtype in dtypes_of(golden):
        with x64():
            comparison = Comparison(golden.name, golden.kind, dtype)
            model = build_segmentor(golden, dtype)
            graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
            label = jnp.asarray(golden.inputs["label"][:, 0], jnp.int32)

            def loss_of(params, statistics, images, label, graphdef=graphdef):
                model = nnx.merge(graphdef, params, jax.tree.map(jnp.copy, statistics))
                logits = model(images, train=True)
                losses = [
                    weight * pixel_loss(each, label, divisor="all")
                    for weight, each in zip(weights, logits, strict=True)
                ]
                scores = [100 * pixel_accuracy(each, label)[None] for each in logits]
                return sum(losses), (losses, scores, nnx.state(model, nnx.BatchStat))

            images = jnp.asarray(last(golden.inputs["x"]), dtype)
            step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
            (total, (losses, scores, after)), grads = step(params, statistics, images, label)
            outputs = {"total_loss": total}
            for name, loss, score in zip(("decode", "aux"), losses, scores, strict=True):
                outputs |= {f"{name}_loss_ce": loss, f"{name}_acc_seg": score}
            for name in ("total_loss", "decode_loss_ce", "aux_loss_ce"):
                comparison.output(name, outputs[name], golden.outputs[name])
            for name in ("decode_acc_seg", "aux_acc_seg"):  # stored in float32
                comparison.output(name, outputs[name], golden.outputs[name], 5e-7)
            compare_state(comparison, golden, model, grads, after, "after/")
            results.append(comparison)
    return results


def check_slide(golden: Golden) -> list[Comparison]:
    """Compare windows and classes with the fixture's.

    The classes are also predicted with canvas and result rounded up, which must change nothing.
    """
    settings = golden.kwargs["test_cfg"]
    crop, stride = tuple(settings["crop_size"]), tuple(settings["stride"])
    size, mirrored = tuple(golden.meta["ori_shape"]), golden.meta["flip"]
    results = []
    for dtype in dtypes_of(golden):
        with x64():
            comparison = Comparison(golden.name, golden.kind, dtype)
            model = build_segmentor(golden, dtype)
            graphdef, state = nnx.split(model)
            predict = jax.jit(lambda x, g=graphdef, s=state: nnx.merge(g, s)(x).main)
            image = last(golden.inputs["x"])[0].astype(dtype)
            height, width = image.shape[:2]
            corners = window_corners((height, width), crop, stride)
            window = min(height, crop[0]), min(width, crop[1])
            windows = np.stack(
                [image[top : top + window[0], left : left + window[1]] for top, left in corners]
            )
            slid = merge_windows(
                predict(windows), jnp.asarray(corners), jnp.ones(len(corners), bool),
                window=window, canvas=(height, width),
            )  # fmt: skip
            comparison.output("slide_logits", first(slid[None]), golden.outputs["slide_logits"])
            whole = resize_bilinear(predict(image[None]), (height, width))
            comparison.output("whole_logits", first(whole), golden.outputs["whole_logits"])
            unflipped = slid[:, ::-1] if mirrored else slid
            logits = resize_bilinear(unflipped[None], size)[0]
            comparison.output("logits", logits.transpose(2, 0, 1), golden.outputs["logits"])
            for batch, bucket in ((len(corners), 1), (2, 32)) if dtype == "float64" else ():
                slide = Slide(crop, stride, batch=batch, bucket=bucket)
                classes = slide(predict, image, size, mirrored=mirrored)
                classes = np.asarray(classes)[: size[0], : size[1]]
                comparison.output(f"pred, bucket {bucket}", classes, golden.outputs["pred"][0], 0)
            results.append(comparison)
    return results


def check_loss(golden: Golden) -> list[Comparison]:
    results = []
    weight = golden.meta["loss_weight"]
    for dtype in dtypes_of(golden):
        with x64():
            comparison = Comparison(golden.name, golden.kind, dtype)
            logits = jnp.asarray(last(golden.inputs["logits"]), dtype)
            label = jnp.asarray(golden.inputs["label"][:, 0], jnp.int32)

            @jax.jit
            def compute(x, label=label):
                grads = [
                    jax.value_and_grad(lambda x: weight * pixel_loss(x, label, divisor=divisor))(x)  # noqa: B023
                    for divisor in ("all", "valid")
                ]
                resized = resize_bilinear(x, label.shape[1:])
                return grads, 100 * pixel_accuracy(x, label)[None], resized

            losses, accuracy, resized = compute(logits)
            for stored, (loss, gradient) in zip(("False", "True"), losses, strict=True):
                name = f"loss_avg_non_ignore_{stored}"
                comparison.output(name, loss, golden.outputs[name])
                name = f"input/logits__avg_non_ignore_{stored}"
                comparison.grad(name, first(gradient), golden.grads[name])
            comparison.output("acc_seg", accuracy, golden.outputs["acc_seg"], 5e-7)
            comparison.output("resized_logits", first(resized), golden.outputs["resized_logits"])
            results.append(comparison)
    return results


def check_metrics(golden: Golden) -> list[Comparison]:
    comparison = Comparison(golden.name, golden.kind, "float64")
    total = Areas.zero(golden.meta["num_classes"])
    for i in range(sum(name.startswith("pred") for name in golden.inputs)):
        pair = (jnp.asarray(golden.inputs[f"{name}{i}"], jnp.int32) for name in ("pred", "label"))
        total += as_areas(count_areas(*pair, golden.meta["num_classes"]))
    scores = total.scores()
    found = {
        "area_intersect": total.intersect,
        "area_union": total.union,
        "area_pred": total.predicted,
        "area_label": total.labelled,
        "IoU": np.nan_to_num(total.iou, nan=-1),
        "Acc": np.nan_to_num(total.accuracy, nan=-1),
        "aAcc": scores["aacc"],
        "mIoU": scores["miou"],
        "mAcc": scores["macc"],
        "reported": [round(100 * scores[k], 2) for k in ("aacc", "miou", "macc")],
    }
    for name, expected in golden.outputs.items():
        comparison.output(name, found[name], expected, 1e-12)
    return [comparison]


def levels(inputs: dict[str, Any]) -> list[Any]:
    return [inputs[f"x{i}"] for i in range(len(inputs))]


def widths(golden: Golden) -> list[int]:
    return [golden.inputs[f"x{i}"].shape[1] for i in range(4)]


def check_upernet_head(golden: Golden) -> list[Comparison]:
    kwargs = golden.kwargs
    return check_module(
        golden,
        lambda p: UPerHead(
            kwargs["in_channels"],
            features=kwargs["channels"],
            classes=kwargs["num_classes"],
            pool_scales=kwargs["pool_scales"],
            dropout=kwargs["dropout_ratio"],
            precision=p,
            rngs=nnx.Rngs(0),
        ),
        lambda head, x, train, keep: [head(levels(x), train=train, keep=keep)],
    )


def check_fcn_head(golden: Golden) -> list[Comparison]:
    kwargs = golden.kwargs
    return check_module(
        golden,
        lambda p: FCNHead(
            kwargs["in_channels"],
            features=kwargs["channels"],
            classes=kwargs["num_classes"],
            dropout=kwargs["dropout_ratio"],
            precision=p,
            rngs=nnx.Rngs(0),
        ),
        lambda head, x, train, keep: [head(levels(x)[kwargs["in_index"]], train=train, keep=keep)],
    )


def check_ppm(golden: Golden) -> list[Comparison]:
    kwargs = golden.kwargs
    return check_module(
        golden,
        lambda p: PyramidPooling(
            kwargs["in_channels"],
            kwargs["channels"],
            kwargs["pool_scales"],
            precision=p,
            rngs=nnx.Rngs(0),
        ),
        lambda ppm, x, train, keep: ppm(x["x"], train=train),
    )


def check_deconvolution_neck(golden: Golden) -> list[Comparison]:
    return check_module(
        golden,
        lambda p: DeconvolutionNeck(golden.kwargs["channels"], precision=p, rngs=nnx.Rngs(0)),
        lambda neck, x, train, keep: neck(levels(x), train=train),
    )


def check_multilevel_neck(golden: Golden) -> list[Comparison]:
    kwargs = golden.kwargs
    return check_module(
        golden,
        lambda p: MultiLevelNeck(
            kwargs["in_channels"], kwargs["out_channels"], precision=p, rngs=nnx.Rngs(0)
        ),
        lambda neck, x, train, keep: neck(levels(x), train=train),
    )


def check_crop(golden: Golden) -> list[Comparison]:
    """Check that the offsets taken, of those given, are the reference's."""
    comparison = Comparison(golden.name, golden.kind, "float64")
    size = tuple(golden.meta["crop_size"])
    draws = iter(golden.inputs["draws"].tolist())
    scene = Scene(golden.inputs["img"], golden.inputs["seg"])
    top, left = choose_crop(
        scene.mask, size, golden.meta["cat_max_ratio"], lambda *_: tuple(next(draws))
    )
    used = len(golden.inputs["draws"]) - len(list(draws))
    cut = crop(scene, top, left, size)
    found = {"img": cut.image, "seg": cut.mask, "offset": [top, left], "draws_used": used}
    for name, expected in golden.outputs.items():
        comparison.output(name, found[name], expected, 0)
    return [comparison]


def check_photometric(golden: Golden) -> list[Comparison]:
    comparison = Comparison(golden.name, golden.kind, "float64")
    draws = [value for _, value in golden.meta["draws"]]
    chosen: dict[str, Any] = {"brightness": draws.pop(0) if draws.pop(0) else None}
    first_mode = chosen["contrast_first"] = bool(draws.pop(0))
    steps = ["contrast", "saturation", "hue"] if first_mode else ["saturation", "hue", "contrast"]
    for step in steps:
        chosen[step] = draws.pop(0) if draws.pop(0) else None
    assert not draws
    image = distort(golden.inputs["img_bgr"][..., ::-1], Distortion(**chosen))
    comparison.output("img_bgr", image[..., ::-1], golden.outputs["img_bgr"], 0)
    return [comparison]


def check_resize_normalise(golden: Golden) -> list[Comparison]:
    comparison = Comparison(golden.name, golden.kind, "float32")
    sizes = golden.outputs["sizes"]
    found = [
        [w, h, long, short, *fitted_size((h, w), long, short)[::-1]]
        for w, h, long, short in sizes[:, :4].tolist()
    ]
    comparison.output("sizes", found, sizes, 0)
    scene = Scene(golden.inputs["img"], golden.inputs["seg"])
    for k, bounds in enumerate(golden.meta["scales"]):
        resized = resize(scene, fitted_size(scene.size, max(bounds), min(bounds)))
        comparison.output(f"seg_{k}", resized.mask, golden.outputs[f"seg_{k}"], 0)
        expected = golden.outputs[f"img_{k}"].astype(int)
        within = np.clip(resized.image.astype(int), expected - 1, expected + 1)
        comparison.output(f"img_{k}", resized.image, within, 0)
    reduced = relabel(golden.inputs["raw_label"], zero_is_ignored=True)
    comparison.output("reduced_label", reduced, golden.outputs["reduced_label"], 0)
    size = tuple(golden.meta["pad_size"])
    padded = pad(scene, size, mask=IGNORED)
    comparison.output("pre_seg", padded.mask, golden.outputs["pre_seg"][0], 0)
    rgb = jnp.asarray(padded.image[None, ..., ::-1])  # OpenCV's images are BGR
    pixels = normalise(rgb, jnp.asarray([scene.size]), IMAGENET_MEAN, IMAGENET_STD)
    comparison.output("pre_img", first(pixels), golden.outputs["pre_img"], 1e-6)
    return [comparison]


CHECKERS: dict[str, Checker] = {
    "mmseg RandomCrop": check_crop,
    "mmseg PhotoMetricDistortion": check_photometric,
    "mmcv.imrescale / SegDataPreProcessor": check_resize_normalise,
    "mmseg EncoderDecoder with stand-in backbone": check_model,
    "mmseg EncoderDecoder.slide_inference + postprocess_result": check_slide,
    "mmseg decode head loss_by_feat": check_loss,
    "mmseg IoUMetric": check_metrics,
    "mmseg UPerHead": check_upernet_head,
    "mmseg FCNHead": check_fcn_head,
    "mmseg PPM": check_ppm,
    "mmseg MultiLevelNeck (MLN of the DeiT baselines)": check_multilevel_neck,
    "deconvolution pyramid of hustvl/Vim (not used by FastVim)": check_deconvolution_neck,
}
