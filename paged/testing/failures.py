"""`CheckFailure`: what a check raises, with the smallest counterexample in words."""


class CheckFailure(AssertionError):
    """A property that does not hold.

    * ``check``: the name of the property, such as ``"coverage"``.

    The message says which property it is, the smallest counterexample that was found, and what to change.
    """

    def __init__(self, check: str, message: str):
        super().__init__(f"{check}: {message}")
        self.check = check


def require(is_true: bool, check: str, message: str) -> None:
    """Raise `CheckFailure` unless ``is_true``."""
    if not is_true:
        raise CheckFailure(check, message)
