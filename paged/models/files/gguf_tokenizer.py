"""The tokenizer that a GGUF file's metadata describes, built from its vocabulary and merges."""

import pathlib
from collections.abc import Mapping
from typing import Any

from .extra import package

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

# How texts are cut into words before pairs are merged, by the name that files have for it: `tokenizer.ggml.pre`. Each
# is the pattern in tokenizer.json of the models whose files have that name.
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(end: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}"


_PATTERNS = {
    "llama-bpe": rf"{_ENGLISH}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_ENGLISH}|{_LETTERS}|\p{{N}}|{_REST}",
    "gpt-4o": rf"{_cased(_ENGLISH + '?')}|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}",
    "tekken": rf"{_cased('')}|\p{{N}}|{_REST_WITH_SLASH}",
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "llama4": "gpt-4o"}
_KNOWN = ("gpt-2", "smollm", *_PATTERNS)
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a word that is a token is one, whatever its merges say
_BEGIN_WITH_BOS = ("llama-bpe", "tekken")  # where the file does not say
# Texts of tokens that end an answer, where a file does not name them all.
_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>")


def backend_of(path: pathlib.Path, metadata: Mapping[str, Any]) -> Any:
    """The ``tokenizers.Tokenizer`` of a file. Raises ``ValueError``, which names the file and the key."""
    tokens = _listed(path, metadata, "tokens", str)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise ValueError(f"{path}: tokenizer.ggml.tokens has {twice[:100]!r} twice.")
    for name, value in metadata.items():
        if name.startswith("tokenizer.ggml.") and name.endswith("_token_id"):
            _require_id(path, name, value, len(tokens))
    kind = metadata["tokenizer.ggml.model"]
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in builders:
        raise ValueError(f"{path}: tokenizer.ggml.model is {str(kind)[:100]!r}; known are 'gpt2' and 'llama'.")
    try:
        backend, has_bos = builders[kind](path, metadata, tokens, vocabulary)
        _add_special(path, metadata, tokens, backend, has_bos)
    except (ValueError, ModuleNotFoundError):
        raise
    except Exception as error:  # the package raises plain exceptions
        raise ValueError(f"{path}: its metadata makes no tokenizer: {str(error)[:200]}.") from None
    return backend


def special_of(metadata: Mapping[str, Any]) -> tuple[frozenset[int], dict[str, str]]:
    """The tokens that end an answer, and the texts of special tokens by the names that templates have for them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{short}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
        for name, short in names.items()
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    ends = {metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot") if
            f"tokenizer.ggml.{name}_token_id" in metadata}  # fmt: skip
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    ends |= {i for i, kind in enumerate(kinds[: len(tokens)]) if kind == _CONTROL and tokens[i] in _ENDS}
    return frozenset(ends), special


def _listed(path: pathlib.Path, metadata: Mapping[str, Any], name: str, kind: type, count: int | None = None) -> list:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise ValueError(f"{path}: tokenizer.ggml.{name} must be a list of {kind.__name__}.")
    if count is not None and len(found) != count:
        raise ValueError(f"{path}: tokenizer.ggml.{name} has {len(found)} entries, and there are {count} tokens.")
    return found


def _require_id(path: pathlib.Path, name: str, value: Any, count: int) -> None:
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{path}: {name} = {str(value)[:40]} is no token: there are {count}.")


def _byte_level(
    path: pathlib.Path, metadata: Mapping[str, Any], tokens: list[str], vocabulary: dict[str, int]
) -> tuple[Any, bool]:
    """Pairs of bytes, merged in a given order."""
    tokenizers = package("tokenizers")
    said = metadata.get("tokenizer.ggml.pre")
    pre = _SAME.get(str(said), said)
    if pre not in _KNOWN:
        raise ValueError(f"{path}: tokenizer.ggml.pre is {str(said)[:100]!r}; known are {', '.join(_KNOWN)}.")
    merges = [tuple(merge.split(" ")) for merge in _listed(path, metadata, "merges", str)]
    if not all(len(merge) == 2 for merge in merges):
        raise ValueError(f"{path}: tokenizer.ggml.merges must be pairs of tokens with a space between them.")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    )
    cut, byte_level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    if pre in _PATTERNS:
        split = cut.Split(tokenizers.Regex(_PATTERNS[pre]), "isolated")
        backend.pre_tokenizer = cut.Sequence([split, byte_level(add_prefix_space=False, use_regex=False)])
    elif pre == "smollm":
        backend.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), byte_level(add_prefix_space=False)])
    else:
        backend.pre_tokenizer = byte_level(add_prefix_space=False)
    if pre == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend, pre in _BEGIN_WITH_BOS


def _sentence_piece(
    path: pathlib.Path, metadata: Mapping[str, Any], tokens: list[str], vocabulary: dict[str, int]
) -> tuple[Any, bool]:
    """Pieces with scores: of all pairs that make a piece, the one of the best score is merged first."""
    tokenizers = package("tokenizers")
    scores = _listed(path, metadata, "scores", float, len(tokens))
    pairs = [
        (-scores[i], i, token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: pair[:2])  # stable: of one piece, the shorter left part first
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, _, left, right in pairs],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normal.Sequence([normal.Prepend(_SPACE)] * bool(has_prefix) + [normal.Replace(" ", _SPACE)])
    backend.decoder = decode.Sequence(
        [decode.Replace(_SPACE, " "), decode.ByteFallback(), decode.Fuse()]
        + [decode.Strip(content=" ", left=1, right=0)] * bool(has_prefix)
    )
    return backend, True


def _add_special(
    path: pathlib.Path, metadata: Mapping[str, Any], tokens: list[str], backend: Any, has_bos: bool
) -> None:
    """Tokens that are found in a text before it is cut, and those that are put around a text."""
    tokenizers = package("tokenizers")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is not None:
        kinds = _listed(path, metadata, "token_type", int, len(tokens))
        for kind in (_CONTROL, _USER_DEFINED):
            added = [
                tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, of in zip(tokens, kinds, strict=True)
                if of == kind and token
            ]
            (backend.add_special_tokens if kind == _CONTROL else backend.add_tokens)(added)
    around = {"bos": metadata.get("tokenizer.ggml.add_bos_token", has_bos),
              "eos": metadata.get("tokenizer.ggml.add_eos_token", False)}  # fmt: skip
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in around}
    used = {name: tokens[i] for name, i in ids.items() if around[name] and i is not None}
    if used:
        single = [
            *(used[name] for name in used if name == "bos"),
            "$A",
            *(used[name] for name in used if name == "eos"),
        ]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[(text, ids[name]) for name, text in used.items()]
        )
