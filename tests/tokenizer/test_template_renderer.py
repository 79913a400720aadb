"""Chat templates run in a process of their own: one that does not end, or takes all memory, is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_gpt.tokenizer import template_renderer
from lit_gpt.tokenizer.template_renderer import TemplateFailed, TemplateRenderer

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(seconds=0.5)
    yield renderer
    renderer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{{ 'a' * 99999999999 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%99999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('only\nusers') }}",
        "{% if %}",
        "{{ messages[7].content }}",
    ],
)
def test_a_template_that_fails_or_does_not_end_is_one_line(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateFailed) as error:
        renderer.render(template, {"messages": []})
    assert str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1100
    assert renderer.render("{{ x }}\u2028é", {"x": 3}) == "3\u2028é"  # the next one has a process again


def test_a_child_that_was_ended_is_started_again(renderer: TemplateRenderer) -> None:
    assert renderer.render("a", {}) == "a"
    child = renderer._child
    assert child is not None
    child.kill()
    child.wait()
    assert renderer.render("b", {}) == "b"
    renderer.close()
    assert renderer._child is None and child.poll() is not None


def test_a_module_in_the_current_folder_is_not_run(
    renderer: TemplateRenderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("open('was-run', 'w')")
    (tmp_path / "jinja2.py").write_text("open('was-run', 'w')")
    monkeypatch.chdir(tmp_path)
    assert renderer.render("a", {}) == "a"
    assert not (tmp_path / "was-run").exists()


@pytest.mark.slow
def test_several_renderings_in_one_exchange(renderer: TemplateRenderer) -> None:
    """Marks stand for generation tags in all but the first, whose text is what the model sees."""
    source = "{% generation %}{{ x }}{% endgeneration %}!"
    assert renderer.render_all(source, [{"x": 1}, {"x": "é"}, {"x": ""}], ("<", ">")) == ["1!", "<é>!", "<>!"]
    assert renderer.render(source, {"x": 2}) == "2!"
    long = "你" * 1_000_000
    assert renderer.render_all("{{ x }}", [{"x": long}, {"x": 3}]) == [long, "3"]


@pytest.mark.slow
def test_an_interrupted_exchange_does_not_answer_the_next(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert renderer.render("a", {}) == "a"
    read = template_renderer.os.read

    def interrupt(*args: int) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(template_renderer.os, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        renderer.render("b", {})
    monkeypatch.setattr(template_renderer.os, "read", read)
    assert renderer.render("c", {}) == "c"


def test_filters_and_loops_are_those_of_transformers(renderer: TemplateRenderer) -> None:
    source = (
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ {'a': '<é>'} | tojson }}"
    )
    assert renderer.render(source, {}) == '01{"a": "<é>"}'
