"""What a worker is asked and answers: lines of JSON, one request at a time. Needs the standard library alone."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(load: Callable[[str, str, int], Callable[..., Any]]) -> None:
    """Be a worker: load a model once, then answer requests until the input ends.

    **Arguments:**

    - `load`: ``load(path, dtype, threads)`` gives what is called with each request's arguments, such as
      ``generate(prompts, new_tokens)``. Its result can be written as JSON.
    """
    options = argparse.ArgumentParser()
    options.add_argument("path")
    options.add_argument("dtype")
    options.add_argument("cores")
    given = options.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to the error output
    os.dup2(2, 1)
    cores = [int(core) for core in given.cores.split(",")]
    os.sched_setaffinity(0, cores)
    answer, seconds = _timed(load, given.path, given.dtype, len(cores))
    _say(answers, {"load": seconds})
    for line in sys.stdin:
        result, seconds = _timed(answer, **json.loads(line))
        _say(answers, {"result": result, **seconds})


class Worker:
    """A process that serves a model.

    **Arguments:**

    - `python`: the interpreter that it runs with.
    - `module`: a module that calls `serve`.
    - `path`, `dtype`, `cores`: the model, and the cores that it may use.
    """

    def __init__(self, python: str, module: str, path: str, dtype: str, cores: Sequence[int]):
        command = [python, "-m", module, path, dtype, ",".join(map(str, cores))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.load = self._answer()["load"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request: its ``result``, and the seconds of CPU time and of the clock that it took."""
        stdin: Any = self._process.stdin
        _say(stdin, request)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        stdout: Any = self._process.stdout
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"The worker ended: {' '.join(map(str, self._process.args))}")  # pyright: ignore
        return json.loads(line)


def _say(to: TextIO, what: dict[str, Any]) -> None:
    to.write(json.dumps(what) + "\n")
    to.flush()


def _timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, float]]:
    cpu, clock = time.process_time(), time.perf_counter()
    result = call(*args, **kwargs)
    return result, {"cpu": time.process_time() - cpu, "clock": time.perf_counter() - clock}
