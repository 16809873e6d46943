"""What a person sees while a run works: a bar on a terminal, lines elsewhere, nothing when asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tasks.plan import Plan
from tasks.shards import EmbeddingRecord


class Progress(Protocol):
    """Is told what a run finds and does."""

    def note(self, text: str) -> None:
        """A line that a person should read."""

    def found(self, plan: Plan) -> None:
        """The plan before the work."""

    def embedded(self, records: Sequence[EmbeddingRecord]) -> None:
        """A group of shards is through."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def found(self, plan: Plan) -> None:
        """Nothing."""

    def embedded(self, records: Sequence[EmbeddingRecord]) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Terminal:
    """Writes to standard error: a bar where that is a terminal, a line a group of shards where not."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.samples = self.bad = self.shards = self.total = 0
        self.started = time.monotonic()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None

    def note(self, text: str) -> None:
        """Say it."""
        self.console.print(text)

    def found(self, plan: Plan) -> None:
        """Say what there is to do."""
        self.total = len(plan.to_embed)
        done = len(plan.shards) - self.total
        if not plan.to_embed and not plan.to_merge:
            self.console.print(f"all {done} shards are done already: nothing to embed, nothing to merge")
            return
        self.console.print(f"{len(plan.shards)} shards: {self.total} to embed, {done} done already")

    def embedded(self, records: Sequence[EmbeddingRecord]) -> None:
        """Count a group of shards."""
        self.shards += len(records)
        self.samples += sum(record.samples for record in records)
        self.bad += sum(sum(record.quarantined.values()) for record in records)
        rate = f"{self.samples / (time.monotonic() - self.started):.1f} images/s, {self.bad} quarantined"
        if self.task is not None and self.console.is_terminal:
            self.bar.update(self.task, completed=self.shards, rate=rate)
        else:
            self.console.print(f"{self.shards}/{self.total} shards, {self.samples} images, {rate}")

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        self.bar.start()
        self.task = self.bar.add_task("embedding", total=self.total, rate="starting workers")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
