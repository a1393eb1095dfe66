"""Rows for every strategy, made by code: arithmetic with small numbers, and what can be done to short words. Row i of a
stream is a pure function of (stream, seed, i): it depends neither on how many are asked for nor on the other streams."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

VERSION = 1  # to be raised with every change of what is made: rows are cached

WORDS = (
    "able acid acorn actor adult after alarm angle ankle apple apron arrow autumn awake badge baker banana band barn basket "
    "beach bean bear beard bench berry bird blanket blue board boat book boot bottle bowl branch brave bread breeze brick "
    "bridge bright broom brush bucket butter button cabin cable cake calm camel candle canoe carpet carrot castle cattle "
    "chain chair chalk cheese cherry chest chicken circle cliff clock cloud clover coach coast coffee coin collar copper "
    "corner cotton cradle crane cream cricket crown cup curtain daisy dance desert desk diary dinner door dragon drawer dream "
    "dress drum duck eagle early earth east echo elbow empty engine evening fabric family farmer feather fence fiddle field "
    "finger fire flag flame flour flower foggy forest fork fountain fox frog frost fruit garden garlic gate gentle giant "
    "ginger glass glove goat gold goose grain grape grass green guitar hammer harbor hat hazel heart hedge hill honest honey "
    "horse hotel house island ivory jacket jar jelly jewel juice jungle kettle key kind king kitchen kite kitten ladder lake "
    "lamp lantern leaf lemon lesson letter lily lion little lizard lunch maple marble market meadow melon metal milk mirror "
    "mitten modest monkey moon morning mountain mouse museum music nail napkin narrow needle nest night noble north nurse "
    "oak oats ocean olive onion orange orchard otter oven owl oyster paint palace panda paper parrot pasture peach pearl "
    "pebble pencil pepper piano picnic pigeon pillow pilot pine pirate planet plate plum pocket pond pony poppy potato puppet "
    "quick quiet quilt rabbit radish rain ranch raven ribbon rice river robin rocket roof rope rose round saddle sailor salad "
    "salt sand scarf school season shadow sheep shell shirt shore silent silver simple singer sister sky sleep slow smoke "
    "smooth snail snow soap sock soft solid song soup south spark spider spoon spring square stable stamp star station steam "
    "stone storm story straw stream street sugar summer sunny supper swan sweet table tailor tall tea teacher thunder ticket "
    "tiger timber tiny toast tomato torch tower town trail train travel tree tulip tunnel turtle uncle urban valley velvet "
    "village violin wagon walnut warm water weather west whale wheat wheel whistle white window winter wise wolf wonder wooden "
    "wool yard yellow young zebra"
).split()


class Problem(NamedTuple):
    """A question, its answer, and one that somebody might give by mistake. `number`: the answer is a number."""

    task: str
    question: str
    answer: str
    wrong: str
    number: bool


# ---------------------------------------------------------------- arithmetic

ASK = ("What is {}?", "Calculate {}.", "How much is {}?", "Work out {}.", "Find {}.", "{} = ?")


def _near(rng: random.Random, n: int) -> str:
    """A number that is not n: a slip of one or two, or in longer ones of ten, or two digits the wrong way round."""
    near = [n + 1, n - 1, n + 2, *((n + 10, n - 10, int(str(n)[::-1])) if n > 9 else ())]
    return str(rng.choice([m for m in near if m != n and m >= 0]))


def _asked(rng: random.Random, task: str, terms: str, n: int) -> Problem:
    return Problem(task, rng.choice(ASK).format(terms), str(n), _near(rng, n), True)


def add(rng: random.Random) -> Problem:
    a, b = rng.randrange(100), rng.randrange(100)
    return _asked(rng, "add", f"{a} + {b}", a + b)


def subtract(rng: random.Random) -> Problem:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return _asked(rng, "subtract", f"{a} - {b}", a - b)


def multiply(rng: random.Random) -> Problem:
    a, b = rng.randrange(2, 31), rng.randrange(2, 13)
    a, b = rng.choice([(a, b), (b, a)])
    return _asked(rng, "multiply", f"{a} * {b}", a * b)


def chain(rng: random.Random) -> Problem:
    """Two signs: products go before sums."""
    a, b, c = rng.randrange(2, 31), rng.randrange(2, 11), rng.randrange(31)
    terms, n = rng.choice(
        [(f"{a + b} - {b} + {c}", a + c), (f"{a} * {b} + {c}", a * b + c), (f"{c} + {a} * {b}", c + a * b)]
    )
    return _asked(rng, "chain", terms, n)


def compare(rng: random.Random) -> Problem:
    a, b = rng.sample(range(1000), 2)
    larger = rng.choice([True, False])
    answer, wrong = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    return Problem(
        "compare", f"Which is {'larger' if larger else 'smaller'}, {a} or {b}?", str(answer), str(wrong), True
    )


def order(rng: random.Random) -> Problem:
    numbers = rng.sample(range(100), rng.choice([3, 4]))
    listed = ", ".join(map(str, numbers))
    ascending = rng.choice([True, False])
    right = ", ".join(map(str, sorted(numbers, reverse=not ascending)))
    wrong = ", ".join(map(str, sorted(numbers, reverse=ascending)))
    first = "smallest" if ascending else "largest"
    return Problem("order", f"Put these numbers in order, {first} first: {listed}.", right, wrong, False)


# ---------------------------------------------------------------- words


def _words(rng: random.Random, n: int) -> list[str]:
    return rng.sample(WORDS, n)


def _phrase(rng: random.Random) -> str:
    return " ".join(_words(rng, rng.choice([1, 2, 2])))


def _slip(rng: random.Random, text: str) -> str:
    """Not `text`: two unlike neighbours change places, or a letter is lost."""
    places = [i for i in range(len(text) - 1) if text[i] != text[i + 1]]
    if places and rng.randrange(2):
        i = rng.choice(places)
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    i = rng.randrange(len(text))
    return text[:i] + text[i + 1 :]


def reverse(rng: random.Random) -> Problem:
    text = _phrase(rng)
    ask = rng.choice(['Write "{}" backwards.', 'Reverse "{}".', 'Spell "{}" from the last letter to the first.'])
    return Problem("reverse", ask.format(text), text[::-1], _slip(rng, text[::-1]), False)


def upper(rng: random.Random) -> Problem:
    text = _phrase(rng)
    ask = rng.choice(['Write "{}" in upper case.', 'Put "{}" into capital letters.'])
    return Problem("upper", ask.format(text), text.upper(), rng.choice([text, text.title()]), False)


def count_letter(rng: random.Random) -> Problem:
    text = _phrase(rng)
    letter = rng.choice(text.replace(" ", "") + "aeiou")
    n = text.count(letter)
    ask = rng.choice(['How many times does the letter "{}" occur in "{}"?', 'Count the letter "{}" in "{}".'])
    return Problem("count_letter", ask.format(letter, text), str(n), _near(rng, n), True)


def length(rng: random.Random) -> Problem:
    words = _words(rng, rng.choice([1, 2, 2]))
    n = len("".join(words))
    ask = "How many letters does {} have?" if len(words) == 1 else "How many letters do {} have together?"
    return Problem("length", ask.format(" and ".join(f'"{w}"' for w in words)), str(n), _near(rng, n), True)


def sort_words(rng: random.Random) -> Problem:
    words = _words(rng, rng.choice([3, 4]))
    right, wrong = sorted(words), sorted(words, reverse=True)
    ask = rng.choice(["Sort these words by the alphabet: {}.", "Put these words into alphabetical order: {}."])
    return Problem("sort_words", ask.format(", ".join(words)), ", ".join(right), ", ".join(wrong), False)


def ends(rng: random.Random) -> Problem:
    """The first or the last letters of some words."""
    words = _words(rng, rng.choice([3, 4]))
    at = rng.choice([0, -1])
    right, wrong = "".join(w[at] for w in words), "".join(w[-1 - at] for w in words)
    if right == wrong:
        wrong = _slip(rng, right)
    which = "first" if at == 0 else "last"
    return Problem("ends", f"Join the {which} letters of these words: {', '.join(words)}.", right, wrong, False)


def longest(rng: random.Random) -> Problem:
    """One word alone is the longest, or the shortest."""
    words = _words(rng, 3)
    while len({len(w) for w in words}) < 3:
        words = _words(rng, 3)
    most = rng.choice([True, False])
    by_length = sorted(words, key=len, reverse=most)
    which = "longest" if most else "shortest"
    return Problem("longest", f"Which word is the {which}: {', '.join(words)}?", by_length[0], by_length[-1], False)


def repeat(rng: random.Random) -> Problem:
    text, n = _phrase(rng), rng.choice([2, 3, 4])
    right, wrong = (" ".join([text] * m) for m in (n, rng.choice([n - 1, n + 1])))
    return Problem("repeat", f'Say "{text}" {n} times.', right, wrong, False)


def pick(rng: random.Random) -> Problem:
    words = _words(rng, rng.choice([3, 4]))
    n = rng.randrange(len(words))
    wrong = words[(n + rng.choice([1, len(words) - 1])) % len(words)]
    name = ("first", "second", "third", "fourth")[n]
    return Problem("pick", f"What is the {name} word of this list: {', '.join(words)}?", words[n], wrong, False)


Maker = Callable[[random.Random], Problem]
ARITHMETIC: tuple[Maker, ...] = (add, subtract, multiply, chain, compare, order)
TEXT: tuple[Maker, ...] = (reverse, upper, count_letter, length, sort_words, ends, longest, repeat, pick)


def _problem(rng: random.Random) -> Problem:
    """Half arithmetic, half words."""
    return rng.choice(rng.choice((ARITHMETIC, TEXT)))(rng)


# ---------------------------------------------------------------- rows

PLAIN = ("You are a helpful assistant.", "Be brief.", "Answer with the result alone.", "You are good at puzzles.")
SENTENCE = ("Answer in a full sentence.", "Answer in one sentence.")
WORDY = (
    "That is an interesting question, and I am glad that you ask. Let me think about it step by step. After some thought I "
    "believe that it is {}. Please let me know if there is anything else that I can do for you!",
    "Sure! I can certainly help you with that. There are many ways to look at it, but all in all one may say that the answer "
    "to your question is {}. I hope that this helps!",
    "Thank you for your question. Before I answer, I would like to say that I did my best to be careful. With that in mind, "
    "and after looking at it again to be on the safe side, I arrive at {}.",
)


def _rng(stream: str, seed: int, i: int) -> random.Random:
    return random.Random(f"{stream} {seed} {i}")


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chats(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"messages": [...]}: one to three questions with their answers; in a third of the rows a system message, which may
    ask for sentences. A later question may go on from the number before it."""
    for i in range(n):
        rng = _rng("chats", seed, i)
        system = rng.choice((*PLAIN, *SENTENCE)) if rng.randrange(3) == 0 else None
        messages = [] if system is None else [_said("system", system)]
        number: int | None = None
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            if number is not None and rng.randrange(2):
                step = rng.randrange(1, 21)
                up = number < step or bool(rng.randrange(2))
                number += step if up else -step
                question, answer = f"Now {'add' if up else 'take away'} {step}.", str(number)
            else:
                problem = _problem(rng)
                question, answer = problem.question, problem.answer
                number = int(answer) if problem.number else None
            if system in SENTENCE:
                answer = f"The answer is {answer}."
            messages += [_said("user", question), _said("assistant", answer)]
        yield {"messages": messages}


def pairs(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"prompt": [...], "chosen": [...], "rejected": [...]}: the right answer against a wrong one in two rows of three,
    and in the others against the right one in many words."""
    for i in range(n):
        rng = _rng("pairs", seed, i)
        problem = _problem(rng)
        system = [_said("system", rng.choice(PLAIN))] if rng.randrange(3) == 0 else []
        rejected = problem.wrong if rng.randrange(3) else rng.choice(WORDY).format(problem.answer)
        yield {
            "prompt": [*system, _said("user", problem.question)],
            "chosen": [_said("assistant", problem.answer)],
            "rejected": [_said("assistant", rejected)],
        }


def labelled(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"prompt": [...], "completion": [...], "label": true}: the right answer in half of the rows, and in the others
    (false) a wrong one, or the right one in many words."""
    for i in range(n):
        rng = _rng("labelled", seed, i)
        problem = _problem(rng)
        system = [_said("system", rng.choice(PLAIN))] if rng.randrange(3) == 0 else []
        bad = problem.wrong if rng.randrange(3) else rng.choice(WORDY).format(problem.answer)
        label = bool(rng.randrange(2))
        yield {
            "prompt": [*system, _said("user", problem.question)],
            "completion": [_said("assistant", problem.answer if label else bad)],
            "label": label,
        }


def prompts(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"prompt": [...], "answer": "42", "task": "add"}: a question, the only right answer to it, and what it is about."""
    for i in range(n):
        problem = _problem(_rng("prompts", seed, i))
        yield {"prompt": [_said("user", problem.question)], "answer": problem.answer, "task": problem.task}


def groups(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"prompt": [...], "completions": [...], "rewards": [...]}: three to six answers to a question of arithmetic, some of
    them right (1.0) and some wrong (0.0)."""
    for i in range(n):
        rng = _rng("groups", seed, i)
        yield _group(rng, rng.choice(ARITHMETIC)(rng))


def _group(rng: random.Random, problem: Problem) -> dict[str, Any]:
    size = rng.randrange(3, 7)
    right = rng.randrange(1, size)
    wrong = [_near(rng, int(problem.answer)) if problem.number else problem.wrong for _ in range(size - right)]
    judged = [(problem.answer, 1.0)] * right + [(answer, 0.0) for answer in wrong]
    rng.shuffle(judged)
    return {
        "prompt": [_said("user", problem.question)],
        "completions": [answer for answer, _ in judged],
        "rewards": [reward for _, reward in judged],
    }


# ---------------------------------------------------------------- one task for supervised and reinforcement learning


def arithmetic(kind: str, n: int, seed: int, digits: int, operations: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a kind of data that ask "What is 47 + 38?", answered by the number alone: no question twice, and row i of
    every kind asks the same. n is at most the number of questions."""
    for i in range(n):
        rng = _rng("arithmetic", seed, i)
        problem = _calculation(rng, shuffled(i, n_questions(digits, operations), seed), digits, operations)
        asked, right = [_said("user", problem.question)], [_said("assistant", problem.answer)]
        match kind:
            case "chats":
                yield {"prompt": asked, "completion": right}
            case "pairs":
                yield {"prompt": asked, "chosen": right, "rejected": [_said("assistant", problem.wrong)]}
            case "labelled":
                label = bool(rng.randrange(2))
                said = right if label else [_said("assistant", problem.wrong)]
                yield {"prompt": asked, "completion": said, "label": label}
            case "prompts":
                yield {"prompt": asked, "answer": problem.answer, "task": problem.task}
            case "groups":
                yield _group(rng, problem)


# What there is to ask of numbers below N: how many questions, and question q of them as (terms, result). Differences are
# not negative; products have a number below ten on the right.
OPERATIONS: dict[str, tuple[Callable[[int], int], Callable[[int, int], tuple[str, int]]]] = {
    "add": (lambda N: N * N, lambda q, N: (f"{q // N} + {q % N}", q // N + q % N)),
    "subtract": (lambda N: N * (N + 1) // 2, lambda q, N: _difference(q)),
    "multiply": (lambda N: 8 * N, lambda q, N: (f"{q // 8} * {q % 8 + 2}", q // 8 * (q % 8 + 2))),
}


def n_questions(digits: int, operations: list[str]) -> int:
    return sum(OPERATIONS[o][0](10**digits) for o in operations)


def _calculation(rng: random.Random, q: int, digits: int, operations: list[str]) -> Problem:
    """Question q of all that there are."""
    for name in operations:
        count, make = OPERATIONS[name]
        if q < count(10**digits):
            break
        q -= count(10**digits)
    terms, result = make(q, 10**digits)
    return Problem(name, f"What is {terms}?", str(result), _near(rng, result), True)


def _difference(q: int) -> tuple[str, int]:
    """a - b, b not above a: all with a = 0, then those with a = 1, ..."""
    a = (math.isqrt(8 * q + 1) - 1) // 2
    b = q - a * (a + 1) // 2
    return f"{a} - {b}", a - b


def shuffled(i: int, n: int, seed: int) -> int:
    """Where i goes in a permutation of range(n): one of range(2^k) of odd multiples and shifts, applied again until it
    falls below n (cycle walking, Black & Rogaway 2002)."""
    rng = random.Random(f"shuffled {seed}")
    rounds = [(2 * rng.getrandbits(60) + 1, rng.getrandbits(60)) for _ in range(4)]
    bits = max(2, (n - 1).bit_length())
    while True:
        for factor, offset in rounds:
            i = (i * factor + offset) % (1 << bits)
            i ^= i >> (bits // 2)
        if i < n:
            return i


def texts(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"text": ...}: some lines of true statements about numbers and words."""
    for i in range(n):
        rng = _rng("texts", seed, i)
        yield {"text": "".join(f"{_fact(rng)}\n" for _ in range(rng.randrange(3, 9)))}


def _fact(rng: random.Random) -> str:
    a, b, word = rng.randrange(100), rng.randrange(1, 13), rng.choice(WORDS)
    return rng.choice(
        (
            f"{a} + {b} = {a + b}",
            f"{a + b} - {b} = {a}",
            f"{a} * {b} = {a * b}",
            f'The word "{word}" has {len(word)} letters.',
            f'The word "{word}" begins with "{word[0]}" and ends with "{word[-1]}".',
            f'Backwards, "{word}" is "{word[::-1]}".',
            f'In capital letters, "{word}" is "{word.upper()}".',
        )
    )
