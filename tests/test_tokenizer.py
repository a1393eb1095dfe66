"""Tokenizers: nothing is lost, nothing is shown by halves, and the vocabulary is what it says."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import varied_text
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from etude.errors import Refusal
from etude.text import tokenizer as tok
from etude.text.tokenizer import Streamer, Tokenizer

HARD = [
    "",
    " ",
    "  leading and trailing  ",
    "tabs\tand\r\nboth\nkinds of line\r",
    "\n\n\n",
    "naïve café — “quoted” … €",
    "日本語のテキスト、改行\nなし",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 tone",
    "e\u0301 is not \u00e9; \u1e9b\u0323 \ufb01 \u2126",  # forms that a normaliser would merge
    "العربية עברית \u202eright to left\u202c",
    "\u0000\u0001\u007f\u0080\u00a0\u00ad",  # controls, no-break space, soft hyphen
    "\u200b\u200d\ufeff\ufffd\uffff\U0010ffff",  # invisible, replacement, non-characters
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯A̴̵̜̰͔ͫ͗͢LGO",
    "x" * 3000,
    "ĠĊ Ā are letters too",  # by which byte-level BPE writes bytes
]
CORPUS = varied_text(8000)


def random_text(rng: random.Random, length: int) -> str:
    kinds = [
        "abc d\n",
        "äöüßé",
        "日本語字",
        "👍🎉🧑🏽",
        "\t\r\x00\x7f\u200d\ufeff\u0301",
        "".join(map(chr, range(0x1D400, 0x1D420))),
    ]
    return "".join(rng.choice(rng.choice(kinds)) for _ in range(length))


def byte() -> Tokenizer:
    return tok.byte([CORPUS], [CORPUS])


def bpe(vocab_size: int = 400, train: str = CORPUS + "日本語 👍 日本語 👍 naïve café\n" * 40) -> Tokenizer:
    return tok.bpe([train], [train], vocab_size=vocab_size)


@pytest.mark.parametrize("make", [byte, bpe])
def test_any_text_comes_back(make: Callable[[], Tokenizer]) -> None:
    """Both ways in (one text, a corpus) and the file between training and use must keep every character."""
    tokenizer, rng = make(), random.Random(0)
    reloaded = tok.from_files({"tokenizer.json": tokenizer.to_json()})
    texts = HARD + [random_text(rng, rng.randint(1, 60)) for _ in range(200)]
    for text, many in zip(texts, tokenizer.encode_many(texts)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(many.tolist()) == text
        assert reloaded.encode(text) == ids and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert reloaded.sha256() == tokenizer.sha256()


def test_byte_ids_are_the_bytes() -> None:
    """Else a byte model's ids mean something else than everybody's."""
    tokenizer = byte()
    for text in HARD:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.encode_many([text])[0].tolist() == list(text.encode())
    assert tokenizer.vocab_size == 256 + len(tok.SPECIAL)
    assert [tokenizer.backend.token_to_id(t) for t in tok.SPECIAL] == list(range(256, 261))


@pytest.mark.parametrize("make", [byte, bpe])
def test_special_tokens_in_prompts_and_in_a_corpus(make: Callable[[], Tokenizer]) -> None:
    """A prompt may name them; a corpus that mentions them is plain text, or it could end documents at will."""
    tokenizer = make()
    text = f"a{tok.EOS}b{tok.IM_START}"
    ids = tokenizer.encode(text)
    assert ids[1] == tokenizer.eos and ids[3] == tokenizer.backend.token_to_id(tok.IM_START) and len(ids) == 4
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids, skip_special=True) == "ab"
    plain = tokenizer.encode_many([text])[0].tolist()
    assert not {tokenizer.backend.token_to_id(t) for t in tok.SPECIAL} & set(plain)
    assert tokenizer.decode(plain, skip_special=True) == text
    assert tokenizer.encode(text) == ids, "encode_many must not change the tokenizer"
    assert None not in (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert len({tokenizer.bos, tokenizer.eos, tokenizer.pad}) == 3


def test_bpe_learns_from_the_training_text_alone() -> None:
    """A vocabulary that saw the validation text would make its loss too good."""
    train = "abab " * 50
    with_val = tok.bpe([train], [train, "xyzxyz " * 500], vocab_size=300)
    assert with_val.sha256() == tok.bpe([train], [train], vocab_size=300).sha256()
    assert len(with_val.encode("abab")) < 4 and len(with_val.encode("xyzxyz")) == 6
    assert bpe(400).vocab_size == 400
    with pytest.raises(Refusal, match="vocab_size=260 is too small.* need 261"):
        bpe(260)


def test_characters_are_the_sorted_set() -> None:
    """nanoGPT's vocabulary, so that losses can be laid over each other."""
    corpus = [CORPUS, "First Citizen:\nBefore we — ☃ é e\u0301\r\n\t\u2028"]
    characters = sorted(set("".join(corpus)))
    for unknown in ("error", "unk"):
        tokenizer = tok.char(corpus[:1], corpus, unknown=unknown)
        assert tokenizer.vocab_size == len(characters) + (unknown == "unk")
        for text in corpus:
            assert tokenizer.encode(text) == [characters.index(c) for c in text]
            assert tokenizer.encode_many([text])[0].tolist() == tokenizer.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tok.from_files({"tokenizer.json": tokenizer.to_json()}).encode(corpus[1]) == tokenizer.encode(corpus[1])
    assert tokenizer.eos is None


def test_unknown_characters_are_named_or_mapped() -> None:
    """Dropped silently, a prompt would mean something else."""
    strict = tok.from_files(tok.char(["abc"], ["abc"], unknown="error").files())
    with pytest.raises(Refusal, match=r"the text has characters.*'☃' \(U\+2603\).*tokenizer.unknown=unk"):
        strict.encode("ab☃c")
    with pytest.raises(Refusal, match="and 2 more"):
        strict.encode("0123456789")
    lenient = tok.from_files(tok.char(["abc"], ["abc"], unknown="unk").files())
    assert lenient.encode("a☃\nc") == [0, 3, 3, 2]
    assert lenient.decode([0, 3, 2]) == "a<unk>c"


def metaspace() -> Tokenizer:
    """A tokenizer in Llama 2's manner, as tokenizer=file may bring one: its decoder drops the first space."""
    vocab = {p: i for i, p in enumerate(["<unk>", "\n", "▁", "▁foo", "▁bar", "a", "b"])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return Tokenizer(backend)


def stream(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    streamer = Streamer(tokenizer)
    return [streamer.push(i) for i in ids], streamer.flush()


@pytest.mark.parametrize("make", [byte, lambda: bpe(262), bpe])
def test_streamed_text_is_whole(make: Callable[[], Tokenizer]) -> None:
    """No half character is ever shown, wherever in a line it stands, and the pieces add up to the text."""
    tokenizer, rng = make(), random.Random(1)
    for text in [
        *HARD,
        "字" * 40,
        "a line of more than sixteen tokens: 👍🏽é\nand on\n\n👍",
        *(random_text(rng, 50) for _ in range(60)),
    ]:
        ids = tokenizer.encode(text)
        pushed, rest = stream(tokenizer, ids)
        assert "".join(pushed) + rest == text
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pushed) and rest == ""


def test_streamed_bytes_that_are_no_text() -> None:
    """An untrained model of bytes says such things; the pieces still add up to what decode makes of them, but for what may
    be a character that the end has cut: that is not shown by halves either."""
    tokenizer, rng = byte(), random.Random(2)
    for _ in range(200):
        ids = [
            rng.choice([rng.randrange(128, 256), rng.randrange(256), 10, 0xE2, 0xF0, tokenizer.eos]) for _ in range(30)
        ]
        pushed, rest = stream(tokenizer, ids)
        assert "".join(pushed) + rest == tokenizer.decode(ids, skip_special=True).rstrip("\ufffd")


def test_streamed_spaces_of_a_word_tokenizer() -> None:
    """Its decoder strips the space in front: of the text, not of every line."""
    tokenizer = metaspace()
    ids = [3, 1, 4, 3, 1, 1, 3, 5]
    pushed, rest = stream(tokenizer, ids)
    assert "".join(pushed) + rest == tokenizer.decode(ids) == "foo\n bar foo\n\n fooa"


def test_streaming_shows_text_at_once() -> None:
    """Holding back everything would pass the tests above."""
    pushed, _ = stream(byte(), list("a\nbé".encode()))
    assert pushed == ["a", "\n", "b", "", "é"]


def test_bad_tokenizer_files_are_refused(tmp_path) -> None:
    with pytest.raises(Refusal, match="there is no tokenizer file"):
        tok.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"version": 1}')
    with pytest.raises(Refusal, match="bad.json is not a tokenizer.json"):
        tok.file([], [], path=str(tmp_path / "bad.json"))
    (tmp_path / "good.json").write_text(bpe().to_json(), encoding="utf-8")
    assert tok.file([], [], path=str(tmp_path / "good.json")).encode(HARD[5]) == bpe().encode(HARD[5])


# ---------------------------------------------------------------- from a folder


def with_beginning() -> Backend:
    """Its post-processor puts a beginning token before a text, as Llama's does."""
    backend = byte().backend
    backend.post_processor = processors.TemplateProcessing(
        single=f"{tok.BOS} $A", special_tokens=[(tok.BOS, backend.token_to_id(tok.BOS))]
    )
    return backend


def test_what_is_put_before_a_text() -> None:
    """Only at a beginning, never in a corpus; our own tokenizers put nothing."""
    tokenizer = Tokenizer(with_beginning())
    assert tokenizer.encode("ab") == [97, 98] and tokenizer.encode("ab", begin=True) == [tokenizer.bos, 97, 98]
    assert tokenizer.encode("", begin=True) == [tokenizer.bos] and tokenizer.encode("") == []
    assert tokenizer.encode_many(["ab"])[0].tolist() == [97, 98]
    for ours in (byte(), bpe()):
        assert ours.encode("ab", begin=True) == ours.encode("ab") and ours.encode("", begin=True) == []


def test_special_tokens_by_their_names() -> None:
    """A config's names come first, as text or as objects; without one the usual ones; ids that end a text or a turn, with
    the end token among them and none that the vocabulary does not have."""
    backend = byte().backend
    plain = Tokenizer(backend)
    assert plain.stop_ids == {plain.eos} and plain.token(plain.eos) == tok.EOS and plain.token(None) is None
    config = {"eos_token": {"content": tok.IM_END}, "bos_token": tok.PAD, "pad_token": "not there"}
    named = Tokenizer(backend, config, stop_ids=[tok.byte([], []).eos or 0, 5, 9999, -1])
    ids = {t: backend.token_to_id(t) for t in tok.SPECIAL}
    assert (named.eos, named.bos, named.pad) == (ids[tok.IM_END], ids[tok.PAD], ids[tok.PAD])
    assert named.stop_ids == {ids[tok.EOS], ids[tok.IM_END], 5}
    assert tok.char(["ab"], ["ab"], unknown="error").stop_ids == set()


@pytest.mark.parametrize(
    "template", [None, "{{ messages }}", [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]]
)
def test_a_folder_holds_all_of_a_tokenizer(template: object, tmp_path: Path) -> None:
    """Names, template, stop tokens and what is put before a text survive being written and read, twice; and a template in
    a file of its own counts more than the one in the config."""
    config = {"eos_token": tok.IM_END, "chat_template": template, "model_max_length": 77}
    tokenizer = Tokenizer(with_beginning(), {k: v for k, v in config.items() if v is not None}, stop_ids=[7])
    assert tokenizer.template == ("y" if isinstance(template, list) else template)
    for turn in ("one", "two"):
        folder = tmp_path / turn
        folder.mkdir()
        for name, text in tokenizer.files().items():
            (folder / name).write_text(text, encoding="utf-8")
        again = tok.load(folder)
        for what in ("bos", "eos", "pad", "stop_ids", "template", "vocab_size"):
            assert getattr(again, what) == getattr(tokenizer, what), what
        assert again.encode("ab", begin=True) == [tokenizer.bos, 97, 98] and again.sha256() == tokenizer.sha256()
        assert again.config["model_max_length"] == 77
        tokenizer = again
    (folder / "chat_template.jinja").write_text("z", encoding="utf-8")
    assert tok.load(folder).template == "z"


def test_transformers_reads_our_folder(tmp_path: Path) -> None:
    """The same ids, the same special tokens, no warning."""
    from transformers import AutoTokenizer

    tokenizer = bpe()
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD[2:8]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text) and theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
    )


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_bad_files_beside_a_tokenizer_are_named(name: str, tmp_path: Path) -> None:
    """Read as if they were not there, a model would not stop where it should."""
    (tmp_path / "tokenizer.json").write_text(bpe().to_json(), encoding="utf-8")
    (tmp_path / name).write_text("{")
    with pytest.raises(Refusal, match=f"{name} cannot be read"):
        tok.load(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(Refusal, match=f"{name} cannot be read"):
        tok.load(tmp_path)


def test_a_generation_config_without_an_end(tmp_path: Path) -> None:
    """null says that there is none: the tokenizer's own counts."""
    (tmp_path / "tokenizer.json").write_text(bpe().to_json(), encoding="utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    found = tok.load(tmp_path)
    assert found.stop_ids == {found.eos}
