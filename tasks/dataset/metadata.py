"""A shard's metadata: the Parquet beside its tar, or its samples' json; and one schema for all shards of a dataset."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedders.errors import InputError, one_line
from embedders.ids import printable
from embedders.quarantine import Reason
from embedders.webdataset import open_shard, sample_json
from tasks.dataset.column_types import plain_schema, plain_table, refused_by_arrow
from tasks.dataset.description import columns_made
from tasks.dataset.ids import canonical_ids, repeated
from tasks.dataset.vectors import READ_BYTES
from tasks.records import read_footer_bytes
from tasks.shards import Shard
from tasks.storage.arrow_file import arrow_file, arrow_file_by_parts

FOOTERS = 1 << 14
"""Shards whose footers are asked for at a time."""
ROWS_OF_A_COLUMN = 1 << 16
"""Rows that are read at a time where only one column is."""
MISMATCH_WARNED, MISMATCH_REFUSED = 0.01, 0.99
"""Shares of ids without a partner: of either side in the whole dataset, and of the smaller side in one shard."""


@contextmanager
def open_metadata(shard: Shard, id_col: str, *, whole: bool = True) -> Iterator[pq.ParquetFile]:
    """Open the Parquet beside a shard's tar.

    Args:
        shard: It has one.
        id_col: The column with the ids.
        whole: Whether all of it will be read; else only what is read is requested of a store.

    Raises:
        InputError: It is not readable as Parquet, or has no id column.
    """
    where, source, info = _where(shard), shard.source, shard.metadata_info
    options = {"buffer_size": READ_BYTES} if source.is_local else {}  # of a store, a column is one request
    with arrow_file(source, info.name) if whole else arrow_file_by_parts(source, info) as file:
        with _unreadable(where):
            parquet = pq.ParquetFile(file, pre_buffer=False, **options)
        if id_col not in parquet.schema_arrow.names:
            columns = ", ".join(parquet.schema_arrow.names)
            raise InputError(f"{where}: no id column {id_col!r}; give --id-col one of: {columns}")
        yield parquet


@contextmanager
def _unreadable(where: str) -> Iterator[None]:
    """Say which metadata it is that Arrow cannot read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error; what Arrow says of a file's content has no number
        raise InputError(f"{where}: not readable as Parquet ({one_line(error, limit=120)}); replace it") from error


def check_metadata(
    shard: Shard, id_col: str, ids: pa.Array | Sequence[str] | None = None, *, unique: bool = True
) -> None:
    """Prove that the metadata Parquet can be joined with the shard's samples by id.

    Args:
        shard: The shard; one without such a Parquet passes.
        id_col: The column with the ids.
        ids: The samples' ids, if the tar was looked at.
        unique: Whether a repeated id is an error; otherwise its first row is the one that is joined.

    Raises:
        InputError: It does not open, has no rows, lacks the id column, repeats an id, or hardly any of its ids is a
            sample's.
    """
    if shard.metadata is None:
        return
    where = _where(shard)
    with open_metadata(shard, id_col, whole=False) as parquet, _unreadable(where):
        column = parquet.read([id_col], use_threads=False).column(
            id_col
        )  # it also reads a column called "id_col.other"
    if not len(column) and (ids is None or len(ids)):
        raise no_rows(where)
    texts = canonical_ids(column)
    again = repeated(texts)
    if unique and len(again):
        raise repeated_id(where, column[int(again[0])].as_py(), int(again[0]))
    if ids is None or not len(ids):
        return
    samples = pa.array(ids, pa.large_string())
    rows = pc.unique(texts.drop_null()).cast(samples.type)
    partners = pc.sum(pc.is_in(rows, samples), min_count=0).as_py()
    if len(rows):
        refuse_mismatch(where, id_col, partners, (len(rows), len(samples)), (pc.min(rows).as_py(), samples[0].as_py()))


def refuse_mismatch(where: str, id_col: str, partners: int, counts: tuple[int, int], examples: tuple[str, str]) -> None:
    """Refuse a shard whose rows and samples hardly have an id in common.

    Args:
        where: How the message names the metadata.
        id_col: The column with the ids.
        partners: How many ids both sides have.
        counts: Rows and samples. The smaller side is what counts: metadata may cover a part of the images, and a
            crawl's metadata lists images that were never fetched.
        examples: An id of a row and one of a sample.

    Raises:
        InputError: Over 99 % of the smaller side has no partner.
    """
    if not min(counts) or 1 - partners / min(counts) <= MISMATCH_REFUSED:
        return
    few = "none of its ids is" if not partners else f"only {partners} of its {counts[0]} ids are"
    raise InputError(
        f"{where}: {few} a sample's: column {id_col!r} has {examples[0]!r}, "
        f"the tar has {examples[1]!r}; give the right --id-col, or the Parquet that belongs to the tar"
    )


def no_rows(where: str) -> InputError:
    """Return what is said of metadata that describes nothing."""
    return InputError(f"{where}: no rows; replace it, or take it away and the samples' json is the metadata")


def repeated_id(where: str, value: Any, row: int) -> InputError:
    """Return what is said of an id that is there twice."""
    return InputError(
        f"{where}: id {value!r} is there twice, again in row {row}; ids must be unique in a shard "
        "(--repeated-ids quarantine joins the first such row and lists the others)"
    )


@dataclass(frozen=True)
class MetadataRows:
    """A shard's metadata in plain types (see `tasks.dataset.column_types`), read a few rows at a time.

    Attributes:
        schema: All its columns, and the notes of the file.
        read: Given the names of columns, and how many rows at most, yields tables of them one after the other.
    """

    schema: pa.Schema
    read: Callable[[Sequence[str], int], Iterator[pa.Table]]

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of all rows."""
        tables = list(self.read([name], ROWS_OF_A_COLUMN))
        return pa.chunked_array([chunk for table in tables for chunk in table.column(0).chunks], self.type_of(name))

    def type_of(self, name: str) -> pa.DataType:
        """Return the type of a column."""
        return self.schema.field(name).type


@contextmanager
def open_rows(shard: Shard, id_col: str) -> Iterator[MetadataRows]:
    """Open a shard's metadata. Without a Parquet beside the tar, its rows are the samples' json members.

    Raises:
        InputError: It is not readable as Parquet, now or when rows are read, or has no id column.
    """
    if shard.metadata is None:
        table = json_metadata(shard, id_col)
        yield MetadataRows(table.schema, lambda names, size: _slices(table.select(names), size))
        return
    where = _where(shard)
    with open_metadata(shard, id_col) as parquet:
        yield MetadataRows(
            plain_schema(parquet.schema_arrow), lambda names, size: _batches(parquet, list(names), size, where)
        )


def _slices(table: pa.Table, size: int) -> Iterator[pa.Table]:
    return (table.slice(start, size) for start in range(0, len(table), size))


def _batches(parquet: pq.ParquetFile, names: list[str], size: int, where: str) -> Iterator[pa.Table]:
    """Yield some columns of a Parquet file, `size` rows or the rest of a row group at a time."""
    for group in range(parquet.num_row_groups):  # not all: Arrow reads no dictionaries inside lists across row groups
        with _unreadable(where):
            batches = parquet.iter_batches(size, row_groups=[group], columns=names, use_threads=False)
        while True:
            with _unreadable(where):
                batch = next(batches, None)
            if batch is None:
                break
            yield plain_table(pa.Table.from_batches([batch]).select(names))


def json_metadata(shard: Shard, id_col: str) -> pa.Table:
    """Return one row per sample from its json member, with every key of any of them as a column, the id first."""
    with shard.source.local_copy(shard.tar) as path:
        opened = open_shard(path, id_col, key_dot=shard.key_dot)
        rows = [
            with_id(sample_json(sample, opened.data), id_col, sample_id)
            for i, (sample, sample_id) in enumerate(zip(opened.index.samples, opened.ids, strict=True))
            if opened.unusable.get(i, (None,))[0] is not Reason.DUPLICATE_ID
        ]
    names = dict.fromkeys([id_col, *(name for row in rows for name in row)])
    return pa.table({printable(name): json_column([row.get(name) for row in rows]) for name in names})


def with_id(row: dict[str, Any], id_col: str, sample_id: str) -> dict[str, Any]:
    """Return a json object whose id column is what the sample goes by, also where it was missing or null."""
    return row if row.get(id_col) is not None else {**row, id_col: sample_id}


def json_column(values: list[Any]) -> pa.Array:
    """Return json values as a column; as text where they are not of one type, text staying as it is."""
    try:
        column = pa.array(values)
        same = not has_empty_struct(column.type)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        same = False
    if not same:
        texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        column = pa.array([None if text is None else printable(text) for text in texts], pa.string())
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column


def has_empty_struct(kind: pa.DataType) -> bool:
    """Return whether a type holds the json object `{}`, which Parquet cannot write."""
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))


# --- columns that can be carried through ------------------------------------------------------------------------------


def usable_schema(shard: Shard, id_col: str, columns: Collection[str]) -> pa.Schema:
    """Return the schema of the Parquet beside a shard's tar, in plain types, from its footer.

    Args:
        shard: It has such a Parquet.
        id_col: The column with the ids.
        columns: The names of the layers' columns that are to come.

    Raises:
        InputError: The file does not open or lacks the id column, two columns have one name, a column of the user's
            own has the name of one to come, or a column's type cannot be written.
    """
    ((schema, _),) = check_metadata_schemas([shard], id_col, columns)
    return schema


def check_metadata_schemas(
    shards: Sequence[Shard], id_col: str, columns: Collection[str]
) -> list[tuple[pa.Schema, Shard]]:
    """Read the footers of the Parquets beside tars, and prove that their columns can be carried through.

    Args:
        shards: Of one dataset; those without a Parquet count for nothing.
        id_col: The column with the ids.
        columns: The names of the layers' columns that are to come.

    Returns:
        The schemas that differ in plain types, each with the first shard that has it.

    Raises:
        InputError: As `usable_schema`.
    """
    distinct: dict[str, tuple[pa.Schema, Shard]] = {}
    last = None
    for shard, schema in _schemas(shards, id_col):
        if set(columns).intersection(schema.names):
            check_columns(schema, _where(shard), columns)  # what the footer says of them is each file's own
        bare = schema.remove_metadata()
        if last is None or not bare.equals(last):
            last = bare
            if str(bare) not in distinct:
                distinct[str(bare)] = _carried_through(schema, _where(shard), columns), shard
    return list(distinct.values())


def _where(shard: Shard) -> str:
    """Return how messages name the Parquet beside a tar."""
    return f"{shard.dataset}/{shard.metadata}"


def _schemas(shards: Sequence[Shard], id_col: str) -> Iterator[tuple[Shard, pa.Schema]]:
    """Yield the shards that have a Parquet with its schema; one that is gone by now fails in its shard's task.

    Raises:
        InputError: It is not readable as Parquet, or has no id column.
    """
    described = [shard for shard in shards if shard.metadata is not None]
    for at in range(0, len(described), FOOTERS):
        by_name = {str(shard.metadata): shard for shard in described[at : at + FOOTERS]}
        files = [shard.metadata_info for shard in by_name.values()]
        for file, footer in read_footer_bytes(described[0].source, files):
            shard = by_name[file.name]
            schema = _schema_in(footer)
            if schema is None or id_col not in schema.names:
                with open_metadata(shard, id_col, whole=False) as parquet:  # says what is wrong, if anything is by now
                    schema = parquet.schema_arrow
            yield shard, schema


def _schema_in(footer: bytes | None) -> pa.Schema | None:
    """Return the schema in a footer; None if it does not open."""
    if footer is None:
        return None
    try:
        return pq.ParquetFile(pa.BufferReader(footer), pre_buffer=False).schema_arrow
    except (OSError, pa.ArrowException):
        return None


def _carried_through(schema: pa.Schema, where: str, columns: Collection[str]) -> pa.Schema:
    """Return a schema in plain types, once its columns are seen to be writable; see `usable_schema`."""
    check_columns(schema, where, columns)
    for field in schema:
        if why := refused_by_arrow(field):
            raise InputError(
                f"{where}: column {field.name!r} is {field.type}, which cannot be carried through ({why}); "
                "write it as another type, or leave it out"
            )
    return plain_schema(schema.remove_metadata())


def check_columns(schema: pa.Schema, where: str, columns: Collection[str]) -> None:
    """Refuse columns that would be lost: of two that have one name, and one that has the name of a layer's column.

    Args:
        schema: Of the user's metadata.
        where: How messages name it.
        columns: The names of the layers' columns.

    Raises:
        InputError: There is such a column, and no record in the footer that this program wrote it.
    """
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise InputError(f"{where}: {count} columns are called {name!r}; rename all but one")
    for name in sorted(set(columns).intersection(schema.names).difference(columns_made(schema))):
        raise InputError(
            f"{where}: has a column {name!r} that shard-embed did not write, and would replace; "
            "give another --image-embedding-column, or rename it"
        )


def check_json_members(shard: Shard, id_col: str, columns: Collection[str]) -> None:
    """Refuse a tar whose first json member has the name of a layer's column as a key.

    Raises:
        InputError: It has; the column would be lost in the merge.
    """
    with shard.source.local_copy(shard.tar) as path:
        opened = open_shard(path, id_col)
        rows = (sample_json(sample, opened.data) for sample in opened.index.samples)
        names = list(next((row for row in rows if row), {}))
    check_columns(pa.schema([(printable(name), pa.null()) for name in names]), json_members(shard), columns)


def json_members(shard: Shard) -> str:
    """Return how messages name a tar's json members."""
    return f"{shard.dataset}/{shard.tar}, json members"


# --- one schema -------------------------------------------------------------------------------------------------------


def unified_schema(
    shards: Sequence[Shard], id_col: str, columns: Collection[str], held: pa.Schema | None = None
) -> pa.Schema:
    """Return the schema that the metadata of all these shards has in common, from the footers of their Parquets.

    A column that some lack is null there; an int that is a float elsewhere is a float; ids of several types are text.

    Args:
        shards: Those without a Parquet count for nothing.
        id_col: The column with the ids.
        columns: The names of the layers' columns, which are none of the metadata.
        held: The schema of what is merged already and stays.

    Raises:
        InputError: A column's types cannot be one, or a Parquet does not open or lacks the id column.
    """

    distinct: dict[str, tuple[pa.Schema, str]] = {}
    if held is not None:
        distinct[str(held)] = held, "what is merged already"
    for schema, shard in check_metadata_schemas(shards, id_col, columns):
        schema = pa.schema([field for field in schema if field.name not in columns])
        distinct.setdefault(str(schema), (schema, _where(shard)))
    if not distinct:
        return pa.schema([])
    (schema, first), *others = distinct.values()
    if not others:
        return schema
    fields = {field.name: (field.with_nullable(True), first) for field in schema}
    for other, where in others:
        for field in other:
            seen = fields.get(field.name)
            fields[field.name] = (_united(*seen, field, where, id_col), seen[1]) if seen else (field, where)
    return pa.schema([field.with_nullable(True) for field, _ in fields.values()])


def _united(one: pa.Field, first: str, other: pa.Field, where: str, id_col: str) -> pa.Field:
    """Return one field that holds the values of two."""
    if one.type == other.type:
        return one
    if one.name == id_col and not (pa.types.is_integer(one.type) and pa.types.is_integer(other.type)):
        return pa.field(id_col, pa.string())
    sides = [pa.field(f.name, f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in (one, other)]
    try:
        return pa.unify_schemas([pa.schema([f]) for f in sides], promote_options="permissive").field(0)
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{where}: column {one.name!r} is {other.type}, and {one.type} in {first}; make it one type in all shards"
        ) from error


def conform(table: pa.Table, schema: pa.Schema, id_col: str) -> pa.Table:
    """Return a shard's metadata in the schema of the dataset.

    Raises:
        InputError: A value does not fit the column's type, or the file has changed since the schema was made.
    """
    if table.schema.equals(schema):
        return table
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table.column(field.name)
        if field.name == id_col and pa.types.is_string(field.type):
            column = canonical_ids(column)
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except pa.ArrowException as error:
            detail = one_line(error, limit=120)
            raise InputError(f"column {field.name!r} does not fit {field.type}: {detail}") from error
    extra = [name for name in table.column_names if name not in schema.names]
    if extra:
        raise InputError(f"columns {', '.join(extra)} came while the run went on; run the same again")
    return pa.table(columns, schema=schema)
