"""From tokens to the text that may be shown: whole characters, and nothing of a stop text."""

from etude.text.tokenizer import Streamer, Tokenizer


class Said:
    """The text of a sample. `push` takes its next token and returns what is certain by now: text that could be the
    beginning of one of `stop` is held back until that is decided, so that no part of one is ever shown.
    `stopped` is the one that was found."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.stop = [s for s in stop if s]
        self.streamer = Streamer(tokenizer)
        self.held = ""
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        return self._show(self.streamer.push(token), last=False)

    def flush(self) -> str:
        """What is still held back, at the end."""
        return "" if self.stopped is not None else self._show(self.streamer.flush(), last=True)

    def _show(self, new: str, last: bool) -> str:
        text = self.held + new
        found = min(
            ((i, s) for s in self.stop if (i := text.find(s)) >= 0), default=None, key=lambda f: (f[0], -len(f[1]))
        )
        if found is not None:
            self.held, self.stopped = "", found[1]
            return text[: found[0]]
        keep = 0 if last else max((_overlap(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
