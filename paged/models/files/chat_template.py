"""Chat templates: messages to text, by a program of a checkpoint that runs in a sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .extra import package

_LONGEST = 10_000_000  # characters that one operation of a template may make


class ChatTemplate:
    """A template in the language of ``jinja2``, as Hugging Face's tokenizers have it.

    It runs in ``jinja2``'s immutable sandbox: it reaches no attribute of Python's objects that begins with an
    underscore, no file and no module, and cannot change the messages. It may not raise to a power, and repeats no text
    beyond 10 million characters. A loop within a loop can still take long.

    **Arguments:**

    - `source`: the template.
    - `origin`: the file that it is from, for errors.
    - `variables`: what the template finds besides the messages, such as ``bos_token``.

    Raises ``ValueError`` if the template is not one, and ``ModuleNotFoundError`` without the extra ``models``.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "a file")
    >>> template.render([{"role": "user", "content": "Hi"}])
    '<user>Hi'
    """

    def __init__(self, source: str, origin: str, variables: Mapping[str, Any] | None = None):
        self.source, self.origin, self.variables = source, origin, dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except package("jinja2").TemplateError as error:
            raise ValueError(f"The chat template of {origin} is not one: {error}.") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        **Arguments:**

        - `messages`: each has a ``role`` and a ``content``, and what else the template reads.
        - `add_generation_prompt`: whether the text ends where an answer of the model begins.
        - `variables`: more names that the template reads, such as ``enable_thinking`` or ``tools``.

        **Returns:** the text, with the texts of special tokens in it.

        Raises ``TypeError`` if ``messages`` are not such, and ``ValueError`` if the template refuses them.
        """
        if isinstance(messages, str | Mapping) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise TypeError(f'messages must be a list of {{"role": ..., "content": ...}}; got {str(messages)[:100]}.')
        names = {**self.variables, **variables, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=[dict(message) for message in messages], **names)
        except Exception as error:  # a template is a program, and fails like one
            kind = type(error).__name__
            raise ValueError(f"The chat template of {self.origin} refuses these messages: {kind}: {error}") from error


@functools.cache
def _environment() -> Any:
    """The sandbox, and what Hugging Face's templates find in it."""
    jinja2, sandbox = package("jinja2"), package("jinja2.sandbox")

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """Also keeps a template from filling the memory by one operation."""

        intercepted_binops = frozenset(("**", "*"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                raise sandbox.SecurityError("a template may not raise to a power")
            sizes = [len(x) for x in (left, right) if isinstance(x, Sequence)]
            times = [x for x in (left, right) if isinstance(x, int)]
            if sizes and times and sizes[0] * times[0] > _LONGEST:
                raise sandbox.SecurityError(f"a template may not repeat to more than {_LONGEST} characters")
            return super().call_binop(context, operator, left, right)

    class Generation(package("jinja2.ext").Extension):
        """``{% generation %}``, which marks what the model wrote: here it is only its content."""

        tags = frozenset(("generation",))

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, package("jinja2.ext").loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja2's escapes for HTML, which a model has not seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
