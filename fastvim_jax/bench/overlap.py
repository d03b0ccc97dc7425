"""Tell how much of a step on several GPUs is communication that no computation hides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pallas_kernels.timing import Event

_COLLECTIVE = "nccl"  # in the names of NCCL's kernels


def overlap(events: Mapping[str, Sequence[Event]], calls: int) -> dict[str, dict[str, Any]]:
    """Split each GPU's time into computation, communication alone, and nothing.

    Args:
        events: kernels and copies on each GPU, from `timing.device_events`.
        calls: number of steps in the events.

    Returns:
        By GPU, in milliseconds per step: `span` from the first start to the last end; `computing`, when any kernel of
        another kind runs; `only_collectives`, when collectives alone run; `idle`; `collectives`, the sum of their
        durations; and `collective_calls`, their number per step.
    """
    found = {}
    for device, each in events.items():
        collectives = [event for event in each if _COLLECTIVE in event[0].lower()]
        computing = _covered(event for event in each if _COLLECTIVE not in event[0].lower())
        busy = _covered(each)
        span = max(e[1] + e[2] for e in each) - min(e[1] for e in each) if each else 0.0
        in_ns = {
            "span": span,
            "computing": computing,
            "only_collectives": busy - computing,
            "idle": span - busy,
            "collectives": sum(e[2] for e in collectives),
        }
        found[device] = {name: round(value / calls / 1e6, 4) for name, value in in_ns.items()}
        found[device]["collective_calls"] = len(collectives) / calls
    return found


def _covered(events: Iterable[Event]) -> float:
    """Return the nanoseconds during which at least one of the events runs."""
    total, end = 0.0, float("-inf")
    for _, start, duration in sorted(events, key=lambda e: e[1]):
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def gaps(
    events: Sequence[Event], calls: int, *, shortest: float = 5e3, longest: int = 12
) -> list[dict[str, Any]]:
    """List where a GPU runs nothing, or nothing but a collective: between which kernels, and for how long.

    Args:
        events: kernels and copies of one GPU, sorted by start.
        calls: number of steps in the events.
        shortest: nanoseconds below which a gap does not count.
        longest: number of pairs to return.

    Returns:
        By pair of kernels that compute, `after` and `before` the gap: milliseconds (`ms`) and gaps per step (`count`),
        and what of the milliseconds a collective runs (`collective_ms`). The longest come first.
    """
    collectives = [e for e in events if _COLLECTIVE in e[0].lower()]
    found: dict[tuple[str, str], list[float]] = {}
    end, last = None, ""
    for name, start, duration in events:
        if _COLLECTIVE in name.lower():
            continue
        if end is not None and start - end >= shortest:
            covered = sum(max(0.0, min(start, c[1] + c[2]) - max(end, c[1])) for c in collectives)
            sums = found.setdefault((last, name), [0.0, 0.0, 0.0])
            for i, value in enumerate((start - end, 1e6, covered)):
                sums[i] += value / calls / 1e6
        if end is None or start + duration > end:
            end, last = start + duration, name
    order = sorted(found.items(), key=lambda item: -item[1][0])[:longest]
    return [
        {
            "after": after, "before": before,
            "ms": round(ms, 4), "count": round(count, 2), "collective_ms": round(covered, 4),
        }
        for (after, before), (ms, count, covered) in order
    ]  # fmt: skip
