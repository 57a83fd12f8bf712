"""Times answers of a real model, in turn with ``transformers``: ``python -m benchmarks.models --model PATH``."""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.folder import as_folder
from benchmarks.worker import Worker

_WORKERS = {"paged": "benchmarks.models.paged_worker", "transformers": "benchmarks.models.transformers_worker"}


def main() -> None:
    """Parse, measure, print."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    options.add_argument("--model", required=True, help="a folder in Hugging Face's form, or a GGUF file")
    options.add_argument("--peer", default=sys.executable, help="a Python that has torch and transformers")
    options.add_argument("--cores", default="0", help="the cores that both may use (default 0)")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="prompts at once (default 1 16)")
    options.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    options.add_argument("--new", type=int, default=64, help="tokens of each answer (default 64)")
    options.add_argument("--rounds", type=int, default=5, help="times that either answers (default 5)")
    options.add_argument("--json", help="a file to write the figures to")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = as_folder(pathlib.Path(given.model), folder)
        cores = [int(core) for core in given.cores.split(",")]
        pythons = {"paged": sys.executable, "transformers": given.peer}
        workers = {name: Worker(pythons[name], module, path, given.dtype, cores) for name, module in _WORKERS.items()}
        rows = [_row(workers, size, given.prompt, given.new, given.rounds) for size in given.batches]
        for worker in workers.values():
            worker.close()
    _print(rows, given)
    if given.json:
        facts = {"options": vars(given), "load": {name: worker.load for name, worker in workers.items()}, "rows": rows}
        pathlib.Path(given.json).write_text(json.dumps(facts, indent=2) + "\n")


def _row(workers: dict[str, Worker], size: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Answers to the same prompts by both in turn. The first round compiles, and is told apart."""
    prompts = np.random.default_rng(0).integers(1000, 40_000, (size, prompt)).tolist()
    answers = {name: [worker.ask(prompts=prompts, new_tokens=new)] for name, worker in workers.items()}
    for _ in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker.ask(prompts=prompts, new_tokens=new))
    first = {name: own[0] for name, own in answers.items()}
    pairs = zip(first["paged"]["result"], first["transformers"]["result"], strict=True)
    row: dict[str, Any] = {"batch": size, "equal": sum(ours == theirs for ours, theirs in pairs)}
    for kind in ("cpu", "clock"):
        seconds = {name: [answer[kind] for answer in own[1:]] for name, own in answers.items()}
        rates = {name: size * new / statistics.median(own) for name, own in seconds.items()}
        in_turn = zip(seconds["paged"], seconds["transformers"], strict=True)
        ratio = statistics.median(theirs / ours for ours, theirs in in_turn)
        row[kind] = {"seconds": seconds, "tokens_per_second": rates, "ratio": ratio}
        row[kind]["first_seconds"] = {name: own[kind] for name, own in first.items()}
    return row


def _print(rows: list[dict[str, Any]], given: Any) -> None:
    print(f"Tokens per second of answers of {given.new} tokens to prompts of {given.prompt}, prompts included,")
    print(f"{given.dtype}, on cores {given.cores}, *measured*: medians of {given.rounds} rounds in turn.\n")
    print("| prompts | time | paged | transformers | ratio | first answer, paged | answers equal |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        for kind, name in (("cpu", "CPU"), ("clock", "clock")):
            rates, first = row[kind]["tokens_per_second"], row[kind]["first_seconds"]["paged"]
            cells = f"{rates['paged']:.1f} | {rates['transformers']:.1f} | {row[kind]['ratio']:.2f} | {first:.1f} s"
            print(f"| {row['batch']} | {name} | {cells} | {row['equal']} of {row['batch']} |")


if __name__ == "__main__":
    main()
