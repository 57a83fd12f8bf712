"""What the demos share: pages over time, and the check of served tokens against dense recomputation without a cache."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from paged.runtime import Generation, StepReport


def print_pages_over_time(reports: Sequence[StepReport], num_pages: int, width: int = 24, height: int = 40) -> None:
    """Pages in use, one line for every so many steps."""
    print(f"\npages in use over {len(reports)} steps, of {num_pages}:")
    for i in range(0, len(reports), max(1, len(reports) // width)):
        report = reports[i]
        bar = "#" * round(height * report.pages_in_use / num_pages)
        print(f"  step {i:4d} {report.kind:>7} |{bar:<{height}}| {report.pages_in_use:3d}  ", end="")
        print(f"running {report.running:2d} waiting {report.waiting:2d}")


@dataclasses.dataclass
class Comparison:
    """Served tokens against the likeliest by dense recomputation: how many are equal, ties, and different."""

    tie: float
    equal: int = 0
    ties: int = 0
    different: int = 0

    def add(self, tokens: Sequence[int], logits: np.ndarray) -> None:
        """Compare served tokens with logits float[tokens, vocabulary] of the positions before them."""
        for served, row in zip(tokens, logits, strict=True):
            if served == int(row.argmax()):
                self.equal += 1
            elif row.max() - row[served] < self.tie:
                self.ties += 1
            else:
                self.different += 1

    def report(self) -> bool:
        """Print the result. Returns whether every token was equal or a tie."""
        count = self.equal + self.ties + self.different
        is_exact = self.different == 0 and count > 0
        print(f"\n{count} served tokens against dense recomputation without a cache: {self.equal} equal,")
        print(f"{self.ties} ties (logits within {self.tie:g}), ", end="")
        print(f"{self.different} different: {'ok' if is_exact else 'NOT EQUAL'}")
        return is_exact


def compare_with_dense(
    dense: Callable[[np.ndarray], np.ndarray], results: Sequence[Generation], tie: float, each: Callable[[], object]
) -> Comparison:
    """Whether every served token is the likeliest one by dense recomputation of all tokens before it.

    If that holds for the first ``i`` tokens then dense greedy decoding has come to the same ``i`` tokens, so that one
    dense pass over a prompt and its answer checks the whole answer. ``dense`` gives logits float[tokens, vocabulary] of
    int32[tokens]. ``each`` is called after each prompt.
    """
    longest = max(len(result.prompt) + len(result.tokens) for result in results)
    comparison = Comparison(tie)
    for result in results:
        tokens = np.zeros(longest, np.int32)  # what follows a token cannot change it: attention is causal
        sequence = [*result.prompt, *result.tokens]
        tokens[: len(sequence)] = sequence
        comparison.add(result.tokens, dense(tokens)[len(result.prompt) - 1 : len(sequence) - 1])
        each()
    return comparison
