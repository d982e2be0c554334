"""Worker processes of this machine: each makes one stage at a time and keeps its model."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

from subjattn.run.perform import watch_parent


PRELOADED = ("torch", "transformers", "peft", "pandas", "xarray", "subjattn.run.perform")


@contextmanager
def workers(number: int, gpus: Sequence[int] = ()) -> Iterator[list[Executor]]:
    """So many processes, the first on the first GPU and so on; they end with the block, or with this process.

    Args:
        number: of processes.
        gpus: devices to share out; none: processes see what this one sees.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(list(PRELOADED))
    pools = [
        ProcessPoolExecutor(
            1,
            mp_context=context,
            initializer=_begin,
            initargs=(gpus[index % len(gpus)] if gpus else None,),
        )
        for index in range(number)
    ]
    try:
        yield list(pools)
    except BaseException:
        for pool in pools:
            for process in list((pool._processes or {}).values()):
                process.kill()
        raise
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(gpu: int | None) -> None:
    """Set a worker up; CUDA is not yet awake, so that it sees the one device it is given."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu].strip() if seen else str(gpu)
    logging.getLogger("subjattn").setLevel(logging.ERROR)  # notes are the first process's
    watch_parent()
