"""The checkpoint of the tests of the command line."""

import json
import pathlib
import shutil

import pytest
import tokenizers

CHECKPOINT = pathlib.Path(__file__).parent.parent / "models" / "checkpoints" / "smollm2"
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}w9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model, and a tokenizer whose tokens are words: w0 to w61, and two roles."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(CHECKPOINT / name, folder / name)
    words = {f"w{i}": i for i in range(62)} | {"user": 62, "system": 63}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder
