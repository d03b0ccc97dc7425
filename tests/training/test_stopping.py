"""SIGTERM and Ctrl-C: the step is finished and saved, and the run goes on later as if nothing had been."""

import os
import signal
import threading

import grain
import pytest

from fastvim_jax.cli.main import main
from fastvim_jax.data import stream
from fastvim_jax.data.prefetch import DevicePrefetch
from fastvim_jax.data.stream import WorkersEnded
from fastvim_jax.stop_signals import STOP_SIGNALS
from fastvim_jax.training import STOPPED_STATUS, Stopped, load_run, read_metrics, train
from fastvim_jax.training.metrics import RunLog
from fastvim_jax.training.stopping import StopRequest
from tests.training.compare_runs import assert_same_run, steps_of
from tests.training.tiny import STEPS_PER_EPOCH, tiny_config

TOTAL = 2 * STEPS_PER_EPOCH
CONFIG = tiny_config(keep_checkpoints=1)


def signalled(patch, number, *, at_step):
    """Let the process get a signal while step `at_step` is under way."""
    advance, count = RunLog.advance, iter(range(1, TOTAL + 1))

    def send(log):
        advance(log)
        if next(count) == at_step:
            os.kill(os.getpid(), number)

    patch.setattr(RunLog, "advance", send)


@pytest.fixture(autouse=True, scope="module")
def signals_not_ignored():
    """Take SIGINT and SIGHUP as a shell in the foreground has them, wherever the suite was started (nohup, &)."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    earlier = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a run of one piece; a signal in its last step comes too late to change anything."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, signal.SIGTERM, at_step=TOTAL)
        assert train(CONFIG, folder, progress=False).step == TOTAL
    return folder


@pytest.mark.drawn("trainings", one_in=6)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    """Stop between checkpoints, and within a window of the log, and resume to the same bits."""
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        signalled(patch, signal.SIGTERM, at_step=7)
        train(CONFIG, tmp_path, progress=False)
    assert caught.value.step == 7
    assert f"SIGTERM: stopped after step 7 of {TOTAL}, which is saved" in str(caught.value)
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert steps_of(tmp_path) == [7] and load_run(tmp_path).step == 7
    train(CONFIG, tmp_path, progress=False)
    assert_same_run(tmp_path, finished)


@pytest.mark.drawn("trainings", one_in=6)
def test_the_command_says_how_to_go_on_and_evaluates_what_it_left_out(
    finished, tmp_path, monkeypatch, capsys
):
    """Stop where an epoch ends: the state is saved, and the evaluation made up for later."""
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")
    experiment, folder = tmp_path / "my experiment.py", tmp_path / "run"
    experiment.write_text(
        "from fastvim_jax.training import TrainConfig\n"
        f"config = TrainConfig.from_json({CONFIG.to_json()!r})\n"
    )
    arguments = ["train", str(experiment), "--run-dir", str(folder), "--no-progress"]
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, at_step=STEPS_PER_EPOCH)
        assert main(arguments) == STOPPED_STATUS == 75
    said = capsys.readouterr().err
    assert f"SIGINT: stopped after step {STEPS_PER_EPOCH} of {TOTAL}, which is saved" in said
    assert f"train '{experiment}' --run-dir {folder} --no-progress" in said
    assert read_metrics(folder, "eval") == []
    assert main(arguments) == 0
    assert_same_run(folder, finished)


@pytest.mark.drawn("trainings", one_in=6)
def test_a_dead_data_worker_is_named_and_the_run_saved(tmp_path, monkeypatch):
    """Name a dead data worker and save the run, as when the kernel ends a worker because memory ran out."""
    take, count = DevicePrefetch.__next__, iter(range(1, TOTAL + 1))

    def end(batches):
        if next(count) == 6:
            raise WorkersEnded("a data worker ended with exit code -9")
        return take(batches)

    monkeypatch.setattr(DevicePrefetch, "__next__", end)
    with pytest.raises(Stopped, match="a data worker ended with exit code -9") as caught:
        train(CONFIG, tmp_path, progress=False)
    assert caught.value.step == 5 and steps_of(tmp_path) == [5]


@pytest.mark.drawn("trainings", one_in=6)
def test_a_worker_that_dies_in_an_evaluation_costs_the_evaluation_alone(tmp_path, monkeypatch):
    def end(*arguments):
        raise WorkersEnded("a data worker ended with exit code -9")

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="exit code -9") as caught:
        patch.setattr("fastvim_jax.training.classification.evaluation.evaluate_weights", end)
        train(CONFIG, tmp_path, progress=False)
    assert caught.value.step == STEPS_PER_EPOCH and steps_of(tmp_path) == [STEPS_PER_EPOCH]
    assert read_metrics(tmp_path, "eval") == []


def test_an_error_of_the_data_stays_one():
    def batches():
        yield 1
        raise RuntimeError("a record is odd")

    made = batches()
    with StopRequest() as stop:
        assert stop.next_of(made) == 1
        with pytest.raises(RuntimeError, match="a record is odd"):
            stop.next_of(made)


@pytest.mark.drawn("trainings", one_in=6)
def test_the_exit_code_of_a_worker_is_explained():
    """Raise WorkersEnded for grain's message, with the exit code explained. The pipeline's own errors pass."""

    def ended(message):
        raise RuntimeError(message)
        yield

    grain_words = "Worker process was terminated unexpectedly with exit code -9. Search the logs"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(WorkersEnded) as caught:
        patch.setattr(stream, "_read_ahead", lambda *_: ended(grain_words))
        next(stream.grain_stream(grain.MapDataset.range(3), 2)(0))
    assert "exit code -9 (SIGKILL, as the kernel sends when memory runs out)" in str(caught.value)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="odd record"):
        patch.setattr(stream, "_read_ahead", lambda *_: ended("odd record"))
        next(stream.grain_stream(grain.MapDataset.range(3), 2)(0))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])  # of SLURM scripts
def test_user_signals_stop_as_well(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.agreed(1) and stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_hang_up_stops_as_well_unless_it_is_ignored():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed(1) and stop.reason == "SIGHUP"
        with pytest.raises(Stopped, match="SIGHUP: stopped after step 0 of 9"):
            stop.before_start(9)
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed(1)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, earlier)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_training_asks_to_be_started_again(monkeypatch, capsys, number):
    handlers = [signal.getsignal(each) for each in STOP_SIGNALS]
    monkeypatch.setenv("FASTVIM_COMPILATION_CACHE", "off")
    monkeypatch.setattr(
        "fastvim_jax.cli.main.importlib.import_module", lambda name: os.kill(os.getpid(), number)
    )
    assert main(["train", "digits/fastvim_digits"]) == 75
    said = capsys.readouterr().err
    assert f"{signal.Signals(number).name}: stopped before training began" in said
    assert handlers == [signal.getsignal(each) for each in STOP_SIGNALS]


def test_a_second_interrupt_stops_at_once_and_a_second_sigterm_does_not():
    with StopRequest() as stop:
        assert not stop.agreed(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(2) and stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_stay_as_they_are():
    handler = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with StopRequest() as stop:
            seen.append(signal.getsignal(signal.SIGTERM) == handler and not stop.agreed(1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [True]
