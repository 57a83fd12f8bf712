"""`python -m paged generate`: answers equal those of `generate`, in order, as they come; faults in one sentence."""

import argparse
import re
import shutil
import sys

import pytest
import tokenizers

from paged import command
from paged.command.generate import _Show
from paged.command.progress import Bar
from paged.models import Tokenizer, load
from paged.runtime import Generation, NGramDraft, StepReport, generate


@pytest.mark.kernels
def test_answers_are_those_of_generate_in_the_order_of_prompts(folder, tmp_path, capsys):
    """Five prompts through pages for fewer, each with its number, and what it took on stderr."""
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w5 w5", "w10 w11 w12", "w13 w14"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(texts[1:]) + "\n")
    sizes = ["--max-new-tokens=6", "--slots=2", "--pages=6", "--page-size=4", "--chunk-size=4", "--dtype=float32"]
    given = ["--prompt", texts[0], "--file", str(tmp_path / "prompts.txt")]
    assert command.main(["generate", "--model", str(folder), "--chat", "--system", "w3", *given, *sizes]) == 0
    said = capsys.readouterr()
    model, state, tokenizer = load(folder, num_pages=6, page_size=4, num_slots=2, dtype="float32")
    model = model.apart()  # as the command on a CPU, whose program runs again
    prompts = [tokenizer.encode(f"system w3 user {text} w9") for text in texts]
    ends = tokenizer.eos_ids
    results = generate(model, state, prompts, max_new_tokens=6, num_slots=2, chunk_size=4, eos=ends)
    expected = [f"--- {i + 1} of 5: {texts[i]}\n{tokenizer.decode(r.tokens)}\n" for i, r in enumerate(results)]
    assert said.out == "".join(expected)
    count = sum(len(result.tokens) for result in results)
    generated = f"5 prompts of {sum(map(len, prompts))} tokens, {count} tokens generated"
    took = r" in .* s: [\d.]+ tokens per second, compilation included; first token after .* s; at most [456] of 6 pages"
    assert re.search(generated + took, said.err)


def _reports():
    """Two prompts: the second ends first."""
    steps = [({0: (1,)}, ()), ({0: (2,), 1: (3, 4)}, (1,)), ({0: (5,)}, (0,))]
    return [StepReport("decode", 1, len(drawn), 3, 2, 0, drawn, ended, tokens_reused=4) for drawn, ended in steps]


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_text_comes_with_its_step_and_others_wait_for_their_turn(capsys, monkeypatch, has_tqdm):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: has_tqdm or None)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(9)}))
    printed = []
    with Bar(unit="token", has_lines=False) as bar:
        show = _Show(Tokenizer(words), ["first", "x" * 90], 3, 8, bar)
        for report in _reports():
            show.step(report)
            printed.append(capsys.readouterr().out)
    assert printed == ["--- 1 of 2: first\nw1", " w2", " w5\n--- 2 of 2: " + "x" * 77 + "...\nw3 w4\n"]
    results = [Generation((7, 8), tokens, "length", 1) for tokens in ((1, 2, 5), (3, 4))]
    summary = show.summary(results, show.first - 1, show.first + 1)
    assert "2 prompts of 4 tokens, 5 tokens generated in 2.0 s: 2.5 tokens per second" in summary
    assert (
        "first token after 1.0 s; at most 3 of 8 pages in use; 2 preemptions; 12 tokens found in the prefix cache"
        in summary
    )


FAULTS = {
    "no prompt": ([], "there is no prompt: give --prompt TEXT"),
    "empty prompt": (["--prompt", ""], "the prompt '' has no token"),
    "no file": (["--file", "nowhere.txt"], "nowhere.txt"),
    "system": (["--prompt", "w1", "--system", "w2"], "add --chat"),
    "no tokens": (["--prompt", "w1", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1; got 0"),
    "drafts": (["--prompt", "w1", "--ngram-drafts", "-1"], "--ngram-drafts must be at least 0; got -1"),
    "long": (["--prompt", "w1", "--max-new-tokens", "9999"], "more than the 256 positions that the model knows"),
    "no model": (["--prompt", "w1", "--model", "nowhere"], "nowhere must be a folder with config.json"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_sentence_without_a_traceback(folder, capsys, name):
    arguments, text = FAULTS[name]
    assert command.main(["generate", "--model", str(folder), *arguments]) == 2
    said = capsys.readouterr()
    last = said.err.rpartition("python -m paged generate: ")[2]
    assert text in last and last.count("\n") == 1 and not said.out


def test_drafts_are_asked_for_by_number(folder, capsys, monkeypatch):
    asked = []

    def answer(*_, speculation, **__):
        asked.append(speculation)
        raise ValueError("asked")

    monkeypatch.setattr("paged.command.generate.answer", answer)
    for more in ([], ["--ngram-drafts=3"]):
        assert command.main(["generate", "--model", str(folder), "--prompt", "w1", *more]) == 2
    assert asked == [None, NGramDraft(num_tokens=3)]


def test_an_interruption_and_a_missing_tokenizer_are_said(folder, capsys, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert command.main(["generate", "--model", str(tmp_path / "model"), "--prompt", "w1"]) == 2
    assert "has no tokenizer (tokenizer.json), so text cannot become tokens" in capsys.readouterr().err

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "parser", lambda: _Fixed(argparse.Namespace(command="generate", run=interrupt)))
    assert command.main([]) == 130 and "generate: interrupted" in capsys.readouterr().err


class _Fixed:
    def __init__(self, options):
        self._options = options

    def parse_args(self, arguments):
        return self._options


def test_help_shows_examples_that_are_some(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paged"])
    with pytest.raises(SystemExit, match="0"):
        command.main(["generate", "--help"])
    examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m paged")]
    for line in examples:
        assert command.parser().parse_args(re.findall(r'"[^"]*"|\S+', line)[3:]).model
    assert len(examples) == 2
