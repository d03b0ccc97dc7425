"""Channels of the weights that a run starts from are matched by name with those of its data."""

from __future__ import annotations

import numpy as np
import pytest

from fastvim_jax.data import CellsData, ClassificationData
from fastvim_jax.errors import UserError
from fastvim_jax.training.channel_weights import EMBEDDING, KERNEL, match_channels
from fastvim_jax.training.classification.run_scores import _require_places
from fastvim_jax.training.weights_source import Source


def data(*names: str) -> CellsData:
    count = len(names)
    return CellsData(
        source="digits", channels=count, channel_names=names, mean=(0.0,) * count, std=(1.0,) * count
    )  # fmt: skip


@pytest.fixture
def embedding(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(3, 4)).astype(np.float32)


def test_embeddings_follow_their_channels(embedding: np.ndarray, rng: np.random.Generator) -> None:
    """Take them by name: those of other stains were taken, by place, where the number of channels was the same."""
    kernel = rng.normal(size=(2, 2, 1, 4)).astype(np.float32)
    source = Source("a", {EMBEDDING: embedding, KERNEL: kernel}, data=data("DNA", "ER", "RNA"))
    found, notes = match_channels(source, data("RNA", "Golgi", "dna", "ER"))
    expected = np.stack([embedding[2], embedding.mean(axis=0), embedding[0], embedding[1]])
    assert np.array_equal(found.arrays[EMBEDDING], expected) and found.arrays[KERNEL] is kernel
    assert notes == (
        "weights of the channels RNA, dna, ER are found by name",
        "weights of Golgi, which the source lacks, begin at the mean of the source's embeddings",
    )
    found, notes = match_channels(source, data("ER"))
    assert np.array_equal(found.arrays[EMBEDDING], embedding[1:2]) and len(notes) == 1


def test_kernels_of_all_channels_follow_them_too(rng: np.random.Generator) -> None:
    kernel = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    source = Source("a", {KERNEL: kernel}, data=data("DNA", "ER", "RNA"))
    found, notes = match_channels(source, data("ER", "Golgi", "DNA"))
    expected = kernel[:, :, [1, 0, 0]] * np.array([1, 0, 1], np.float32)[:, None]
    assert np.array_equal(found.arrays[KERNEL], expected)
    assert notes[1] == "weights of Golgi, which the source lacks, begin at 0"


def test_without_common_names_nothing_changes(embedding: np.ndarray) -> None:
    """Leave weights alone where one side names no channels or the names agree; note that none is known."""
    source = Source("a", {EMBEDDING: embedding}, data=data("DNA", "ER", "RNA"))
    unnamed = Source("a", {EMBEDDING: embedding})
    assert match_channels(source, data("DNA", "ER", "RNA")) == (source, ())
    assert match_channels(source, ClassificationData()) == (source, ())
    assert match_channels(unnamed, data("DNA", "ER", "RNA")) == (unnamed, ())
    found, notes = match_channels(source, data("X", "Y", "Z"))
    assert found is source and "are DNA, ER, RNA there, X, Y, Z here" in notes[0]


@pytest.mark.parametrize("names", [("ER", "DNA", "RNA"), ("ER", "RNA"), ("DNA", "RNA", "ER")])
def test_an_evaluation_names_channels_at_the_models_places(names: tuple[str, ...]) -> None:
    """Refuse other places: the model took ER for DNA, and the scores were those of mixed-up channels."""
    own = data("DNA", "ER", "RNA")
    for same in (own, data("DNA", "ER"), data("Hoechst", "ER", "RNA"), ClassificationData()):
        _require_places(own, same)
    with pytest.raises(UserError, match=r"channels are DNA, ER, RNA, in this order.*eval_channels"):
        _require_places(own, data(*names))
