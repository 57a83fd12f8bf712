"""Serves requests that come over time, in turn with ``transformers``: ``python -m benchmarks.serving --model PATH``."""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from benchmarks.folder import as_folder
from benchmarks.worker import Worker

from .load import Load
from .plot import plot

_WORKERS = {
    "paged": "benchmarks.serving.paged_worker",
    "transformers": "benchmarks.serving.transformers_worker",
    "one by one": "benchmarks.serving.naive_worker",
}


def main() -> None:
    """Parse, measure, print."""
    given = _options().parse_args()
    load = Load(given.requests, given.rate, given.system, given.prompt, given.new, given.spread, given.most, given.seed)
    drawn = load.draw()
    asked = {**drawn, "slots": given.slots, "pages": given.pages, "clock": given.clock}
    settings: dict[str, Any] = {name: {} for name in _WORKERS}
    settings["paged"] = {"chunk_size": given.chunk, "steps": given.steps}
    if given.page_cache == "off":
        settings["paged"]["prefix_cache"], settings["transformers"]["allow_block_sharing"] = False, False
    with tempfile.TemporaryDirectory() as folder:
        path = as_folder(pathlib.Path(given.model), folder)
        cores = [int(core) for core in given.cores.split(",")]
        workers = {
            name: Worker(sys.executable if name == "paged" else given.peer, _WORKERS[name], path, given.dtype, cores)
            for name in given.servers
        }
        served = _serve(workers, asked, settings, given.rounds)
        for worker in workers.values():
            worker.close()
    _print(served, given, load)
    if given.json:
        facts = {"options": vars(given), "load": drawn, "served": served}
        pathlib.Path(given.json).write_text(json.dumps(facts, indent=2) + "\n")
    if given.plot:
        print(plot(served, pathlib.Path(given.plot)))


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    add = options.add_argument
    add("--model", required=True, help="a folder in Hugging Face's form, or a GGUF file")
    add("--peer", default=sys.executable, help="a Python that has torch and transformers")
    add("--servers", nargs="+", choices=list(_WORKERS), default=list(_WORKERS), help="who serves (default all)")
    add("--clock", choices=["cpu", "wall"], default="cpu", help="what time is: CPU time, or the wall's (default cpu)")
    add("--cores", default="0", help="the cores that each may use (default 0)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--requests", type=int, default=32, help="how many (default 32)")
    add("--rate", type=float, default=0.0, help="arrivals per second, a Poisson process; 0: all at once (default 0)")
    add("--system", type=int, default=64, help="tokens with which every prompt begins (default 64)")
    add("--prompt", type=int, default=32, help="median of a prompt's tokens after them, log-normal (default 32)")
    add("--new", type=int, default=48, help="median of an answer's tokens, log-normal (default 48)")
    add("--spread", type=float, default=0.5, help="standard deviation of the logarithms of both (default 0.5)")
    add("--most", type=int, default=192, help="the most tokens of either (default 192)")
    add("--seed", type=int, default=0, help="of arrivals, lengths and ids (default 0)")
    add("--slots", type=int, default=8, help="sequences that run at once (default 8)")
    add("--pages", type=int, default=256, help="pages of 16 tokens (default 256)")
    add("--page-cache", choices=["on", "off"], default="on", help="whether prompts share pages (default on)")
    add("--chunk", type=int, default=64, help="rows of a step for prompts, ours (default 64)")
    add("--steps", type=int, default=32, help="steps of a launch, ours (default 32)")
    add("--rounds", type=int, default=3, help="times that each serves the load, in turn, after one more (default 3)")
    add("--json", help="a file for every figure of every round")
    add("--plot", help="an image file: requests done over time (needs matplotlib)")
    return options


def _serve(workers: dict[str, Worker], asked: dict, settings: dict, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The reports of all rounds of each server, in turn. The first round compiles."""
    served: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(rounds + 1):
        for name, worker in workers.items():
            answer = worker.ask(**asked, how=settings[name])
            served[name].append({**answer["result"], "cpu": answer["cpu"], "clock": answer["clock"]})
    return served


def _median(rounds: list[dict[str, Any]], *path: str) -> float:
    def value(report: Any) -> float:
        for name in path:
            report = report[name]
        return report

    return statistics.median(value(report) for report in rounds[1:])


def _print(served: dict[str, list[dict[str, Any]]], given: Any, load: Load) -> None:
    come = f"{load.rate} per second (Poisson)" if load.rate else "all at once"
    print(f"{load.requests} requests, {come}. Prompts: {load.system} tokens in common, then log-normal ones, median")
    print(f"{load.prompt}; answers log-normal, median {load.new}; spread of both {load.spread}. {given.slots} slots,")
    how = f"{given.dtype}, cores {given.cores}, {given.clock} time"
    print(f"{how}, *measured*: medians of {given.rounds} rounds in turn.\n")
    print("| server | tokens per second | first token, median | 95 % | per token, median | 95 % | the first round |")
    print("|---|---|---|---|---|---|---|")
    for name, rounds in served.items():
        times = [_median(rounds, kind, q) for kind in ("first_token", "per_token") for q in ("median", "p95")]
        first, last, each, late = times
        rate, cold = _median(rounds, "tokens_per_second"), rounds[0]["seconds"]
        print(f"| {name} | {rate:.1f} | {first:.2f} s | {last:.2f} s | {each:.3f} s | {late:.3f} s | {cold:.1f} s |")
    if ours := served.get("paged"):
        report = ours[-1]
        names = ("steps", "prompt_tokens", "reused_tokens", "preemptions", "most_pages")
        print("\npaged: " + ", ".join(f"{report[name]} {name.replace('_', ' ')}" for name in names) + ".")
        for name, rounds in served.items():
            if name != "paged":
                pairs = list(zip(report["tokens"], rounds[-1]["tokens"], strict=True))
                print(f"{sum(a == b for a, b in pairs)} of {len(pairs)} answers are those of {name}.")


if __name__ == "__main__":
    main()
