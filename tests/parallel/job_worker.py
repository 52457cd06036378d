"""What ranks do in the tests of hangs and restarts. Started processes import it by name, so it holds no tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from qwench.parallel.launch import attempt, connected
from qwench.parallel.watchdog import Watchdog


def waits_for_the_others(logs: Path) -> None:
    """Of the second collective only rank 0 comes: rank 1 sleeps, rank 2 is stopped so that it cannot even say so."""
    with connected(torch.device("cpu")) as place:
        watch = Watchdog(logs, patience_s=1.0, long_patience_s=60.0)
        watch.mark(6, "loading", is_long=True)
        dist.barrier()
        watch.mark(7, "training step")
        if place.rank == 1:
            time.sleep(600)
        if place.rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def is_slow_then_hangs(logs: Path) -> None:
    with Watchdog(logs, patience_s=0.4, long_patience_s=60.0) as watch:
        for _ in range(6):
            watch.mark(3, "validation")
            time.sleep(0.1)
        print("validated")
        watch.mark(3, "saving a checkpoint", is_long=True)
        time.sleep(0.6)
        print("saved")
    time.sleep(0.5)  # nobody watches any more
    print("unwatched")
    Watchdog(logs, patience_s=0.4, long_patience_s=60.0).mark(5, "training step")
    time.sleep(600)


def dies_once(out: Path) -> None:
    """The ranks add up their numbers, after rank 1 has died in the first attempt."""
    with connected(torch.device("cpu")) as place:
        path = out / f"attempt {attempt()} rank {place.rank}"
        if attempt() == 0:
            if place.rank == 1:
                path.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        numbers = torch.tensor([float(place.rank)])
        dist.all_reduce(numbers)
        path.write_text(str(float(numbers)))


if __name__ == "__main__":
    {"hang": is_slow_then_hangs, "torchrun": dies_once}[sys.argv[1]](Path(sys.argv[2]))
