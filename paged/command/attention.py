"""Arguments that say which attention a command is about."""

import argparse
import functools
from typing import Any

import jax.numpy as jnp

from paged.spec import PAGE_ORDERS, SCALE_KINDS, ALiBi, AttentionSpec, Causal, Chunk, Mask, PageLayout, Prefix


def add_attention(group: Any) -> None:
    """Add the arguments of an attention and its pages."""
    number = functools.partial(group.add_argument, type=int, metavar="N")
    number("--q-heads", default=32, help="query heads (default: 32)")
    number("--kv-heads", default=8, help="KV heads (default: 8)")
    group.add_argument("--heads", type=_heads, metavar="Q/KV", help="both: 32/8 is --q-heads 32 --kv-heads 8")
    number("--head-dim", default=128, help="default: 128")
    number("--page-size", default=16, help="tokens per page (default: 16)")
    number("--window", help="how many tokens a query sees, its own included")
    number("--chunk", help="a query sees the tokens of its own chunk of so many")
    number("--prefix", help="every query sees the first N tokens too")
    group.add_argument("--soft-cap", type=float, metavar="C", help="scores become C * tanh(score / C)")
    group.add_argument("--alibi", action="store_true", help="with ALiBi biases")
    group.add_argument("--sinks", action="store_true", help="with a sink for each query head")
    group.add_argument("--dtype", default="bfloat16", help="dtype of pages (default: bfloat16)")
    group.add_argument("--scales", choices=SCALE_KINDS, help="scales of quantised pages")
    group.add_argument("--q-dtype", help="dtype of queries (default: the pages', and bfloat16 over quantised pages)")
    group.add_argument("--order", default="packed", choices=PAGE_ORDERS, help="order of pages (default: packed)")


def spec_of(options: argparse.Namespace) -> AttentionSpec:
    """The attention that the arguments say."""
    q_heads, kv_heads = options.heads or (options.q_heads, options.kv_heads)
    mask: Mask | None = None if options.chunk is None else Chunk(options.chunk)
    spec = AttentionSpec(
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=options.head_dim,
        window=options.window,
        mask=mask,
        soft_cap=options.soft_cap,
        sinks=options.sinks,
        scores=(ALiBi(),) if options.alibi else (),
    )
    if options.prefix is None:
        return spec
    return spec.replace(causal=False, window=None, mask=spec.visibility | (Causal() & Prefix(options.prefix)))


def layout_of(options: argparse.Namespace) -> PageLayout:
    """The pages that the arguments say."""
    return PageLayout(
        page_size=options.page_size,
        num_kv_heads=(options.heads or (options.q_heads, options.kv_heads))[1],
        head_dim=options.head_dim,
        dtype=jnp.dtype(options.dtype),
        order=options.order,
        scales=options.scales,
    )


def q_dtype_of(options: argparse.Namespace) -> Any:
    """The dtype of queries, or None where it is not said."""
    return None if options.q_dtype is None else jnp.dtype(options.q_dtype)


def _heads(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"heads are given as Q/KV, such as 32/8; got {text!r}")
    return int(parts[0]), int(parts[1])
