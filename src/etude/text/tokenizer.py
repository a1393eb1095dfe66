"""Tokenizers. All of them are a `tokenizers.Tokenizer` of the Hugging Face library inside, so every run's
tokenizer.json has one format, which transformers reads too."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from etude.errors import Refusal

BOS, EOS, PAD = "<|begin▁of▁sentence|>", "<|end▁of▁sentence|>", "<|▁pad▁|>"
IM_START, IM_END = "<|im▁start|>", "<|im▁end|>"
SPECIAL = [BOS, EOS, PAD, IM_START, IM_END]
UNK = "<unk>"


class Tokenizer:
    """Text to ids and back. `bos`, `eos`, `pad` are ids, None where the vocabulary has no such token; `stop_ids` are the
    tokens that end a text or a turn. `config` is a tokenizer_config.json, whose names of special tokens and whose
    chat_template are taken; without one the tokens are found by their usual names."""

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None, stop_ids: Iterable[int] = ()):
        self.backend, self.config = backend, config or {}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        usual = {"bos_token": (BOS, "<s>"), "eos_token": (EOS, "</s>", "<|endoftext|>"), "pad_token": (PAD,)}
        self.bos, self.eos, self.pad = (self._first(_name(self.config.get(k)), *names) for k, names in usual.items())
        self.stop_ids = {i for i in stop_ids if 0 <= i < self.vocab_size}
        self.stop_ids |= {self.eos} if self.eos is not None else set()
        self.template = _template(self.config.get("chat_template"))
        self.characters = frozenset(backend.get_vocab()) if self._by_character() else None

    def _first(self, *names: str | None) -> int | None:
        return next((i for n in names if n and (i := self.backend.token_to_id(n)) is not None), None)

    def _by_character(self) -> bool:
        words = isinstance(self.backend.model, models.WordLevel) and self.backend.token_to_id(UNK) is None
        return words and all(len(token) == 1 for token in self.backend.get_vocab())

    def check(self, text: str, where: str = "the text") -> None:
        """Raises Refusal naming the characters of `text` that a vocabulary of characters does not have."""
        if self.characters is None or not (unknown := sorted(set(text) - self.characters)):
            return
        names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:8]) + (
            f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        )
        raise Refusal(
            f"{where} has characters that the tokenizer does not know: {names}; train with tokenizer.unknown=unk to map them to {UNK}"
        )

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """The ids of `text`; special tokens in it are recognised. With `begin` the tokenizer adds what it puts around a
        text (Llama's a beginning token, ours nothing)."""
        self.check(text)
        try:
            return self.backend.encode(text, add_special_tokens=begin).ids
        except Exception as error:  # the library raises plain Exception
            raise Refusal(f"the tokenizer cannot encode {text[:40]!r}: {error}") from None

    def token(self, i: int | None) -> str | None:
        return None if i is None else self.backend.id_to_token(i)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, on all cores. Special tokens are not looked for: a corpus is plain text."""
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encoded]

    @functools.cached_property
    def _plain(self) -> Backend:
        backend = Backend.from_str(self.to_json())
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def to_json(self) -> str:
        return self.backend.to_str()

    def files(self) -> dict[str, str]:
        """What lies in a folder beside the weights, by name: transformers' AutoTokenizer reads it too."""
        names = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config
        config |= {k: self.token(i) for k, i in names.items() if i is not None}
        written = {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(config, indent=1)}
        if self.stop_ids:
            ids = {"eos_token_id": sorted(self.stop_ids)} | ({} if self.bos is None else {"bos_token_id": self.bos})
            written["generation_config.json"] = json.dumps(ids)
        return written

    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def load(path: str | Path) -> Tokenizer:
    """A tokenizer.json, or a folder that holds one and perhaps tokenizer_config.json, chat_template.jinja and
    generation_config.json. Raises Refusal if it is missing or not one."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise Refusal(f"there is no tokenizer file {file}; give the path of a tokenizer.json")
    files = {}
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        path = file if name == "tokenizer.json" else folder / name
        try:
            files[name] = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"{path} cannot be read as text: {error}") from None
    return from_files(files, folder, file)


def from_files(
    files: dict[str, str], folder: Path | str = "the tokenizer", file: Path | str = "tokenizer.json"
) -> Tokenizer:
    """The inverse of Tokenizer.files; where they lie is for errors. Raises Refusal where tokenizer.json is none."""
    try:
        backend = Backend.from_str(files["tokenizer.json"])
    except Exception as error:  # the library raises plain Exception
        raise Refusal(f"{file} is not a tokenizer.json of the tokenizers library: {error}") from None
    config = _json(files, "tokenizer_config.json", folder)
    if template := files.get("chat_template.jinja"):
        config["chat_template"] = template
    stop = _json(files, "generation_config.json", folder).get("eos_token_id")
    stop = stop if isinstance(stop, list) else [stop]
    return Tokenizer(backend, config, [i for i in stop if isinstance(i, int)])


def _json(files: dict[str, str], name: str, folder: Path | str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{folder}/{name} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}


def _name(token: Any) -> str | None:
    """A special token in tokenizer_config.json: its text, or an object with it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _template(value: Any) -> str | None:
    """A chat template in tokenizer_config.json: its text, or a list of named ones, of which "default" counts."""
    if isinstance(value, list) and all(isinstance(t, dict) for t in value):
        value = next((t.get("template") for t in value if t.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise Refusal(
            "chat_template in tokenizer_config.json should be a text, or a list of objects with name and template"
        )
    return value


class Streamer:
    """Text of ids that come one by one: `push` returns what is certain by now, so that a character whose bytes are
    spread over several tokens is never shown by halves. Only the last few ids are decoded, however long the text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # from the last piece that was shown on: what follows may depend on it
        self.shown = 0  # ids of it

    def push(self, token: int) -> str:
        self.ids.append(token)
        before, text = self._decode(self.ids[: self.shown]), self._decode(self.ids)
        # U+FFFD at the end stands for bytes that the next token may complete; for a real one that is a token's delay.
        if len(text) <= len(before) or text.endswith("�"):
            return ""
        self.ids, self.shown = self.ids[self.shown :], len(self.ids) - self.shown
        return text[len(before) :]

    def flush(self) -> str:
        """What is left at the end, without a character that the end has cut."""
        text = self._decode(self.ids)[len(self._decode(self.ids[: self.shown])) :]
        return text.rstrip("�")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=True)


# ---------------------------------------------------------------- makers: each takes (training texts, all texts)


def char(train: Iterable[str], corpus: Iterable[str], *, unknown: Literal["error", "unk"]) -> Tokenizer:
    """One token a character of the whole corpus, sorted, as nanoGPT's: 65 for tiny Shakespeare. `unknown` "error" makes
    other characters an error that names them, "unk" adds <unk> for them."""
    found: set[str] = set()
    for text in corpus:
        found |= set(text)
    characters = sorted(found)
    vocab = {c: i for i, c in enumerate(characters)}
    if unknown == "unk":
        vocab[UNK] = len(vocab)
    backend = Backend(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def byte(train: Iterable[str], corpus: Iterable[str]) -> Tokenizer:
    """One token a byte of UTF-8, in order, then the special tokens."""
    alphabet = _byte_alphabet()
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    return Tokenizer(backend)


def bpe(train: Iterable[str], corpus: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens, trained on the
    training texts only. Any text can be encoded: what has no merge stays bytes."""
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise Refusal(
            f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL)} special tokens need {least}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(train, trainer)
    return Tokenizer(backend)


def file(train: Iterable[str], corpus: Iterable[str], *, path: str) -> Tokenizer:
    """A tokenizer that was trained elsewhere: the texts do not change it."""
    return load(path)


def stored(train: Iterable[str], corpus: Iterable[str]) -> Tokenizer:
    """The tokenizer that lies with the data (data=h5), which then does not call this."""
    raise Refusal("this data brings no tokenizer: choose tokenizer=bpe, char, byte or file")


def ids(train: Iterable[str], corpus: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Numbers for texts: for ids whose tokenizer is not at hand. Text is ids in decimal with a space between them."""
    if vocab_size < 1:
        raise Refusal(f"tokenizer.vocab_size={vocab_size} should be at least 1")
    backend = Backend(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def _byte_alphabet() -> list[str]:
    """The character by which byte-level BPE writes each byte (Radford et al. 2019): printable ones as they are, the
    others from U+0100 on, in order."""
    printable = set(re.findall(r"[!-~¡-¬®-ÿ]", "".join(map(chr, range(256)))))
    others = iter(range(256, 512))
    return [chr(b) if chr(b) in printable else chr(next(others)) for b in range(256)]
