"""Templates of strangers end in time, within memory; those of checkpoints render as before."""

import time

import pytest

from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.inputs import sandbox
from qwenvl_jax.inputs.chat import ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
LARGE = "it makes a text or list of more than 16,777,216"
LATE = "it takes longer than 0.2 seconds"
KEPT = "{{% set s = 'a ' * 300000 %}}{{% set n = namespace(l=[]) %}}" + (
    "{{% for i in range(9999) %}}{{% set n.l = n.l + [{}] %}}{{% endfor %}}"
)
KEPT_LARGE = "it makes texts and lists of more than 67,108,864 characters in all"
DOUBLED = "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}"

BOMBS = {
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", LATE),
    "loops that write": ("{% for i in range(99999) %}{% for j in range(99999) %}abc{% endfor %}{% endfor %}", "it "),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", LATE),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "multiplied text": ("{{ 'a' * 10000000000 }}", LARGE),
    "multiplied list": ("{% set x = [0] * 100000000 %}", LARGE),
    "a power": ("{{ 10 ** (10 ** 9) }}", LARGE),
    "doubled text": (DOUBLED, LARGE),
    "doubled lists": ("{% set x = ['ab'] %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}", "it "),
    "doubled lists as JSON": ("{% set x = ['ab'] %}" + "{% set x = [x, x] %}" * 40 + "{{ x | tojson }}", "it "),
    "added text": ("{% set x = 'ab' %}" + "{% set x = x + x %}" * 40, LARGE),
    "centred": ("{{ 'a' | center(10000000000) }}", LARGE),
    "mapped": ("{{ ['a'] | map('center', 10000000000) | list }}", LARGE),
    "indented": ("{{ ('a\n' * 100000) | indent(1000000) }}", LARGE),
    "replaced": ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", LARGE),
    "replaced by a filter": ("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", LARGE),
    "joined": ("{{ ('b' * 100000).join(['a'] * 100000) }}", "it "),
    "a format": ("{{ '%10000000000d' % 1 }}", "width of more than 9999"),
    "a method": ("{{ 'a'.ljust(10000000000) }}", "it calls ljust of a text"),
    "str.format": ("{{ '{:>10000000000}'.format(1) }}", "width of more than 9999"),
    "str.format, nested": ("{{ '{:{}}'.format(1, 10000000000) }}", "width of more than 9999"),
    "a list of texts": (KEPT.format("(s ~ i)"), KEPT_LARGE),
    "a list of added texts": (KEPT.format("(s + 'a')"), KEPT_LARGE),
    "a list of slices": (KEPT.format("s[1:]"), KEPT_LARGE),
    "a list of splits": (KEPT.format("s.split('a')"), KEPT_LARGE),
    "a list of parts": (KEPT.format("(s ~ 'b').rpartition('b')"), KEPT_LARGE),
    "a list of halves": (KEPT.replace("300000", "300000 ~ 'b'").format("s.split('b')"), KEPT_LARGE),
    "a list of words": (KEPT.format("('a ' * 9999999).split()"), LARGE),
    "a list of lines": (KEPT.format("('\n' * 9999999).splitlines()"), LARGE),
    "a list of upper case": (KEPT.format("s.upper()"), KEPT_LARGE),
    "a list of filtered texts": (KEPT.format("(s | upper)"), KEPT_LARGE),
    "a list of long lists": (KEPT.format("[" + "s, " * 9999 + "s]"), KEPT_LARGE),
    "lorem ipsum": ("{{ lipsum(100000) }}", "lipsum"),
    "a block": ("{% set x %}{% for i in range(9) %}{{ 'a' * 9999999 }}{% endfor %}{% endset %}", "it "),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end(monkeypatch, name):
    template, message = BOMBS[name]
    monkeypatch.setattr(sandbox, "SECONDS", 2.0 if message == KEPT_LARGE else 0.2)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"(?i){message}"):
        ChatTemplate({"default": template}).render(USER)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "template", ["{" * 500 + "% if", "{% if a %}" * 200 + "{% endif %}" * 200, "{{ " + "(" * 9999, "x" * (1 << 21)]
)
def test_templates_that_cannot_be_compiled(template):
    with pytest.raises(CheckpointError, match="not a valid chat template"):
        ChatTemplate({"default": template})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}", "1/1True"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() if v > 1 %}{{ k ~ v ~ none }}{% endfor %}", "b2None"),
        ("{% for x in missing %}{% else %}none{% endfor %}", "none"),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ messages[0].content.split('i')[0].strip().upper() }}", "H"),
        ("{{ ', '.join(['a', 'b']) }}{{ 'a-b' | replace('-', '+') }}{{ '%s of %d' % ('a', 2) }}", "a, ba+ba of 2"),
        ("{{ messages | map(attribute='role') | list | tojson(indent=2) }}", '[\n  "user"\n]'),
        ("{%- for m in messages recursive -%}{{ m.role }}{%- endfor -%}", "user"),
        ("{{ '{} and {:>3}'.format('a', 7) }}{{ 'ab' * 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}", "a and   7abab31024"),
    ],
)
def test_what_templates_may_do(template, text):
    assert ChatTemplate({"default": template}).render(USER) == text
