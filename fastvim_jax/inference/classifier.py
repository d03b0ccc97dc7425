"""Classify images from Python: paths, Pillow images, and arrays of any size.

classifier = Classifier.load("runs/mine")            # or a folder of save_pretrained, or hf://owner/name
result = classifier(["cat.jpg", Image.open("dog.png"), array])
result.probabilities                                 # images x classes
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from fastvim_jax.data.classification_config import ClassificationData
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.errors import UserError, one_or_several, require_texts
from fastvim_jax.inference.decoding import decoded_batches
from fastvim_jax.inference.fingerprint import fingerprint
from fastvim_jax.inference.preprocessing import photographs_data, preprocessing_of
from fastvim_jax.models import build_model
from fastvim_jax.models.backbone import Backbone
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.channel_vit import ChannelViTConfig
from fastvim_jax.models.compiling import forward_options
from fastvim_jax.models.mae import MaskedAutoencoder
from fastvim_jax.models.parameters import round_products
from fastvim_jax.models.prepared import split_weights
from fastvim_jax.models.pretrained import is_pretrained, load_pretrained, refuse_choice
from fastvim_jax.models.registry import FAST
from fastvim_jax.models.saving import Preprocessing, check_class_names
from fastvim_jax.models.shares import run_in_shares, share_of, tracing_share_of
from fastvim_jax.training.classification.config import TrainConfig
from fastvim_jax.training.run_folder import Run, load_run

Images = Any
"""A path, a Pillow image, an array `h w c` of uint8, or a sequence of these; or an array `n h w c` of uint8."""
_AHEAD = (
    2  # Batches that the devices may have to compute while the results of earlier ones are fetched.
)
OUTPUTS = ("logits", "probabilities", "embeddings")
"""What a classifier returns by default."""
MAPS = ("features", "class_maps")
"""What a classifier returns of every patch when asked."""


@dataclass(frozen=True)
class Result:
    """The model's outputs for n images, in the order given. Rows of images that could not be read are NaN.

    Attributes:
        logits: `n classes`, float32; `n 0` if the classifier's `outputs` do not name them.
        probabilities: `n classes`, float32, or `n 0`.
        embeddings: `n d`, float32, or `n 0`: the pooled features that the head reads; with head_pool="max" the
            maximum of each feature over the patches.
        errors: for each image that could not be read, by its index, the reason.
        features: `n rows columns d`, float32: the features of every patch, after the final norm; None unless the
            classifier's `outputs` name them.
        class_maps: `n rows columns classes`, float32: the head's logits for every patch, or None.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    embeddings: np.ndarray
    errors: dict[int, str]
    features: np.ndarray | None = None
    class_maps: np.ndarray | None = None


class Classifier:
    """Classify images with a trained model: decode, preprocess, run the model.

    The model is compiled once, at the first call or by `compile`, because the last batch is padded. Threads or
    processes decode images while the devices compute the previous batches. Each batch is split over all local devices,
    and on a CPU over its cores.

    Args:
        model: a classifier with its weights.
        preprocessing: size, crop and normalisation of the model's input.
        class_names: in the order of the logits; may be empty.
        batch_size: images per batch, rounded up to a multiple of the number of local devices.
        dtype: compute dtype, "float32" or "bfloat16", with the model's own activations and blocks. By default the
            model's own; on a GPU the model's fast mode, as create_model(..., fast=True) builds it. docs/models.md says
            how exact this is; any `dtype` given switches it off.
        outputs: which arrays of `Result` to compute and to copy from the devices: "logits", "probabilities",
            "embeddings", "features", "class_maps". With "embeddings" and "features" alone the head is left out, and
            the model may be one without classes.
        blocks: "scan" or "unroll", as in the model's config; by default "unroll" in the fast mode, otherwise the
            model's own. Unrolled blocks run faster on a GPU and take longer to trace.
        workers: processes that decode when all images of a call are paths; 0: threads, which take up to four cores'
            worth. Processes start at every call, within seconds, so they pay off for thousands of files. A script that
            asks for them needs `if __name__ == "__main__":`.

    Raises:
        UserError: a model without classes (if an output needs the head) or of feature maps, a model of images with
            other than one or three channels, unknown outputs, or a batch size below 1.
    """

    def __init__(
        self,
        model: nnx.Module,
        preprocessing: Preprocessing,
        class_names: Sequence[str] = (),
        *,
        batch_size: int = 32,
        dtype: Literal["float32", "bfloat16"] | None = None,
        outputs: Sequence[str] = OUTPUTS,
        blocks: Literal["scan", "unroll"] | None = None,
        workers: int = 0,
    ) -> None:
        outputs = require_texts(outputs, "outputs")
        class_names = require_texts(class_names, "class_names")
        config: Any = model.config  # type: ignore[attr-defined]
        if not isinstance(model, Backbone) or bool(getattr(config, "out_indices", None)):
            raise UserError(f"a {type(model).__name__} is no classifier{_instead(model)}")
        if config.head_pool == "all" and not set(outputs) <= set(MAPS):
            raise UserError(
                'a model with head_pool="all" has features and logits of every patch, none of the whole image: '
                'outputs=["features", "class_maps"] has them.'
            )
        unknown = [name for name in outputs if name not in OUTPUTS + MAPS]
        if unknown or not outputs:
            raise UserError(f"outputs={outputs!r}: choose from {', '.join(OUTPUTS + MAPS)}.")
        if not config.num_classes and not set(outputs) <= {"embeddings", "features"}:
            raise UserError(
                f"a {type(model).__name__} without classes classifies nothing; `fastvim embed` writes its features "
                '(outputs=["embeddings"]).'
            )
        if config.channels not in (1, 3) or isinstance(
            config, ChannelMambaConfig | ChannelViTConfig
        ):
            raise UserError(
                f"a {type(model).__name__} of {config.channels} channels classifies no photographs: "
                "`fastvim embed` writes features; for a run, `fastvim channels RUN IMAGE` says the class of an image."
            )
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1.")
        check_class_names(class_names, config)
        devices = jax.local_devices()
        if dtype is None and platform_of(devices[0]) in ("gpu", "cuda"):
            dtype = "bfloat16"
            fast = {name: value for name, value in FAST.items() if hasattr(config, name)}
            config = dataclasses.replace(config, **fast)
        changed = {"dtype": dtype, "blocks": blocks}
        config = dataclasses.replace(config, **{k: v for k, v in changed.items() if v is not None})
        if workers < 0:
            raise UserError(f"workers={workers} must be at least 0.")
        self.workers = workers
        self.outputs = outputs
        self.class_names = class_names
        self.data = photographs_data(preprocessing, config.channels)
        mesh = Mesh(np.array(devices), ("data",))
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._batch = -(-batch_size // len(devices)) * len(devices)
        params = nnx.state(model)
        if dtype == "bfloat16":  # Otherwise the model rounds its weights at every call.
            params = round_products(params, config.precision.compute)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._params = jax.device_put(params, everywhere)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))
        preprocess = make_preprocess(self.data)

        def run(params: Any, images: Array) -> dict[str, Array]:
            model = nnx.merge(graphdef, params)
            tokens = model.forward_features(preprocess(images))
            found: dict[str, Array] = {}
            if not {"logits", "probabilities"}.isdisjoint(outputs):
                found["logits"] = model.forward_head(tokens).astype(jnp.float32)
                found["probabilities"] = jax.nn.softmax(found["logits"])
            if "embeddings" in outputs:
                pooled = model.forward_head(tokens, pre_logits=True)
                # With head_pool="max" the head reads every patch, and the maximum is that of the logits.
                found["embeddings"] = pooled if pooled.ndim == 2 else pooled.max(axis=1)
            if not set(MAPS).isdisjoint(outputs):
                found["features"] = model.feature_maps(tokens, self.data.height_width)
            if "class_maps" in outputs:
                found["class_maps"] = model.class_maps(found["features"])
            return {name: found[name].astype(jnp.float32) for name in outputs}

        self._described = repr((config, self.data, self.class_names))
        shape = (self._batch, *self.data.height_width, self.data.channels)
        self._input = share_of(jax.ShapeDtypeStruct(shape, np.uint8, sharding=self._split))
        with tracing_share_of(self._batch):
            split = split_weights(run, self._params, self._input)
        # Calls pass a list of arrays, because JAX would flatten the model's state by Python code at every call.
        self._weights = jax.jit(split.prepare, out_shardings=everywhere)(self._params)
        options = forward_options(config.precision.compute)
        self._run: Any = jax.jit(split.run, compiler_options=options)
        # Shapes of one image's outputs, for calls without images.
        shapes = jax.eval_shape(split.run, self._weights, self._input)
        self._shapes = {name: each.shape[1:] for name, each in shapes.items()}
        self._width = config.embed_dim

    @classmethod
    def load(
        cls,
        source: Path | str,
        *,
        weights: str | None = None,
        step: int | Literal["best"] | None = None,
        revision: str | None = None,
        offline: bool = False,
        **options: Any,
    ) -> Classifier:
        """Load a classifier.

        Args:
            source: a run folder, a folder of `save_pretrained`, or `hf://owner/name` of the Hugging Face hub.
            weights: for a run folder, `raw` or `ema`. By default the average (`ema`), or what scored better in the log.
            step: for a run folder, the checkpoint's step, or `best`. By default the latest.
            revision: for a repository of the hub, its branch, tag or commit.
            offline: take a repository of the hub from the local cache, and do not use the network.
            **options: keyword arguments of `Classifier`.

        Raises:
            UserError: no such source, a damaged one, or one that is no classifier; weights or a step of a saved model.
        """
        if is_pretrained(source):
            refuse_choice(source, weights, step)
            found = load_pretrained(source, revision=revision, offline=offline)
            return cls(found.model, found.preprocessing, found.class_names, **options)
        return cls.of_run(load_run(source, weights=weights, step=step), **options)

    @classmethod
    def of_run(cls, run: Run, **options: Any) -> Classifier:
        """Build a classifier from a run that `load_run` loaded.

        Raises:
            UserError: the run is of another task, or of cell images.
        """
        if not isinstance(run.config, TrainConfig):
            raise UserError(
                f"a run of a {type(run.config).__name__} is no classifier: a classifier starts from its weights with "
                "`fastvim train EXPERIMENT --init RUN`."
            )
        if not isinstance(run.config.data, ClassificationData):
            raise UserError(
                "a run of cell images classifies no photographs: `fastvim channels RUN IMAGE` says the class of one "
                "image and what each channel contributes, `fastvim embed RUN PATH...` writes features."
            )
        return cls(run.model, preprocessing_of(run), run.class_names, **options)

    @property
    def batch_size(self) -> int:
        """Images per batch, over all local devices."""
        return self._batch

    @property
    def num_features(self) -> int:
        """Width of the embeddings."""
        return self._width

    def fingerprint(self) -> str:
        """Digest weights, config, preprocessing and class names: two classifiers that differ have two digests."""
        return fingerprint(self._described, self._params)

    def compile(self) -> Classifier:
        """Compile the model now instead of at the first call; return itself."""
        if hasattr(self._run, "lower"):
            self._run = self._run.lower(self._weights, self._input).compile()
        return self

    def __call__(self, images: Images) -> Result:
        """Classify images.

        Args:
            images: a path, a Pillow image or a uint8 array `h w c`; a sequence of these, of any sizes; or one uint8
                array `n h w c`. All are resized and cropped as in the model's evaluation.

        Raises:
            UserError: an array of another rank, dtype or number of channels.
        """
        listed = _listed(images)
        found = {
            name: np.empty((len(listed), *shape), np.float32)
            for name, shape in self._shapes.items()
        }
        errors: dict[int, str] = {}
        for start, outputs, problems in self.each_batch(listed):
            for name, part in outputs.items():
                found[name][start : start + len(part)] = part
            errors |= {start + i: problem for i, problem in problems.items()}
        return _result(found, errors)

    def each_file(
        self, files: Sequence[str | Path] | str | Path
    ) -> Iterator[tuple[str, int, Result]]:
        """Classify any number of image files, in batches of which a few are in memory at a time.

        Yields:
            For each file, in order: its name, its row in the result of its batch, and that result.
        """
        names = [str(file) for file in one_or_several(files)]
        for start, outputs, errors in self.each_batch(names):
            if errors:  # Arrays from the devices are read-only.
                outputs = {name: np.array(each) for name, each in outputs.items()}
            result = _result(outputs, errors)
            for i in range(len(result.logits)):
                yield names[start + i], i, result

    def decoded(self, images: Any) -> Iterator[tuple[int, Array, dict[int, str]]]:
        """Decode images by all cores, some batches before they are asked for.

        Yields:
            The index of a batch's first image, the padded batch on the devices, and by the place in the batch why an
            image could not be read.
        """
        return decoded_batches(
            images,
            self.data,
            batch_size=self._batch,
            sharding=self._split,
            workers=self.workers,
        )

    def forward(self, batch: Array) -> dict[str, Array]:
        """Start the model on a batch of `decoded`; return the outputs, on the devices, by their names in `Result`.

        On a CPU of several cores, wait for the outputs.
        """
        size = self._input.shape[0]
        outputs: dict[str, Array] = run_in_shares(self._run, self._weights, batch, size)
        return outputs

    def each_batch(
        self, images: Any
    ) -> Iterator[tuple[int, dict[str, np.ndarray], dict[int, str]]]:
        """Yield (index of the first image, outputs, errors) of each batch; the devices work on later ones meanwhile.

        The outputs are those of `forward`, as NumPy arrays without the padding's rows.
        """
        waiting: collections.deque[tuple[int, Any, dict[int, str]]] = collections.deque()

        def fetch() -> tuple[int, dict[str, np.ndarray], dict[int, str]]:
            start, outputs, problems = waiting.popleft()
            count = min(self._batch, len(images) - start)
            arrays = {name: np.asarray(each)[:count] for name, each in outputs.items()}
            return start, arrays, problems

        for start, batch, problems in self.decoded(images):
            outputs = self.forward(batch)
            for each in outputs.values():
                each.copy_to_host_async()
            waiting.append((start, outputs, problems))
            if len(waiting) > _AHEAD:
                yield fetch()
        while waiting:
            yield fetch()


def _instead(model: nnx.Module) -> str:
    """Say what uses a model that is no classifier."""
    if isinstance(model, MaskedAutoencoder):
        return ": use `fastvim reconstruct`, or make a classifier of it by `fastvim train EXPERIMENT --init FOLDER`."
    if isinstance(model, Backbone):
        return ": its out_indices make it return feature maps."
    return (
        ": `fastvim predict RUN IMAGE --out FOLDER` takes the run folder that it was exported from."
    )


def platform_of(device: jax.Device) -> str:
    """Return a device's platform: cpu, gpu or tpu."""
    return device.platform


def _listed(images: Images) -> Any:
    """Return a sequence of single images: a list, or an array of images."""
    if isinstance(images, str | Path | PIL.Image.Image):
        return [images]
    if isinstance(images, np.ndarray | jax.Array):
        if images.ndim not in (3, 4):
            raise UserError(
                f"images have shape {images.shape}: give `height width channels` or `images height width channels`."
            )
        return [np.asarray(images)] if images.ndim == 3 else np.asarray(images)
    if isinstance(images, Iterable):
        return list(images)
    raise UserError(
        f"images cannot be {type(images).__name__}: give paths, Pillow images or arrays."
    )


def _result(outputs: dict[str, np.ndarray], errors: dict[int, str]) -> Result:
    """Name the outputs, with NaN for images that could not be read; those that were not asked for have no columns."""
    if errors:
        for array in outputs.values():
            array[list(errors)] = np.nan
    count = len(next(iter(outputs.values())))
    none = {name: np.empty((count, 0), np.float32) for name in OUTPUTS}
    return Result(errors=errors, **(none | outputs))
