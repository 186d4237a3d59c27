"""Where cells are computed: in this process, in processes beside it, or on Ray. Results are read from the store's files.

A worker that is killed loses one cell: it is begun once more, and where it is lost again the rest is done first and the way
out is said at the end.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.errors import MansuError
from mansu_tl.models import parameters

C = TypeVar("C")
# Below this many parameters a second thread costs more than it brings, and a model more in memory costs nothing.
_SMALL = 5_000_000
_PATIENCE = 10.0  # seconds that a worker gets to stop by itself
ENGINES = ("processes", "ray")


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_small(model: TransformerBridge) -> bool:
    """Whether a model is best run on one thread, beside others: less than five million parameters, all on the CPU."""
    values = parameters(model).values()
    return sum(value.numel() for value in values) < _SMALL and all(value.device.type == "cpu" for value in values)


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """One thread for torch inside, where wanted; the number of before is put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_gb() -> float:
    """The most memory that this process has had, in GB."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@runtime_checkable
class Engine(Protocol):
    """What computes cells.

    Attributes:
        slots: how many cells it computes at the same time.
        lost: what a future raises whose worker died.
    """

    slots: int
    lost: tuple[type[Exception], ...]

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin one cell: a function of a module and arguments that can be pickled."""

    def close(self) -> None:
        """Stop what still runs; nothing is left behind."""


class LocalProcesses:
    """Python processes beside this one, each with one thread.

    One pool a process, so that one that dies takes no other along.

    Args:
        slots: how many.
    """

    lost: tuple[type[Exception], ...] = (BrokenProcessPool,)

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._latest: dict[_Pool, Future[Any]] = {}

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin one cell in a process that has nothing to do, or in a new one."""
        pool = next((pool for pool, future in self._latest.items() if future.done() and not _broken(future)), None)
        pool = pool or _Pool()
        self._latest[pool] = pool.submit(work, *arguments)
        return self._latest[pool]

    def close(self) -> None:
        """Stop every process: one that works may tidy up for some seconds, then it is killed."""
        busy = [pool for pool, future in self._latest.items() if not future.done()]
        for pool in self._latest:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in (process for pool in busy for process in pool.context.started if process.is_alive()):
            process.terminate()
        for process in (process for pool in self._latest for process in pool.context.started):
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def _broken(future: Future[Any]) -> bool:
    return not future.cancelled() and isinstance(future.exception(), BrokenProcessPool)


class _Pool(ProcessPoolExecutor):
    """One process."""

    def __init__(self) -> None:
        self.context = _Context()
        super().__init__(1, self.context, _begin)


class _Worker(SpawnProcess):
    """A process that does not run the caller's script again, which so needs no `__main__` guard."""

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    """Fresh processes, and a list of them."""

    def __init__(self) -> None:
        self.started: list[_Worker] = []

    def Process(self, *arguments: Any, **named: Any) -> _Worker:  # type: ignore[override]  # noqa: N802
        process = _Worker(*arguments, **named)
        self.started.append(process)
        return process


def _begin() -> None:
    """One thread; Ctrl-C is the caller's to hear; and without the caller there is nothing to work for."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_the_caller, daemon=True).start()


def _leave(*_: object) -> None:
    """Leave once, through every `finally`: nothing half-written stays behind."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(130)


def _follow_the_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_PATIENCE)
    os._exit(1)


class Ray:
    """Ray's workers: a cluster that is running (`RAY_ADDRESS`), or one on this machine. All must see the results folder.

    Args:
        slots: how many cells at the same time; None = one a processor of the cluster, or one a GPU where they take one.
        num_gpus: what each cell takes of the cluster's GPUs.
    """

    def __init__(self, slots: int | None = None, num_gpus: int = 0) -> None:
        import ray

        self._ray, self._begun = ray, not ray.is_initialized()
        if self._begun:
            ray.init(
                num_cpus=None if os.environ.get("RAY_ADDRESS") else slots, log_to_driver=False, include_dashboard=False
            )
        there = ray.cluster_resources()
        self.slots = slots or max(1, int(there.get("GPU", 1)) // num_gpus if num_gpus else int(there.get("CPU", 1)))
        self._cell = ray.remote(max_retries=0, num_cpus=1, num_gpus=num_gpus)(_as_it_was_raised)
        self.lost: tuple[type[Exception], ...] = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
        )
        self._running: set[Any] = set()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Begin one cell on whichever worker is free; what it raises is raised as it was."""
        reference = self._cell.remote(work, *arguments)
        self._running.add(reference)
        future: Future[Any] = Future()

        def tell(done: Future[Any]) -> None:
            self._running.discard(reference)
            error = done.exception()
            raised = error if error is not None else done.result()[1]
            if raised is not None:
                future.set_exception(raised)
            else:
                future.set_result(done.result()[0])

        reference.future().add_done_callback(tell)
        return future

    def close(self) -> None:
        """Cancel what still runs; a cluster that was begun here is stopped."""
        for reference in list(self._running):
            self._ray.cancel(reference, force=True)
        if self._begun:
            self._ray.shutdown()


def _as_it_was_raised(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    with one_thread():
        try:
            return work(*arguments), None
        except Exception as error:
            return None, error


def compute(
    engine: Engine,
    work: Callable[[C], Any],
    cells: Sequence[C],
    *,
    title: Callable[[C], str] = str,
    progress: bool = False,
) -> dict[C, Any]:
    """What `work` gives for every cell; the engine is closed at the end, however it comes.

    Args:
        title: how a cell is called.
        progress: show a bar over the cells.

    Raises:
        MansuError: what a cell refuses, or cells whose workers were stopped from outside twice, once all others are done.
    """
    waiting, running, given = deque(cells), dict[Future[Any], C](), dict[C, Any]()
    lost: Counter[C] = Counter()
    try:
        with tqdm(total=len(cells), desc="cells", unit="cell", disable=not progress) as bar:
            while waiting or running:
                while waiting and len(running) < engine.slots:
                    cell = waiting.popleft()
                    running[engine.submit(work, cell)] = cell
                bar.set_postfix_str(", ".join(map(title, running.values())))
                # In short waits, so that Ctrl-C is heard on every system.
                for future in wait(running, 0.2, FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    try:
                        given[cell] = future.result()
                        bar.update()
                    except engine.lost:
                        lost[cell] += 1
                        if lost[cell] == 1:
                            waiting.append(cell)
    finally:
        engine.close()
    gone = [title(cell) for cell, times in lost.items() if times > 1]
    if gone:
        raise MansuError(
            f"{', '.join(gone)}: the process was stopped from outside, twice, as when memory runs out; all the rest is done "
            "and kept, the same call goes on from there, and workers=1 runs one after the other"
        )
    return given


def require_engine(on: str, workers: int | None) -> None:
    """Refuse an engine that is unknown or not installed, and a number of workers below one.

    Raises:
        MansuError: any of them.
    """
    if workers is not None and workers < 1:
        raise MansuError(f"workers={workers}; choose at least 1")
    if on not in ENGINES:
        raise MansuError(f"engine {on!r}: unknown; choose one of {', '.join(ENGINES)}")
    if on == "ray" and not _ray_is_installed():
        raise MansuError("engine 'ray': Ray is not installed; pip install 'mansu-tl[ray]', or use 'processes'")


def engine_for(on: str, workers: int | None, cells: int, device: str = "cpu") -> Engine | None:
    """The engine for so many cells; None where this process does best by itself.

    Args:
        on: one of `ENGINES`.
        workers: at the same time; None = as many as there are processors.
        device: what a cell computes on; on Ray it gets a GPU of its own where that is one.
    """
    if on == "ray":
        return Ray(workers, num_gpus=1 if device.startswith("cuda") else 0)
    slots = min(workers or cores(), cells)
    return LocalProcesses(slots) if slots > 1 else None


def _ray_is_installed() -> bool:
    return "ray" in sys.modules or importlib.util.find_spec("ray") is not None
