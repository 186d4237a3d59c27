"""`python -m mansu_tl.worker`: one model's study in a process of its own; `mansu_tl.processes` starts it.

It reads folder and config as JSON from its standard input, and says on its standard output, one JSON object a line, how far
it is and how it ended.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from mansu_tl.config import StudyConfig
from mansu_tl.errors import MansuError
from mansu_tl.processes import Job, StageBar, one_thread
from mansu_tl.results.locks import one_writer
from mansu_tl.study import peak_memory_gb, run_model


def main() -> int:
    """Run the study; exit status 0, 1 for a bug, 2 for what is refused, 130 for an interruption."""
    # What libraries print goes where it does not disturb.
    out, sys.stdout = sys.stdout, sys.stderr
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)

    def say(**record: Any) -> None:
        # A caller that is gone ends this process at its next stage.
        out.write(json.dumps(record) + "\n")
        out.flush()

    try:
        asked = json.load(sys.stdin)
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in asked["config"].items()
        }
        job = Job(asked["name"], Path(asked["folder"]), StudyConfig(**values))
        with one_thread(), one_writer(job.folder):
            _, stages = run_model(job, StageBar(job, False, lambda done, text: say(done=done, next=text)))
        say(made=stages.made, peak_memory_gb=peak_memory_gb())
    except MansuError as error:
        say(kind=type(error).__name__, refused=str(error))
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    return 0


def _leave(*_: object) -> None:
    """Stopped by the caller it leaves as at Ctrl-C, once: nothing half-written stays behind."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
