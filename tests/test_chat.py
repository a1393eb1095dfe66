"""Chats: templates rendered as transformers renders them, hostile ones refused, and what generate.py chat=true prints."""

import itertools
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import varied_text
from hydra import compose, initialize_config_dir
from running import ROOT, environment
from test_model import made

from etude.config import CONF, check
from etude.errors import Refusal
from etude.infer import engine, session
from etude.infer.engine import InferenceEngine
from etude.infer.sampling import Sampling, Token
from etude.text import chat
from etude.text import tokenizer as tok
from etude.text.tokenizer import BOS, EOS, IM_END, IM_START, PAD, Tokenizer

CORPUS = varied_text(4000)
GREETING = [{"role": "user", "content": "Hello, wörld! 日本 👍"}]
TALK = [
    {"role": "system", "content": "  Be brief & <b>bold</b>.\n"},
    {"role": "user", "content": 'What is "x"?\n\n'},
    {"role": "assistant", "content": "{x}: 1 < 2"},
    {"role": "user", "content": ""},
]


def bpe() -> Tokenizer:
    return tok.bpe([CORPUS], [CORPUS], vocab_size=400)


def byte() -> Tokenizer:
    return tok.byte([CORPUS], [CORPUS])


def with_template(template: Any, **config: Any) -> Tokenizer:
    return Tokenizer(byte().backend, {"chat_template": template} | config)


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in tokenizer.files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# ---------------------------------------------------------------- rendering

TEMPLATES = {
    "ChatML": chat.CHATML,
    "system first": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = 'You are a cat.' %}{% endif %}
<<SYS>>{{ system }}<</SYS>>
{% for m in loop_messages %}{{ loop.index0 }}/{{ loop.length }} {{ m.role | upper }}: {{ m['content'] | trim }}{% if not loop.last %};{% endif %}

{% endfor %}
{% if add_generation_prompt %}ASSISTANT:{% endif %}
""",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{{ pad_token }}",
    "tojson": "{% for m in messages %}{{ m | tojson }}\n{{ m['content'] | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "tojson of ASCII": "{% for m in messages %}{{ m | tojson(ensure_ascii=true) }}{% endfor %}",
    "tojson, tight": "{% for m in messages %}{{ m | tojson(separators=(',', ':'), sort_keys=true) }}{% endfor %}",
    "today": "Today: {{ strftime_now('%d %b %Y') }}. {{ messages[0]['content'] }}",
    "blocks": """
    {% for m in messages %}
        {% if m['role'] == 'user' %}
    U: {{ m['content'] }}
        {% else %}
    O: {{- m['content'] -}}
        {% endif %}
    {% endfor %}
  {#- a comment -#}
  end
""",
    "break and continue": """{% for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}{{ m['content'] }}
{% if m['role'] == 'assistant' %}{% break %}{% endif %}{% endfor %}""",
    "namespace": """{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}{% set ns.n = ns.n + 1 %}
{% endif %}{% endfor %}{{ ns.found }} {{ ns.n }}""",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{{ caller() if caller else m.content }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "alternation": """{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) and messages[0]['role'] != 'system' %}
{{ raise_exception('Roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}""",
    "strings": "{% for m in messages %}{{ m.content.split(' ')[0].strip().title() ~ '|' ~ (m.content | length) ~ m.get('name', '-') }}{% endfor %}",
    "defined": "{{ nothing is defined }}{% if nothing %}x{% endif %}{{ nothing }}{{ messages is defined }}",
    "tools": "{% if tools %}tools{% endif %}{% if documents %}documents{% endif %}{{ messages[0].content }}",
    "no tools": "{% if tools is not none %}TOOLS{% endif %}{{ tools is defined }}{{ documents is none }}{{ messages[0].content }}",
    "training": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    "selected": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}{{ messages | length }}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ d | tojson }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_by_transformers(name: str, tmp_path: Path) -> None:
    """Text for text, for several conversations, with and without the beginning of an answer; of the same files."""
    import transformers

    tokenizer = with_template(TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(written(tokenizer, tmp_path / "t"))
    for messages in (GREETING, TALK, [*GREETING, *TALK], TALK[1:2]):
        for reply in (True, False):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
            assert chat.render(tokenizer, messages, reply) == expected
            ids = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
            assert tokenizer.encode(expected) == ids


@pytest.mark.parametrize("make", [bpe, byte])
def test_chatml_for_tokenizers_trained_here(make: Callable[[], Tokenizer]) -> None:
    """Each turn between its two tokens, one id each."""
    tokenizer = make()
    text = chat.render(tokenizer, TALK[:1] + GREETING)
    assert text == (
        f"{IM_START}system\n{TALK[0]['content']}{IM_END}\n"
        f"{IM_START}user\n{GREETING[0]['content']}{IM_END}\n{IM_START}assistant\n"
    )
    assert chat.render(tokenizer, GREETING, reply=False) == f"{IM_START}user\n{GREETING[0]['content']}{IM_END}\n"
    start, end = (tokenizer.backend.token_to_id(t) for t in (IM_START, IM_END))
    ids = tokenizer.encode(text)
    assert ids.count(start) == 3 and ids.count(end) == 2 and ids[0] == start
    assert tokenizer.decode(ids) == text


def test_tokens_that_a_vocabulary_lacks(tmp_path: Path) -> None:
    """They are undefined in a template, as for transformers, and not an empty text."""
    import transformers

    plain = tok.char([CORPUS], [CORPUS], unknown="unk").backend
    template = "[{{ bos_token }}]{% if bos_token is defined %}defined{% endif %}{{ eos_token is none }}"
    tokenizer = Tokenizer(plain, {"chat_template": template})
    theirs = transformers.AutoTokenizer.from_pretrained(written(tokenizer, tmp_path / "t"))
    assert chat.render(tokenizer, GREETING) == theirs.apply_chat_template(GREETING, tokenize=False)


def test_characters_have_no_chat() -> None:
    with pytest.raises(Refusal, match="no chat template and no ChatML tokens: leave out chat=true") as raised:
        chat.render(tok.char([CORPUS], [CORPUS], unknown="unk"), GREETING)
    assert "\n" not in str(raised.value)


HOSTILE = {
    "ancestors": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "endless attributes": "{{ messages" + ".__class__" * 500 + " }}",
    "more attributes": "{{ messages" + ".a.b" * 20 + " }}",
    "by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals of time": "{{ strftime_now.__globals__['os'].system('true') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "a message is changed": "{{ messages.append(1) }}",
    "a message is emptied": "{{ messages[0].clear() }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}{{ os }}",
    "another template": "{% extends 'base' %}",
    "it refuses": "{{ raise_exception('Only user and assistant roles are supported!') }}",
    "in two lines": "{{ raise_exception('Only user\\nand assistant') }}",
    "undefined": "{{ nothing.at.all }}",
    "unknown filter": "{{ messages | nothing }}",
    "unknown tag": "{% nothing %}",
    "open": "{% for m in messages %}{{ m }}",
    "half": "{{ messages[0 }}",
    "stray": "{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nothing added": "{{ messages[0]['content'] + 1 }}",
    "divided": "{{ 1 / 0 }}",
    "no such call": "{{ messages() }}",
    "wrong call": "{{ strftime_now() }}",
    "a long way": "{% for i in range(1000000000) %}x{% endfor %}",
    "round and round": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ 'x' * 100000000000000 }}",
    "no JSON": "{{ self | tojson }}",
    "a number for a text": "{{ 'abc'.split(1) }}",
}


SILENT = {
    "class": "{{ ''.__class__ }}",
    "by filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "globals": "{{ raise_exception.__globals__ }}{{ strftime_now.__code__ }}{{ namespace.__init__ }}",
    "self": "{{ self._TemplateReference__context }}",
    "own attributes": "{{ messages.__class__ }}{{ messages[0].__init__ }}{{ bos_token.__len__ }}",
}


@pytest.mark.parametrize("name", SILENT)
def test_templates_that_learn_nothing(name: str) -> None:
    """What leads out of the sandbox is not there: nothing is printed of it, if it is not refused."""
    try:
        assert chat.render(with_template(SILENT[name]), TALK) == ""
    except Refusal as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_that_are_refused(name: str) -> None:
    """In one line of which there is an end, whatever the template does; the conversation is as it was."""
    messages = [dict(m) for m in TALK]
    with pytest.raises(Refusal, match="chat template") as raised:
        chat.render(with_template(HOSTILE[name]), messages)
    line = str(raised.value)
    assert "\n" not in line and len(line) < 500
    assert messages == TALK


def test_what_a_template_objects_to_is_said() -> None:
    with pytest.raises(Refusal, match="the chat template refuses: Only user and assistant roles are supported!"):
        chat.render(with_template(HOSTILE["it refuses"]), TALK)


# ---------------------------------------------------------------- files


def test_a_list_of_templates(tmp_path: Path) -> None:
    """The one called default counts; where there is none, it is as if there were no template."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    assert chat.render(with_template(named), GREETING) == GREETING[0]["content"] + "!"
    assert with_template(named[:1]).template is None
    assert chat.render(with_template(named[:1]), GREETING).startswith(IM_START)
    assert tok.load(written(with_template(named), tmp_path / "t")).template == named[1]["template"]


@pytest.mark.parametrize(
    "template", [5, ["default"], [None], {"default": "x"}, [{"name": "default", "template": 5}], True]
)
def test_templates_that_are_no_text(template: Any, tmp_path: Path) -> None:
    """Refused where the files are read, or where the template is asked for."""
    folder = written(byte(), tmp_path / "t")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(Refusal):
        chat.render(tok.load(folder), GREETING)


def test_the_template_in_its_own_file_wins(tmp_path: Path) -> None:
    import transformers

    folder = written(with_template("config"), tmp_path / "t")
    assert chat.render(tok.load(folder), GREETING) == "config"
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} in a file: ü\n", encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(GREETING, tokenize=False)
    assert chat.render(tok.load(folder), GREETING) == expected == GREETING[0]["content"] + " in a file: ü"


def test_special_tokens_as_objects(tmp_path: Path) -> None:
    """In tokenizer_config.json a token is a text or an object with it; it need not be the usual one."""
    folder = written(byte(), tmp_path / "t")
    config = {"eos_token": {"content": IM_END, "special": True, "lstrip": False}, "bos_token": PAD, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    found = tok.load(folder)
    assert (found.token(found.eos), found.token(found.bos), found.token(found.pad)) == (IM_END, PAD, PAD)
    assert found.stop_ids == {found.eos}
    text = chat.render(
        Tokenizer(found.backend, config | {"chat_template": "{{ eos_token }} {{ bos_token }}"}), GREETING
    )
    assert text == f"{IM_END} {PAD}"


@pytest.mark.parametrize(
    "config", [{"eos_token": 5}, {"eos_token": ["x"]}, {"eos_token": {"content": 5}}, {"bos_token": {"text": "x"}}, {"eos_token": {"content": ["x"]}}], ids=str
)  # fmt: skip
def test_special_tokens_that_are_none(config: dict[str, Any], tmp_path: Path) -> None:
    """Refused in one line, or passed over: then the usual tokens count."""
    folder = written(byte(), tmp_path / "t")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        found = tok.load(folder)
    except Refusal as error:
        assert "\n" not in str(error)
    else:
        assert (found.token(found.bos), found.token(found.eos)) == (BOS, EOS)


@pytest.mark.parametrize(
    "given,expected",
    [
        (260, {257, 260}),
        ([260, 258], {257, 258, 260}),
        ([], {257}),
        (None, {257}),
        ({"a": 1}, None),
        ([260, 100_000, -1], {257, 260}),
        ("x", None),
        ([None], None),
        ([[260]], None),
    ],
    ids=str,
)
def test_tokens_that_end_an_answer(given: Any, expected: set[int] | None, tmp_path: Path) -> None:
    """generation_config.json has one, several or null; the end of a text is always among them. What is no id is refused or
    passed over."""
    folder = written(byte(), tmp_path / "t")
    assert byte().eos == 257
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    if expected is not None:
        assert tok.load(folder).stop_ids == expected
        return
    try:
        assert tok.load(folder).stop_ids == {257}
    except Refusal as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"7", b"\xff\xfe", b'{"a": ' + b"[" * 100_000])
def test_files_that_are_wrong(name: str, content: bytes, tmp_path: Path) -> None:
    """No JSON is refused, with the path; what is no object says nothing."""
    folder = written(byte(), tmp_path / "t")
    (folder / name).write_bytes(content)
    if content in (b"[1, 2]", b"7"):
        assert tok.load(folder).eos == 257
        return
    with pytest.raises(Refusal, match=name) as raised:
        tok.load(folder)
    assert "\n" not in str(raised.value)


def test_a_template_file_that_is_no_text(tmp_path: Path) -> None:
    folder = written(byte(), tmp_path / "t")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(Refusal, match="chat_template.jinja"):
        tok.load(folder)


@pytest.mark.parametrize("make", [bpe, byte])
def test_what_is_written_is_read_again(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    """files() through load(), twice: the same tokens, ends, template and ids, and the same files."""
    tokenizer = Tokenizer(make().backend, {"chat_template": TEMPLATES["system first"], "extra": 1}, [3, 259])
    again = tok.load(written(tokenizer, tmp_path / "t"))
    assert again.files() == tokenizer.files()
    assert tok.load(written(again, tmp_path / "u")).files() == tokenizer.files()
    names = ("vocab_size", "bos", "eos", "pad", "stop_ids", "template")
    assert [getattr(again, n) for n in names] == [getattr(tokenizer, n) for n in names]
    assert again.stop_ids == {3, 259, tokenizer.eos} and again.config["extra"] == 1
    for text in (chat.render(tokenizer, TALK), CORPUS[:200], "日本 👍\n"):
        assert again.encode(text) == tokenizer.encode(text)
    plain = tok.load(written(tok.char([CORPUS], [CORPUS], unknown="unk"), tmp_path / "v"))
    assert (plain.bos, plain.eos, plain.stop_ids, plain.template) == (None, None, set(), None)
    assert "generation_config.json" not in plain.files()


# ---------------------------------------------------------------- generate.py chat=true


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tokenizer]:
    """A model of random weights that says something else to every text; its folder, itself and its tokenizer."""
    tokenizer = byte()
    model = made("dense", vocab_size=tokenizer.vocab_size, seed=3)
    model.save_pretrained(folder := tmp_path_factory.mktemp("talker") / "export", tokenizer)
    return folder, model, tokenizer


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """generate.py's config, greedy and short."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = check(compose("generate", overrides=["ckpt=x", "threads=1"]), "generate")
    assert not changes.keys() - cfg.keys()
    return cfg | {"ckpt": str(folder), "temperature": 0.0, "max_tokens": 12, "device": "cpu", "chat": True} | changes


def answer(talker: tuple[Path, Any, Tokenizer], messages: list[dict[str, str]], n: int = 12) -> str:
    """What the model says to a conversation, by the parts that generate.py is made of."""
    _, model, tokenizer = talker
    prompt = tokenizer.encode(chat.render(tokenizer, messages))
    options = {"sampling": Sampling(temperature=0), "max_tokens": n}
    return InferenceEngine(model, tokenizer).generate([prompt], **options)[0].text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


Talker = tuple[Path, Any, Tokenizer]


def test_the_answer_alone_is_printed(talker: Talker, capsys: pytest.CaptureFixture[str]) -> None:
    """Streamed or not, with a system's message or none."""
    said = answer(talker, [user("Hello")])
    assert said != answer(talker, [system("Be brief"), user("Hello")]) and said.strip()
    assert session.run(settings(talker[0], prompt="Hello")) == 0
    assert capsys.readouterr().out == said + "\n"
    assert session.run(settings(talker[0], prompt="Hello", system="Be brief")) == 0
    assert capsys.readouterr().out == answer(talker, [system("Be brief"), user("Hello")]) + "\n"
    assert session.run(settings(talker[0], prompt="Hello", stream=False)) == 0
    out = capsys.readouterr().out
    assert out == f"--- 'Hello' sample 1, 12 tokens, ended by length\n{said}\n\n"
    assert session.run(settings(talker[0], prompt="Hello", chat=False)) == 0
    assert capsys.readouterr().out.startswith("Hello")


def test_the_script_chats(talker: Talker) -> None:
    """As a process: a message with quotes and an equals sign; what is refused, in one line with exit code 2."""
    message = 'Say "a=b", it\'s ${x}'
    common = ["generate.py", f"ckpt={talker[0]}", "temperature=0", "max_tokens=12"]
    chats = [*common, "chat=true", f"prompt={message}", "system=You, there: be [brief]"]
    done = forked.Forked(chats, ROOT, environment())
    _, err = done.communicate(120)
    assert done.returncode == 0 and err == "", err
    assert done.written().decode() == answer(talker, [system("You, there: be [brief]"), user(message)]) + "\n"
    refused = forked.run([*common, "prompt=Hello", "system=Be brief"], ROOT, environment())
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == "error: system= is said to a chat: type chat=true as well\n"


def test_refused_before_a_question_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer without a chat: at once, also in a session."""
    tokenizer = tok.char([CORPUS], [CORPUS], unknown="unk")
    made("dense", vocab_size=tokenizer.vocab_size).save_pretrained(tmp_path / "export", tokenizer)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for prompt in ("Hello", None):
        with pytest.raises(Refusal, match="leave out chat=true"):
            session.run(settings(tmp_path / "export", prompt=prompt))
    with pytest.raises(Refusal, match="type chat=true as well"):
        session.run(settings(tmp_path / "export", prompt="Hello", chat=False, system="x"))


def test_a_bad_template_is_refused_by_generate(talker: Talker, tmp_path: Path) -> None:
    """The template in the folder, also where it is only found out when it is rendered."""
    for i, template in enumerate(("{{ ''.__class__.__mro__ }}", "{% for %}", "{{ 1 / 0 }}")):
        folder = tmp_path / str(i)
        talker[1].save_pretrained(folder, with_template(template))
        with pytest.raises(Refusal, match="chat template"):
            session.run(settings(folder, prompt="Hello"))


def test_several_messages_and_a_file_of_answers(
    talker: Talker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line is a chat of its own after the system's message: no history. As JSONL, or printed without the prompts."""
    (tmp_path / "prompts.txt").write_text("Hello\nWho are you?\n\nHello again\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello\\nthere"}\n{"prompt": "ü"}\n')
    lines = ["Hello", "Who are you?", "Hello again"]
    expected = [answer(talker, [system("Be brief"), user(p)]) for p in lines]
    assert len(set(expected)) == 3
    given = {"system": "Be brief", "file": str(tmp_path / "prompts.txt")}
    assert session.run(settings(talker[0], **given, out=str(tmp_path / "out.jsonl"))) == 0
    assert capsys.readouterr().out == f"3 samples in {tmp_path}/out.jsonl\n"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    common = {"choice": 0, "tokens": 12, "finish": "length"}
    assert rows == [{"prompt": p, "text": t} | common for p, t in zip(lines, expected)]
    assert session.run(settings(talker[0], **given)) == 0
    heads = [f"--- {p!r} sample 1, 12 tokens, ended by length\n{t}\n\n" for p, t in zip(lines, expected)]
    assert capsys.readouterr().out == "".join(heads)
    given = {"file": str(tmp_path / "prompts.jsonl"), "out": str(tmp_path / "two.jsonl"), "n": 2}
    assert session.run(settings(talker[0], **given)) == 0
    rows = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [answer(talker, [user(p)]) for p in ("Hello\nthere", "ü")]
    assert [(r["prompt"], r["choice"], r["text"]) for r in rows] == [
        (p, c, t) for p, t in zip(("Hello\nthere", "ü"), texts) for c in (0, 1)
    ]


def says(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, *texts: str) -> None:
    """Let the model's draws be the ids of these texts, one after another, and dots for ever."""
    given = [i for t in texts for i in tokenizer.encode(t)]
    ids = itertools.chain(given, itertools.repeat(tokenizer.encode(".")[0]))
    monkeypatch.setattr(engine, "choose", lambda logits, choosers: [Token(next(ids)) for _ in choosers])


def test_the_end_of_a_turn_ends_the_answer(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that ends its turn as the template ends every turn (ChatML: the end token) has finished."""
    says(monkeypatch, talker[2], f"Paris.{IM_END}\n{IM_START}user\nmore")
    assert session.run(settings(talker[0], prompt="Hello", max_tokens=30)) == 0
    assert capsys.readouterr().out == "Paris.\n"


def test_other_ends_are_in_the_folder(
    talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """generation_config.json names a token; stop= a text."""
    ending = Tokenizer(talker[2].backend, {"chat_template": chat.CHATML}, [talker[2].encode("Z")[0]])
    talker[1].save_pretrained(tmp_path / "export", ending)
    says(monkeypatch, ending, "Paris.Zmore and more")
    assert session.run(settings(tmp_path / "export", prompt="Hello", max_tokens=15)) == 0
    assert capsys.readouterr().out == "Paris.\n"
    says(monkeypatch, ending, "Paris. User: what")
    assert session.run(settings(tmp_path / "export", prompt="Hello", max_tokens=15, stop=["User:"])) == 0
    assert capsys.readouterr().out == "Paris. \n"


# ---------------------------------------------------------------- a session


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """`typed(*lines)`: what is typed at a terminal; -> the conversations that are rendered from then on."""

    def type_in(*lines: Any) -> list[Any]:
        waiting: Iterator[Any] = iter(lines)
        rendered: list[Any] = []
        render = chat.render

        def read(prompt: str) -> str:
            line = next(waiting)
            if isinstance(line, type):
                raise line
            return line

        def spy(tokenizer: Tokenizer, messages: list[Any], reply: bool = True) -> str:
            if reply:  # else it is not a question
                rendered.append([dict(m) for m in messages])
            return render(tokenizer, messages, reply)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(chat, "render", spy)
        return rendered

    return type_in


def test_a_session_keeps_the_conversation(
    talker: Talker, typed: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every message comes after all that was said, the system's first; answers are those of the whole conversation."""
    first = [system("Be brief"), user("Hello")]
    one = answer(talker, first)
    second = [*first, {"role": "assistant", "content": one}, user("And then?")]
    two = answer(talker, second)
    assert two != answer(talker, [system("Be brief"), user("And then?")])
    third = [*second, {"role": "assistant", "content": two}, user("Bye")]
    rendered = typed("Hello", "And then?", "Bye", "")
    assert session.run(settings(talker[0], system="Be brief")) == 0
    assert rendered == [first, second, third]
    assert capsys.readouterr().out == f"{one}\n{two}\n{answer(talker, third)}\n"


def test_a_session_without_chat_has_no_history(
    talker: Talker, typed: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    rendered = typed("Hello", "Hello", EOFError)
    assert session.run(settings(talker[0], chat=False)) == 0
    assert rendered == []
    lines = capsys.readouterr().out
    half = lines[: (len(lines) - 1) // 2]
    assert half.startswith("Hello") and lines == half * 2 + "\n"


def test_what_was_stopped_or_refused_is_not_said(
    talker: Talker, typed: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in an answer and a message that is refused leave the conversation as it was; it goes on."""
    stream, calls = session.Speaker.stream, []

    def stopped(self: session.Speaker, prompt: str) -> str:
        calls.append(prompt)
        if prompt == "stop":
            raise KeyboardInterrupt
        if prompt == "refuse":
            raise Refusal("no")
        return stream(self, prompt)

    monkeypatch.setattr(session.Speaker, "stream", stopped)
    rendered = typed("stop", "refuse", "Hello", "stop", "And?", KeyboardInterrupt)
    assert session.run(settings(talker[0])) == 0
    one = answer(talker, [user("Hello")])
    assert rendered[:2] == [[user("Hello")], [user("Hello"), {"role": "assistant", "content": one}, user("And?")]]
    assert calls == ["stop", "refuse", "Hello", "stop", "And?"]
    assert "error: no\n" in capsys.readouterr().err


def test_a_session_at_a_terminal(talker: Talker) -> None:
    """A process whose standard input is a terminal: two messages and an empty line."""
    one = answer(talker, [user("Hello")], 6)
    two = answer(talker, [user("Hello"), {"role": "assistant", "content": one}, user("And then?")], 6)
    master, slave = pty.openpty()
    command = [sys.executable, "generate.py", f"ckpt={talker[0]}", "chat=true", "temperature=0", "max_tokens=6"]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    os.close(slave)
    os.write(master, b"Hello\nAnd then?\n\n")
    out, err = child.communicate(timeout=120)
    os.close(master)
    assert child.returncode == 0, err
    assert out.decode() == f"> {one}\n> {two}\n> "
    assert err.decode() == "Type a message and press return; an empty line or Ctrl-D ends.\n"


# ---------------------------------------------------------------- what the assistant said


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """A conversation of these contents, the user's and the assistant's in turn."""
    roles = itertools.cycle(["user", "assistant"] if first == "user" else ["assistant", "user"])
    return [{"role": r, "content": c} for r, c in zip(roles, contents)]


def heard(tokenizer: Tokenizer, messages: list[dict[str, str]], last_only: bool = False, first: int = 0) -> list[str]:
    """The texts of the ranges, of a text that is the rendered one."""
    text, ranges = chat.spans(tokenizer, messages, last_only, first)
    assert text == chat.render(tokenizer, messages, reply=False)
    assert ranges == sorted(ranges) and all(0 <= a < b <= len(text) for a, b in ranges)
    return [text[a:b] for a, b in ranges]


GENERATING = (
    "{% for m in messages %}{{ '" + IM_START + "' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '" + IM_END + "' }}{% endgeneration %}{% else %}{{ m['content'] + '" + IM_END + "' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '" + IM_START + "assistant\\n' }}{% endif %}"
)  # fmt: skip
TALKS = [
    turns("Hello", "Hi"),
    turns("Hello", "Hi\n\n ", "  And?", "\n1 < 2 \t", "", "日本 👍"),
    [*TALK[:1], *turns("a", "a", "a", "a")],
    [{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi"}, *turns("x")],
    turns(f"{IM_END}\n{IM_START}assistant\nI", f"He said {IM_END}", "x", f"{IM_END}\n"),
    turns("one", "two", "three"),
    GREETING,
]


@pytest.mark.parametrize("messages", TALKS, ids=lambda m: m[-1]["content"][:9])
def test_three_ways_to_what_was_said_agree(messages: list[dict[str, str]]) -> None:
    """On ChatML: marks in the template, texts that grow, and marks instead of the contents; every content with the token
    that ends its turn and without the line's end behind that."""
    plain, marked = byte(), with_template(GENERATING)
    text = chat.render(plain, messages, reply=False)
    assert text == chat.render(marked, messages, reply=False)
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected = [messages[i]["content"] + IM_END for i in said]
    assert heard(plain, messages) == heard(marked, messages) == expected
    ranges = chat.spans(plain, messages, last_only=False)[1]
    assert chat.spans(marked, messages, last_only=False) == (text, ranges)
    if said:
        assert chat._marked(marked, messages, text, said) == ranges
    assert [chat._grown(plain, messages, i, text) for i in said] == ranges
    assert list(chat._kept(plain, messages, said, text).values()) == ranges
    for tokenizer in (plain, marked):
        assert heard(tokenizer, messages, last_only=True) == expected[-1:]
        for first in range(len(messages) + 1):
            rest = [e for i, e in zip(said, expected) if i >= first]
            assert heard(tokenizer, messages, first=first) == rest
            assert heard(tokenizer, messages, last_only=True, first=first) == rest[-1:]


LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
# As Qwen3's: a thought stands in turns behind the last question alone, where there is an empty one at least.
THINKING = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}{% set parts = m['content'].split('</think>') %}{{ '<|im▁start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n' + (parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '') + '\\n</think>\\n\\n' }}{% endif %}
{{- parts[-1].lstrip('\\n') + '<|im▁end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im▁start|>assistant\\n' }}{% endif %}"""
# As DeepSeek-R1's: asked for an answer, it begins with a thought that is never shown afterwards.
OPENED = """{% for m in messages %}{% if m['role'] == 'user' %}U{{ m['content'] }}{% else %}A{{ m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'A<think>\\n' }}{% endif %}"""
# As Phi-3's: an end of text behind the last turn alone.
CLOSED = """{% for m in messages %}{{ m['role'] + '\\n' + m['content'] + '<|im▁end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"""
# As gpt-oss's: the last turn ends with another token. As Command-R7B's: with two of them.
RETURNED = """{% for m in messages %}{{ '<|im▁start|>' + m['role'] + '\\n' + m['content'] + ('<|im▁end|>' if not loop.last or m['role'] == 'user' else eos_token) }}{% endfor %}{% if add_generation_prompt %}{{ '<|im▁start|>assistant\\n' }}{% endif %}"""
TWICE = chat.CHATML.replace(IM_END, IM_END + EOS)
# As GLM-4's: the next turn's first token is the only end.
ENDLESS = """{% for m in messages %}{{ '<|im▁start|>' + m['role'] + '\\n' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|im▁start|>assistant\\n' }}{% endif %}"""
THOUGHT = turns("q", "<think>\nhm\n</think>\n\nfirst", "r", "<think>\noh\n</think>\n\nsecond")

SAID = [
    ("stripped", LLAMA2, turns(" q ", " first\n", "r", "\tsecond "), [f" first {EOS}", f" second {EOS}"]),
    ("stripped by a filter", chat.CHATML.replace("['content']", "['content'] | trim"), turns("q", "\n a ", "r", "b\n"), [f"a{IM_END}", f"b{IM_END}"]),
    ("a thought", THINKING, THOUGHT, [f"first{IM_END}", f"<think>\noh\n</think>\n\nsecond{IM_END}"]),
    ("an empty thought", THINKING, turns("q", "first", "r", "second"), [f"first{IM_END}", f"<think>\n\n</think>\n\nsecond{IM_END}"]),
    ("an opened thought", OPENED, THOUGHT, [f"\n\nfirst{EOS}", f"\n\nsecond{EOS}"]),
    ("the text's end", CLOSED, turns("q", "first", "r", "second\n"), [f"first{IM_END}", f"second\n{IM_END}"]),
    ("another end", RETURNED, turns("q", "first", "r", "second"), [f"first{IM_END}", f"second{EOS}"]),
    ("two ends", TWICE, turns("q", "first", "r", "second"), [f"first{IM_END}{EOS}", f"second{IM_END}{EOS}"]),
    ("no end", ENDLESS, turns("q", "first\n", "r", "second \n"), ["first\n", "second \n"]),
    ("no end, no beginning", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", turns("q", "a\n", "r", "b"), ["a\n", "b"]),
    ("never asked", "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}", turns("q", "a", "r", "b"), ["assistant: a", "assistant: b"]),
    ("an end in words", "{% for m in messages %}{{ m['content'] + '###\\n' }}{% endfor %}", turns("q", "a", "r", "b"), ["a", "b"]),
    ("several marks", GENERATING.replace("{{ m['content']", "{{ 'one' }}{% endgeneration %}--{% generation %}{{ m['content']", 1), turns("q", "a", "r", "b"), ["one", f"a{IM_END}", "one", f"b{IM_END}"]),
    ("marks with white space", GENERATING.replace(f"'{IM_END}' }}}}{{% endg", f"'{IM_END}\\n' }}}}{{% endg", 1), turns("q", "a"), [f"a{IM_END}\n"]),
    ("marks of the content", GENERATING.replace(f"m['content'] + '{IM_END}' }}}}{{% endgeneration %}}", "m['content'] }}{% endgeneration %}x", 1), turns("q", "a"), ["a"]),
    ("marks in a filter", "{% for m in messages %}{% filter trim %}{% generation %} {{ m['content'] }} {% endgeneration %}{% endfilter %};{% endfor %}", turns("q", "a", "r", "b"), ["a", "b"]),
]  # fmt: skip


@pytest.mark.parametrize("template,messages,expected", [s[1:] for s in SAID], ids=[s[0] for s in SAID])
def test_what_templates_make_of_what_was_said(
    template: str, messages: list[dict[str, str]], expected: list[str]
) -> None:
    """White space taken off, thoughts left out or added, one end or none: what is left, with its end."""
    tokenizer = with_template(template)
    assert heard(tokenizer, messages) == expected
    turn = len(expected) // (len(messages) // 2)
    assert heard(tokenizer, messages, last_only=True) == expected[-turn:]
    assert heard(tokenizer, messages, first=2) == expected[turn:]


def test_contents_that_look_like_what_follows() -> None:
    """What stands between two answers may be a part of one; an answer of nothing has no range where marks enclose it."""
    counted = with_template("{% for m in messages %}{{ messages | length }}{{ m['content'] }}\n{% endfor %}")
    assert heard(counted, turns("q", "\n4r\n4x", "r", "b")) == ["\n4r\n4x", "b"]
    assert heard(counted, turns("q", "x\n4r\n4", "r", "b")) == ["x\n4r\n4", "b"]
    marked = with_template("{% for m in messages %}[{% generation %}{{ m['content'] }}{% endgeneration %}]{% endfor %}")
    assert heard(marked, turns("", "", "", "b")) == ["b"]


def test_marks_behind_the_last_turn_alone() -> None:
    """As in TRL's Phi-3: what is marked there belongs to the last turn, with the marks of its content."""
    tokenizer = with_template(GENERATING + "{% if not add_generation_prompt %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}")  # fmt: skip
    messages = turns("q", "a", "r", "b")
    assert heard(tokenizer, messages) == [f"a{IM_END}", f"b{IM_END}", EOS]
    assert heard(tokenizer, messages, last_only=True) == heard(tokenizer, messages, first=2) == [f"b{IM_END}", EOS]


def test_a_system_that_a_template_refuses() -> None:
    """Its own words, and not a guess; without one the turns are found."""
    tokenizer = with_template("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + chat.CHATML)  # fmt: skip
    with pytest.raises(Refusal, match="^the chat template refuses: System role not supported$"):
        chat.spans(tokenizer, [system("x"), *turns("q", "a")], last_only=False)
    assert heard(tokenizer, turns("q", "a")) == [f"a{IM_END}"]


def test_a_template_that_leaves_the_answer_out() -> None:
    """As those of models of images do, which want contents in parts: nothing is trained on its ends alone."""
    for marks in ("", "{% generation %}"):
        parts = f"{{% for c in m['content'] %}}{{% if c.type == 'text' %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{IM_END}"
        marked = marks + parts + marks.replace("gen", "endgen")
        tokenizer = with_template("{% for m in messages %}" + marked + "{% endfor %}")
        with pytest.raises(Refusal, match="does not show what the assistant said"):
            chat.spans(tokenizer, turns("q", "a"), last_only=False)
        assert chat.end_of_turn(tokenizer) == set()


@pytest.mark.parametrize("content", ["{{ m['content'] | upper }}{{ messages | length }}", "{{ m['content'] | tojson }}", "{{ m['content'][:1] }}"])  # fmt: skip
def test_what_cannot_be_found_is_refused(content: str) -> None:
    """A template that changes what was said, in earlier turns too: one line with what to do, and never a wrong range."""
    tokenizer = with_template(
        "{% for m in messages %}{{ messages | length }}{{ m['role'] }}" + content + "{% endfor %}"
    )
    with pytest.raises(Refusal, match="does not show what the assistant said: put {% generation %}") as raised:
        chat.spans(tokenizer, turns('a "quote"\n', 'an "answer"\n', "b", "c"), last_only=False)
    assert "\n" not in str(raised.value)


def test_marks_that_a_message_has_too() -> None:
    """The private characters of the marks are text like any other where somebody wrote them."""
    open, close = chat.OPEN, chat.CLOSE
    for tokenizer in (byte(), with_template(GENERATING), with_template(THINKING)):
        messages = turns(f"{open}1{close}", f"{close}x{open}3{close}", "y", f"z{open}{close}")
        ends = [s[-len(f"x{open}3{close}{IM_END}") :] for s in heard(tokenizer, messages)[:1]]
        assert ends == [f"x{open}3{close}{IM_END}"]
        assert heard(tokenizer, messages, last_only=True)[0].endswith(f"z{open}{close}{IM_END}")


def test_names_in_a_generation_block_stay_in_it(tmp_path: Path) -> None:
    """As for transformers, with marks or without."""
    import transformers

    template = "{% set x = 'out' %}{% for m in messages %}{% generation %}{% set x = m['content'] %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}"  # fmt: skip
    tokenizer = with_template(template)
    theirs = transformers.AutoTokenizer.from_pretrained(written(tokenizer, tmp_path / "t"))
    assert chat.render(tokenizer, TALK) == theirs.apply_chat_template(TALK, tokenize=False)
    assert heard(tokenizer, turns("q", "a")) == ["q", "a"]


def test_long_conversations_are_found_alike() -> None:
    """Beyond the number of turns that are rendered one by one."""
    messages = turns(*(f"turn {i}" for i in range(6 * chat.GROWN)))
    expected = [m["content"] + IM_END for m in messages[1::2]]
    assert heard(byte(), messages) == expected == heard(with_template(GENERATING), messages)


def test_the_end_of_a_turn_is_what_is_trained() -> None:
    """The token that stops generate.py is the last of what the assistant said, behind white space too."""
    for template, end in ((chat.CHATML, IM_END), (LLAMA2, EOS), (CLOSED, IM_END), (OPENED, EOS)):
        tokenizer = with_template(template)
        assert chat.end_of_turn(tokenizer) == {tokenizer.backend.token_to_id(end)}
        assert all(s.endswith(end) for s in heard(tokenizer, turns("q", "a", "r", "b")))
    assert chat.end_of_turn(with_template(ENDLESS)) == chat.end_of_turn(with_template("{{ 1 / 0 }}")) == set()


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of chats renders one template a million times."""
    compiled = []
    environment = chat._environment
    monkeypatch.setattr(chat, "_environment", lambda marked: compiled.append(marked) or environment(marked))
    tokenizer = with_template(chat.CHATML + "{# for this test #}")
    for i in range(20):
        chat.spans(tokenizer, turns(f"q{i}", f"a{i}"), last_only=False)
    assert compiled == [False]


# As Qwen2.5's: tools and calls as JSON, results in the user's turn.
CALLING = """{% if tools %}{{ '<|im▁start|>system\\n<tools>' }}{% for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}{{ '\\n</tools><|im▁end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im▁start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}
{%- if m.role == 'tool' %}{{ '<tool_response>\\n' + m.content + '\\n</tool_response>' }}{% else %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}{% set f = c.function %}{{ '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' + (f.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}
{{- '<|im▁end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im▁start|>assistant\\n' }}{% endif %}"""
TOOL = {"type": "function", "function": {"name": "weather", "description": "the weather — <now>", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CALLED = [
    {"role": "user", "content": "Is it warm in Århus?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Århus"}}}]},
    {"role": "tool", "tool_call_id": "1", "content": "12 °C"},
]  # fmt: skip


@pytest.mark.parametrize("messages", [CALLED[:1], CALLED], ids=["asked", "called"])
def test_tools_are_rendered_as_transformers_does(tmp_path: Path, messages: list[dict]) -> None:
    """Descriptions, calls and results, in the template's own form."""
    import transformers

    tokenizer = with_template(CALLING)
    theirs = transformers.AutoTokenizer.from_pretrained(written(tokenizer, tmp_path / "t"))
    for tools in (None, [TOOL]):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        assert chat.render(tokenizer, messages, tools=tools) == expected
    assert "the weather — <now>" in expected and ("12 °C" in expected) == (len(messages) == 3)


def test_a_template_without_a_place_for_tools() -> None:
    """Tools that would be left out of the prompt are refused, not ignored; a template is not asked for what it mentions in
    another sense."""
    for template in (chat.CHATML, "{% for m in messages %}{{ m.tools }}{% endfor %}"):
        tokenizer = with_template(template)
        assert not chat.takes_tools(tokenizer)
        for messages, tools in ((CALLED[:1], [TOOL]), (CALLED[:2], None), (CALLED[2:], None)):
            with pytest.raises(Refusal, match="no place for tools: leave out tools"):
                chat.render(tokenizer, messages, tools=tools)
        chat.render(tokenizer, CALLED[:1], tools=[])
    assert chat.takes_tools(with_template(CALLING))
    with pytest.raises(Refusal, match="the chat template refuses"):  # a template that is none says so itself
        chat.render(with_template("{% if tools"), CALLED[:1])
