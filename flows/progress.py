"""Show the progress of a run: a live view on a terminal or in a notebook, lines elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tasks.plan import Plan, embedding_jobs
from tasks.records import LayerRecord
from tasks.wording import counted

RECENT = 60.0
"""Seconds over which the current rate is an average."""


class Progress(Protocol):
    """What a run reports its progress to: a context manager that is entered while shards are embedded."""

    def note(self, text: str) -> None:
        """Show a line that the user should read."""

    def found(self, plan: Plan, images: int = 0) -> None:
        """Take the plan, before the work.

        Args:
            plan: What is done and what is to do.
            images: About how many images there are to embed; 0 if unknown.
        """

    def embedded(self, records: Sequence[LayerRecord]) -> None:
        """Take the records of a finished group of shards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Silent:
    """Show nothing."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def found(self, plan: Plan, images: int = 0) -> None:
        """Ignore it."""

    def embedded(self, records: Sequence[LayerRecord]) -> None:
        """Ignore it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class ProgressGroup:
    """Report progress to several receivers."""

    def __init__(self, *all_: Progress) -> None:
        self.all = all_
        self._entered = contextlib.ExitStack()

    def note(self, text: str) -> None:
        """Pass it on."""
        for progress in self.all:
            progress.note(text)

    def found(self, plan: Plan, images: int = 0) -> None:
        """Pass it on."""
        for progress in self.all:
            progress.found(plan, images)

    def embedded(self, records: Sequence[LayerRecord]) -> None:
        """Pass it on."""
        for progress in self.all:
            progress.embedded(records)

    def __enter__(self) -> Self:
        with self._entered:
            for progress in self.all:
                self._entered.enter_context(progress)
            self._entered = self._entered.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


@dataclass
class Pace:
    """How far a run is, and how fast. Counts are shards and images of this run, times are in seconds."""

    shards_in_all: int = 0
    images_in_all: int = 0
    """An estimate until the last shard is done."""
    several_passes: bool = False
    """Whether some shards are read more than once, for models that cannot share a pass; each time counts."""
    shards: int = 0
    images: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    work: dict[str, float] = field(default_factory=dict)
    """When the first shard began and the last one ended, so that rates do not include the start of the workers."""
    _recent: deque[tuple[float, int]] = field(default_factory=deque)

    @classmethod
    def of(cls, plan: Plan, images: int) -> Pace:
        """Return the pace at the beginning of a run.

        Args:
            plan: What there is to do.
            images: How many images its shards hold, about.
        """
        shards, passes = len(plan.to_embed), sum(len(shards) for _, shards in embedding_jobs(plan))
        return cls(passes, images * passes // max(shards, 1), passes > shards)

    @property
    def progress(self) -> str:
        """Return how many shards are done, in words."""
        of = counted(self.shards_in_all, "pass over a shard", "passes over shards")
        return f"{self.shards:,} of {of if self.several_passes else counted(self.shards_in_all, 'shard')}"

    def count(self, records: Sequence[LayerRecord]) -> None:
        """Count a finished group of shards."""
        self.shards += len(records)
        self.images += sum(record.samples for record in records)
        for record in records:
            self.quarantined.update(record.quarantined)
        self._recent.append((time.monotonic(), self.images))
        works = [work for work in (self.work, *(record.work for record in records)) if work]
        if works:
            self.work = {"began": min(w["began"] for w in works), "ended": max(w["ended"] for w in works)}
        if self.shards >= self.shards_in_all:
            self.images_in_all = self.images

    @property
    def share(self) -> float:
        """Return how much is done, from 0 to 1."""
        return self.shards / self.shards_in_all if self.shards_in_all else 1.0

    @property
    def average(self) -> float:
        """Return the images per second from the begin of the first shard to the end of the last."""
        return self.images / max(self.work["ended"] - self.work["began"], 0.01) if self.work else 0.0

    @property
    def now(self) -> float:
        """Return the images per second over the last minute, or since the last group but one if that is longer ago."""
        while len(self._recent) > 2 and self._recent[1][0] < time.monotonic() - RECENT:
            self._recent.popleft()
        if len(self._recent) < 2:
            return self.average
        since, images = self._recent[0]
        return (self.images - images) / max(time.monotonic() - since, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Return the estimated time left, or None before the first shard is done."""
        return (time.monotonic() - self.started) * (1 / self.share - 1) if self.share else None

    @property
    def left(self) -> str:
        """Return the time left in words."""
        seconds = self.seconds_left
        return "starting" if seconds is None else f"{datetime.timedelta(seconds=round(seconds))} left"

    @property
    def bad(self) -> str:
        """Return the number of quarantined samples in words, by reason."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.quarantined.most_common())
        return f"{self.quarantined.total():,} quarantined" + (f" ({reasons})" if reasons else "")


class Terminal:
    """Show progress on standard error: as a live view on a terminal, else as one line per group of shards."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.pace = Pace()
        self._gpus: list[Any] = []
        self._live = Live(console=self.console, get_renderable=self.view, refresh_per_second=2)

    def note(self, text: str) -> None:
        """Print it."""
        self.console.print(text)

    def found(self, plan: Plan, images: int = 0) -> None:
        """Print what there is to do."""
        total = len(plan.to_embed)
        done = len(plan.own) - total
        self.pace = Pace.of(plan, images)
        if not plan.to_embed and not plan.to_merge:
            self.console.print(f"{counted(done, 'shard')}, all done already: nothing to embed, nothing to merge")
            return
        part = "" if plan.part is None else f"part {plan.part.number} of {plan.part.count}: "
        shards = counted(len(plan.own), "shard")
        self.console.print(f"{part}{shards}: {total:,} to embed, {done:,} done already")

    def embedded(self, records: Sequence[LayerRecord]) -> None:
        """Count a finished group of shards, and print a line if there is no live view."""
        pace = self.pace
        pace.count(records)
        if not self.console.is_terminal:
            rate = f"{pace.average:.1f} images/s, {pace.quarantined.total()} quarantined"
            self.console.print(f"{pace.progress}, {counted(pace.images, 'image')}, {rate}")

    def view(self) -> Group:
        """Return what the terminal shows now."""
        pace = self.pace
        images = counted(pace.images, "image")
        if pace.images_in_all > pace.images:
            images = f"{pace.images:,} of about {counted(pace.images_in_all, 'image')}"
        table = Table.grid(padding=(0, 2))
        table.add_row("shards", ProgressBar(max(pace.shards_in_all, 1), pace.shards, width=40), pace.left)
        table.add_row("", pace.progress, images)
        table.add_row("images/s", f"{pace.now:,.1f} now", f"{pace.average:,.1f} on average")
        for line in gpu_lines(self._gpus):
            table.add_row(*line)
        return Group(table, Text(pace.bad))

    def __enter__(self) -> Self:
        self.pace.started = time.monotonic()
        if self.console.is_terminal:
            self._gpus = open_gpus()
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()


class Notebook(Terminal):
    """Show in a notebook what a terminal shows, in one output that each finished group of shards updates."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._output: Any = None

    def embedded(self, records: Sequence[LayerRecord]) -> None:
        """Count a finished group of shards, and update the output."""
        from IPython.display import HTML, display

        self.pace.count(records)
        page = Console(record=True, file=io.StringIO(), width=100, force_jupyter=False)
        page.print(self.view())
        html = HTML(page.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))
        if self._output is None:
            self._output = display(html, display_id=True)
        else:
            self._output.update(html)


def progress_here() -> Progress:
    """Return a live view on a terminal or in a notebook, and silence elsewhere."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_jupyter:
        return Notebook(console)
    return Terminal(console) if console.is_terminal else Silent()


CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Prefect's and Dask's log lines off the terminal within the block, here and in the workers it starts.

    Prefect's server still gets them. If the user has set PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL, nothing changes.
    """
    if CONSOLE_LEVEL in os.environ:
        yield
        return
    import distributed  # noqa: F401  # its import sets levels

    prefect, dask, nowhere = logging.getLogger("prefect"), logging.getLogger("distributed"), logging.NullHandler()
    propagate, level = prefect.propagate, dask.level
    os.environ[CONSOLE_LEVEL] = "CRITICAL"
    prefect.propagate = False
    prefect.addHandler(nowhere)  # without any handler Python would print warnings
    dask.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        dask.setLevel(level)
        prefect.removeHandler(nowhere)
        prefect.propagate = propagate
        os.environ.pop(CONSOLE_LEVEL, None)


def open_gpus() -> list[Any]:
    """Return NVML handles of the GPUs, which open no CUDA context; none without NVML or a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no NVML, or no driver behind it
        return []


def gpu_lines(gpus: Sequence[Any]) -> list[tuple[str, str, str]]:
    """Return how busy each GPU and its JPEG decoder are, as the three cells of a row of the live view.

    Args:
        gpus: Handles from `open_gpus`.

    Returns:
        Name, use of the GPU and use of its decoder in percent. A GPU that reports neither has no row.
    """
    lines = []
    for number, gpu in enumerate(gpus):
        import pynvml

        busy, decoder = "", ""
        with contextlib.suppress(Exception):
            busy = f"{pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu} % busy"
        with contextlib.suppress(Exception):
            decoder = f"decoder {pynvml.nvmlDeviceGetJpgUtilization(gpu)[0]} %"
        if busy or decoder:
            lines.append((f"GPU {number}", busy, decoder))
    return lines
