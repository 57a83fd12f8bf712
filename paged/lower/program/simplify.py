"""The normal form of a mask: negations at the leaves, `&` and `|` flat, sorted, and free of redundant terms."""

from paged.spec import And, Everything, Mask, Not, Nothing, Or


def normal_form(mask: Mask) -> Mask:
    """An equal mask in normal form; two masks of one normal form are the same mask.

    Uses De Morgan's laws, idempotence, absorption, complements, and each mask's own `Mask.implies`, which
    intersects windows: ``Window(8) & Window(4)`` is ``Window(4)``. The meaning never changes.

    >>> print(normal_form(Causal() & (Causal() & Window(8)) & Window(4)))
    (j <= p) & (p - j < 4)
    >>> print(normal_form(~(~Window(4) | ~Causal())))
    (j <= p) & (p - j < 4)
    >>> normal_form(Window(4) & ~Window(8))
    Nothing()
    """
    if isinstance(mask, Not):
        return _negation(normal_form(mask.term))
    if isinstance(mask, And):
        return _combine(And, [normal_form(term) for term in mask.terms])
    if isinstance(mask, Or):
        return _combine(Or, [normal_form(term) for term in mask.terms])
    return mask


def _negation(mask: Mask) -> Mask:
    """The normal form of ``~mask``, from a mask in normal form."""
    if isinstance(mask, Everything):
        return Nothing()
    if isinstance(mask, Nothing):
        return Everything()
    if isinstance(mask, Not):
        return mask.term
    if isinstance(mask, And | Or):
        dual = Or if isinstance(mask, And) else And
        return _combine(dual, [_negation(term) for term in mask.terms])
    return Not(mask)


def _combine(kind: type[And] | type[Or], terms: list[Mask]) -> Mask:
    """``&`` or ``|`` of normal forms. For ``|`` every implication is the other way round than for ``&``."""
    neutral, absorbing = (Everything(), Nothing()) if kind is And else (Nothing(), Everything())
    flat = [inner for term in terms for inner in (term.terms if isinstance(term, kind) else (term,))]
    if absorbing in flat:
        return absorbing
    kept: list[Mask] = []
    for term in flat:
        if term == neutral or any(_is_redundant(kind, term, other) for other in kept):
            continue
        kept = [other for other in kept if not _is_redundant(kind, other, term)] + [term]
    if any(_excludes(kind, a, b) for i, a in enumerate(kept) for b in kept[:i]):
        return absorbing
    kept.sort(key=lambda term: (term.rank, str(term)))
    return kind(tuple(kept)) if len(kept) > 1 else kept[0] if kept else neutral


def _is_redundant(kind: type[And] | type[Or], term: Mask, other: Mask) -> bool:
    return implies(other, term) if kind is And else implies(term, other)


def _excludes(kind: type[And] | type[Or], a: Mask, b: Mask) -> bool:
    """Whether ``a & b`` is nothing (for ``|``: whether ``a | b`` is everything)."""
    return implies(a, _negation(b)) if kind is And else implies(_negation(a), b)


def implies(a: Mask, b: Mask) -> bool:
    """Whether ``a`` is known to imply ``b``, both in normal form. True is never wrong; False may be."""
    if a == b or isinstance(a, Nothing) or isinstance(b, Everything):
        return True
    if isinstance(a, Or):
        return all(implies(term, b) for term in a.terms)
    if isinstance(b, And):
        return all(implies(a, term) for term in b.terms)
    if isinstance(b, Or) and any(implies(a, term) for term in b.terms):
        return True
    if isinstance(a, And):
        return any(implies(term, b) for term in a.terms)
    if isinstance(a, Not) and isinstance(b, Not):
        return implies(b.term, a.term)
    return a.implies(b)
