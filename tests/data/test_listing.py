"""Large listings go to other processes as files that these map into memory, and the files go with their process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.data import listing, open_source
from fastvim_jax.data.listing import FiledSequence, SharedArray, Texts
from tests.support import ROOT


def test_texts_are_a_sequence(rng: np.random.Generator) -> None:
    names = ["", "a", "ü/ß.png", os.fsdecode(b"\xff\xfe.png"), "long" * 50]
    texts = Texts(names)
    assert list(texts) == names and len(texts) == 5 and texts[-1] == names[-1]
    assert texts[1:3] == names[1:3] and names[2] in texts
    assert list(pickle.loads(pickle.dumps(texts))) == names
    assert not list(Texts([]))
    with pytest.raises(IndexError):
        _ = texts[5]


def test_large_arrays_are_mapped_and_small_ones_sent(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rng.integers(0, 100, (4000, 3))
    shared = SharedArray(values)
    assert len(pickle.dumps(shared)) > values.nbytes
    monkeypatch.setattr(listing, "SHARED_FROM", 1000)
    pickled = pickle.dumps(shared)
    assert len(pickled) < 500 and pickle.dumps(shared) == pickled  # one file, however many workers
    copy = pickle.loads(pickled)
    assert isinstance(copy.values, np.memmap) and not copy.values.flags.writeable
    np.testing.assert_array_equal(copy.values, values)


def test_sources_are_small_when_pickled(image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("image_folder", "train", path=str(image_tree))
    monkeypatch.setattr(listing, "SHARED_FROM", 1)
    copy = pickle.loads(pickle.dumps(source))
    for i in range(len(source)):
        assert (copy[i].name, copy[i].target) == (source[i].name, source[i].target)


def test_a_sequence_of_any_size_is_small_when_pickled(rng: np.random.Generator) -> None:
    values = [rng.normal(size=10_000) for _ in range(3)]
    pickled = pickle.dumps(FiledSequence(values))
    assert len(pickled) < 500
    copy = pickle.loads(pickled)
    assert len(copy) == 3 and pickle.dumps(copy) == pickled
    np.testing.assert_array_equal(copy[2], values[2])


SCRIPT = """
import os, pickle, signal, sys
import numpy as np
from fastvim_jax.data.listing import SharedArray
pickle.dumps(SharedArray(np.zeros(2**20, np.uint8)))
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_go_with_their_process(tmp_path: Path) -> None:
    """At its end, or when the next process makes such a file."""
    for how, left in (("ended", 0), ("killed", 1), ("ended", 0)):
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", SCRIPT, how], cwd=ROOT, env=environment)
        assert len(list(tmp_path.glob("fastvim-listing-*"))) == left
