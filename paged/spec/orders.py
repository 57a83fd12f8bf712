"""Page orders: the axes of a pool's arrays, by name. Shapes, axis numbers and shardings of pages follow from the names.

| axis | what it counts | size |
|---|---|---|
| ``page`` | pages of the pool | ``N`` |
| ``head`` | KV heads | ``Hkv`` |
| ``offset`` | places for tokens in one page | ``P`` |
| ``kv`` | keys, then values | ``2`` |
| ``kv_head`` | keys and values of heads in turn: head ``h`` has its key at ``2h``, its value next | ``2 * Hkv`` |
| ``dim``, ``value_dim`` | numbers in one key, in one value | ``D``, ``Dv`` |
| ``lanes`` | numbers in one key and its value side by side, padded with 0 | a multiple of 128 |
"""

from typing import Literal, get_args

PageOrder = Literal["packed", "joined", "split", "interleaved"]
ScaleKind = Literal["tensor", "head", "token"]

PAGE_ORDERS: tuple[PageOrder, ...] = get_args(PageOrder)
SCALE_KINDS: tuple[ScaleKind, ...] = get_args(ScaleKind)

# The axes of each array of a pool: one array for keys and values together, or one for keys and one for values.
ARRAY_AXES: dict[PageOrder, tuple[tuple[str, ...], ...]] = {
    "packed": (("page", "kv", "head", "offset", "dim"),),
    "joined": (("page", "head", "offset", "lanes"),),
    "split": (("head", "page", "offset", "dim"), ("head", "page", "offset", "value_dim")),
    "interleaved": (("page", "offset", "kv_head", "dim"),),
}

# The axes of ``k_scale`` and of ``v_scale``.
SCALE_AXES: dict[ScaleKind, tuple[str, ...]] = {
    "tensor": (),
    "head": ("head",),
    "token": ("page", "head", "offset"),
}
