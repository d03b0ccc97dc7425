"""Channels of the weights that a run starts from are matched by name with those of its data."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from fastvim_jax.data import CellsData, ClassificationData
from fastvim_jax.errors import UserError
from fastvim_jax.training.channel_weights import EMBEDDING, KERNEL, match_channels, require_places
from fastvim_jax.training.classification import run_scores
from fastvim_jax.training.start_from import _other_normalisation
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


def test_a_channel_that_could_be_two_is_refused(embedding: np.ndarray) -> None:
    source = Source("a", {EMBEDDING: embedding}, data=data("dna", "ER", "DNA"))
    with pytest.raises(UserError, match=r"are called DNA, but for capitals \(dna, ER, DNA\)"):
        match_channels(source, data("ER", "DNA"))


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


@pytest.mark.parametrize(
    "names", [("ER", "DNA", "RNA"), ("ER", "RNA"), ("DNA", "RNA", "ER"), ("er", "dna")]
)
def test_an_evaluation_names_channels_at_the_models_places(names: tuple[str, ...]) -> None:
    """Refuse other places: the model took ER for DNA, and the scores were those of mixed-up channels."""
    own = data("DNA", "ER", "RNA")
    for same in (own, data("DNA", "ER"), data("Hoechst", "ER", "RNA"), ClassificationData()):
        require_places(own, same)
    with pytest.raises(UserError, match=r"channels are DNA, ER, RNA, in this order.*eval_channels"):
        require_places(own, data(*names))


def test_a_saved_model_knows_its_channels_places(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = SimpleNamespace(preprocessing=data("DNA", "ER"))
    monkeypatch.setattr(run_scores, "load_pretrained", lambda _: saved)
    with pytest.raises(UserError, match="channels are DNA, ER, in this order"):
        run_scores._saved("folder", data("ER", "DNA"), None, ())


def test_means_are_compared_channel_by_channel() -> None:
    """Note no other mean where the data only have another order of channels, or one more."""
    own = dataclasses.replace(data("DNA", "ER"), mean=(0.1, 0.2), std=(1.0, 2.0))
    here = dataclasses.replace(
        data("er", "Golgi", "DNA"), mean=(0.2, 0.5, 0.1), std=(2.0, 3.0, 1.0)
    )
    assert _other_normalisation(own, here) == []
    other = dataclasses.replace(here, std=(2.0, 3.0, 1.5))
    assert _other_normalisation(own, other) == [
        "data.std is (1.0, 2.0) there, (2.0, 3.0, 1.5) here"
    ]
    unknown = dataclasses.replace(data("A", "B"), mean=(0.2, 0.1), std=(1.0, 2.0))
    assert _other_normalisation(own, unknown) == ["data.mean is (0.1, 0.2) there, (0.2, 0.1) here"]
