"""`python -m paged generate`: answers of a checkpoint to many prompts at once, shown as they come."""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from paged.lower import TARGETS
from paged.models import Tokenizer, load, open_checkpoint, open_tokenizer
from paged.runtime import Generation, NGramDraft, Sampler, StepReport
from paged.runtime import generate as answer

from .progress import Bar

_EXAMPLE = """\
examples:
  python -m paged generate --model SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt "What is paging?"
  python -m paged generate --model Qwen3-0.6B --file prompts.txt --max-new-tokens 64 --slots 8 --pages 200

A model is a folder in Hugging Face's form, or a GGUF file. All prompts are served together, through one pool of pages;
answers come in the order of the prompts. Text goes to stdout, and progress to stderr.
"""


def add_parser(commands: Any) -> None:
    """Add the command ``generate``."""
    parser = commands.add_parser(
        "generate",
        help="answer prompts with a model of a checkpoint",
        description="Answer prompts with a model of a checkpoint.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="a folder in Hugging Face's form, or a GGUF file"
    )
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may stand several times"
    )
    asked.add_argument("--file", metavar="PATH", help='a file with a prompt in each line; "-" for stdin')
    asked.add_argument("--chat", action="store_true", help="each prompt is what a user says; needs a chat template")
    asked.add_argument("--system", metavar="TEXT", help="with --chat: what the system says before")
    number("--max-new-tokens", default=128, help="the longest answer (default: 128)")
    drawn = parser.add_argument_group("how tokens are drawn")
    drawn.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest token")
    drawn.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens")
    drawn.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of probability P")
    drawn.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    served = parser.add_argument_group("how it is served")
    served.add_argument("--slots", type=int, metavar="N", help="prompts at once (default: all, and at most 16)")
    served.add_argument("--pages", type=int, metavar="N", help="pages of the pool (default: as --slots prompts need)")
    served.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens per page (default: 16)")
    served.add_argument("--chunk-size", type=int, default=64, metavar="N", help="rows of a prompt's step (default: 64)")
    number = functools.partial(served.add_argument, type=int, metavar="N")
    number("--ngram-drafts", default=0, help="verify up to N drafts from a prompt's own tokens in a step (default: 0)")
    served.add_argument("--dtype", help="of parameters and pages (default: as they are stored)")
    served.add_argument("--target", default="auto", choices=TARGETS, help='default: "auto"')


def run(options: argparse.Namespace) -> int:
    """Answer all prompts. Returns the exit status."""
    if options.system is not None and not options.chat:
        raise ValueError("--system is what the system says in a conversation: add --chat.")
    texts = _texts(options)
    started = time.perf_counter()
    with Bar(unit="token", has_lines=False) as bar:
        bar.show(0, 0, f"reading {options.model}")
        checkpoint = open_checkpoint(options.model)
        tokenizer = open_tokenizer(checkpoint)
        if tokenizer is None:
            raise ValueError(f"{options.model} has no tokenizer (tokenizer.json), so text cannot become tokens.")
        prompts = [_ids(tokenizer, text, options) for text in texts]
        slots, pages = _sizes(prompts, options, checkpoint.config.get("max_position_embeddings"))
        sizes = {"num_pages": pages, "page_size": options.page_size, "num_slots": slots}
        sizes |= {"chunk_size": options.chunk_size}
        model, state, _ = load(options.model, **sizes, dtype=options.dtype, target=options.target)
        model = model.apart() if jax.default_backend() == "cpu" else model
        loaded = time.perf_counter()
        show = _Show(tokenizer, texts, options.max_new_tokens, pages, bar)
        results, _ = answer(
            model,
            state,
            prompts,
            max_new_tokens=options.max_new_tokens,
            num_slots=slots,
            chunk_size=options.chunk_size,
            sampler=Sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p),
            key=jax.random.key(options.seed),
            eos=tokenizer.eos_ids or None,
            donate_state=True,
            speculation=NGramDraft(num_tokens=options.ngram_drafts) if options.ngram_drafts else None,
            on_step=show.step,
        )
    ended = time.perf_counter()
    print(f"loaded in {loaded - started:.1f} s; {show.summary(results, loaded, ended)}", file=sys.stderr)
    return 0


def _texts(options: argparse.Namespace) -> list[str]:
    lines: list[str] = []
    if options.file is not None:
        text = sys.stdin.read() if options.file == "-" else pathlib.Path(options.file).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
    texts = [*options.prompt, *lines]
    if not texts:
        raise ValueError("there is no prompt: give --prompt TEXT, or --file PATH with a prompt in each line.")
    return texts


def _ids(tokenizer: Tokenizer, text: str, options: argparse.Namespace) -> list[int]:
    if not options.chat:
        ids = tokenizer.encode(text)
        if not ids:
            raise ValueError(f"the prompt {text!r} has no token.")
        return ids
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return tokenizer.chat([*system, {"role": "user", "content": text}])


def _sizes(prompts: Sequence[Sequence[int]], options: argparse.Namespace, positions: Any) -> tuple[int, int]:
    """Sequences at once, and pages of the pool: by default, room for the longest of that many prompts."""
    for name in ("max_new_tokens", "page_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}.")
    if options.ngram_drafts < 0:
        raise ValueError(f"--ngram-drafts must be at least 0; got {options.ngram_drafts}.")
    for i, prompt in enumerate(prompts):
        if isinstance(positions, int) and len(prompt) + options.max_new_tokens > positions:
            raise ValueError(
                f"prompt {i + 1} has {len(prompt)} tokens, and {options.max_new_tokens} may follow: more than the "
                f"{positions} positions that the model knows. Shorten it, or lower --max-new-tokens."
            )
    slots = min(len(prompts), 16) if options.slots is None else options.slots
    needs = sorted(-(-(len(prompt) + options.max_new_tokens - 1) // options.page_size) for prompt in prompts)
    return slots, sum(needs[-slots:]) if options.pages is None else options.pages


@dataclasses.dataclass
class _Show:
    """Prints answers as they come: that of the first prompt that has not ended, and then what others have by then."""

    tokenizer: Tokenizer
    texts: Sequence[str]
    max_new_tokens: int
    num_pages: int
    bar: Bar

    def __post_init__(self) -> None:
        self.streams = [self.tokenizer.stream() for _ in self.texts]
        self.waiting, self.left = [""] * len(self.texts), set(range(len(self.texts)))
        self.head, self.tokens, self.reused, self.most_pages = 0, 0, 0, 0
        self.first: float | None = None
        self.bar.show(0, self._total(), "first step")

    def step(self, report: StepReport) -> None:
        """One step of the model."""
        if report.drawn and self.first is None:
            self.first = time.perf_counter()
            self._begin()
        for i, tokens in report.drawn.items():
            self.tokens += len(tokens)
            self.waiting[i] += self.streams[i].push(tokens)
        for i in report.ended:
            self.waiting[i] += self.streams[i].finish()
        self.left -= set(report.ended)
        self.reused += report.tokens_reused
        self.most_pages = max(self.most_pages, report.pages_in_use)
        self._print()
        what = f"{report.pages_in_use}/{self.num_pages} pages, {report.running} running, {report.waiting} waiting"
        self.bar.show(self.tokens, self._total(), what)

    def _total(self) -> int:
        """The most tokens that may come: answers that end early count as what they are, once all have ended."""
        return len(self.texts) * self.max_new_tokens

    def _begin(self) -> None:
        if len(self.texts) > 1:
            head = self.texts[self.head]
            self.bar.write(
                f"--- {self.head + 1} of {len(self.texts)}: {head if len(head) <= 80 else head[:77] + '...'}\n"
            )

    def _print(self) -> None:
        """Whole lines while a bar stands below the text; every piece where text and bar do not share a terminal."""
        is_shared = sys.stdout.isatty() and sys.stderr.isatty() and len(self.texts) > 1
        while self.head < len(self.texts):
            has_ended = self.head not in self.left
            text = self.waiting[self.head] + "\n" * has_ended
            cut = text.rfind("\n") + 1 if is_shared else len(text)
            if cut:
                if len(self.texts) == 1:
                    self.bar.close()  # one answer streams without a bar
                self.bar.write(text[:cut])
            self.waiting[self.head] = text[cut:]
            if not has_ended:
                return
            self.head += 1
            if self.head < len(self.texts):
                self._begin()

    def summary(self, results: Sequence[Generation], started: float, ended: float) -> str:
        """What it took."""
        first = "none" if self.first is None else f"{self.first - started:.1f} s"
        read, seconds = sum(len(result.prompt) for result in results), ended - started
        prompts = f"{len(results)} prompt{'s' * (len(results) != 1)}"
        return (
            f"{prompts} of {read} tokens, {self.tokens} tokens generated in {seconds:.1f} s: "
            f"{self.tokens / seconds:.1f} tokens per second, compilation included; first token after {first}; "
            f"at most {self.most_pages} of {self.num_pages} pages in use; "
            f"{sum(result.preemptions for result in results)} preemptions; "
            f"{self.reused} tokens found in the prefix cache"
        )
