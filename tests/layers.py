"""Records of layers for tests that make some without embedding anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedders import ImageEmbedder
from embedders.engine import EndOfShard, Engine, Rows
from embedders.quarantine import QuarantinedSample
from embedders.recipe import Recipe, recipes_of
from embedders.webdataset import OpenShard
from tasks.embed import EmbedOptions, embed_group
from tasks.merge_options import MergeOptions
from tasks.plan import Plan, make_plan
from tasks.records import Column, LayerRecord
from tasks.shards import Shard

LAYER = "image_embedding"


def layer_record(
    embedded: int,
    quarantined: Mapping[str, int] | None = None,
    *,
    key: str = "key",
    recipe: str = "digest",
    dimensions: int = 4,
    layer: str = LAYER,
    **fields: Any,
) -> LayerRecord:
    """A balanced record of a layer of vectors."""
    reasons = dict(quarantined or {})
    columns = {layer: Column("float32", (dimensions,))}
    samples = embedded + sum(reasons.values())
    return LayerRecord(key, layer, recipe, samples, embedded, reasons, embedded, columns, **fields)


class Nothing(ImageEmbedder):
    """An embedder that is never opened."""

    def load_dataset_shard(self, tar_path: str) -> Any:
        raise NotImplementedError

    def load_embedding_model(self, device: str) -> Any:
        raise NotImplementedError


def recipe_named(digest: str, layer: str = LAYER) -> Recipe:
    """A recipe with a digest of the test's choice."""
    return Recipe(layer, Nothing(image_embedding_column=layer), {"embedder": digest}, digest, digest, (layer,))


def embed_all(shards: Sequence[Shard], embedder: ImageEmbedder, **options: Any) -> list[LayerRecord]:
    """Embed shards here, on the CPU."""
    recipes = recipes_of(embedder)
    done = embed_group(shards, recipes, EmbedOptions("key", "cpu", **options))
    return [of_layer[recipes[0].layer] for of_layer in done.values()]


def plan_of(shards: Sequence[Shard], embedder: ImageEmbedder, **options: Any) -> Plan:
    """What an output holds of an embedder's layers."""
    return make_plan(shards, recipes_of(embedder), MergeOptions("key", **options))


@dataclass
class Embedded:
    """All that came of a shard, in the order of its samples."""

    shard: OpenShard
    ids: list[str]
    vectors: np.ndarray
    quarantined: list[QuarantinedSample]

    @property
    def samples(self) -> int:
        return self.shard.count


def embedded_shards(results: Iterable[Rows | EndOfShard], session: int = 0, column: str = "") -> list[Embedded]:
    """What an engine gave, a shard at a time, for the first column or one with a name."""
    rows: dict[int, list[Rows]] = {}
    done = []
    for result in results:
        if isinstance(result, Rows):
            if result.session == session:
                rows.setdefault(id(result.shard), []).append(result)
            continue
        found = rows.pop(id(result.shard), [])
        samples = np.concatenate([np.zeros(0, np.int64), *(it.samples for it in found)])
        order = np.argsort(samples)
        values = [it.columns[column or next(iter(it.columns))] for it in found]
        vectors = np.ascontiguousarray(np.concatenate(values)[order]) if values else np.zeros((0, 0), np.float32)
        ids = result.shard.ids_at(samples[order]).to_pylist()
        done.append(Embedded(result.shard, ids, vectors, list(result.quarantined[session])))
    return done


def run_engine(embedder: ImageEmbedder, shards: Iterable[OpenShard], device: str = "cpu") -> list[Embedded]:
    """Embed shards with an engine of their own."""
    apart = [replace(shard) for shard in shards]  # one shard may be given twice
    return embedded_shards(Engine([embedder.open(device)]).embed(apart))
