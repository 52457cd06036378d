"""How the ranks of an attempt find each other in a store that has outlived earlier attempts.

torchrun keeps one store over restarts and clears nothing, so torch's own meeting may find the addresses of processes
that are gone (torch 2.13: "Connection refused", or a wait without end). Its count of restarts does not help: on several
hosts only the one that lost a process counts. Therefore rank 0 of every attempt announces a word of its own, and what
the ranks then write begins with it. A rank that reads an old word notices, since nobody answers it there.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

WORD = "QWENCH_ATTEMPT"
"""Environment variable that holds the word of this process's attempt once it has met the others."""
ANNOUNCED = "qwench/attempt"
POLL_S = 0.02


def connection(timeout_s: float) -> dist.TCPStore:
    """A connection to the job's store. A process may have several: a call that waits holds the one it is made on."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def meet(rank: int, world: int, timeout_s: float) -> dist.Store:
    """The attempt's own part of the store, once all ranks have come. Raises DistStoreError or TimeoutError."""
    store, deadline = connection(timeout_s), time.monotonic() + timeout_s
    word = _announce(store, world, deadline) if rank == 0 else _answer(store, rank, deadline)
    os.environ[WORD] = word
    return dist.PrefixStore(f"qwench/{word}", store)


def _announce(store: dist.Store, world: int, deadline: float) -> str:
    """Rank 0: a new word, and an answer to everyone who has heard it."""
    word = uuid.uuid4().hex
    store.set(ANNOUNCED, word)
    absent = set(range(1, world))
    while absent:
        for rank in sorted(absent):
            if store.check([f"qwench/{word}/here/{rank}"]):
                nonce = store.get(f"qwench/{word}/here/{rank}").decode()
                store.set(f"qwench/{word}/seen/{nonce}", "")
                absent.remove(rank)
        _pause(deadline, f"ranks {sorted(absent)} have not come")
    return word


def _answer(store: dist.Store, rank: int, deadline: float) -> str:
    """Another rank: the word to which rank 0 of this attempt answers."""
    nonce, word = uuid.uuid4().hex, ""
    while True:
        if store.check([ANNOUNCED]) and (announced := store.get(ANNOUNCED).decode()) != word:
            word = announced
            store.set(f"qwench/{word}/here/{rank}", nonce)
        if word and store.check([f"qwench/{word}/seen/{nonce}"]):
            return word
        _pause(deadline, "rank 0 has not come")


def _pause(deadline: float, missing: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{missing}; look at the logs of the other hosts")
    time.sleep(POLL_S)
