"""What generate.py does: prompts from somewhere, text to somewhere."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etude.errors import Refusal, StorageFault
from etude.infer.sampling import Sampling
from etude.text import chat

SAMPLING = "temperature top_k top_p min_p typical_p repetition_penalty presence_penalty frequency_penalty seed logprobs".split()


def run(cfg: dict) -> int:
    """-> exit code."""
    for name in ("n", "max_tokens"):
        if cfg[name] < 1:
            raise Refusal(f"{name}={cfg[name]} should be at least 1")
    if cfg["prompt"] is not None and cfg["file"] is not None:
        raise Refusal("prompt= and file= both say what to begin with; give one of them")
    if cfg["system"] is not None and not cfg["chat"]:
        raise Refusal("system= is said to a chat: type chat=true as well")
    if cfg["json_schema"] is not None and cfg["regex"] is not None:
        raise Refusal("json_schema= and regex= both say what the text must be; give one of them")
    sampling = Sampling(**{k: cfg[k] for k in SAMPLING})
    guide = read_guide(cfg)
    prompts = read_prompts(cfg)  # before the model is loaded: a missing file is told at once
    done = finished(cfg, prompts) if cfg["out"] is not None and prompts is not None else 0

    from etude.infer.load import load
    from etude.parallel import cores, pick_device, settle

    settle(cfg["threads"] or cores())
    engine = load(cfg["ckpt"], pick_device(cfg["device"]), cfg["dtype"], cfg["trusted"], cfg["engine"])
    speak = Speaker(cfg, engine, sampling, guide)
    if cfg["chat"]:
        chat.template(engine.tokenizer)  # refused now rather than after the first question
    if prompts is None:
        return session(speak)
    if cfg["out"] is not None:
        return write(speak, prompts, done)
    if len(prompts) == 1 and cfg["n"] == 1 and cfg["stream"]:
        speak.stream(prompts[0])
        return 0
    for r in speak.records(prompts, 0):
        text = r["text"] if cfg["chat"] else r["prompt"] + r["text"]
        print(
            f"--- {r['prompt']!r} sample {r['choice'] + 1}, {r['tokens']} tokens, ended by {r['finish']}\n{text}\n",
            flush=True,
        )
    return 0


def read_guide(cfg: dict) -> dict[str, Any] | None:
    """What the text is made to be: Request.guide. `json_schema` is a schema, or a file that holds one."""
    if cfg["regex"] is not None:
        return {"regex": cfg["regex"]}
    if (given := cfg["json_schema"]) is None:
        return None
    try:
        text = given if given.lstrip().startswith("{") else Path(given).expanduser().read_text(encoding="utf-8")
        return {"json": json.loads(text)}
    except (OSError, ValueError) as error:
        raise Refusal(f"json_schema={given} is neither a JSON schema nor a file of one: {error}") from None


def read_prompts(cfg: dict) -> list[str] | None:
    """The prompts, or None for a session at the terminal."""
    if cfg["prompt"] is not None:
        return [cfg["prompt"]]
    if cfg["file"] is not None:
        path = Path(cfg["file"]).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise Refusal(f"file={cfg['file']} does not exist; give a file with one prompt a line, or JSONL") from None
        except (OSError, UnicodeDecodeError) as error:
            raise Refusal(f"file={cfg['file']} cannot be read as text: {error}") from None
        prompts = [
            _json_prompt(line, path, i) if path.suffix == ".jsonl" else line
            for i, line in enumerate(lines, 1)
            if line.strip()
        ]
        if not prompts:
            raise Refusal(f"file={cfg['file']} has no prompt in it")
        return prompts
    if not sys.stdin.isatty():
        text = sys.stdin.read()
        return [text.removesuffix("\n")]
    return None


def _json_prompt(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Refusal(f'{path}:{number}: not JSON ({error}); expected {{"prompt": "..."}}') from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        found = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise Refusal(f'{path}:{number}: expected an object with a text "prompt", found {found}')
    return row["prompt"]


class Speaker:
    """An engine with the settings of one call of generate.py. With chat=true a prompt is a user's message, and `history`
    the conversation before it."""

    def __init__(self, cfg: dict, engine: Any, sampling: Sampling, guide: dict[str, Any] | None):
        self.cfg, self.engine, self.sampling, self.guide = cfg, engine, sampling, guide
        self.end_ids = frozenset(chat.end_of_turn(engine.tokenizer) if cfg["chat"] else ())
        self.history: list[chat.Message] = []
        if cfg["system"] is not None:
            self.history.append({"role": "system", "content": cfg["system"]})
        self.cropped = False

    def request(self, prompt: str) -> Any:
        from etude.infer.engine import encode_prompt
        from etude.infer.request import Request

        tokenizer, cfg = self.engine.tokenizer, self.cfg
        if cfg["chat"]:
            messages = [*self.history, {"role": "user", "content": prompt}]
            ids = tokenizer.encode(chat.render(tokenizer, messages))
        else:
            ids = encode_prompt(tokenizer, prompt)
        limit = self.engine.limit
        if limit is not None and len(ids) + cfg["max_tokens"] > limit and not self.cropped:
            self.cropped = True
            print(
                f"note: this model has embeddings for {limit} positions; beyond them it sees the last {limit} tokens, computed anew for each",
                file=sys.stderr,
            )
        return Request(
            prompt=ids,
            sampling=self.sampling,
            n=cfg["n"],
            max_tokens=cfg["max_tokens"],
            stop=tuple(cfg["stop"]),
            stop_ids=self.end_ids,
            guide=self.guide,
        )

    def records(self, prompts: list[str], done: int) -> Iterator[dict[str, Any]]:
        """What is told of each sample, prompt 0's first; the first `done` are left out. Raises Refusal for a sample that
        the model could not make."""
        n = self.cfg["n"]
        made: dict[int, Any] = {}
        at, first = done, done // n
        for number, c in self.engine.run(self.request(p) for p in prompts[first:]):
            made[(first + number) * n + c.choice] = c
            while at in made:
                c = made.pop(at)
                if c.error is not None:
                    raise Refusal(f"prompt {at // n + 1}, sample {c.choice + 1}: {c.error}")
                record = {"prompt": prompts[at // n], "choice": c.choice, "text": c.text, "tokens": len(c.tokens)}
                record["finish"] = c.finish
                if self.sampling.logprobs is not None:
                    record["logprobs"] = [[t.id, t.logprob] for t in c.tokens]
                yield record
                at += 1

    def stream(self, prompt: str) -> str:
        """Print the prompt and its continuation as it comes, of a chat the answer alone; -> the continuation."""
        pieces = []
        sys.stdout.write("" if self.cfg["chat"] else prompt)
        sys.stdout.flush()
        for piece in self.engine.stream(self.request(prompt)):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            pieces.append(piece.text)
            if piece.error is not None:
                print()
                raise Refusal(piece.error)
        print()
        return "".join(pieces)


def session(speak: Speaker) -> int:
    what = "a message" if speak.cfg["chat"] else "a beginning"
    print(f"Type {what} and press return; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not prompt:
            return 0
        try:
            answer = speak.stream(prompt)
            if speak.cfg["chat"]:
                speak.history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        except Refusal as error:
            print(f"error: {error}", file=sys.stderr)


# ---------------------------------------------------------------- JSONL


def finished(cfg: dict, prompts: list[str]) -> int:
    """How many samples the file `out` has already: an interrupted call goes on there. A line that was cut is taken off.
    Raises Refusal for a file of other prompts."""
    path = Path(cfg["out"]).expanduser()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise Refusal(f"out={cfg['out']} cannot be read: {error.strerror}") from None
    lines = data.split(b"\n")
    cut = len(lines.pop())
    wanted = [(p, j) for p in prompts for j in range(cfg["n"])]
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            same = i < len(wanted) and (row["prompt"], row["choice"]) == wanted[i]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise Refusal(
                f"out={cfg['out']} line {i + 1} is not of this call's prompts: give a new file, or the prompts and n that it was made of"
            )
    if cut:
        os.truncate(path, len(data) - cut)
    return len(lines)


def write(speak: Speaker, prompts: list[str], done: int) -> int:
    """One line a sample, in the prompts' order, each as soon as those before it are there. -> exit code."""
    out = speak.cfg["out"]
    total = len(prompts) * speak.cfg["n"]
    try:
        with Path(out).expanduser().open("a", encoding="utf-8") as file:
            for record in speak.records(prompts, done) if done < total else ():
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise StorageFault(f"could not write out={out}: {error.strerror}") from None
    print(f"{total} samples in {out}" + (f", {done} of them from before" if done else ""))
    return 0
