"""What the documentation shows runs: the README's code, and the demo on a small scale."""

import contextlib
import hashlib
import io
import pathlib
import re
import subprocess

import gguf
import jax
import jaxtyping
import numpy as np
import pytest
import tokenizers

import paged
from examples import corpus, demo, demo_train, pretrained, rollout
from tests.models.files import gguf_writing

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def test_readme_is_short_and_the_index_links_every_page():
    assert len(PAGES[0].read_text().split()) <= 600
    links = re.findall(r"\]\((\S+?\.md)\)", (ROOT / "docs" / "README.md").read_text())
    missing = {page.name for page in PAGES[1:]} - {"README.md", *links}
    assert not missing, f"docs/README.md does not link {sorted(missing)}"


def test_links_between_pages_lead_somewhere():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks").glob("*/README.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text())]
    broken = [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert links and not broken


def test_every_name_that_sources_and_pages_speak_of_exists():
    """An error that advises a class which is not there helps nobody."""
    paths = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "paged").rglob("*.py")]
    named = {(name, path.name) for path in paths for name in re.findall(r"\bpaged\.([A-Z]\w+)", path.read_text())}
    missing = sorted((name, page) for name, page in named if not hasattr(paged, name))
    assert len(named) > 50 and not missing


@contextlib.contextmanager
def _annotations_rest(is_wrong_on_purpose):
    """Code that shows an error passes a wrong argument. The function's own error must come, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", is_wrong_on_purpose)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# Pages of a test of seconds. Every run has how they begin; they run as a whole with the kernels' tables.
LONG = ("engine.md", "layers.md", "pictures.md", "serving.md", "testing.md")


def _pages():
    for path in WITH_CODE:
        if path.name in LONG:
            yield pytest.param(path, 1, id=f"{path.name}, the beginning")
        yield pytest.param(path, None, id=path.name, marks=[pytest.mark.kernels] * (path.name in LONG))


@pytest.mark.parametrize(("path", "blocks"), list(_pages()))
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(path, blocks):
    names: dict[str, object] = {}
    written = re.findall(r"```python\n(.*?)```(\s*```text\n(.*?)```)?", path.read_text(), re.DOTALL)
    for code, _, shown in written[:blocks]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), _annotations_rest("except " in code):
            exec(compile(code, str(path), "exec"), names)
        if shown:
            assert printed.getvalue().strip() == shown.strip()


def test_bigram_loss_is_that_of_a_hand_counted_model():
    training = np.frombuffer(b"abab", np.uint8)  # pairs: ab, ba, ab
    of_ab, of_ba = 3 / (256 + 2), 2 / (256 + 1)  # add-one counts over rows of 256
    expected = -(np.log(of_ab) + np.log(of_ba)) / 2
    assert corpus.bigram_loss(training, np.frombuffer(b"aba", np.uint8)) == pytest.approx(expected)


def test_the_standard_library_is_split_into_disjoint_files():
    training, held_out = corpus.standard_library()
    whole = training.tobytes()
    assert len(training) > 1_000_000 and len(held_out) > 5
    assert not any(file[:2000].tobytes() in whole for file in held_out)


@pytest.fixture
def small_demo(monkeypatch):
    """The demo that trains, with few pages. Its training may promote dtypes, which optax relies on; serving may not."""
    train = demo_train.train_and_report

    def train_with_promotion(*args):
        with jax.numpy_dtype_promotion("standard"):
            return train(*args)

    monkeypatch.setattr(demo_train, "train_and_report", train_with_promotion)
    monkeypatch.setattr(demo_train, "NUM_PAGES", 40)


@pytest.mark.slow
@pytest.mark.usefixtures("small_demo")
def test_the_demo_serves_exactly_and_reports_an_untrained_model(capsys):
    assert demo_train.main(["--steps", "2", "--prompts", "6", "--new-tokens", "16"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"\b0 different: ok", printed) and "NOT BETTER" in printed and "FAILED" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("small_demo")
def test_the_demo_notices_a_wrong_token(monkeypatch, capsys):
    honest = demo_train.generate

    def dishonest(*args, **kwargs):
        first, *others = honest(*args, **kwargs)
        wrong = ((first.tokens[0] + 1) % 256, *first.tokens[1:])
        return [type(first)(first.prompt, wrong, first.finish_reason, first.preemptions), *others]

    monkeypatch.setattr(demo_train, "generate", dishonest)
    assert demo_train.main(["--steps", "2", "--prompts", "6", "--new-tokens", "16"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.kernels
def test_rollouts_teach_and_agree_with_training(capsys):
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        assert rollout.main(["--rounds", "40"]) == 0
    assert "compiled: " in capsys.readouterr().out


def test_without_the_package_the_demo_says_so_and_serves_the_small_model(monkeypatch, capsys):
    calls = []

    def fails(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution found\n")

    monkeypatch.setattr(pretrained, "PACKAGE", "paged-no-such-package")
    monkeypatch.setattr(pretrained.subprocess, "run", fails)
    monkeypatch.setattr(demo_train, "main", lambda arguments: 7)
    assert demo.main([]) == 7
    printed = capsys.readouterr().out
    assert "SmolLM2 cannot be had here: pip cannot install paged-no-such-package 0.1.2: ERROR: No matching" in printed
    assert calls[0][-2:] == ["--no-deps", "paged-no-such-package==0.1.2"]


def test_the_model_is_found_by_the_list_of_files_checked_and_never_imported(monkeypatch, tmp_path):
    package, listed = tmp_path / "paged_no_such_package", tmp_path / "paged_no_such_package-0.1.2.dist-info"
    package.mkdir()
    listed.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "model.gguf").write_bytes(b"GGUF")
    (listed / "METADATA").write_text("Name: paged-no-such-package\nVersion: 0.1.2\n")
    (listed / "RECORD").write_text("paged_no_such_package/__init__.py,,\npaged_no_such_package/model.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "PACKAGE", "paged-no-such-package")
    monkeypatch.setattr(pretrained, "FILE", "paged_no_such_package/model.gguf")
    with pytest.raises(
        pretrained.Unavailable, match=r"model.gguf has the sha256 [0-9a-f]{64}, and the model's is b179"
    ):
        pretrained.smollm2()
    monkeypatch.setattr(pretrained, "SHA256", hashlib.sha256(b"GGUF").hexdigest())
    assert pretrained.smollm2() == package / "model.gguf"


@pytest.mark.slow
def test_the_demo_serves_a_file_and_notices_a_wrong_token(monkeypatch, tmp_path, capsys):
    """With a tiny random model, whose words are bytes."""
    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "ab", "<|im_end|>"]
    string, texts = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
    extra = {"model": ("gpt2", string), "pre": ("smollm", string), "tokens": (words, texts)}
    extra |= {"token_type": ([1] * 257 + [3], texts), "eos_token_id": (257, gguf.GGUFValueType.UINT32)}
    extra = {f"tokenizer.ggml.{name}": value for name, value in extra.items()}
    extra["tokenizer.ggml.merges"] = (["a b"], texts)
    extra["tokenizer.chat_template"] = ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", string)
    weights = gguf_writing.hugging_face_weights("llama", words=len(words))
    file = gguf_writing.write(tmp_path / "model.gguf", "llama", weights, extra=extra)
    monkeypatch.setattr(demo, "NUM_PAGES", 30)
    monkeypatch.setattr(demo, "SYSTEM", "Hm.")
    questions = ("Why?", "What is a page?", "Who?", "Where is the daughter of the baker?")
    assert demo.serve_and_check(file, questions, 12) == 0
    printed = capsys.readouterr().out
    assert "0 different: ok" in printed and "PASSED" in printed and "--- What is a page?" in printed
    honest = demo.generate

    def dishonest(*args, **kwargs):
        (first, *others), state = honest(*args, **kwargs)
        wrong = ((first.tokens[0] + 1) % 256, *first.tokens[1:])
        return [type(first)(first.prompt, wrong, first.finish_reason, first.preemptions), *others], state

    monkeypatch.setattr(demo, "generate", dishonest)
    assert demo.serve_and_check(file, questions[:2], 4) == 1
    assert "different: NOT EQUAL" in capsys.readouterr().out
