"""Traces of chosen steps."""

import jax
import jax.numpy as jnp
import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.training.profiling import Profiler, ProfileSteps


@pytest.mark.parametrize(("text", "steps"), [("10:13", (10, 13)), ("7", (7, 7)), (" 1:1 ", (1, 1))])
def test_ranges(text, steps):
    assert ProfileSteps.parse(text) == ProfileSteps(*steps)


@pytest.mark.parametrize("text", ["", "a", "3:", ":3", "5:4", "0:2", "1-3", "1:2:3"])
def test_what_is_no_range(text):
    with pytest.raises(UserError, match="profile"):
        ProfileSteps.parse(text)


@pytest.fixture
def traces(monkeypatch):
    """Return the calls to JAX's profiler, which is one for the whole process."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    return calls


def test_steps_count_from_this_start(traces, tmp_path):
    ended = []
    with Profiler(ProfileSteps(2, 3), tmp_path, first_step=101) as profiler:
        for step in range(101, 106):
            with profiler.begin(step):
                traces.append(step)
            ended.append(profiler.end(step, jnp.zeros(())))
    assert traces == [101, ("start", str(tmp_path)), 102, 103, ("stop",), 104, 105]
    assert ended == [None, None, tmp_path, None, None]


def test_an_unfinished_trace_is_kept_after_an_error(traces, tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        Profiler(ProfileSteps(1, 9), tmp_path, first_step=1) as profiler,
        profiler.begin(1),
    ):
        raise ZeroDivisionError
    assert traces == [("start", str(tmp_path)), ("stop",)]


def test_no_profile_no_trace(traces, tmp_path):
    with Profiler(None, tmp_path, first_step=1) as profiler:
        with profiler.begin(1):
            pass
        assert profiler.end(1, jnp.zeros(())) is None
    assert traces == []


def test_a_trace_is_a_file_for_xprof(tmp_path):
    with Profiler(ProfileSteps(1, 1), tmp_path, first_step=1) as profiler:
        with profiler.begin(1):
            result = jnp.arange(9.0) @ jnp.ones(9)
        assert profiler.end(1, result) == tmp_path
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
