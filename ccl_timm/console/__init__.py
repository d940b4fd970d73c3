"""What scripts print: sentences and a progress bar to stderr, results to stdout, from the first process only."""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm.auto import tqdm  # in a notebook a widget

from ccl_timm.console.escape import terminal_text

__all__ = [
    'ERROR_MARK',
    'Progress',
    'first_few',
    'is_primary',
    'log_info',
    'log_error',
    'shortened',
    'show_duration',
    'show_share',
    'table',
    'log_warning',
    'was_error_logged',
]

ERROR_MARK = 'ccl_timm_error_said'  # name of a file


def is_primary() -> bool:
    """Whether this process is the one that speaks and writes."""
    return int(os.environ.get('RANK', 0)) == 0


def log_info(text: str = '') -> None:
    """Print a line for people; names in it may hold anything."""
    if is_primary():
        tqdm.write(terminal_text(text), file=sys.stderr)


def log_warning(text: str, by_any_process: bool = False) -> None:
    """Print a warning; from the first process only, unless each may meet something of its own to warn of."""
    if by_any_process or is_primary():
        tqdm.write(terminal_text(f'warning: {text}'), file=sys.stderr)


def log_error(text: str) -> None:
    """Print why the program ends: once, by the first of torchrun's processes on this machine that has a reason."""
    mark = _error_mark()
    if mark is not None:
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return
    print(f'error: {terminal_text(shortened(text))}', file=sys.stderr)


def shortened(text: str) -> str:
    """The text with the middle left out of every word of more than 300 characters."""
    return re.sub(r'\S{301,}', lambda word: f'{word[0][:100]}...{word[0][-50:]}', text)


def was_error_logged() -> bool:
    """Whether another of torchrun's processes on this machine has said why the program ends."""
    mark = _error_mark()
    return mark is not None and mark.exists()


def _error_mark() -> Path | None:
    """A file beside the folders that torchrun gives its processes for errors; None without torchrun."""
    own = os.environ.get('TORCHELASTIC_ERROR_FILE')
    return Path(own).parent.parent / ERROR_MARK if own else None


def show_duration(seconds: float) -> str:
    """A duration in the unit that suits it: ``'90 s'``, ``'2.5 min'``, ``'3.0 h'``."""
    for size, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 1.6 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} s'


def show_share(fraction: float | None) -> str:
    """A share of the images in percent; nothing for all of them."""
    return f'{100 * fraction:g}%' if fraction else ''


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Align rows under a header, in columns two spaces apart; each cell is one line, whatever its text holds."""
    cells = [[terminal_text(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return '\n'.join(line.rstrip() for line in lines)


def first_few(names: list[str], number: int = 5) -> str:
    """The first names of a list, with dots if there are more."""
    return ', '.join(names[:number]) + (', ...' if len(names) > number else '')


class Progress:
    """A bar on a terminal, a line each ``interval`` steps elsewhere.

    Args:
        items: what to go through; has a length.
        label: what stands before.
        interval: steps between lines.
    """

    def __init__(self, items: Iterable, label: str, interval: int):
        self.items, self.label, self.interval = items, label, interval
        self.steps = len(items)
        shown = is_primary() and (sys.stderr.isatty() or 'ipykernel' in sys.modules)
        self.bar = tqdm(total=self.steps, desc=label, leave=False, disable=not shown)
        self.done = 0
        self.waited = 0.0  # seconds, for items

    def __iter__(self) -> Iterator:
        items = iter(self.items)
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                break
            self.waited += time.perf_counter() - started
            self.done += 1
            yield item
            self.bar.update()
        self.bar.close()

    @property
    def wants_report(self) -> bool:
        """Whether the current step is one to report."""
        return self.done % self.interval == 0

    def report(self, text: str) -> None:
        """Show the state after the current step."""
        if self.bar.disable:
            log_info(f'{self.label} {self.done:>5}/{self.steps}  {text}')
        else:
            self.bar.set_postfix_str(text)
