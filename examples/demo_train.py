"""The whole road once: declare an attention, train a small byte-level model with it, serve prompts from pages, check.

Run it with `make demo-train`, or `python -m examples.demo_train` where `paged[examples]` is installed. It exits
non-zero when a served token is not the one that dense recomputation without a cache gives, or when the model has not
beaten a bigram model fitted on the same text.
"""

import argparse
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import paged
from paged.runtime import Generation, StepReport, generate

from .corpus import VOCABULARY, bigram_loss, standard_library
from .language_model import LanguageModel
from .serving import compare_with_dense, print_pages_over_time
from .training import evaluate, train

WIDTH, DEPTH, CONTEXT, BATCH = 128, 4, 256, 8
GLOBAL = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=16, soft_cap=30.0, sinks=True)
LOCAL = GLOBAL.replace(window=64)
LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=16, dtype=jnp.float32)
NUM_PAGES, NUM_SLOTS, CHUNK = 96, 12, 64
TIE = 1e-4  # logits closer than this are a tie: float32 sums in another order may rank them either way


def main(arguments: list[str] | None = None) -> int:
    """Train, serve, check. The exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=320, help="training steps")
    options.add_argument("--prompts", type=int, default=32, help="prompts to serve")
    options.add_argument("--new-tokens", type=int, default=64, help="bytes to generate for the longest answer")
    given = options.parse_args(arguments)

    print(f"{paged.lower(LOCAL, LAYOUT).explain()}\nand the same without the window, on alternate layers\n")
    training, held_out = standard_library()
    model, state = eqx.nn.make_with_state(LanguageModel)(
        (LOCAL, GLOBAL), LAYOUT, NUM_PAGES, vocabulary=VOCABULARY, width=WIDTH, depth=DEPTH, key=jax.random.key(0)
    )
    model = train_and_report(model, training, given.steps)
    has_learnt = beats_bigram(model, training, held_out)

    prompts, new_tokens = draw_prompts(held_out, given.prompts, given.new_tokens)
    results = serve(model, state, prompts, new_tokens)
    is_exact = equals_dense_decoding(model, results)
    print("\nPASSED" if has_learnt and is_exact else "\nFAILED")
    return 0 if has_learnt and is_exact else 1


def train_and_report(model: LanguageModel, training: np.ndarray, steps: int) -> LanguageModel:
    """The trained model."""
    from_text = np.random.default_rng(0).integers(0, len(training) - CONTEXT - 1, size=(steps, BATCH, 1))
    windows = training[from_text + np.arange(CONTEXT + 1)]
    parameters = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    print(f"training {parameters:,} parameters on {len(training):,} bytes of the standard library's source")
    model, losses = train(model, windows, learning_rate=4e-3)
    print(f"loss {losses[0]:.3f} -> {np.mean(losses[-20:]):.3f} nats per byte")
    return model


def beats_bigram(model: LanguageModel, training: np.ndarray, held_out: list[np.ndarray]) -> bool:
    """Whether the model predicts held-out text better than a bigram model of the training text."""
    text = np.concatenate([file[: 4 * CONTEXT] for file in held_out])
    ours, bigram = evaluate(model, text, CONTEXT), bigram_loss(training, text)
    print(
        f"held-out loss: model {ours:.3f}, bigram {bigram:.3f} nats per byte: {'ok' if ours < bigram else 'NOT BETTER'}"
    )
    return ours < bigram


def draw_prompts(held_out: list[np.ndarray], count: int, longest_answer: int) -> tuple[list[list[int]], list[int]]:
    """Beginnings of held-out text of unequal length, and as many numbers of bytes to generate."""
    draw = np.random.default_rng(1)
    prompts, new_tokens = [], []
    for i in range(count):
        file = held_out[i % len(held_out)]
        length = int(draw.integers(1, CONTEXT - longest_answer))
        start = int(draw.integers(0, len(file) - length))
        prompts.append(file[start : start + length].tolist())
        new_tokens.append(int(draw.integers(longest_answer // 2, longest_answer + 1)))
    return prompts, new_tokens


def serve(
    model: LanguageModel, state: eqx.nn.State, prompts: list[list[int]], new_tokens: list[int]
) -> list[Generation]:
    """Greedy answers to all prompts through one pool of pages, and a report of what it took."""
    at_once = sum(-(-(len(p) + n) // LAYOUT.page_size) for p, n in zip(prompts, new_tokens, strict=True))
    lengths = sorted(len(prompt) for prompt in prompts)
    print(f"\nserving {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} bytes from {NUM_PAGES} pages; ", end="")
    print(f"all at once would hold {at_once}")
    assert at_once > NUM_PAGES, "the pool must be too small for all prompts at once, or the demo shows nothing"

    reports: list[StepReport] = []
    started = time.perf_counter()
    with tqdm(total=sum(new_tokens), desc="serving", unit="token") as bar:

        def on_step(report: StepReport) -> None:
            reports.append(report)
            bar.update(report.new_tokens)
            bar.set_postfix(pages=report.pages_in_use, running=report.running, waiting=report.waiting)

        results = generate(
            model,
            state,
            prompts,
            num_pages=NUM_PAGES,
            page_size=LAYOUT.page_size,
            num_slots=NUM_SLOTS,
            chunk_size=CHUNK,
            max_new_tokens=new_tokens,
            on_step=on_step,
        )
    seconds = time.perf_counter() - started
    print_pages_over_time(reports, NUM_PAGES)
    generated = sum(len(result.tokens) for result in results)
    processed = generated + sum(len(prompt) for prompt in prompts)
    rates = f"{generated / seconds:.0f} per second, {processed / seconds:.0f} with the prompts'"
    print(f"{generated} tokens generated: {rates} (measured, wall time, compilation included)")
    print(f"{sum(result.preemptions for result in results)} preemptions")
    for result in results[:3]:
        print(f"\n--- prompt ends: {bytes(result.prompt[-60:])!r}\n    answer: {bytes(result.tokens)!r}")
    return results


def equals_dense_decoding(model: LanguageModel, results: list[Generation]) -> bool:
    """Whether every served token is the one that dense greedy decoding gives, ties aside."""
    dense = eqx.filter_jit(lambda model, tokens: model.dense(tokens[None])[0])
    comparison = compare_with_dense(
        lambda tokens: np.asarray(dense(model, jnp.asarray(tokens))), results, TIE, lambda: None
    )
    return comparison.report()


if __name__ == "__main__":
    sys.exit(main())
