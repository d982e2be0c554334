"""Workers on a Ray cluster, or a local one started for the purpose; the run's folder is on storage all nodes see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

from subjattn.errors import BadInput


class _OnRay(Executor):
    """One actor that makes one stage at a time."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._actor.call.remote(fn, args, kwargs).future()  # type: ignore[no-any-return]


@contextmanager
def on_ray(address: str, number: int | None, threads: int) -> Iterator[list[Executor]]:
    """So many actors, a GPU each where the cluster has some.

    Args:
        address: `ray` starts Ray on this machine, `ray://HOST:PORT` joins a cluster.
        number: of actors; None: as many as the cluster has GPUs, or cores for.
        threads: CPU cores of each.

    Raises:
        BadInput: Ray is not installed, the cluster cannot be reached, or so many actors do not fit it.
    """
    try:
        import ray
    except ImportError:
        raise BadInput("--on ray needs Ray: pip install 'subjattn[ray]'") from None
    try:
        if address == "ray":
            ray.init(
                num_cpus=None if number is None else number * threads,
                include_dashboard=False,
                configure_logging=False,
                log_to_driver=False,
            )
        else:
            ray.init(address, configure_logging=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"--on {address}: {' '.join(str(error).split())[:200]}") from None
    try:
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        fit = min(gpus or 10**9, int(there.get("CPU", 1)) // threads)
        number = number or max(1, fit)
        if number > fit:
            raise BadInput(
                f"--workers {number} do not fit the cluster of {there.get('CPU', 0):g} cores and {gpus} GPUs with "
                f"{threads} cores each: ask for at most {fit}"
            )
        actor = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0)(_Worker)
        yield [_OnRay(actor.remote()) for _ in range(number)]
    finally:
        ray.shutdown()


class _Worker:
    """What an actor does."""

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)
