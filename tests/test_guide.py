"""Guided output: whatever the logits are, the text is what was asked for, and then the sample ends."""

import json
import random
import re
import sys
import time
from typing import Any

import jsonschema
import pytest
import torch
from conftest import varied_text
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from etude.errors import Refusal
from etude.infer.guide import SPACE, Guide, compile_guide, token_bytes
from etude.infer.sampling import Chooser, Sampling, choose
from etude.text import tokenizer as tok

pytest.importorskip("llguidance")

CHARS = "".join(map(chr, range(32, 127))) + "\n\t\ré日üß蓝ö名前"


def spaced() -> tok.Tokenizer:
    """A tokenizer as Llama 2's: ▁ for a space, <0x..> for a byte, a space put in front of a text."""
    words = [
        "<unk>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *CHARS.strip(),
        "▁{",
        '":',
        "true",
        "▁a",
        "ab",
    ]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    backend = Backend(
        models.BPE(vocab, [("▁", "{"), ('"', ":"), ("a", "b"), ("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("</s>", normalized=False)])
    return tok.Tokenizer(backend)


TOKENIZERS = {
    "byte": tok.byte([], []),
    "bpe": tok.bpe([varied_text(20_000) + '{"name": "a", "n": [1, 2]}\n' * 50], [], vocab_size=700),
    "char": tok.char([CHARS], [CHARS], unknown="unk"),
    "spaced": spaced(),
}


def say(
    tokenizer: tok.Tokenizer, guide: Guide, seed: int, limit: int = 3000, keen: str = '"]}', vocab: int = 0
) -> list[int]:
    """A sample of a model whose logits are random, but that likes to close what it opened; ends where the guide does."""
    V = vocab or tokenizer.vocab_size
    bias = {i: 4.0 for c in keen if (i := tokenizer.backend.token_to_id(c)) is not None}
    chooser = Chooser(Sampling(temperature=1.0, seed=seed, logit_bias=bias), 0, [], V, guide)
    torch.manual_seed(seed)
    logits = torch.randn(64, V)
    out: list[int] = []
    while not guide.finished and len(out) < limit:
        token = choose(logits[len(out) % 64][None], [chooser])[0]
        assert token is not None, chooser.error
        chooser.push(token.id)
        out.append(token.id)
    return out


def text_of(tokenizer: tok.Tokenizer, out: list[int]) -> str:
    return tokenizer.decode(out, skip_special=True)


# ---------------------------------------------------------------- what is asked for


def object_of(required: list[str] | None = None, **properties: Any) -> dict:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


TEXT = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict] = {
    "flat": object_of(name=TEXT, age={"type": "integer"}),
    "nested": object_of(a=object_of(b=object_of(c={"type": "boolean"}, d={"type": "null"}))),
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 5},
    "objects in arrays": object_of(rows={"type": "array", "items": object_of(x={"type": "number"}, y=TEXT), "maxItems": 3}),
    "enum": object_of(colour={"enum": ["rot", "grün", "蓝"]}, n={"enum": [1, 2.5, None, True]}),
    "unicode": object_of(**{"größe": TEXT, "名前": {"const": "é\"\\\n日"}}),
    "optional": object_of(required=["b"], a=TEXT, b={"type": "integer"}, c={"type": "boolean"}),
    "any of": {"anyOf": [object_of(kind={"const": "a"}, v={"type": "integer"}), object_of(kind={"const": "b"}, v=TEXT)]},
    "pattern": object_of(id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, day={"type": "string", "format": "date"}),
    "references": {
        "$defs": {"leaf": {"type": "integer"}, "pair": object_of(l={"$ref": "#/$defs/leaf"}, r={"$ref": "#/$defs/leaf"})},
        "type": "array", "items": {"$ref": "#/$defs/pair"}, "maxItems": 3,
    },
    "recursive": {"$defs": {"t": object_of(required=["v"], v={"type": "integer"}, next={"$ref": "#/$defs/t"})}, "$ref": "#/$defs/t"},
    "numbers": object_of(n={"type": "number", "minimum": -1, "maximum": 1}, i={"type": "integer", "exclusiveMinimum": 5}),
    "values": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 4},
    "scalar": {"type": "string", "minLength": 3, "maxLength": 6},
}  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_of_a_schema(schema: str) -> None:
    """Random logits give JSON that parses and that an independent validator accepts, with tokens of bytes, of several
    letters, of characters, and of SentencePiece's kind."""
    tree, whole = SCHEMAS[schema], 0
    if "$ref" not in tree:
        jsonschema.Draft202012Validator.check_schema(tree)
    for name, tokenizer in TOKENIZERS.items():
        make = compile_guide(tokenizer, {"json": tree})
        for seed in range(4):
            guide = make()
            out = say(tokenizer, guide, seed, 1500)
            if not guide.finished:
                continue
            text = text_of(tokenizer, out)
            jsonschema.validate(json.loads(text), tree)
            assert not re.search(r"\s{21}", text), "white space without end"
            whole += 1
        assert guide.error is None, name
    assert whole >= 12, "too few samples came to their end"


def test_any_object() -> None:
    """{"json": true} is an object of anything, and only that."""
    sizes = []
    for seed in range(8):
        guide = compile_guide(TOKENIZERS["byte"], {"json": True})()
        out = say(TOKENIZERS["byte"], guide, seed, 4000)
        if guide.finished:
            found = json.loads(text_of(TOKENIZERS["byte"], out))
            assert isinstance(found, dict)
            sizes.append(len(out))
    assert len(sizes) >= 4


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "pattern",
    [r"[a-f]{2,5}-[0-9]{3}", r"(ja|nein), (bitte|danke)!", r"(a|b)*abc", r"[^x]{4}é?", r"[a-z_é]+@[a-z]+\.(com|org)", r"日(é|日)*\n"],
)  # fmt: skip
def test_the_whole_text_matches_a_pattern(name: str, pattern: str) -> None:
    tokenizer, ended = TOKENIZERS[name], 0
    for seed in range(6):
        guide = compile_guide(tokenizer, {"regex": pattern}, end_ids=tokenizer.stop_ids)()
        out = say(tokenizer, guide, seed, 400, keen="c@.m\n")
        if guide.finished:
            assert re.fullmatch(pattern, text_of(tokenizer, out)), out
            ended += 1
    # Without an end token a text that may go on never ends by itself.
    assert ended >= 1 or (not tokenizer.stop_ids and pattern.endswith(("\\n", "org)")))


def test_choices_and_grammars() -> None:
    """Each text can come and no other; a Lark grammar with a recursive rule, which no regular expression has."""
    texts = ["yes", "no", "no way", "vielleicht (é.*)", "日"]
    for tokenizer in TOKENIZERS.values():
        make = compile_guide(tokenizer, {"choice": texts})
        found = {text_of(tokenizer, say(tokenizer, make(), seed, keen="ynv日 ")) for seed in range(60)}
        assert found <= set(texts) and len(found) >= 4
    grammar = 'start: sum\nsum: term | sum "+" term\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,3}/'
    tokenizer = TOKENIZERS["bpe"]
    for seed in range(10):
        guide = compile_guide(tokenizer, {"grammar": grammar})()
        out = say(tokenizer, guide, seed, 400, keen=")")
        if guide.finished:
            text = text_of(tokenizer, out)
            assert set(text) <= set("0123456789+()") and eval(re.sub(r"\b0+(?=\d)", "", text)) >= 0


# ---------------------------------------------------------------- ends


def ids_of(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def test_only_end_tokens_end_a_text() -> None:
    """Not before it is whole; where it may go on, beside what goes on; where it is finished, alone."""
    t = TOKENIZERS["byte"]
    a, b = ord("a"), ord("b")
    guide = compile_guide(t, {"regex": "ab*"})()
    assert ids_of(guide.mask()) == [a] and not guide.finished
    guide.push(a)
    assert ids_of(guide.mask()) == [b, t.eos] and not guide.finished
    guide.push(t.eos)
    assert guide.finished and ids_of(guide.mask()) == [t.eos] and guide.error is None
    turn = t.backend.token_to_id(tok.IM_END)
    guide = compile_guide(t, {"regex": "ab"}, end_ids={t.eos, turn})()
    guide.push(a)
    guide.push(b)
    assert guide.finished and ids_of(guide.mask()) == sorted([t.eos, turn])
    silent = compile_guide(t, {"regex": "ab"}, end_ids=())()
    silent.push(a)
    silent.push(b)
    assert silent.finished and not silent.mask().any()


def test_an_end_token_with_a_text() -> None:
    """A request may end at a newline: then no newline may come inside of what it asked for."""
    t = TOKENIZERS["byte"]
    guide = compile_guide(t, {"regex": "a\n?b+"}, end_ids={10})()
    guide.push(ord("a"))
    assert ids_of(guide.mask()) == [ord("b")]
    guide.push(ord("b"))
    assert ids_of(guide.mask()) == [10, ord("b")]
    guide.push(10)
    assert guide.finished and guide.error is None


def test_masks_are_as_long_as_the_logits() -> None:
    """A model's vocabulary may be padded beyond the tokenizer's; what is there never comes."""
    t = TOKENIZERS["byte"]
    guide = compile_guide(t, {"choice": ["ab"]}, vocab_size=t.vocab_size + 59)()
    assert guide.mask().shape == (320,) and ids_of(guide.mask()) == [ord("a")]
    assert text_of(t, say(t, guide, 0, vocab=320)) == "ab"


def test_special_tokens_never_stand_for_their_text() -> None:
    """Not even where their very text is asked for, and <unk> stands for nothing."""
    for name in ("byte", "bpe"):
        t = TOKENIZERS[name]
        out = say(t, compile_guide(t, {"choice": [f"a{tok.IM_END}b"]})(), 0)
        assert not set(out) & set(t.backend.get_added_tokens_decoder()) and t.decode(out) == f"a{tok.IM_END}b"
        assert out == t.encode_many([f"a{tok.IM_END}b"])[0].tolist()
    char = TOKENIZERS["char"]
    assert not compile_guide(char, {"regex": ".{5}"})().mask()[char.backend.token_to_id(tok.UNK)]


# ---------------------------------------------------------------- samples


def test_samples_are_independent_and_can_be_built_anew() -> None:
    """Two guides of one compilation go different ways; one that is given the same tokens again says the same."""
    t = TOKENIZERS["bpe"]
    make = compile_guide(t, {"json": SCHEMAS["objects in arrays"]})
    assert (
        compile_guide(t, {"json": dict(SCHEMAS["objects in arrays"])}) is not make
    )  # a maker; what is compiled is kept
    first, second = make(), make()
    rng = random.Random(0)
    out: list[int] = []
    before = make().mask()
    while not first.finished and len(out) < 200:
        mask = first.mask()
        again = make()
        for token in out:
            again.push(token)
        assert torch.equal(again.mask(), mask) and torch.equal(first.mask(), mask)
        token = rng.choice(ids_of(mask))
        first.push(token)
        out.append(token)
    assert len(out) > 10 and torch.equal(second.mask(), before) and not second.finished


def test_what_is_compiled_is_kept() -> None:
    from etude.infer import guide

    t, before = TOKENIZERS["byte"], guide._compiled.cache_info().misses
    spec = {"regex": "only here [0-9]+"}
    for _ in range(3):
        compile_guide(t, spec)
    assert guide._compiled.cache_info().misses == before + 1
    compile_guide(TOKENIZERS["bpe"], spec)
    assert guide._compiled.cache_info().misses == before + 2


def test_a_token_that_is_not_allowed() -> None:
    """The guide is in error for ever, allows nothing, and the sample's chooser says why."""
    t = TOKENIZERS["byte"]
    for wrong in (ord("x"), t.vocab_size + 5, t.backend.token_to_id(tok.PAD)):
        guide = compile_guide(t, {"regex": "ab"})()
        guide.push(wrong)
        assert guide.error and "\n" not in guide.error and not guide.finished and not guide.mask().any()
        chooser = Chooser(Sampling(), 0, [], t.vocab_size, guide)
        assert choose(torch.zeros(1, t.vocab_size), [chooser]) == [None]
        assert guide.error in (chooser.error or "")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "spec,why",
    [
        ({}, "a guide is one of"),
        ({"json": {}, "regex": "a"}, "a guide is one of"),
        ({"xml": "a"}, "a guide is one of"),
        ({"json": 3}, "should be a JSON schema"),
        ({"json": False}, "should be a JSON schema"),
        ({"json": {"type": "foo"}}, "foo"),
        ({"json": {"type": "array", "contains": {"type": "string"}}}, "contains"),
        ({"json": {"const": float("nan")}}, "is not JSON"),
        ({"json": {"const": {1, 2}}}, "is not JSON"),
        ({"json": {"$ref": "http://localhost:1/schema.json"}}, "does not fetch"),
        (
            {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
            "no text of this tokenizer's tokens satisfies it",
        ),
        ({"json": {"enum": ["\ud800"]}}, "json is refused"),
        ({"regex": "[a"}, "unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": ""}, "not empty"),
        ({"regex": "a" * (1 << 20) + "a"}, "1048577 characters"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": 3}, "should be a text"),
        ({"choice": []}, "list of texts"),
        ({"choice": ["a", ""]}, "list of texts"),
        ({"choice": "ab"}, "list of texts"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_is_wrong_is_told(spec: dict, why: str) -> None:
    with pytest.raises(Refusal, match=re.escape(why)) as refused:
        compile_guide(TOKENIZERS["byte"], spec)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def deep(n: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: list[dict] = [
    {"json": deep(400)},
    {"json": deep(100_000)},
    {"json": {"enum": [f"value {i}" for i in range(60_000)]}},
    {"json": {"allOf": [{"anyOf": [object_of(**{f"p{i}_{j}": TEXT}) for j in range(6)]} for i in range(8)]}},
    {"regex": "(a{1000}){1000}"},
    {"regex": "a{1000000}"},
    {"regex": "(" * 5000 + "a" + ")" * 5000},
    {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
    {"grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(30)) + 'a30: "a"'},
]


@pytest.mark.parametrize("spec", BOMBS, ids=range(len(BOMBS)))
def test_what_explodes_is_refused_in_time(spec: dict) -> None:
    begun = time.monotonic()
    with pytest.raises(Refusal) as refused:
        compile_guide(TOKENIZERS["byte"], spec)
    assert time.monotonic() - begun < 10 and "\n" not in str(refused.value)


@pytest.mark.parametrize("pattern", [r"(\w{1,200} ?){1,200}", "(a|b)*a(a|b){25}", "(x+x+)+y", "(.*a){40}", "((a*)*)*b"])
def test_hard_patterns_stay_quick_on_the_way(pattern: str) -> None:
    """Where a limit is met later, that sample has an error; no step takes long."""
    t = TOKENIZERS["byte"]
    guide, rng = compile_guide(t, {"regex": pattern})(), random.Random(0)
    for _ in range(150):
        begun = time.monotonic()
        allowed = ids_of(guide.mask())
        took = time.monotonic() - begun
        assert took < 1
        if not allowed or guide.finished:
            break
        guide.push(rng.choice(allowed))
    assert guide.error is None or "\n" not in guide.error


def test_vocabularies_that_cannot_say_it() -> None:
    """Told when the guide is compiled; tokens that have no text of their own are refused."""
    few = tok.char(["abc "], ["abc "], unknown="error")
    with pytest.raises(
        Refusal, match="the guide's json is refused: this tokenizer has no token for what must come next"
    ):
        compile_guide(few, {"json": True})
    with pytest.raises(Refusal, match="no text of this tokenizer's tokens satisfies it"):
        compile_guide(few, {"regex": "abd"})
    assert ids_of(compile_guide(few, {"regex": "[a-z]"})().mask()) == few.encode("abc")
    with pytest.raises(Refusal, match="it has no decoder"):
        compile_guide(tok.ids([], [], vocab_size=5), {"regex": "1"})
    words = Backend(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}))
    words.decoder = decoders.WordPiece()
    with pytest.raises(Refusal, match="its decoder is WordPiece"):
        token_bytes(tok.Tokenizer(words))


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Refusal, match=re.escape("pip install llguidance")):
        compile_guide(tok.byte([], []), {"regex": "a"})


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens_add_up_to_the_text(name: str) -> None:
    """Of any tokens in any order, against the tokenizer's own decoder; and of real text."""
    t, rng = TOKENIZERS[name], random.Random(0)
    tokens, added = token_bytes(t), t.backend.get_added_tokens_decoder()
    plain = [i for i in range(t.vocab_size) if i not in added]
    for _ in range(200):
        ids = [rng.choice(plain) for _ in range(rng.randrange(1, 12))]
        data = b"".join(tokens[i] for i in ids)
        if (
            name == "spaced"
        ):  # its decoder writes a U+FFFD for each byte of what is not UTF-8, and takes the first space off
            try:
                expected = data.decode().removeprefix(" ")
            except UnicodeDecodeError:
                continue
        else:
            expected = data.decode(errors="replace")
        assert t.decode(ids) == expected
    text = 'é日 {"a": [1, 2]}\n'
    whole = b"".join(tokens[i] for i in t.encode(text)).decode()
    assert whole.removeprefix(" ") == text


def test_space_is_bounded() -> None:
    """A model that only ever wants white space must go on after twenty of them."""
    t = TOKENIZERS["byte"]
    guide = compile_guide(t, {"json": SCHEMAS["flat"]})()
    n = 0
    guide.push(ord("{"))
    while guide.mask()[32]:
        guide.push(32)
        n += 1
    assert n == 20 == int(re.findall(r"\{0,(\d+)\}", SPACE)[0]) and guide.error is None


def test_patterns_split_as_the_library_wants() -> None:
    """The tokenizer's own cut of a text that leaves no choice: the very tokens that it would encode."""
    t = TOKENIZERS["bpe"]
    text = varied_text(300).strip()[:60]
    assert say(t, compile_guide(t, {"choice": [text]})(), 0) == t.encode(text)
