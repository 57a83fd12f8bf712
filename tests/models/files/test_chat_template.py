"""Chat templates: what Hugging Face's may use works, and what a hostile one tries does not."""

import datetime
import json

import pytest

from paged.models import ChatTemplate

MESSAGES = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Hé?"}]


def _text(source, messages=MESSAGES, **variables):
    return ChatTemplate(source, "chat_template.jinja").render(messages, **variables)


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{{ messages[0].content }}", "Be <brief> & kind."),
        ("{%- for m in messages %}\n    {%- if loop.last %}\n{{ m['role'] }}\n{%- endif %}\n{%- endfor %}", "user"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}!", "Hé?!"),
        ("{{ messages[1] | tojson }}", json.dumps(MESSAGES[1], ensure_ascii=False)),
        ("{{ tools | tojson(indent=2) }}", json.dumps([{"a": "<"}], indent=2)),
        ("{{ 'yes' if add_generation_prompt else 'no' }}{{ date is defined }}", "yesFalse"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 2 * 3 %}{% endfor %}{{ ns.n }}",
            "12",
        ),
        ("{{ messages[0].content.split(' ')[-1].upper() ~ '-' * 3 }}", "KIND.---"),
    ],
)
def test_what_templates_use_works(source, expected):
    assert _text(source, tools=[{"a": "<"}]) == expected


def test_a_template_knows_the_day():
    assert _text("{{ strftime_now('%Y') }}") in {str(datetime.date.today().year + i) for i in (0, 1)}


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception.__globals__.items() }}", "SecurityError|UndefinedError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError|UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update({'role': 'x'}) }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "may not raise to a power"),
        ("{% for i in range(999999999) %}{% endfor %}", "OverflowError"),
        ("{{ 'x' * 999999999999 }}", "may not repeat to more than"),
        ("{{ 999999999999 * [1] }}", "may not repeat to more than"),
        ("{% include '/etc/passwd' %}", "TypeError|TemplateNotFound|no loader"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_what_a_hostile_template_tries_is_refused(source, reason):
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match=rf"The chat template of chat_template.jinja refuses .*({reason})"):
        _text(source, messages)
    assert messages == MESSAGES


def test_what_is_no_template_or_no_conversation_is_said():
    with pytest.raises(ValueError, match=r"The chat template of chat_template.jinja is not one: .*endfor"):
        _text("{% for m in messages %}")
    for wrong in ("Hello", {"role": "user"}, [{"content": "Hello"}], ["Hello"]):
        with pytest.raises(TypeError, match=r'messages must be a list of {"role": ..., "content": ...}; got'):
            _text("x", wrong)
