"""Checkpoints: bits in, bits out; and every way of being damaged is refused by name."""

import errno
import functools
import gc
import json
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastvim_jax.errors import UserError
from fastvim_jax.training import checkpoints, checksums
from fastvim_jax.training.checkpoints import CheckpointError, Checkpoints
from fastvim_jax.training.flat_trees import flatten, unflatten
from fastvim_jax.training.steps import TrainState, init_state


class Net(nnx.Module):
    def __init__(self, width: int = 5, names: tuple[str, ...] = ("kernel", "bias")):
        for i, name in enumerate(names):
            setattr(self, name, nnx.Param(jnp.arange(width) / 3 + i))


OPTIMIZER = optax.chain(
    optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 0.1 / (step + 1))
)


def make_state(rng=None, *, step=0, ema=True, **net) -> TrainState:
    state = init_state(nnx.split(Net(**net))[1], OPTIMIZER, ema=ema)
    if rng is None:
        return state

    def draw(leaf):
        return jnp.asarray(rng.normal(size=leaf.shape) * 10, leaf.dtype)

    drawn = jax.tree.map(draw, state)
    return TrainState(jnp.asarray(step, jnp.int32), drawn.params, drawn.optimizer, drawn.ema)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def run(tmp_path, rng):
    """Return a run folder with checkpoints at 10 and 20, and the states they hold."""
    store = Checkpoints(tmp_path / "checkpoints")
    states = {step: make_state(rng, step=step) for step in (10, 20)}
    for step, state in states.items():
        assert store.save(state, {"data": {"batches": step}, "window": [{"loss": 1 / 3}]}) == step
    store.close()
    return tmp_path, states


def reopen(path, **options):
    return Checkpoints(path / "checkpoints", **options)


def big_file(path, step):
    files = [p for p in (path / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    return max((p for p in files if "params" in p.parts), key=lambda p: p.stat().st_size)


def test_a_restored_state_has_the_same_bits(run):
    path, states = run
    store = reopen(path)
    assert store.steps() == [10, 20] and store.latest() == 20
    assert_same_bits(store.restore_state(make_state()), states[20])
    assert_same_bits(store.restore_state(make_state(), step=10), states[10])
    meta = store.read_meta()
    assert meta["step"] == 20
    assert meta["data"] == {"batches": 20} and meta["window"] == [{"loss": 1 / 3}]


def test_weights_alone(run):
    path, states = run
    store = reopen(path, read_only=True)
    params = make_state().params
    assert_same_bits(store.restore_weights(params, weights="raw"), states[20].params)
    assert_same_bits(store.restore_weights(params, weights="ema", step=10), states[10].ema)


def test_no_average_was_kept(tmp_path, rng):
    store = reopen(tmp_path)
    state = make_state(rng, step=3, ema=False)
    store.save(state, {})
    assert_same_bits(store.restore_state(make_state(ema=False)), state)
    with pytest.raises(CheckpointError, match="holds no average of the weights"):
        store.restore_weights(state.params, weights="ema")


def test_names_are_the_stored_parameters(rng):
    state = make_state(rng)
    assert set(flatten(state.params)) == {"kernel", "bias"}
    moments = {f"0.{moment}.{name}" for moment in ("mu", "nu") for name in ("kernel", "bias")}
    assert set(flatten(state.optimizer)) == {"0.count", "1.count"} | moments
    assert_same_bits(unflatten(state.optimizer, flatten(state.optimizer)), state.optimizer)


def test_only_the_latest_are_kept(tmp_path, rng):
    store = reopen(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(make_state(rng, step=step), {})
    store.close()
    assert store.steps() == [2, 3]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert sorted(p.name for p in (tmp_path / "checksums").iterdir()) == ["2.json", "3.json"]


@pytest.fixture
def held(monkeypatch):
    """Stop saves just before their folder gets its name, until this event is set."""
    go_on, complete = threading.Event(), Checkpoints._complete

    def wait(store):
        assert go_on.wait(60)
        complete(store)

    monkeypatch.setattr(Checkpoints, "_complete", wait)
    yield go_on
    go_on.set()


def test_a_save_goes_on_in_the_background_with_the_bits_it_was_given(tmp_path, rng, held):
    """Save in the background while the next steps take the state's buffers, as the train step does."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x * 2 + 1, state)

    store = reopen(tmp_path)
    state = make_state(rng, step=7, width=300_000)
    given = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with store:
        store.save(state, {})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        store.check()
        assert store.steps() == [] and store.latest() is None
        assert not (tmp_path / "checksums").exists()
        held.set()
        store.wait()
        assert store.steps() == [7] == [store.latest()]
    assert_same_bits(reopen(tmp_path).restore_state(make_state(width=300_000)), given)


def test_a_step_is_saved_once(run, rng):
    path, states = run
    store = reopen(path)
    assert store.save(make_state(rng, step=20), {}) == 20
    assert_same_bits(store.restore_state(make_state()), states[20])


def test_the_end_of_a_run_waits_for_the_save(tmp_path, rng, held):
    with reopen(tmp_path) as store:
        store.save(make_state(rng, step=1), {})
        held.set()
    assert store.steps() == [1] and (tmp_path / "checksums" / "1.json").is_file()


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("noticed_by", ["check", "save", "close"])
def test_a_save_that_fails_leaves_the_last_good_one(run, rng, monkeypatch, noticed_by):
    path, states = run
    store = reopen(path, keep=1)
    monkeypatch.setattr("fastvim_jax.training.checkpoints.write_checksums", full_disk)
    store.save(make_state(rng, step=30), {})
    until(lambda: not store._manager.is_saving_in_progress())
    with pytest.raises(CheckpointError) as caught:
        {
            "check": store.check,
            "save": lambda: store.save(make_state(rng, step=40), {}),
            "close": store.close,
        }[noticed_by]()
    message = str(caught.value)
    assert "checkpoint of step 30 could not be written: the disk is full (" in message
    assert f"MB free at {path / 'checkpoints'}" in message
    assert f"Last good checkpoint: step 20 in {path / 'checkpoints' / '20'}" in message
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["10", "20"]
    assert_same_bits(reopen(path, read_only=True).restore_state(make_state()), states[20])
    if noticed_by == "check":  # Said once; when there is room again, saving works.
        monkeypatch.undo()
        store.check()
        state = make_state(rng, step=40)
        with store:
            store.save(state, {})
        assert store.steps() == [40]
        assert_same_bits(reopen(path).restore_state(make_state()), state)


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(
    tmp_path, rng, monkeypatch, caplog
):
    monkeypatch.setattr("fastvim_jax.training.checkpoints.write_checksums", full_disk)
    with pytest.raises(ZeroDivisionError), reopen(tmp_path) as store:
        store.save(make_state(rng, step=1), {})
        raise ZeroDivisionError
    assert "checkpoint of step 1 could not be written: the disk is full" in caplog.text
    assert "Last good checkpoint: none yet" in caplog.text


def test_nothing_is_pickled(run):
    path, _ = run
    for file in (path / "checkpoints").rglob("*"):
        assert file.suffix not in {".pkl", ".pickle", ".msgpack"}
        if file.is_file():
            assert not file.read_bytes().startswith((b"\x80\x04", b"\x80\x05"))


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "bytes"),
        (flip, "has changed since it was written"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(run, harm, reason):
    path, states = run
    harm(big_file(path, 20))
    store = reopen(path)
    with pytest.raises(CheckpointError) as caught:
        store.restore_state(make_state())
    message = str(caught.value)
    assert f"checkpoint {path / 'checkpoints' / '20'} is damaged" in message and reason in message
    assert "The previous one is step 10" in message
    assert isinstance(caught.value, UserError)
    assert_same_bits(store.restore_state(make_state(), step=10), states[10])
    harm(big_file(path, 10))
    with pytest.raises(CheckpointError, match="There is no earlier one"):
        reopen(path).restore_weights(make_state().params, weights="raw", step=10)


# Orbax drops a coroutine of a read that failed, and Python notes it when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_seen_without_the_record_too(run, caplog):
    """Say that the record is lost, and refuse what Orbax cannot read the same way."""
    path, states = run
    (path / "checksums" / "20.json").unlink()
    assert_same_bits(reopen(path).restore_state(make_state()), states[20])
    assert "is used unchecked: its record of checksums" in caplog.text
    shutil.rmtree(path / "checkpoints" / "20" / "params" / "d")
    with pytest.raises(CheckpointError, match="20 is damaged.*The previous one is step 10"):
        reopen(path).restore_state(make_state())
    gc.collect()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"meta/x": 3}', '{"params/x": [1, "a"'])
def test_a_damaged_record_is_damage(run, text):
    path, states = run
    (path / "checksums" / "20.json").write_text(text)
    store = reopen(path)
    with pytest.raises(
        CheckpointError, match=r"record of checksums .*20\.json (cannot be read|is empty)"
    ):
        store.read_meta()
    assert_same_bits(store.restore_state(make_state(), step=10), states[10])


def test_a_fifo_in_the_place_of_a_record_is_damage(run):
    path, _ = run
    (path / "checksums" / "20.json").unlink()
    os.mkfifo(path / "checksums" / "20.json")
    with pytest.raises(CheckpointError, match=r"record of checksums .*20\.json cannot be read"):
        reopen(path).read_meta()


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": None}, {"data": 3}, {"window": True}, {"window": [3]}, {"window": [{"loss": {}}]}, {"step": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_meta_is_named_without_the_record_too(run, change):
    path, _ = run
    (path / "checksums" / "20.json").unlink()
    file = path / "checkpoints" / "20" / "meta" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match="20 is damaged: .*The previous one is step 10"):
        reopen(path, read_only=True).restore_state(make_state())


def test_a_checkpoint_under_another_number_is_refused(run):
    path, _ = run
    shutil.copytree(path / "checkpoints" / "10", path / "checkpoints" / "30")
    shutil.copy(path / "checksums" / "10.json", path / "checksums" / "30.json")
    with pytest.raises(CheckpointError, match="30 is damaged: it is the checkpoint of step 10"):
        reopen(path, read_only=True).restore_state(make_state())


def test_each_file_is_hashed_once_and_only_what_is_read(run, monkeypatch):
    path, _ = run
    hashed = []
    fingerprint = checksums._fingerprint
    monkeypatch.setattr(
        checksums, "_fingerprint", lambda file: (hashed.append(file), fingerprint(file))[1]
    )
    store = reopen(path)
    store.read_meta()
    assert {file.relative_to(path / "checkpoints" / "20").parts[0] for file in hashed} == {"meta"}
    store.restore_weights(make_state().params, weights="ema")
    store.restore_state(make_state())
    files = [p for p in (path / "checkpoints" / "20").rglob("*") if p.is_file()]
    assert len(hashed) == len(set(hashed)) and set(hashed) <= set(files)


@pytest.mark.parametrize("name", ["lr[1e-3]", "a\\b", "*"])
def test_a_path_that_the_library_takes_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="Choose a run folder whose whole path has none of"):
        reopen(tmp_path / name)


# Orbax drops a coroutine of a read that failed, and Python notes it when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_first_checkpoint_is_read_back(tmp_path, rng, monkeypatch):
    """Read the first checkpoint back. A run whose checkpoints cannot be restored ends at the first one."""
    complete = Checkpoints._complete

    def lose(store):
        (folder,) = store.directory.glob("1.*tmp*")
        shutil.rmtree(folder / "params" / "d")
        complete(store)

    monkeypatch.setattr(Checkpoints, "_complete", lose)
    store = reopen(tmp_path)
    store.save(make_state(rng, step=1), {})
    with pytest.raises(CheckpointError, match="1 is damaged"):
        store.wait()
    gc.collect()


def test_other_files_among_the_checkpoints_are_none(run):
    """Pass over them: the two odd digits here are `str.isdigit`, and `int` takes only one of them."""
    path, states = run
    for name in ("\u00b2", "\u0663", "007"):
        (path / "checkpoints" / name).mkdir()
    (path / "checkpoints" / "99").write_text("")
    store = reopen(path, read_only=True)
    assert store.steps() == [10, 20]
    assert_same_bits(store.restore_state(make_state()), states[20])
    store.close()
    with reopen(path) as store:
        assert store.latest() == 20


def test_an_unfinished_checkpoint_is_never_taken(run):
    path, _ = run
    whole = path / "checkpoints" / "20"
    whole.rename(path / "checkpoints" / "20.orbax-checkpoint-tmp-0")
    store = reopen(path, read_only=True)
    assert store.latest() == 10
    with pytest.raises(CheckpointError, match="20 was never finished; finished are 10"):
        store.read_meta(20)
    with pytest.raises(CheckpointError, match="5 does not exist; finished are 10"):
        store.read_meta(5)


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist: this run has no checkpoint yet"):
        reopen(tmp_path, read_only=True)
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        reopen(tmp_path).read_meta()


@pytest.mark.parametrize(
    ("net", "difference"),
    [
        ({"width": 6}, "kernel: checkpoint float32[5], this model float32[6]"),
        ({"names": ("kernel", "scale")}, "scale: not in the checkpoint"),
        ({"names": ("kernel",)}, "bias: this model has none"),
    ],
)
def test_another_model_is_refused_by_its_parameters(run, net, difference):
    path, _ = run
    store = reopen(path)
    other = make_state(**net)
    for restore in (
        lambda: store.restore_state(other),
        lambda: store.restore_weights(other.params, weights="ema"),
    ):
        with pytest.raises(CheckpointError) as caught:
            restore()
        assert "20 is of another model" in str(caught.value)
        assert difference in str(caught.value)


def test_another_format_is_refused(run, monkeypatch):
    path, _ = run
    monkeypatch.setattr("fastvim_jax.training.checkpoints.FORMAT", 2)
    with pytest.raises(CheckpointError, match="has format 1; this version reads 2"):
        reopen(path).read_meta()


def test_reading_writes_nothing(run):
    path, _ = run
    before = sorted(p.relative_to(path) for p in path.rglob("*"))
    store = reopen(path, read_only=True)
    store.restore_weights(make_state().params, weights="raw")
    store.close()
    assert sorted(p.relative_to(path) for p in path.rglob("*")) == before
    assert json.loads((path / "checksums" / "20.json").read_text())


def test_a_failed_process_of_several_does_not_wait_forever_for_its_last_save(
    monkeypatch, tmp_path, caplog
):
    """Let another process have failed, too, so that its part of the checkpoint never comes."""

    class Waiting:
        def is_saving_in_progress(self) -> bool:
            return True

        def wait_until_finished(self) -> None:
            raise AssertionError("it waits")

    store = Checkpoints(tmp_path / "checkpoints")
    store.close()
    monkeypatch.setattr(store, "_manager", Waiting())
    monkeypatch.setattr(store, "_saving", 7)
    monkeypatch.setattr(checkpoints, "_LAST_SAVE", 0.1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ZeroDivisionError), store:
        _ = 1 / 0
    assert "step 7 is left unfinished" in caplog.text
