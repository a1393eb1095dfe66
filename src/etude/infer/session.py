"""What generate.py does: prompts from somewhere, text to somewhere."""

import json
import sys
from pathlib import Path
from typing import Any

from etude.errors import Refusal, StorageFault
from etude.infer.sampling import Sampling
from etude.text import chat


def run(cfg: dict) -> int:
    """-> exit code."""
    for name in ("n", "max_tokens", "batch_size"):
        if cfg[name] < 1:
            raise Refusal(f"{name}={cfg[name]} should be at least 1")
    if cfg["prompt"] is not None and cfg["file"] is not None:
        raise Refusal("prompt= and file= both say what to begin with; give one of them")
    if cfg["system"] is not None and not cfg["chat"]:
        raise Refusal("system= is said to a chat: type chat=true as well")
    sampling = Sampling(**{k: cfg[k] for k in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")})
    prompts = read_prompts(cfg)  # before the model is loaded: a missing file is told at once

    from etude.infer.load import load
    from etude.parallel import cores, pick_device, settle

    settle(cfg["threads"] or cores())
    model, tokenizer = load(cfg["ckpt"], pick_device(cfg["device"]), cfg["dtype"], cfg["trusted"])
    speak = Speaker(cfg, model, tokenizer, sampling)
    if cfg["chat"]:
        chat.template(tokenizer)  # refused now rather than after the first question
    if prompts is None:
        return session(speak)
    if cfg["out"] is None and len(prompts) == 1 and cfg["n"] == 1 and cfg["stream"]:
        speak.stream(prompts[0])
        return 0
    rows = speak.complete(prompts)
    records = [
        {
            "prompt": p,
            "choice": j,
            "text": rows[i * cfg["n"] + j].text,
            "tokens": len(rows[i * cfg["n"] + j].row.out),
            "finish": rows[i * cfg["n"] + j].row.finish,
        }
        for i, p in enumerate(prompts)
        for j in range(cfg["n"])
    ]
    write(cfg["out"], records, alone=cfg["chat"])
    return 0


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
    """A loaded model with the settings of one call of generate.py. With chat=true a prompt is a user's message, and
    `history` the conversation before it."""

    def __init__(self, cfg: dict, model: Any, tokenizer: Any, sampling: Sampling):
        self.cfg, self.model, self.tokenizer, self.sampling = cfg, model, tokenizer, sampling
        self.end_ids = chat.end_of_turn(tokenizer) if cfg["chat"] else set()
        self.history: list[chat.Message] = []
        if cfg["system"] is not None:
            self.history.append({"role": "system", "content": cfg["system"]})

    def encode(self, prompt: str) -> list[int]:
        from etude.infer.generate import encode_prompt

        if not self.cfg["chat"]:
            return encode_prompt(self.tokenizer, prompt)
        messages = [*self.history, {"role": "user", "content": prompt}]
        return self.tokenizer.encode(chat.render(self.tokenizer, messages))

    def complete(self, prompts: list[str], on_text: Any = lambda i, text: None) -> list:
        from etude.infer.generate import complete

        return complete(
            self.model,
            self.tokenizer,
            [self.encode(p) for p in prompts],
            self.sampling,
            self.cfg["max_tokens"],
            self.cfg["stop"],
            self.cfg["n"],
            self.cfg["batch_size"],
            self.cfg["cache"],
            on_text,
            self.on_crop,
            self.end_ids,
        )

    def stream(self, prompt: str) -> str:
        """Print the prompt and its continuation as it comes, of a chat the answer alone; -> the continuation."""
        sys.stdout.write("" if self.cfg["chat"] else prompt)
        sys.stdout.flush()
        row = self.complete([prompt], lambda i, text: (sys.stdout.write(text), sys.stdout.flush()))[0]
        print()
        return row.text

    def on_crop(self, limit: int) -> None:
        print(
            f"note: this model has embeddings for {limit} positions; from here on it sees the last {limit} tokens, computed anew for each",
            file=sys.stderr,
        )


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


def write(out: str | None, records: list[dict], alone: bool) -> None:
    """JSONL to a file, or texts to the terminal, `alone` or behind their prompts."""
    if out is not None:
        try:
            Path(out).expanduser().write_text(
                "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
            )
        except OSError as error:
            raise StorageFault(f"could not write out={out}: {error.strerror}") from None
        print(f"{len(records)} samples in {out}")
        return
    for r in records:
        print(
            f"--- {r['prompt']!r} sample {r['choice'] + 1}, {r['tokens']} tokens, ended by {r['finish']}\n{'' if alone else r['prompt']}{r['text']}\n"
        )
