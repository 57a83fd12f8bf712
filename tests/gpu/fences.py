"""What the interpreter does not see: the matrix unit or a copy that reads memory before a fence.

Threads store to shared memory by one way, and the matrix unit and the copies read it by another. Between the two there
must be a `commit_smem`. So the kernel's program is walked, in order, and every place that lacks one is named.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from paged.lower import Attend
from paged.spec import RaggedBatch

# Of each operation the operands that it reads or writes by the other way.
_OTHER_WAY = {"wgmma_ref": (1, 2), "copy_smem_to_gmem": (0,), "copy_gmem_to_smem": (1,)}


def kernel_jaxpr(attend: Attend, rows: int = 1) -> Any:
    """The program of the kernel of a decode call."""
    layout, spec = attend.layout, attend.spec
    batch = RaggedBatch.decode(jnp.array([9, 300]), jnp.zeros((2, 64), jnp.int32), query_rows=rows)
    dtype = jnp.bfloat16 if layout.is_quantised else layout.dtype
    q = jnp.zeros((2 * rows, spec.num_q_heads, spec.head_dim), dtype)
    scales = {"k_scale": 1.0, "v_scale": 1.0} if layout.is_quantised else {}
    call = jax.make_jaxpr(attend.state)(q, layout.init(num_pages=4, **scales), batch)
    (kernel,) = (eqn.params["jaxpr"] for eqn in _equations(call.jaxpr) if _is_kernel(eqn))
    return kernel


def names_in(jaxpr: Any) -> list[str]:
    """The operations of a program, those of nested ones too, in order."""
    return [eqn.primitive.name for eqn in _equations(jaxpr)]


def unfenced(jaxpr: Any) -> list[str]:
    """What reads or overwrites shared memory that threads have stored to, without a fence in between."""
    found: list[str] = []
    env = {v: v for v in (*jaxpr.invars, *jaxpr.constvars)}
    _walk(jaxpr, env, set(), found)
    return found


def _walk(jaxpr: Any, env: dict, stored: set, found: list[str]) -> set:
    """Walk a program. ``stored`` is the memory that was stored to since the last fence, and ``env`` names memory."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "commit_smem":
            stored = set()
        elif name == "swap":
            stored = stored | {env.get(eqn.invars[0], eqn.invars[0])}
        for i in _OTHER_WAY.get(name, ()):
            if env.get(eqn.invars[i], eqn.invars[i]) in stored:
                found.append(f"{name} of {eqn.invars[i].aval}")
        after = [_walk(inner, _bound(inner, args, env), stored, found) for inner, args in _nested(eqn)]
        if after:
            stored = set().union(*after)
        if name in ("while", "scan"):  # once more, with what the turn before has stored
            for inner, args in _nested(eqn):
                stored = stored | _walk(inner, _bound(inner, args, env), stored, found)
    return stored


def _bound(inner: Any, args: list, env: dict) -> dict:
    names = [*inner.constvars, *inner.invars] if inner.constvars else inner.invars
    bound = dict(env)
    for v, arg in zip(names, args, strict=False):
        if not isinstance(arg, jax.extend.core.Literal):
            bound[v] = env.get(arg, arg)
    return bound


def _nested(eqn: Any) -> list[tuple[Any, list]]:
    """The programs inside of an operation, with what each is given."""
    params, invars = eqn.params, list(eqn.invars)
    if eqn.primitive.name == "cond":
        return [(branch.jaxpr, invars[1:]) for branch in params["branches"]]
    if eqn.primitive.name == "while":
        return [(params["body_jaxpr"].jaxpr, invars[params["cond_nconsts"] :])]
    if "jaxprs" in params:  # of warps
        return [(inner, invars) for inner in params["jaxprs"]]
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is None:
        return []
    return [(inner.jaxpr if hasattr(inner, "jaxpr") else inner, invars)]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for x in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield from _equations(x)


def _is_kernel(eqn: Any) -> bool:
    return eqn.primitive.name == "run_scoped" and "barrier_wait" in names_in(eqn.params["jaxpr"])
