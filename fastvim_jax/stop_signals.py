"""The signals that ask a run to save and stop."""

from __future__ import annotations

import signal

STOP_SIGNALS = (
    signal.SIGTERM,  # sent before a machine is taken away
    signal.SIGINT,  # Ctrl-C
    signal.SIGHUP,  # the terminal was closed
    signal.SIGUSR1,  # what many SLURM scripts send before a time limit, Lightning's among them
    signal.SIGUSR2,  # and submitit's
)
