"""Studies of further models in processes of their own, and how many threads a study computes with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl import errors
from mansu_tl.config import StudyConfig
from mansu_tl.errors import MansuError
from mansu_tl.models import parameters

# Below this many parameters a second thread costs more than it brings, and a model more in memory costs nothing.
_SMALL = 5_000_000
_PATIENCE = 10.0  # seconds that a process gets to stop by itself
_COMMAND = [sys.executable, "-m", "mansu_tl.worker"]


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


@dataclass(frozen=True, eq=False)
class Job:
    """One model's study, to be done.

    Attributes:
        name: how the model is called.
        folder: where its results go.
        config: what is run; its `also` is empty or left to the caller.
    """

    name: str
    folder: Path
    config: StudyConfig


class StageBar:
    """A bar over the stages of one model's study, which also tells another how far it is.

    Args:
        job: the study.
        progress: draw it.
        tell: is called with the number of finished stages and what comes next.
    """

    def __init__(self, job: Job, progress: bool, tell: Callable[[int, str], object] = lambda done, text: None) -> None:
        # Circuit, sweep, references, and one a method.
        total = 3 + len(job.config.methods)
        self._bar = tqdm(total=total, desc=job.name, unit="stage", disable=not progress)
        self.shown = progress
        self._tell, self._done, self._text = tell, 0, ""

    def __enter__(self) -> StageBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def set_postfix_str(self, text: str) -> None:
        """Name what is being done."""
        self._text = text
        self._bar.set_postfix_str(text)
        self._tell(self._done, text)

    def update(self, stages: int = 1) -> None:
        """So many stages more are finished."""
        self._done += stages
        self._bar.update(stages)
        self._tell(self._done, self._text)


class Processes:
    """Studies to be done, each by the caller or in a Python process beside it, whoever comes first.

    A process sees the config and nothing else of the caller, so a script needs no `__main__` guard. Leaving the block stops
    the processes that still run; what they finished is on disk.

    Args:
        jobs: the studies.
        helpers: how many processes may run at the same time; 0 leaves everything to the caller.
        progress: draw a bar for each study.
    """

    def __init__(self, jobs: Sequence[Job], helpers: int, progress: bool) -> None:
        self.made, self.peak_memory_gb = 0, 0.0
        self._waiting, self._progress = list(jobs), progress
        self._lock, self._stopped = threading.Lock(), False
        self._running: list[subprocess.Popen[str]] = []
        self._failed: Exception | None = None
        helpers = min(helpers, len(self._waiting))
        self._threads = [
            threading.Thread(target=self._help, name="mansu_tl-study", daemon=True) for _ in range(helpers)
        ]

    def __enter__(self) -> Processes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
        for thread in self._threads:
            thread.join(_PATIENCE)
        with self._lock:
            for process in self._running:
                process.kill()
        for thread in self._threads:
            thread.join()

    def claim(self) -> Job | None:
        """A study that nobody has begun, now the caller's to do; None where there is none left."""
        with self._lock:
            return self._waiting.pop(0) if self._waiting and not self._stopped else None

    def check(self, *_: object) -> None:
        """Raise what stopped one of the studies, if one was.

        Raises:
            MansuError: what it refused, or that its process was stopped from outside.
        """
        if self._failed is not None:
            raise self._failed

    def wait(self) -> None:
        """Wait until all processes are done.

        Raises:
            MansuError: as `check`.
        """
        for thread in self._threads:
            while thread.is_alive():
                # In short waits, so that Ctrl-C is heard on every system.
                thread.join(0.2)
                self.check()
        self.check()

    def _help(self) -> None:
        try:
            while self._failed is None and (job := self.claim()) is not None:
                self._process(job)
        except Exception as error:
            self._failed = error

    def _process(self, job: Job) -> None:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            with self._lock:
                if self._stopped:
                    return
                process = _start(said)
                self._running.append(process)
            try:
                answer = self._follow(process, job)
            finally:
                with self._lock:
                    self._running.remove(process)
            if self._stopped:
                return
            if "refused" in answer:
                raise getattr(errors, answer["kind"])(f"{job.name}: {answer['refused']}")
            if "made" not in answer:
                said.seek(0)
                raise _death(job.name, process.returncode, said.read())
            with self._lock:
                self.made += answer["made"]
                self.peak_memory_gb += answer["peak_memory_gb"]

    def _follow(self, process: subprocess.Popen[str], job: Job) -> dict[str, Any]:
        """Draw how far a process is until it ends; what it said last."""
        assert process.stdin is not None
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        with process, StageBar(job, self._progress) as bar:
            try:
                asked = {"name": job.name, "folder": str(job.folder), "config": asdict(job.config)}
                process.stdin.write(json.dumps(asked))
                process.stdin.close()
            except BrokenPipeError:  # it is dead; its status says more
                return answer
            done = 0
            for line in process.stdout:
                answer = _record(line) or answer
                if "done" in answer:
                    bar.set_postfix_str(answer["next"])
                    bar.update(answer["done"] - done)
                    done = answer["done"]
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        return answer


def _start(said: TextIO) -> subprocess.Popen[str]:
    package = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        _COMMAND,
        # PYTHONSAFEPATH: the user's current folder is not searched for modules.
        env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        encoding="utf-8",
    )


def _record(line: str) -> dict[str, Any] | None:
    """What the worker says on a line; None where a library printed something."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _death(model: str, status: int, said: str) -> Exception:
    """What a process that ended without an answer stands for: a bug, or that somebody stopped it."""
    if status == 1:
        return RuntimeError(f"the study of {model} died in its process: {said[-2000:]}")
    how = f"signal {-status}" if status < 0 else f"status {status}"
    hint = ", as when memory runs out" if status == -9 else ""
    return MansuError(
        f"{model}: its process was stopped from outside ({how}{hint}); the same call continues from the last finished "
        "stage, workers=1 runs one model after the other"
    )
