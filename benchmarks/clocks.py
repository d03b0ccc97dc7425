"""Record clocks and power of GPUs while something else is timed."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
import time


class Clocks:
    """Watch clock and power of all GPUs with nvidia-smi: a GPU at its power limit lowers its clock by itself."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int, float, float]] = []
        self._process: subprocess.Popen[str] | None = None
        query = "--query-gpu=index,clocks.sm,power.draw.instant"
        with contextlib.suppress(FileNotFoundError):  # no GPU here
            self._process = subprocess.Popen(
                ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "50"],
                stdout=subprocess.PIPE,
                text=True,
            )
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    gpu, clock, power = map(float, line.split(","))
                    self._seen.append((time.monotonic(), int(gpu), clock, power))

    def since(self, begin: float) -> dict[str, dict[str, float]]:
        """Return, by GPU, the mean clock in MHz and the mean power in W since `begin`, of `time.monotonic`."""
        seen = [each for each in self._seen if each[0] >= begin]
        return {
            str(gpu): {
                "mhz": round(statistics.mean(each[2] for each in seen if each[1] == gpu)),
                "watts": round(statistics.mean(each[3] for each in seen if each[1] == gpu)),
            }
            for gpu in sorted({each[1] for each in seen})
        }

    def end(self) -> None:
        """Stop watching."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._listener.join(5)
