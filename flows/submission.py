"""What a run gives to its cluster and when: each group of shards is indexed, embedded, and merged as soon as it is.

Only a few groups for each worker are submitted at a time. So the memory of client and scheduler follows the tasks in
flight and not the dataset, and a worker that joins late, or a group that took longer than expected, changes the size
of the groups that follow.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from embedders.decision import Decision
from embedders.recipe import Recipe
from flows.tasks_in_flight import Ended, TasksInFlight
from tasks.dataset.even_files import Part, write_parts
from tasks.decide import TRIES, agreed, decide, kept_decision, warm_up
from tasks.embed import EmbedOptions, Records, embed_shards
from tasks.group_size import SECONDS_OF_A_MERGE, GroupSize
from tasks.index import index_shards
from tasks.merge import merge_shards
from tasks.merge_options import MergeOptions
from tasks.plan import Plan, embedding_jobs, merged_columns, passes
from tasks.records import LayerRecord, seconds_in_work
from tasks.retries import ShardFailure, ShardsFailed
from tasks.shards import Shard

TICK = 1.0
"""Seconds to wait for the end of a task before the cluster is looked at again."""

MERGE_FIRST = 10
"""The priority of a merge: the reader of the dataset, and the end of the run, wait for it."""

AHEAD = 2
"""Groups that wait for each worker beyond those that its threads work on, so that it need not wait for the next."""

ALONE_IN_VAIN = 8
"""Shards that fail one after the other, each in a task of its own, before the rest is not tried so any more."""


@dataclass(frozen=True)
class Group:
    """Shards that one task embeds, and with which recipes."""

    shards: tuple[Shard, ...]
    recipes: tuple[Recipe, ...] = ()


@dataclass(frozen=True)
class _Waiting:
    """A group that is embedded and not merged yet, with the future of its embedding."""

    group: Group
    records: Records
    options: MergeOptions
    embedded: Any


@dataclass(frozen=True)
class Stages:
    """The Prefect tasks of a group, in their order; the first one is done once, for all groups."""

    decide: Any = decide
    index: Any = index_shards
    embed: Any = embed_shards
    merge: Any = merge_shards


STAGES = Stages()


@dataclass
class Submission:
    """One run's tasks on its cluster.

    Attributes:
        tasks: Those that are in flight.
        plan: What was to do when the run began.
        options: What embedding tasks need beside shards and recipes.
        size: How many shards the next group takes.
        embedded: Called with the shards of a group, and their records of the first layer, once they are embedded.
        failures: Why shards failed, by name; the submission adds to it.
        stages: The tasks of a group.
        deciders: Addresses of the workers that may measure what all of them do; empty for any.
    """

    tasks: TasksInFlight
    plan: Plan
    options: EmbedOptions
    size: GroupSize
    embedded: Callable[[Sequence[Shard], Sequence[LayerRecord]], None]
    failures: dict[str, ShardFailure]
    stages: Stages = STAGES
    deciders: Sequence[str] = ()
    _groups: dict[Any, Group] = field(default_factory=dict)
    _decisions: dict[str, Decision | None] = field(default_factory=dict)
    _deciding: dict[Any, tuple[Recipe, ...]] = field(default_factory=dict)
    _records: dict[str, dict[str, LayerRecord]] = field(default_factory=dict)
    _waiting: deque[_Waiting] = field(default_factory=deque)
    _columns: dict[str, LayerRecord] = field(default_factory=dict)
    _merge_options: MergeOptions | None = None

    def embed_all(self) -> None:
        """Index, embed and merge every shard that lacks a layer; a failed group stops none of the others.

        Raises:
            ClusterLost: There is no cluster any more.
        """
        left = deque((recipes, deque(shards)) for recipes, shards in embedding_jobs(self.plan))
        while left or self._groups or self._deciding or self._waiting:
            began, submitted = time.monotonic(), False
            if left and self._may_embed(*left[0]):
                recipes, shards = left[0]
                count = self.size.next(len(shards), self.tasks.threads)
                self._embed(Group(tuple(shards.popleft() for _ in range(min(count, len(shards)))), recipes))
                submitted = True
                if not shards:
                    left.popleft()
            for again in self._wait(0 if submitted else TICK):
                if again.recipes:  # a lost merge is made up for at the end
                    left.appendleft((again.recipes, deque(again.shards)))
            if submitted:
                self.size.cost(time.monotonic() - began)

    def embed_alone(self, shards: Sequence[Shard], plan: Plan) -> None:
        """Try shards once more whose failure may be another one's: each by itself, so that it is nobody else's now.

        One after the other: what is assigned to a worker that dies counts as having had a part in it.

        Raises:
            ClusterLost: There is no cluster any more.
        """
        in_vain = 0
        for shard in shards:
            if in_vain == ALONE_IN_VAIN:
                return
            self.embed_again([shard], passes(plan.missing(shard)))
            in_vain = in_vain + 1 if shard.name in self.failures else 0

    def embed_again(self, shards: Sequence[Shard], together: Sequence[tuple[Recipe, ...]]) -> None:
        """Embed shards in passes, one task each, and wait for them; a merge follows where they are whole.

        Raises:
            ClusterLost: There is no cluster any more.
        """
        for shard in shards:
            self.failures.pop(shard.name, None)
        left = deque(Group((shard,), recipes) for shard in shards for recipes in together)
        while left or self._groups or self._waiting:
            while left and self._is_decided(left[0].recipes, left[0].shards):
                self._embed(left.popleft())
            left.extend(again for again in self._wait() if again.recipes)

    def merge_all(self, plan: Plan) -> None:
        """Merge what is embedded and not merged, or merged in another way than now.

        Raises:
            ClusterLost: There is no cluster any more.
        """
        size = GroupSize(SECONDS_OF_A_MERGE)
        left = deque(plan.to_merge)
        while left or self._groups:
            while left and len(self._groups) < self.tasks.threads + self.tasks.workers:
                count = min(len(left), size.next(len(left), self.tasks.threads))
                group = Group(tuple(left.popleft() for _ in range(count)))
                self._merge(group, {shard.name: plan.records(shard) for shard in group.shards}, plan.options)
            for again in self._wait():
                left.extend(again.shards)

    def write_parts(self, groups: Sequence[Sequence[Part]], options: MergeOptions, schema: pa.Schema) -> None:
        """Write the files of an even size that were asked for.

        Raises:
            ClusterLost: There is no cluster any more.
        """
        output = self.plan.shards[0].output
        for parts in groups:
            parameters = {"parts": parts, "output": output, "options": options, "schema": schema}
            self._groups[self.tasks.submit(write_parts, parameters)] = Group(())
        while self._groups:
            self._wait()

    # --- one group ----------------------------------------------------------------------------------------------------

    def _may_embed(self, recipes: tuple[Recipe, ...], shards: Collection[Shard]) -> bool:
        """Return whether it is decided how a pass computes, and the cluster has room for another group."""
        room = self._embedding() < self.tasks.threads + AHEAD * self.tasks.workers
        return self._is_decided(recipes, shards) and room

    def _embedding(self) -> int:
        return sum(bool(group.recipes) for group in self._groups.values())

    def _is_decided(self, recipes: tuple[Recipe, ...], shards: Collection[Shard]) -> bool:
        """Return whether decoder and batch size of a pass are decided; if nothing is known yet, have them measured.

        They are those of the shards that are done, if there are any. On a CPU nothing depends on measuring.
        """
        name = _sources(recipes)
        if name in self._decisions or name in map(_sources, self._deciding.values()):
            return name in self._decisions
        kept = kept_decision(self.plan, recipes)
        if kept is not None or self.options.device == "cpu":
            self._decisions[name] = kept
        else:
            some = tuple(itertools.islice(shards, TRIES))
            parameters = {"shards": some, "recipes": recipes, "options": self.options}
            self._deciding[self.tasks.submit(self.stages.decide, parameters, workers=self.deciders)] = recipes
            self.tasks.start_on_each(self.deciders, warm_up, recipes, self.options)
        return name in self._decisions

    def _embed(self, group: Group) -> None:
        """Submit the index task of a group, if it has one, and its embedding, which follows it."""
        shards, recipes = group.shards, group.recipes
        indexed: list[Any] = []
        parameters: dict[str, Any]
        if recipes[0].embedder.use_index_files and shards[0].source.is_local:
            indexed = [self.tasks.submit(self.stages.index, {"shards": shards, "id_col": self.options.id_col})]
        parameters = {"shards": shards, "recipes": recipes, "options": self.options}
        parameters |= {"decision": self._decisions[_sources(recipes)]}
        self._groups[self.tasks.submit(self.stages.embed, parameters, indexed)] = group

    def _decided(self, recipes: tuple[Recipe, ...], decision: Decision | None) -> None:
        """Take a decision; it is None if that failed, and then each worker decides for itself."""
        if decision is not None and self.plan.part is not None:
            decision = agreed(decision, self.plan, recipes)
        self._decisions[_sources(recipes)] = decision
        self.tasks.forget_started()

    def _merge_some(self) -> None:
        """Submit merges that wait: about one a worker while there is something to embed."""
        embedding = self._embedding()
        room = self.tasks.workers if embedding else self.tasks.threads + self.tasks.workers
        while self._waiting and len(self._groups) - embedding < room:
            waiting = self._waiting.popleft()
            self._merge(waiting.group, waiting.records, waiting.options, [waiting.embedded])
            self.tasks.release(waiting.embedded)

    def _merge(self, group: Group, records: Records, options: MergeOptions, after: Sequence[Any] = ()) -> None:
        there: frozenset[str] = frozenset()
        if after and not self.options.verify:  # else the plan has looked at it
            there = self._merged_before.intersection(shard.name for shard in group.shards)
        parameters = {"shards": group.shards, "records": records, "options": options, "there": tuple(there)}
        self._groups[self.tasks.submit(self.stages.merge, parameters, after, MERGE_FIRST)] = group

    def _wait(self, seconds: float = TICK) -> list[Group]:
        """Take what ends within some time, have merged what that allows, and return what has to be done again."""
        again = [group for ended in self.tasks.ended(seconds) if (group := self._take(ended)) is not None]
        self._merge_some()
        return again

    def _take(self, ended: Ended) -> Group | None:
        """Take what has come of a task; return its group if nobody knows, so that it has to be done again."""
        group = self._groups.pop(ended.future, None)
        try:
            if (decided := self._deciding.pop(ended.future, None)) is not None and not ended.lost:
                self._decided(decided, ended.result)
            if group is None:  # of an index task its embedding tells
                return None
            if ended.lost:
                self._waiting.clear()  # what they follow is lost, too; the files are there, and merged at the end
                return group
            if ended.error is not None:
                self._failed(group, ended.error)
            elif group.recipes:
                self._embedded(group, ended)
        finally:
            if not (self._waiting and self._waiting[-1].embedded is ended.future):
                self.tasks.release(ended.future)
        return None

    def _failed(self, group: Group, error: BaseException) -> None:
        if isinstance(error, ShardsFailed):
            self.failures.update({failure.shard: failure for failure in error.failures})
            return
        for shard in group.shards:  # its worker died, or Prefect could not run it
            self.failures[shard.name] = replace(ShardFailure.of(shard.name, error), alone=True)

    def _embedded(self, group: Group, ended: Ended) -> None:
        """Take the records of an embedded group, and have those of its shards merged that have all layers now."""
        records: Records = ended.result
        main = group.recipes[0].layer
        fresh = [of_layer[main] for of_layer in records.values()]
        self.size.ended(len(group.shards), seconds_in_work(fresh), self.tasks.threads, time.monotonic())
        self.embedded(group.shards, fresh)
        for name, of_layer in records.items():
            self._records.setdefault(name, {}).update(of_layer)
            for layer, record in of_layer.items():
                if record.embedded:
                    self._columns.setdefault(layer, record)
        whole = Group(tuple(shard for shard in group.shards if self._has_all(shard)))
        self._merge_options = self._merge_options or self._options_by_now()
        if whole.shards and self._merge_options is not None:
            of_shards = {s.name: self.plan.records(s) | self._records.pop(s.name) for s in whole.shards}
            self._waiting.append(_Waiting(whole, of_shards, self._merge_options, ended.future))

    @cached_property
    def _merged_before(self) -> frozenset[str]:
        """The shards that had a merged file when the run began; it may still be the right one."""
        files = self.plan.options.folder(self.plan.shards[0]).list(".parquet")
        return frozenset(file.name.removesuffix(".parquet") for file in files)

    def _has_all(self, shard: Shard) -> bool:
        fresh = self._records.get(shard.name, {})
        return all(layer.name in fresh or shard.name in layer.records for layer in self.plan.asked)

    def _options_by_now(self) -> MergeOptions | None:
        """Return how a shard is merged now; None while some layer's columns are not known, since no shard has a value.

        What is merged otherwise than the whole dataset needs it in the end is merged again then.
        """
        layers = []
        for layer in self.plan.layers:
            found = layer.records
            if not any(record.embedded for record in found.values()):
                if layer.name not in self._columns:
                    return None
                found = {"": self._columns[layer.name]}
            layers.append(replace(layer, records=found))
        return replace(self.plan.options, columns=tuple(merged_columns(layers)))


def _sources(recipes: Sequence[Recipe]) -> str:
    """Return what passes of one model, or of the same models together, have in common."""
    return " ".join(sorted({recipe.source for recipe in recipes}))
