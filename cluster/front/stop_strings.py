"""Where an answer's text has to end. Knows strings, not tokens."""

from __future__ import annotations


class StopStrings:
    """Holds text back while it could be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        """`include`: the stop string that ends the text is shown."""
        self._stops = stops
        self._include = include
        self._held = ""
        self._passed = 0
        """Held characters at whose end no stop string could end the text yet."""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that can be shown, and whether a stop string was found.

        One that this piece completes while it may not stop is text like any other, now and later.
        """
        if not self._stops:
            return text, False
        self._held += text
        end = self._end() if may_stop else None
        if end is not None:
            shown, self._held = self._held[:end], ""
            return shown, True
        passed = self._passed if may_stop else len(self._held)
        shown_length = len(self._held) - self._possible_start()
        shown, self._held = self._held[:shown_length], self._held[shown_length:]
        self._passed = max(0, passed - shown_length)
        return shown, False

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _end(self) -> int | None:
        """Where the held text ends, when it holds a stop string: the first to begin, then the shortest."""
        found = [
            (at, len(stop))
            for stop in self._stops
            if (at := self._held.find(stop, max(0, self._passed - len(stop) + 1))) >= 0
        ]
        if not found:
            return None
        at, length = min(found)
        return at + length if self._include else at

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
