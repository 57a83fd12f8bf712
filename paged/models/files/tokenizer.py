"""`Tokenizer`: text to token ids and back, and conversations by a checkpoint's own template."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paged.files import parse_object
from paged.runtime import TextStream

from .chat_template import ChatTemplate
from .extra import package
from .gguf_file import Checkpoint, open_gguf
from .gguf_tokenizer import backend_of, special_of

_ROLES = ("bos", "eos", "unk", "pad")


class Tokenizer:
    """Text to token ids and back.

    - ``backend``: the ``tokenizers.Tokenizer`` that does it.
    - ``eos_ids``: the tokens that end an answer.
    - ``special``: the texts of special tokens, by name: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``.
    - ``template``: the `ChatTemplate`, or None.

    `open_tokenizer` and `load` make one.
    """

    def __init__(
        self,
        backend: Any,
        eos_ids: Iterable[int] = (),
        special: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
    ):
        self.backend, self.eos_ids = backend, frozenset(eos_ids)
        self.special, self.template = dict(special or {}), template

    @property
    def size(self) -> int:
        """How many tokens there are. A model's vocabulary may be larger: its last rows are padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text. ``add_special``: with the tokens that the checkpoint puts around texts."""
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Ids without a token, which models with padded vocabularies can draw, have no text."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self) -> TextStream:
        """A decoder for tokens that come one after the other."""
        return TextStream(self.decode)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text of a conversation, see `ChatTemplate.render`. Raises ``ValueError`` if there is no template."""
        if self.template is None:
            raise ValueError("The checkpoint has no chat template: it was not made for conversations. Use encode.")
        return self.template.render(messages, **variables)

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """The token ids of a conversation, up to where the answer begins. ``variables``: see `ChatTemplate.render`."""
        return self.encode(self.chat_text(messages, **variables), add_special=False)

    def __repr__(self) -> str:
        chat = "with" if self.template is not None else "without"
        return f"Tokenizer of {self.size} tokens, {chat} a chat template"


def open_tokenizer(path: str | os.PathLike | Checkpoint) -> Tokenizer | None:
    """The tokenizer of a checkpoint.

    **Arguments:**

    - `path`: a folder in Hugging Face's form, or a GGUF file, or what `open_checkpoint` gave for one. A folder has
      tokenizer.json, and may have tokenizer_config.json, chat_template.jinja and generation_config.json.

    **Returns:** the `Tokenizer`. None for a folder without tokenizer.json, and for a GGUF file without a vocabulary.

    Raises ``ValueError``, which names the file, if one cannot be read, and ``ModuleNotFoundError`` without the extra
    ``models``.

    >>> import pathlib, tempfile, tokenizers
    >>> backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     backend.save(folder + "/tokenizer.json")
    ...     _ = (pathlib.Path(folder) / "config.json").write_text('{"eos_token_id": 1}')
    ...     tokenizer = open_tokenizer(folder)
    >>> tokenizer.encode("a"), tokenizer.decode([0, 1]), tokenizer.eos_ids
    ([0], 'a b', frozenset({1}))
    """
    if isinstance(path, Checkpoint):
        return _of_gguf(path) if path.metadata else _of_folder(path.path)
    path = pathlib.Path(path)
    return _of_gguf(open_gguf(path)) if path.suffix == ".gguf" else _of_folder(path)


def _of_gguf(checkpoint: Checkpoint) -> Tokenizer | None:
    metadata, origin = checkpoint.metadata, str(checkpoint.path)
    if "tokenizer.ggml.model" not in metadata:
        return None
    backend = backend_of(checkpoint.path, metadata)
    eos_ids, special = special_of(metadata)
    source = metadata.get("tokenizer.chat_template")
    template = ChatTemplate(source, origin, special) if isinstance(source, str) else None
    return Tokenizer(backend, eos_ids, special, template)


def _of_folder(folder: pathlib.Path) -> Tokenizer | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = package("tokenizers").Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the package raises plain exceptions
        raise ValueError(f"{file}: it is no tokenizer: {str(error)[:200]}.") from None
    config = _optional(folder / "tokenizer_config.json")
    special = {f"{role}_token": text for role in _ROLES if (text := _text(config.get(f"{role}_token"))) is not None}
    eos_ids = _eos_ids(folder)
    if (of_text := backend.token_to_id(special.get("eos_token", ""))) is not None:
        eos_ids.add(of_text)
    return Tokenizer(backend, eos_ids, special, _template(folder, config, special))


def _optional(file: pathlib.Path) -> dict[str, Any]:
    return parse_object(file, file.read_bytes()) if file.is_file() else {}


def _text(token: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _eos_ids(folder: pathlib.Path) -> set[int]:
    """The tokens that generation_config.json ends at, or those of config.json where it says none."""
    for name in ("generation_config.json", "config.json"):
        said = _optional(folder / name).get("eos_token_id")
        if said is not None:
            ids = said if isinstance(said, list) else [said]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise ValueError(f"{folder / name}: eos_token_id must be token ids; got {str(said)[:100]}.")
            return set(ids)
    return set()


def _template(folder: pathlib.Path, config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file), special)
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    return ChatTemplate(source, str(folder / "tokenizer_config.json"), special) if isinstance(source, str) else None
