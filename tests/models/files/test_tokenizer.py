"""Tokenizers from a folder and from a GGUF file's metadata, and text that comes in whole characters."""

import functools
import itertools
import json
import pathlib
import sys

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from paged.models import TextStream, Tokenizer, open_gguf, open_safetensors, open_tokenizer
from paged.models.files.chat_template import _environment
from paged.models.files.gguf_tokenizer import backend_of, special_of

FILE = pathlib.Path("model.gguf")
BYTES = tokenizers.pre_tokenizers.ByteLevel.alphabet()
_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ã ¶"]
_WORDS = [*sorted(BYTES), *(merge.replace(" ", "") for merge in _MERGES), "<|end|>", "<|begin|>", "<tool>"]


def _byte_level(pre="llama-bpe", **changes):
    """Metadata of a vocabulary of bytes and a few merges."""
    names = {
        "model": "gpt2", "pre": pre, "tokens": _WORDS, "merges": _MERGES, "bos_token_id": len(_WORDS) - 2,
        "eos_token_id": len(_WORDS) - 3, "token_type": [1] * (len(_WORDS) - 3) + [3, 3, 4],
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in (names | changes).items() if value is not None}


_PIECES = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0} | {f"<0x{i:02X}>": 0.0 for i in range(256)}
_PIECES |= {"▁": -9.0, "a": -8.0, "b": -7.5, "c": -8.5, "ab": -3.0, "bc": -2.0, "▁a": -4.0, "abc": -1.0, "▁abc": -5.0,
            "cab": -2.5, "é": -8.2, "bb": -6.0, "bbb": -6.5, "d": -8.0, "ad": -3.5, "db": -2.2}  # fmt: skip


def _sentence_piece(**changes):
    names = {
        "model": "llama", "tokens": list(_PIECES), "scores": list(_PIECES.values()), "bos_token_id": 1,
        "eos_token_id": 2, "unknown_token_id": 0, "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(_PIECES) - 259),
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in (names | changes).items()}


@functools.cache
def _tokenizer(kind):
    metadata = {"bytes": _byte_level, "pieces": _sentence_piece}[kind]()
    return Tokenizer(backend_of(FILE, metadata), *special_of(metadata))


def test_special_tokens_of_a_gguf_file():
    tokenizer = _tokenizer("bytes")
    ids = tokenizer.encode("hello<|end|><tool>")
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["<|begin|>", "hello", "<|end|>", "<tool>"]
    assert tokenizer.decode(ids) == "hello<tool>" and tokenizer.decode(ids, skip_special=False)[:9] == "<|begin|>"
    assert tokenizer.encode("hello", add_special=False) == ids[1:2]
    assert tokenizer.eos_ids == {len(_WORDS) - 3} and tokenizer.special["bos_token"] == "<|begin|>"
    assert tokenizer.size == len(_WORDS) and tokenizer.decode([10**6]) == ""
    without = backend_of(FILE, _byte_level(add_bos_token=False, add_eos_token=True))
    assert without.encode("hello").tokens == ["hello", "<|end|>"]
    with pytest.raises(ValueError, match="The checkpoint has no chat template"):
        tokenizer.chat([{"role": "user", "content": "hello"}])


CUTS = {
    "llama-bpe": ["I", "'M", " here", ":", " ", "123", "45", "\n\n", "don", "'t", "  ", " x"],
    "qwen2": ["I", "'M", " here", ":", " ", "1", "2", "3", "4", "5", "\n\n", "don", "'t", "  ", " x"],
    "gpt-4o": ["I'M", " here", ":", " ", "123", "45", "\n\n", "don't", "  ", " x"],
    "tekken": ["I", "'M", " here", ":", " ", "1", "2", "3", "4", "5", "\n\n", "don", "'t", "  ", " x"],
    "gpt-2": ["I", "'", "M", " here", ":", " 12345", "\n", "\n", "don", "'t", "  ", " x"],
    "smollm": ["I", "'", "M", " here", ":", " ", "1", "2", "3", "4", "5", "\n", "\n", "don", "'t", "  ", " x"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_models_of_that_name_cut_it(pre):
    text = "I'M here: 12345\n\ndon't   x"
    backend = backend_of(FILE, _byte_level(pre))
    spans = [text[begin:end] for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert spans == CUTS[pre] and "".join(spans) == text


def _merged_by_score(text):
    """Sentence pieces by the definition: of all neighbours that make a piece, merge those of the best, leftmost."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        pairs = [(-_PIECES[piece], i) for i, piece in enumerate(joined) if piece in _PIECES]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [piece for part in parts for piece in
            ([part] if part in _PIECES else [f"<0x{byte:02X}>" for byte in part.encode()])]  # fmt: skip


@given(st.text(alphabet="abcd é€", max_size=12))
@example("abcab bbb adb")
def test_sentence_pieces_merge_by_score(text):
    encoded = _tokenizer("pieces").backend.encode(text)
    if text:
        assert encoded.tokens == ["<s>", *_merged_by_score(text)]
    assert _tokenizer("pieces").decode(encoded.ids) == text


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@given(st.data())
def test_a_stream_gives_whole_characters_and_loses_none(kind, data):
    """Of any tokens, also such that are no text: pieces of characters, special tokens, spaces at the beginning."""
    tokenizer = _tokenizer(kind)
    text = data.draw(st.text(alphabet="ab ö€😀\n", max_size=6))
    ids = tokenizer.encode(text) + data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=8))
    ids += tokenizer.encode(data.draw(st.text(alphabet="a €", max_size=3)), add_special=False)
    stream, pieces, at = tokenizer.stream(), [], 0
    while at < len(ids):
        step = data.draw(st.integers(1, 3))
        pieces.append(stream.push(ids[at : at + step]))
        at += step
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    whole, joined = tokenizer.decode(ids), "".join([*pieces, stream.finish()])
    if kind == "pieces" and "\ufffd" in whole:  # its decoder breaks all characters that broken bytes follow
        left = iter(joined)
        assert all(character in left for character in whole if character != "\ufffd")
    else:
        assert joined == whole


def test_a_stream_keeps_little_and_gives_text_at_once():
    """It decodes a few tokens at a time, however long the text is, and begins anew after the end."""
    calls = []
    stream = TextStream(lambda ids: calls.append(len(ids)) or bytes(ids).decode("utf-8", "replace"))
    assert [stream.push([byte]) for byte in b"x" * 50] == ["x"] * 50 and max(calls) <= 2
    assert stream.push("€".encode()[:2]) == "" and stream.finish() == "\ufffd" and stream.push([120]) == "x"


@pytest.mark.parametrize(
    "metadata, message",
    [
        (_byte_level("deepseek"), r"model.gguf: tokenizer.ggml.pre is 'deepseek'; known are gpt-2, smollm, llama-bpe"),
        (_byte_level(model="t5"), r"tokenizer.ggml.model is 't5'"),
        (_byte_level(tokens=["a", "b", "a"], bos_token_id=0, eos_token_id=0), r"tokenizer.ggml.tokens has 'a' twice"),
        (_byte_level(tokens=[1]), r"tokenizer.ggml.tokens must be a list of str"),
        (_byte_level(bos_token_id=10**6), r"tokenizer.ggml.bos_token_id = 1000000 is no token: there are \d+"),
        (_byte_level(eos_token_id=-1), r"tokenizer.ggml.eos_token_id = -1 is no token"),
        (_byte_level(merges=["a b c"]), r"merges must be pairs"),
        (_byte_level(merges=["zz yy"]), r"model.gguf: its metadata makes no tokenizer"),
        (_byte_level(token_type=[1]), r"token_type has 1 entries, and there are \d+ tokens"),
        (_sentence_piece(scores=[0.0]), r"scores has 1 entries"),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_refused_by_name(metadata, message):
    with pytest.raises(ValueError, match=message):
        backend_of(FILE, metadata)


def _folder(folder, **files):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_says_its_ends_and_its_template(tmp_path):
    template = "{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}"
    config = {"bos_token": {"content": "a"}, "eos_token": "</s>", "chat_template": template}
    folder = _folder(tmp_path, tokenizer_config=config, config={"eos_token_id": 0})
    tokenizer = open_tokenizer(folder)
    assert tokenizer.eos_ids == {0, 3} and "with a chat template" in repr(tokenizer)
    assert tokenizer.chat([{"role": "user", "content": "b"}]) == [0, 1]
    _folder(tmp_path, generation_config={"eos_token_id": [1, 2]})
    (folder / "chat_template.jinja").write_text("b")
    tokenizer = open_tokenizer(folder)
    assert tokenizer.eos_ids == {1, 2, 3} and tokenizer.chat([{"role": "user", "content": "a"}]) == [1]
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (folder / "chat_template.jinja").unlink()
    _folder(tmp_path, tokenizer_config={"chat_template": named})
    assert open_tokenizer(folder).chat([]) == [0]


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path):
    assert open_tokenizer(tmp_path) is None
    _folder(tmp_path, config={"eos_token_id": "3"})
    with pytest.raises(ValueError, match=r"config.json: eos_token_id must be token ids; got 3"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Python"}}')
    with pytest.raises(ValueError, match=r"tokenizer.json: it is no tokenizer"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["gguf", "tokenizers", "jinja2"])
def test_a_missing_package_names_the_extra(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    folder = _folder(tmp_path, tokenizer_config={"chat_template": "a"})
    if name == "jinja2":
        _environment.cache_clear()
    (folder / "a.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ModuleNotFoundError, match=rf'needs the package {name}.*pip install "paged\[models\]"'):
        open_gguf(folder / "a.gguf") if name == "gguf" else open_tokenizer(folder)
    with pytest.raises(FileNotFoundError):  # safetensors need no package
        open_safetensors(folder)
