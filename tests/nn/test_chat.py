"""Templates of chats: by hand and as transformers renders them, the ids that come of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_llama
from helpers import run_alone

import aq_jax as aq
from aq_jax.nn.chat import ChatTemplate, read_chat_template
from aq_jax.nn.continuation import Continuation
from aq_jax.nn.generator import Generator

CHAT = [
    {"role": "user", "content": "the <an>"},
    {"role": "assistant", "content": "than"},
    {"role": "user", "content": "é"},
]
# What models' templates do: whitespace control, loop controls, namespaces, JSON, marks of what the model has said.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "blocks": """{{- bos_token }}
    {%- set ns = namespace(count=0) -%}
    {%- for m in messages if m.role != "tool" %}
        {%- if loop.index > 2 %}{% continue %}{% endif %}
        {%- set ns.count = ns.count + 1 %}
        {% if m.role == "assistant" %}
            {% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
        {% else %}
            [{{ ns.count }}] {{ m | tojson }} {{ m.content | upper }}
        {% endif %}
    {%- endfor %}
{% if tools %}tools{% endif %}{% if not pad_token is defined %} none {%- endif %}""",
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
THEIRS = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
templates, chat, tokens = json.loads(sys.stdin.read())
print(json.dumps([
    render_jinja_template([chat], chat_template=each, add_generation_prompt=True, **tokens)[0][0] for each in templates
]))
"""


def render(source: str, messages: Any = CHAT) -> str:
    return ChatTemplate(source, TOKENS, "tokenizer_config.json").render(messages)


def test_messages_are_rendered_as_the_template_says() -> None:
    assert render(TEMPLATES["chatml"]) == (
        "<|user|>\nthe <an></s>\n<|assistant|>\nthan</s>\n<|user|>\né</s>\n<|assistant|>\n"
    )


@pytest.mark.slow  # importing transformers takes longer than all other tests here
def test_templates_are_rendered_as_transformers_renders_them(tmp_path: Path) -> None:
    said = run_alone(tmp_path, THEIRS, stdin=json.dumps([list(TEMPLATES.values()), CHAT, TOKENS]))
    assert [render(source) for source in TEMPLATES.values()] == json.loads(said)


FAILING = {
    "{{ raise_exception('No system, please.') }}": "TemplateError: No system, please",
    "{% for m in messages %}": "TemplateSyntaxError: Unexpected end of template",
    "{{ messages[7].content.lower() }}": "UndefinedError: ",
    "{{ messages.append(1) }}": "SecurityError: ",
    "{{ ''.__class__.__mro__ }}": "SecurityError: ",
    "{{ messages[0].content + 1 }}": "TypeError: ",
}


@pytest.mark.parametrize("source", FAILING)
def test_a_template_that_fails_is_an_error_in_its_words(source: str) -> None:
    with pytest.raises(aq.AqError, match=f"^tokenizer_config.json: the chat template fails: {FAILING[source]}"):
        render(source)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], r"messages: found '\[\]'; wanted a list of one message or more"), ("hello", "messages: found 'hello'"),
        (["hello"], "message 0 is hello; wanted a role and a content"),
        ([*CHAT, {"role": "user", "content": [{"type": "image"}]}], "message 3 is .*image"),
        ([{"role": 3, "content": ""}], "wanted a role and a content, both strings"),
        ([{"role": "user", "content": "", "more": object()}], "messages: hold what is no plain data"),
    ],
)  # fmt: skip
def test_what_are_no_messages_is_refused(messages: Any, text: str) -> None:
    with pytest.raises(aq.AqError, match=text):
        render("", messages)


def test_a_template_lies_in_one_of_two_files(tmp_path: Path) -> None:
    def found(chat_template: Any = None) -> str | None:
        said = {"eos_token": {"content": "</s>"}, "pad_token": None, "chat_template": chat_template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        template = read_chat_template(tmp_path)
        return template and template.render(CHAT)

    assert found() is None
    assert found("a{{ eos_token }}{{ pad_token }}") == "a</s>"
    assert found([{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]) == "c"
    for wrong, text in (([{"name": "rag", "template": "b"}], "chat templates rag; wanted one that is called default"),
                        (3, "chat_template is '3'; wanted a text")):  # fmt: skip
        with pytest.raises(aq.FormatError, match=text):
            found(wrong)
    (tmp_path / "chat_template.jinja").write_text("d")
    assert found("c") == "d"


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    table = small_llama.make(tmp_path_factory.mktemp("model"), seed=1)
    (table.parent / "chat_template.jinja").write_text(
        "<s>{% for m in messages %}{{ m.content }}<s>{% endfor %}{{ '\\n' }}"
    )
    found = aq.load_model(table)
    assert isinstance(found, Generator)
    return found


def test_special_tokens_of_a_template_are_not_doubled(generator: Generator) -> None:
    (ids,) = generator._chats([CHAT[1:2]])
    assert generator.tokenizer.encode("<s>than<s>\n").ids == [1, *ids]  # the tokenizer would begin with another
    text = generator.generate(messages=CHAT[1:2], max_tokens=16)
    wanted = Continuation(generator.tokenizer, ids)
    assert text == wanted.add(generator.generate_ids(ids, 16)) + wanted.end()
    assert generator.generate(messages=[CHAT[1:2]], max_tokens=16) == [text]
    assert "".join(generator.stream(messages=CHAT[1:2], max_tokens=16)) == text


def test_messages_that_cannot_be_answered_are_refused(generator: Generator) -> None:
    with pytest.raises(aq.AqError, match=r"generate: the messages have \d+ tokens; wanted at most 95"):
        generator.generate(messages=[{"role": "user", "content": "b" * 200}])
    with pytest.raises(aq.AqError, match="generate: found a prompt and messages; wanted one of them"):
        generator.generate("the", messages=CHAT)  # type: ignore[call-overload]
    with pytest.raises(aq.AqError, match="messages: found '3'; wanted a list of one message or more"):
        generator.generate(messages=3)  # type: ignore[call-overload]
    with pytest.raises(aq.AqError, match="generate: the prompt is NoneType; wanted a string"):
        generator.generate()  # type: ignore[call-overload]
    bare = Generator(generator.model, generator.tokenizer)
    with pytest.raises(aq.AqError, match="generate: the tokenizer has no chat template; wanted a prompt"):
        bare.generate(messages=CHAT)
