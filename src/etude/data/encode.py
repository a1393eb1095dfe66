"""Examples to token ids, and which of the tokens are to be predicted."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from etude.data.formats import BadRow, Example
from etude.errors import Refusal
from etude.signature import did_you_mean
from etude.text import chat
from etude.text.tokenizer import Tokenizer

TRAIN_ON = ("assistant", "completion", "all")
BATCH = 1024  # examples tokenised at once: their tokens' texts and places take far more memory than their ids


@dataclass(frozen=True, slots=True)
class Document:
    """ids (n,) uint32; targets (n,) bool: whether token t is to be predicted from those before it."""

    ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that is tokenised by itself. `targets`: ranges of its characters, or all of it; `begin`: with what the
    tokenizer puts around a text; `end`: an end token follows, which is a target."""

    text: str
    targets: bool | list[tuple[int, int]]
    begin: bool = False
    end: bool = False


def encode(
    examples: Sequence[Example], tokenizer: Tokenizer, kind: str, train_on: str = "assistant"
) -> list[list[Document] | BadRow]:
    """The documents of each example, or what is wrong with it: one of a text (all targets, no end token), a chat or a prompt
    (no targets), (chosen, rejected) of a pair, a labelled answer, and each completion of a group, behind its prompt.

    A chat is rendered whole and tokenised in one go; a token is a target if a character of it is. A prompt and a completion
    that are strings are tokenised apart, as they are when the model answers, and an end token follows; plain text
    among chats is a completion without a prompt. Special tokens are recognised in all of them, but not in kind "text".
    `train_on`: "assistant", every turn of the assistant; "completion", its last one; "all". Of a prompt with a completion the
    first two are the completion's, and pairs, labelled rows and groups are always trained on those. But in kind "text" a document's first token is no
    target."""
    if train_on not in TRAIN_ON:
        raise Refusal(f"data.train_on={train_on} is unknown{did_you_mean(train_on, list(TRAIN_ON))}")
    if kind == "text":
        return _texts(examples, tokenizer)
    batches = (examples[at : at + BATCH] for at in range(0, len(examples), BATCH))
    return [result for batch in batches for result in _rows(batch, tokenizer, kind, train_on)]


def words(example: Example) -> Iterator[str]:
    """The texts of an example, to train a tokenizer on."""
    for part in (example.prompt, *example.answers):
        if not isinstance(part, str):
            yield from (m["content"] for m in part)
        elif part:
            yield part


def _texts(examples: Sequence[Example], tokenizer: Tokenizer) -> list[list[Document] | BadRow]:
    encoded: list[list[Document] | BadRow] = [[] for _ in examples]
    texts: dict[int, str] = {}
    for i, example in enumerate(examples):
        try:
            tokenizer.check(text := str(example.answers[0]), "the row")
            texts[i] = text
        except Refusal as error:
            encoded[i] = BadRow(str(error))
    for i, ids in zip(texts, tokenizer.encode_many(list(texts.values()))):
        encoded[i] = [Document(ids, np.ones(len(ids), dtype=np.bool_))]
    return encoded


def _rows(examples: Sequence[Example], tokenizer: Tokenizer, kind: str, train_on: str) -> list[list[Document] | BadRow]:
    plans: list[list[list[Piece]] | BadRow] = []
    for example in examples:
        try:
            plans.append(_plan(example, tokenizer, kind, train_on))
        except Refusal as error:
            plans.append(BadRow(str(error)))
    pieces = [p for plan in plans if not isinstance(plan, BadRow) for document in plan for p in document]
    tokenised = iter(_tokenise(pieces, tokenizer))
    encoded: list[list[Document] | BadRow] = []
    for plan in plans:
        if isinstance(plan, BadRow):
            encoded.append(plan)
            continue
        documents = [_joined([next(tokenised) for _ in document]) for document in plan]
        encoded.append(_checked(documents, kind))
    return encoded


def _plan(example: Example, tokenizer: Tokenizer, kind: str, train_on: str) -> list[list[Piece]]:
    """The pieces of each document. Raises Refusal for text that the template or the vocabulary cannot take."""
    prompt = example.prompt
    if not example.answers:
        text = prompt if isinstance(prompt, str) else chat.render(tokenizer, prompt, reply=True)
        documents = [[Piece(text, False, begin=isinstance(prompt, str))]]
    elif isinstance(prompt, str):
        whole = kind == "chats" and train_on == "all"
        asked = [Piece(prompt, whole, begin=True)]
        documents = [[*asked, Piece(str(answer), True, end=True)] for answer in example.answers]
    else:
        documents = [[_chat(prompt, answer, tokenizer, kind, train_on)] for answer in example.answers]
    if tokenizer.characters is not None:
        for piece in (p for document in documents for p in document):
            tokenizer.check(piece.text, "the row")
    return documents


def _chat(
    prompt: list[chat.Message], answer: str | list[chat.Message], tokenizer: Tokenizer, kind: str, train_on: str
) -> Piece:
    assert not isinstance(answer, str)
    messages = [*prompt, *answer]
    if kind == "chats" and train_on == "all":
        return Piece(chat.render(tokenizer, messages, reply=False), True)
    last_only = kind == "chats" and train_on == "completion" and not prompt
    return Piece(*chat.spans(tokenizer, messages, last_only, first=len(prompt)))


def _tokenise(pieces: list[Piece], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, targets) of each piece, in three batches: with what begins a text, with places in the text, and without."""
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * len(pieces)
    batches: dict[tuple[bool, bool], list[int]] = {}
    for i, piece in enumerate(pieces):
        batches.setdefault((piece.begin, isinstance(piece.targets, list)), []).append(i)
    for (begin, ranges), numbers in batches.items():
        texts = [pieces[i].text for i in numbers]
        if ranges:
            encodings = _with_places(tokenizer).encode_batch(texts, add_special_tokens=begin)
        else:
            encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=begin)
        for i, encoding in zip(numbers, encodings):
            found[i] = _ended(pieces[i], encoding, tokenizer.eos)
    return found


@functools.lru_cache(maxsize=2)
def _with_places(tokenizer: Tokenizer) -> Backend:
    """The tokenizer without its post-processor, which may take white space out of the tokens' places in the text."""
    backend = Backend.from_str(tokenizer.to_json())
    backend.post_processor = None
    return backend


def _ended(piece: Piece, encoding: Encoding, eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    ids = encoding.ids
    if piece.end and eos is not None and ids[-1:] != [eos]:  # people write the end token into their rows
        ids = [*ids, eos]
    if isinstance(piece.targets, bool):
        return np.array(ids, dtype=np.uint32), np.full(len(ids), piece.targets)
    targets = np.zeros(len(ids), dtype=np.bool_)
    for start, end in piece.targets:
        targets[_tokens(encoding, start, end)] = True
    return np.array(ids, dtype=np.uint32), targets


def _tokens(encoding: Encoding, start: int, end: int) -> slice:
    """The tokens that have a character of text[start:end]; a tokenizer may have dropped some characters."""
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None:
        return slice(0, 0)
    last = next(t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None)
    following = encoding.token_to_chars(last + 1)
    while following is not None and following[0] < end:  # other bytes of the last character
        last += 1
        following = encoding.token_to_chars(last + 1)
    return slice(first, last + 1)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> Document:
    ids, targets = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts))
    targets[:1] = False
    return Document(ids, targets)


def _checked(documents: list[Document], kind: str) -> list[Document] | BadRow:
    if kind == "prompts":
        return documents if len(documents[0].ids) else BadRow("the prompt has no token")
    if not all(d.targets.any() for d in documents):
        return BadRow("no target: no token of the row is to be predicted from one before it")
    if kind in ("pairs", "labelled") and len(documents) == 2 and np.array_equal(documents[0].ids, documents[1].ids):
        return BadRow("chosen and rejected are the same tokens: there is nothing to prefer")
    return documents
