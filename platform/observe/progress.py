"""Progress of long work in one line: what is done, how fast, how long it will take."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO


class Progress:
    """Counts work in `unit`s and prints `label 12/80 clips  3.2 clips/s  loss 0.41  0:21 left`.

    A terminal's line is rewritten; elsewhere a line is printed every `interval` seconds, and the last one always.

    total: how many units there are, or None when nobody knows. initial: units that an earlier run finished; they count
    as done but not towards the speed. stream: stderr by default, so that stdout stays free for results.
    """

    def __init__(
        self,
        total: int | None,
        unit: str = "clips",
        label: str = "",
        *,
        initial: int = 0,
        interval: float = 5.0,
        stream: TextIO | None = None,
    ) -> None:
        if total is not None and total < 0:
            raise ValueError(f"total must not be negative, got {total}")
        self.total, self.unit, self.label, self.done = total, unit, label, initial
        self._initial, self._stream = initial, stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.1 if self._terminal else interval
        self._started = self._printed = time.monotonic()
        self._figures: dict[str, float | str] = {}
        self._current = False

    def update(self, n: int = 1, **figures: float | str) -> None:
        """Count `n` more units; `figures` replace those shown so far under the same names."""
        self.done += n
        self._figures |= figures
        self._current = False
        now = time.monotonic()
        if self.done == self.total or now - self._printed >= self._interval:
            self._print(now)

    def close(self) -> None:
        """Print the last line if it has not been; leave a terminal's cursor on a fresh one."""
        if not self._current and self.done > self._initial:
            self._print(time.monotonic())
        if self._terminal:
            print(file=self._stream, flush=True)

    def line(self, elapsed: float) -> str:
        """The text after `elapsed` seconds of work."""
        done = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        parts = [f"{self.label} {done} {self.unit}".lstrip()]
        counted = self.done - self._initial
        if counted > 0 and elapsed > 0:
            parts.append(_speed(counted / elapsed, self.unit))
        parts += [f"{name} {_short(value)}" for name, value in self._figures.items()]
        if self.total is not None and counted > 0 and self.done < self.total:
            parts.append(f"{_clock(elapsed / counted * (self.total - self.done))} left")
        elif counted > 0:
            parts.append(f"{_clock(elapsed)} in all" if self.done == self.total else _clock(elapsed))
        return "  ".join(parts)

    def _print(self, now: float) -> None:
        text = self.line(now - self._started)
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)  # return, and erase to the line's end
        else:
            print(text, file=self._stream, flush=True)
        self._printed, self._current = now, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _speed(rate: float, unit: str) -> str:
    """Slow work reads better as seconds a unit."""
    return f"{rate:.3g} {unit}/s" if rate >= 0.1 else f"{1 / rate:.3g} s/{unit.removesuffix('s')}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
