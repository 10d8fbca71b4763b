"""From tokens to text, a token at a time: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

# What decoders write for bytes that are no character, or not yet.
BROKEN = "\ufffd"
# A character has four bytes at most. Where more tokens than this stay broken, they will not become a
# character, save perhaps the last three.
_LONGEST_WAIT = 8
_PERHAPS_A_CHARACTER = 3
# So many tokens are decoded again with each new one at most; half of them are kept when there are more.
_LONGEST_WINDOW = 64


class Detokenizer:
    """The text of a growing sequence of tokens; what was given out is never taken back.

    Tokens are decoded with some of those before them, since decoders treat the first one differently.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # so many of them had been given out when the latest text was
        self._sent = 0  # so many characters of their text have been

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        broken = text.endswith(BROKEN)
        if broken and len(self._ids) - self._context <= _LONGEST_WAIT:
            return ""
        certain = len(text) - _PERHAPS_A_CHARACTER if broken else len(text)
        new = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if new and not broken:
            self._keep(len(self._ids) - self._context, text)
            self._context = len(self._ids)
        elif len(self._ids) > _LONGEST_WINDOW:
            self._keep(_LONGEST_WINDOW // 2, text)
            self._context = 0
        return new

    def _keep(self, count: int, text: str) -> None:
        """Keep the last tokens only; as many characters as before are still to be given out."""
        unsent = len(text) - self._sent
        self._ids = self._ids[-count:]
        self._sent = len(self._decode(self._ids)) - unsent

    def close(self) -> str:
        """What is left, be it broken."""
        return self._decode(self._ids)[self._sent :] if self._ids else ""


class StopStrings:
    """Passes text on until one of some strings appears in it, however it is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that belongs to no stop string, nor may begin one."""
        text = self._held + text
        begins = [begin for stop in self._stops if (begin := text.find(stop)) >= 0]
        if begins:
            self.found, self._held = True, ""
            return text[: min(begins)]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe]

    def close(self) -> str:
        """What was held back, now that no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` are the first ones of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class TextStream:
    """The text of one sequence, up to its first stop string."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        return self._stops.push(self._detokenizer.push(token))

    def close(self) -> str:
        """The rest of the text, when no token follows."""
        if self.stopped:
            return ""
        last = self._stops.push(self._detokenizer.close())
        return last + self._stops.close()
