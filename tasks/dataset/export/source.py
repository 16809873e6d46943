"""Read a merged dataset for an export, one row group at a time."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import InputError
from tasks.dataset.description import DESCRIPTION
from tasks.dataset.schema import read_schema
from tasks.manifest import MANIFEST
from tasks.relocation import find_places, missing_dataset
from tasks.storage.arrow_file import arrow_file
from tasks.storage.folder import Folder

Dtype = Literal["float32", "float16"]
"""Type of the values of exported vectors."""


@dataclass(frozen=True)
class Batch:
    """Some rows of the dataset."""

    metadata: pa.Table
    """Their columns without the vectors."""
    vectors: np.ndarray
    """(rows, dimensions) float32."""


@dataclass(frozen=True)
class Exported:
    """A merged dataset to export: its files, their rows, and the name and dimensions of the vectors' column."""

    folder: Folder
    files: tuple[str, ...]
    rows: int
    column: str
    dimensions: int

    @classmethod
    def open(cls, output: str, dataset: str | None = None, column: str | None = None) -> Exported:
        """Find the dataset of an output, and read the footers of its files.

        Args:
            output: Folder or URL of the output.
            dataset: Where the tars are, if they are not where the manifest says.
            column: The column of vectors; by default that of the last run.

        Raises:
            InputError: There is no dataset, or it has no row or no such column.
        """
        column = column or _stored(output).get("column")
        folder = Folder(_dataset_folder(output, dataset))
        files = tuple(file.name for file in folder.list(".parquet"))
        rows, described = 0, None
        for name in files:
            with arrow_file(folder, name) as file:
                footer = pq.read_metadata(file)
            description = _described(footer, column)
            if description is None:
                what = "has no embeddings" if column is None else f"has no vectors {column!r}"
                raise InputError(f"{folder.url}/{name}: {what} that shard-embed wrote; run flows.embed first")
            rows += footer.num_rows
            if described is None or description["dimensions"] > described["dimensions"]:
                described = description
        if described is None or not rows:
            raise InputError(f"{output}: no merged dataset; give the --output of a run of flows.embed")
        return cls(folder, files, rows, described["column"], described["dimensions"])

    @cached_property
    def schema(self) -> pa.Schema:
        """Return the schema of all columns but the vectors; all files are cast to it."""
        schema = read_schema(self.folder.url.rstrip("/").removesuffix("/metadata"))
        if schema is None:
            with arrow_file(self.folder, self.files[0]) as file:
                schema = pq.read_schema(file)
        schema = schema.remove_metadata()
        return pa.schema([field for field in schema if field.name != self.column])

    def batches(self) -> Iterator[Batch]:
        """Yield every row that has a vector, one row group at a time.

        Raises:
            InputError: A file cannot be read, or has another schema than the dataset.
        """
        for name in self.files:
            with arrow_file(self.folder, name) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
                for group in range(parquet.num_row_groups):
                    yield self._batch(name, self._read(name, parquet, group))

    def _read(self, name: str, parquet: pq.ParquetFile, group: int) -> pa.Table:
        try:
            return parquet.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            way = "run flows.embed with --verify, which makes damaged files again"
            raise InputError(f"{self.folder.url}/{name}: cannot be read ({error}); {way}") from error

    def _batch(self, name: str, table: pa.Table) -> Batch:
        column = table.column(self.column)
        if column.null_count:
            table = table.filter(column.is_valid())
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column(self.column).chunks]
        vectors = np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32, copy=False)
        metadata = table.drop_columns([self.column]).replace_schema_metadata(None)
        try:
            metadata = metadata.cast(self.schema)
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"{self.folder.url}/{name}: its columns differ from those of the other files") from error
        return Batch(metadata, vectors.reshape(len(table), self.dimensions))


def _described(footer: pq.FileMetaData, column: str | None) -> dict[str, Any] | None:
    """Return what a footer says about a column of vectors, by default the first; None if it says nothing."""
    described = json.loads((footer.metadata or {}).get(DESCRIPTION, b"[]"))
    vectors = (it for it in described if it["dimensions"] and column in (None, it["column"]))
    return next(vectors, None) or next((it for it in described if column in (None, it["column"])), None)


def _stored(output: str) -> dict[str, Any]:
    """Return the manifest of an output; {} if there is none."""
    text = Folder(output).read_text(MANIFEST)
    with contextlib.suppress(ValueError):
        stored = json.loads(text) if text else {}
        return stored if isinstance(stored, dict) else {}
    return {}


def _dataset_folder(output: str, dataset: str | None) -> str:
    """Return the folder with the merged dataset of an output, which is the tars' if the run was in place.

    Raises:
        InputError: The run was in place, and the tars have moved.
    """
    places = find_places(output, _stored(output), dataset)
    if places.metadata == places.dataset and (missing := missing_dataset(places.dataset)):
        raise InputError(f"{output}: made with --in-place, and {missing}")
    return places.metadata


def imported(module: str, package: str) -> Any:
    """Import an optional module.

    Args:
        module: Its name.
        package: The package that has it, as pip names it.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{package} is missing: pip install {package}") from error
