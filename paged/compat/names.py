"""The words of other libraries: the names of their arguments, and what each of them is here.

`WORDS` has a table for each entry point. A name in it is another name of an argument; or a function, which checks the
value and gives the arguments that it stands for, or refuses it with what to write instead. `knows` makes an entry point
know its table. `docs/porting.md` has a line for each name.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from paged.spec import FLOAT_DTYPES

from .number import block_sizes, flag, integer

Reader = Callable[[str, Any], dict[str, Any]]
Word = str | Reader
Entry = TypeVar("Entry", bound=Callable[..., Any])

# ejkernel's names of platforms, and the target of each.
_TARGETS = {None: "auto", "auto": "auto", "xla": "xla", "pallas": "tpu"}


def speed_hint(name: str, value: Any) -> dict[str, Any]:
    """A hint about another library's kernel, which no kernel here has a use for: a positive number or None."""
    if value is not None:
        integer(name, value, 1)
    return {}


def block_hint(name: str, value: Any) -> dict[str, Any]:
    """Four sizes of blocks of another library's kernel, or None."""
    if value is not None:
        block_sizes(name, value)
    return {}


def unused_flag(name: str, value: Any) -> dict[str, Any]:
    """A flag that changes no result there, and means nothing here."""
    flag(name, value)
    return {}


def only(accepted: Any, instead: str) -> Reader:
    """An argument with one value that means what is done anyway. Any other is refused with ``instead``."""

    def read(name: str, value: Any) -> dict[str, Any]:
        value = getattr(value, "value", value)  # a member of an enum
        if value is not accepted and not (isinstance(value, type(accepted)) and value == accepted):
            raise ValueError(f"{name} must be left out, or {accepted!r}: {instead}")
        return {}

    return read


def _platform(name: str, value: Any) -> dict[str, Any]:
    value = getattr(value, "value", value)
    if not (value is None or isinstance(value, str)) or value not in _TARGETS:
        raise ValueError(
            f'{name} must be "xla", "pallas" (which is target="tpu" here), "auto" or None; got {value!r}. On '
            'GPUs these calls run as "xla".'
        )
    return {"target": _TARGETS[value]}


def _causal(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, bool) and value not in (0, 1):
        raise ValueError(f"{name} must be 1 or 0; got {value!r}.")
    return {"use_causal_mask": bool(value)}


def _softmax_dtype(name: str, value: Any) -> dict[str, Any]:
    if value is not None and jnp.dtype(value) not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or None; got {value!r}. The softmax is float32.")
    return {}


_DEBUG = only(False, "no kernel here prints. paged.compat.explain says what a call runs.")
_CUSTOM_MASK = only(
    None,
    "masks are functions of positions here: lower a spec with a paged.Mask, such as paged.Where, and paged.lower. For "
    "a tree of drafted tokens: paged.Tree() and RaggedBatch(..., ancestors=).",
)
_TEMPERATURE = only(
    None,
    "multiply the rows of queries by their temperatures beforehand, which is the same where there is no soft cap; or "
    "lower a spec with a paged.ScoreOp.",
)
_CU_KV_LENS = only(
    None,
    "page_indices must have rows of one width here, one row for each sequence. docs/porting.md has the four lines "
    "that make them.",
)

_GPU: dict[str, Word] = {"num_warps": speed_hint, "num_stages": speed_hint}
_EJKERNEL: dict[str, Word] = {**_GPU, "platform": _platform, "backend": only("any", "target= says where it runs.")}
_RAGGED: dict[str, Word] = {
    **_EJKERNEL,
    "kv_lens": "context_lens",
    "page_indices": "block_tables",
    "cu_q_lens": "query_start_loc",
    "attention_sink": "softmax_aux",
    "sm_scale": "softmax_scale",
    "soft_cap": "logits_soft_cap",
}

WORDS: dict[str, dict[str, Word]] = {
    "page_attention": {
        **_EJKERNEL,
        "q": "query",
        "k_pages": "key_cache",
        "v_pages": "value_cache",
        "lengths": "context_lens",
        "page_indices": "block_tables",
    },
    "prefill_page_attention": {**_EJKERNEL, "block_k": speed_hint},
    "ragged_page_attention_v2": {**_RAGGED, "q": "query", "queries": "query"},
    "ragged_page_attention_v3": {
        **_RAGGED,
        "kv_cache": "kv_pages",
        "kv_cache_fused": "kv_pages",
        "causal": _causal,
        "softmax_dtype": _softmax_dtype,
        "chunk_prefill_size": speed_hint,
        "d_block_sizes": block_hint,
        "p_block_sizes": block_hint,
        "skip_kv_mask": unused_flag,
        "disable_bounds_checks": unused_flag,
        "disable_semaphore_checks": unused_flag,
        "debug_mode": _DEBUG,
        "custom_mask": _CUSTOM_MASK,
        "xai_temperature_len": _TEMPERATURE,
        "cu_kv_lens": _CU_KV_LENS,
        "mask_aligned_to_cu_kv": only(False, "there is no custom_mask whose rows could be padded."),
    },
}

# Other names of arrays, for ``in_specs`` by name.
ARRAYS = {name: word for words in WORDS.values() for name, word in words.items() if isinstance(word, str)}


def knows(words: Mapping[str, Word]) -> Callable[[Entry], Entry]:
    """Make an entry point accept the words of other libraries beside its own arguments.

    A call that uses none of them costs one look at its keywords. Errors name the argument as the caller did.
    """

    def decorate(entry: Entry) -> Entry:
        own = tuple(inspect.signature(entry).parameters)
        known = frozenset(own)

        @functools.wraps(entry)
        def call(*args: Any, **kwargs: Any) -> Any:
            if known.issuperset(kwargs):
                return entry(*args, **kwargs)
            given, names = _translated(entry.__name__, words, own, len(args), kwargs)
            try:
                return entry(*args, **given)
            except (TypeError, ValueError) as error:
                raise _in_words_of_caller(error, names) from None

        return call  # pyright: ignore[reportReturnType]: it accepts what the entry point accepts, and more

    return decorate


def _translated(
    entry: str, words: Mapping[str, Word], own: tuple[str, ...], positional: int, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The keywords as the entry point has them, and the caller's name of each argument that was given by another."""
    given = {name: value for name, value in kwargs.items() if name in own}
    origin: dict[str, str] = {**dict.fromkeys(own[:positional], "position"), **{name: name for name in given}}
    others = {name: value for name, value in kwargs.items() if name not in own and name != "cfg"}
    fields = _fields(entry, words, own, kwargs.get("cfg"))
    for name, value in {**fields, **others}.items():
        is_field = name in fields and name not in others
        if name not in words and not is_field:
            raise TypeError(_unknown(entry, name, (*own, *words)))
        word = words.get(name, name)
        said = {word: value} if isinstance(word, str) else word(name, value)
        for argument, own_value in said.items():
            if argument not in origin:
                given[argument], origin[argument] = own_value, f"cfg.{name}" if is_field else name
            elif not is_field and not origin[argument].startswith("cfg."):
                raise TypeError(f"{entry}() got {argument} twice: by {origin[argument]}, and as {name}.")
            elif not is_field:
                given[argument], origin[argument] = own_value, name
    return given, {argument: name for argument, name in origin.items() if name not in (argument, "position")}


def _fields(entry: str, words: Mapping[str, Word], own: tuple[str, ...], cfg: Any) -> dict[str, Any]:
    """The fields of ejkernel's ``cfg``, which stand for arguments that the call does not have. None is unset."""
    if cfg is None:
        return {}
    fields = dict(cfg) if isinstance(cfg, Mapping) else vars(cfg)
    unknown = [name for name in fields if name not in words and name not in own]
    if unknown:
        raise TypeError(f"cfg has fields that {entry}() has no words for: {unknown}.")
    return {name: value for name, value in fields.items() if value is not None}


def _unknown(entry: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{entry}() has no argument {name}.{hint} docs/porting.md lists the names that it knows."


def _in_words_of_caller(error: Exception, names: Mapping[str, str]) -> Exception:
    """The error, with the caller's names of arguments in its text."""
    if type(error) not in (TypeError, ValueError) or not names or len(error.args) != 1:
        return error
    text = str(error)
    # "query" is an argument, and a word too: a query head, a query's own position.
    for argument, name in names.items():
        text = re.sub(rf"\b{argument}\b(?!'s own| (?:head|row|token)s?\b)", name, text)
    return type(error)(text).with_traceback(error.__traceback__)
