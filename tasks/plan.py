"""What is left to do: read the footers of what is there, and name what is missing. Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa

from embedders.errors import InputError
from embedders.recipe import Recipe
from embedders.shared_loading import can_share
from tasks.dataset.metadata import check_metadata_schemas, unified_schema
from tasks.keys import layer_key, merge_key
from tasks.merge_options import MergedColumn, MergeOptions
from tasks.output_files import OutputFiles
from tasks.records import PART, Column, LayerRecord, MergeRecord, intact
from tasks.run_part import RunPart
from tasks.shards import Shard
from tasks.storage.folder import in_bulk

R = TypeVar("R")


def merged_key(shard: Shard, records: Mapping[str, LayerRecord], options: MergeOptions) -> str:
    """Return what a shard's merged file is a pure function of.

    A file beside a tar is its own metadata, so that does not count; json members have no schema before they are read.

    Args:
        shard: The shard.
        records: Of its layers, by name.
        options: How they are joined.
    """
    return merged_keys(options)(shard, records)


def merged_keys(options: MergeOptions) -> Callable[[Shard, Mapping[str, LayerRecord]], str]:
    """Return `merged_key` for many shards that are joined in one way."""
    whole, without_schema = options.as_dict(), replace(options, schema=None).as_dict()

    def key_of(shard: Shard, records: Mapping[str, LayerRecord]) -> str:
        versions = {name: records[name].version for name in sorted(records)}
        if options.in_place:
            return merge_key(replace(shard, metadata_fingerprint=None), versions, whole)
        return merge_key(shard, versions, without_schema if shard.metadata is None else whole)

    return key_of


@dataclass(frozen=True)
class Layer:
    """A layer of the output.

    Attributes:
        name: Its name.
        recipe: The digest of what makes it.
        made_of: The fingerprint of what makes it.
        asked: Whether this run makes it; others were made before and are joined again.
        records: By shard, of the files that hold what they should.
    """

    name: str
    recipe: str
    made_of: Mapping[str, Any]
    asked: bool
    records: Mapping[str, LayerRecord]


@dataclass(frozen=True)
class Plan:
    """Every shard, with the records of its layers and of its merged file, as far as they are done."""

    shards: tuple[Shard, ...]
    recipes: tuple[Recipe, ...]
    options: MergeOptions
    layers: tuple[Layer, ...]
    merged: dict[str, MergeRecord]
    gone: tuple[str, ...] = ()
    """Shards that the output has layers of and the dataset has no more."""
    part: RunPart | None = None
    """Which shards this run does; None for all."""

    @cached_property
    def own(self) -> tuple[Shard, ...]:
        """The shards that this run does: all, or those of its part."""
        return self.shards if self.part is None else tuple(self.part.of(self.shards))

    @cached_property
    def asked(self) -> tuple[Layer, ...]:
        """The layers that this run makes, in the order in which it was asked for them."""
        by_name = {layer.name: layer for layer in self.layers}
        return tuple(by_name[recipe.layer] for recipe in self.recipes)

    @property
    def main(self) -> Layer:
        """The first layer that this run makes: its counts are the run's."""
        return self.asked[0]

    @cached_property
    def embedded(self) -> dict[str, LayerRecord]:
        """The record of the first layer of each shard that has all layers asked for."""
        first, *others = self.asked
        return {name: it for name, it in first.records.items() if all(name in other.records for other in others)}

    def missing(self, shard: Shard) -> tuple[Recipe, ...]:
        """Return the recipes whose layer a shard lacks."""
        return tuple(
            recipe for recipe, layer in zip(self.recipes, self.asked, strict=True) if shard.name not in layer.records
        )

    def records(self, shard: Shard) -> dict[str, LayerRecord]:
        """Return the records of a shard's layers, by layer."""
        return {layer.name: layer.records[shard.name] for layer in self.layers if shard.name in layer.records}

    @cached_property
    def to_embed(self) -> list[Shard]:
        """Those of this run's shards that lack a layer that belongs to their tar and its recipe."""
        return [shard for shard in self.own if shard.name not in self.embedded]

    @cached_property
    def to_merge(self) -> list[Shard]:
        """Those of this run's shards that are embedded and whose merged file is missing or older than its inputs."""
        return [shard for shard in self.own if shard.name in self.embedded and shard.name not in self.merged]

    @cached_property
    def unfinished(self) -> list[Shard]:
        """The shards of the whole dataset that are not embedded or not merged, in its order."""
        return [shard for shard in self.shards if shard.name not in self.embedded or shard.name not in self.merged]

    def embedded_since(self, before: Plan) -> list[LayerRecord]:
        """Return the records of this run's shards that an earlier plan did not have yet."""
        names = [shard.name for shard in self.own if shard.name not in before.embedded]
        return [self.embedded[name] for name in names if name in self.embedded]

    @property
    def vectors(self) -> MergedColumn:
        """The main layer's column of vectors, as the merged dataset has it."""
        name = self.main.name
        found = [column for column in self.options.columns if column.name == name]
        return found[0] if found else MergedColumn(name, name, "float32", (0,))


def make_plan(
    shards: Sequence[Shard],
    recipes: Sequence[Recipe],
    options: MergeOptions,
    *,
    overwrite: bool = False,
    verify: bool = False,
    part: RunPart | None = None,
) -> Plan:
    """Read what the output holds of these shards.

    A shard's layer counts as done if its footer opens, its key is the one expected, and its counts agree with the
    file's rows, the quarantine and the index.

    Args:
        shards: All of the dataset.
        recipes: Of the layers that are asked for.
        options: How layers and metadata are joined; the layers and columns are found here.
        overwrite: Whether layers that another recipe made are made anew.
        verify: Whether to read every page of what looks done and check it against its checksum.
        part: Which shards are to be done; None for all. What is decided for all is the same in all parts.

    Raises:
        InputError: A layer was made by another recipe and `overwrite` is not set, or two layers have one column name.
    """
    plan, files = _plan_layers(shards, recipes, options, overwrite, verify, part)
    return _with_merged(plan, _merge_records(plan, files, verify))


def _plan_layers(
    shards: Sequence[Shard],
    recipes: Sequence[Recipe],
    options: MergeOptions,
    overwrite: bool,
    verify: bool,
    part: RunPart | None,
) -> tuple[Plan, OutputFiles]:
    """Return a plan without merged files, and the files of the output; see `make_plan`."""
    files = OutputFiles(shards, options.folder(shards[0]))
    layers = [_asked_layer(files, recipe, options.id_col, overwrite) for recipe in recipes]
    others = files.layers.difference(layer.name for layer in layers)
    earlier = [_earlier_layer(files, name, options.id_col) for name in others]
    layers = sorted([*layers, *(layer for layer in earlier if layer is not None)], key=lambda layer: layer.name)
    check_column_names(layers, recipes)
    if verify:
        layers = [_verified(shards if part is None else part.of(shards), layer) for layer in layers]
    columns = merged_columns(layers)
    options = replace(
        options,
        layers=tuple(layer.name for layer in layers),
        columns=tuple(columns),
        made_of={layer.name: layer.made_of for layer in layers},
    )
    return Plan(tuple(shards), tuple(recipes), options, tuple(layers), {}, files.gone, part), files


def _asked_layer(files: OutputFiles, recipe: Recipe, id_col: str, overwrite: bool) -> Layer:
    found: dict[str, LayerRecord] = {}
    for name, record in files.layer_records(recipe.layer):
        shard = files.shards[name]
        if record.recipe != recipe.digest and not overwrite:
            raise InputError(
                f"{shard.output}: layer {recipe.layer!r} was made by another model or setting (see manifest.json); "
                "give another --image-embedding-column to add a layer, another --output, or --overwrite to replace it"
            )
        if record.key == layer_key(shard, recipe.layer, recipe.digest, id_col) and recipe.accepts(record.decoder):
            found[name] = record
    return Layer(recipe.layer, recipe.digest, recipe.fingerprint, True, files.balanced(found, index=True))


def _earlier_layer(files: OutputFiles, name: str, id_col: str) -> Layer | None:
    """Return a layer that another run made; None if no shard has it. Files of tars that have changed are left out."""
    records = dict(files.layer_records(name))
    if not records:
        return None
    recipe = Counter(record.recipe for record in records.values()).most_common(1)[0][0]
    made_of = next(record.made_of for record in records.values() if record.recipe == recipe)
    found = {
        shard: record
        for shard, record in records.items()
        if record.key == layer_key(files.shards[shard], name, recipe, id_col)
    }
    return Layer(name, recipe, made_of, False, files.balanced(found, index=False))


def _verified(shards: Sequence[Shard], layer: Layer) -> Layer:
    """Return a layer without those files of some shards that cannot be read or have a wrong checksum."""
    found = _only(shards, layer.records, lambda shard: intact(shard.target, shard.layer_file(layer.name)))
    return replace(layer, records=found)


def check_column_names(layers: Sequence[Layer], recipes: Sequence[Recipe] = ()) -> None:
    """Refuse two layers with a column of one name.

    Args:
        layers: Of the output, with the columns that are there.
        recipes: Of the layers that are asked for, with the columns that are still to be computed.

    Raises:
        InputError: There are such layers.
    """
    asked = {recipe.layer: recipe.columns for recipe in recipes}
    owner: dict[str, str] = {}
    for layer in layers:
        there = (name for record in layer.records.values() for name in record.columns)
        for name in dict.fromkeys([*asked.get(layer.name, ()), *there]):
            if owner.setdefault(name, layer.name) != layer.name:
                raise InputError(
                    f"layers {owner[name]!r} and {layer.name!r} both have a column {name!r}; delete one of the two "
                    "folders in layers/, or rename the column"
                )


def columns_of(records: Collection[LayerRecord]) -> dict[str, Column]:
    """Return the columns of a layer, by the records of its shards.

    A shard without any value says nothing of its columns, unless no other shard does.
    """
    found: dict[str, Column] = {}
    for record in [record for record in records if record.embedded] or records:
        for name, column in record.columns.items():
            found.setdefault(name, column)
    return found


def merged_columns(layers: Sequence[Layer]) -> list[MergedColumn]:
    """Return the columns that layers give to the merged dataset: numbers and vectors, one row per sample."""
    found: list[MergedColumn] = []
    for layer in layers:
        columns = columns_of(layer.records.values())
        if PART not in columns:
            found += [MergedColumn(n, layer.name, c.dtype, c.shape) for n, c in columns.items() if len(c.shape) < 2]
    return found


def _merge_records(plan: Plan, files: OutputFiles, verify: bool) -> dict[str, MergeRecord]:
    """Return the records of the merged files of embedded shards, whatever their key."""
    if not plan.embedded:
        return {}
    found = files.merge_records()
    return _only(plan.own, found, lambda shard: intact(*plan.options.place(shard))) if verify else found


def _with_merged(plan: Plan, records: Mapping[str, MergeRecord]) -> Plan:
    """Return a plan with the merged files that have the key they should have."""
    key_of = merged_keys(plan.options)
    by_name = {shard.name: shard for shard in plan.shards}
    merged = {
        name: record
        for name, record in records.items()
        if name in plan.embedded and record.key == key_of(by_name[name], plan.records(by_name[name]))
    }
    return replace(plan, merged=merged)


def _only(shards: Sequence[Shard], records: Mapping[str, R], holds: Callable[[Shard], bool]) -> dict[str, R]:
    """Return the records without those of some shards for which something does not hold that is read from files."""
    asked = [shard for shard in shards if shard.name in records]
    without = {shard.name for shard, answer in zip(asked, in_bulk(holds, asked), strict=True) if not answer}
    return {name: record for name, record in records.items() if name not in without}


def plan_in_one_schema(
    shards: Sequence[Shard],
    recipes: Sequence[Recipe],
    options: MergeOptions,
    held: HeldSchema,
    *,
    overwrite: bool = False,
    verify: bool = False,
    part: RunPart | None = None,
) -> Plan:
    """Plan, with the schema that the metadata of all shards has in common; see `make_plan`.

    The footers of metadata that is not merged yet are read, so that what cannot be one schema is found before any
    image is. Where they widen the schema, what is merged already is joined again. In place each file keeps its own.
    Parts of a run look at all shards in the dataset's order, so all find one schema, whatever is done meanwhile.

    Args:
        shards: All of the dataset.
        recipes: Of the layers that are asked for.
        options: How layers and metadata are joined.
        held: Given the names of the new columns, returns the schema of what is merged already, without them.
        overwrite: As `make_plan`.
        verify: As `make_plan`.

    Raises:
        InputError: Columns of one name cannot be of one type, one of them cannot be carried through, or one has the
            name of a layer's column.
    """
    plan, files = _plan_layers(shards, recipes, options, overwrite, verify, part)
    records = _merge_records(plan, files, verify)
    del files  # of a million shards they take a gigabyte
    names = tuple(dict.fromkeys([*plan.options.names, *(name for recipe in recipes for name in recipe.columns)]))
    schema = None if options.in_place else held(names)
    if schema is not None:
        plan = replace(plan, options=replace(plan.options, schema=schema))
    plan = _with_merged(plan, records)
    left = plan.unfinished
    if options.in_place:
        check_metadata_schemas(left, options.id_col, names)
    if options.in_place or not left:
        return plan
    unified = unified_schema(left, options.id_col, names, schema if plan.merged else None)
    if not unified.names or (schema is not None and unified.equals(schema)):
        return plan
    return _with_merged(replace(plan, options=replace(plan.options, schema=unified)), records)


HeldSchema = Callable[[Collection[str]], pa.Schema | None]


def passes(recipes: Sequence[Recipe]) -> list[tuple[Recipe, ...]]:
    """Split recipes into those that can be computed in one pass over the images."""
    found: list[list[Recipe]] = []
    for recipe in recipes:
        for together in found:
            if all(recipe.source == it.source or can_share(recipe.embedder, it.embedder) for it in together):
                together.append(recipe)
                break
        else:
            found.append([recipe])
    return [tuple(together) for together in found]


def embedding_jobs(plan: Plan) -> list[tuple[tuple[Recipe, ...], list[Shard]]]:
    """Return what is left to embed: recipes that share a pass, and the shards that lack exactly these layers."""
    lacking: dict[tuple[Recipe, ...], list[Shard]] = {}
    for shard in plan.to_embed:
        lacking.setdefault(plan.missing(shard), []).append(shard)
    jobs: dict[tuple[Recipe, ...], list[Shard]] = {}
    for missing, shards in lacking.items():
        for recipes in passes(missing):
            jobs.setdefault(recipes, []).extend(shards)
    return list(jobs.items())
