"""Where the time goes, on a clock that only the test moves."""

import pytest

from fastvim_jax.training import clock as clock_module
from fastvim_jax.training.clock import TIMING, Clock


@pytest.fixture
def move(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def take_step(clock, move, *, data=0.1, dispatch=0.2, device=0.6, rest=0.1):
    for part, seconds in (("data_wait", data), ("dispatch", dispatch), ("device_wait", device)):
        with clock.timed(part):
            move(seconds)
    move(rest)
    clock.step()


def test_a_lap_counts_the_time_of_steps_alone(move):
    clock = Clock(32, image_flops=1e9, peak_flops=64e9)
    take_step(clock, move, dispatch=30.0)  # compiles
    clock.first_step()
    for _ in range(4):
        take_step(clock, move)
    with clock.timed("evaluation_seconds"):
        move(7)
    with clock.timed("checkpoint_seconds"):
        move(2)
    lap = clock.lap()
    assert set(lap) <= TIMING
    assert lap == pytest.approx(
        {
            "seconds": 43.8, "images_per_second": 32.0, "step_seconds": 1.0, "mfu": 0.5,
            "data_wait": 0.1, "dispatch": 0.2, "device_wait": 0.6,
            "evaluation_seconds": 7.0, "checkpoint_seconds": 2.0, "first_step_seconds": 30.8,
        }
    )  # fmt: skip
    take_step(clock, move, data=1.1)
    assert clock.lap() == pytest.approx(
        {
            "seconds": 45.8, "images_per_second": 16.0, "step_seconds": 2.0, "mfu": 0.25,
            "data_wait": 0.55, "dispatch": 0.1, "device_wait": 0.3,
        }
    )  # fmt: skip


def test_a_lap_without_a_step_and_a_device_without_a_known_peak(move):
    clock = Clock(8, image_flops=1e9)
    clock.first_step()
    assert clock.lap() == {"seconds": 0.0}
    take_step(clock, move)
    assert "mfu" not in clock.lap()
