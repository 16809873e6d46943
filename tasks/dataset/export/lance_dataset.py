"""Export to a Lance dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from tasks.dataset.export.source import Dtype, Exported, imported
from tasks.dataset.vectors import VectorFormat, vector_array


def export_lance(dataset: Exported, folder: Path, dtype: Dtype) -> int:
    """Write data.lance with the vectors as fixed-size lists, which Lance's vector search needs.

    Args:
        dataset: What to export.
        folder: Where to write.
        dtype: Type of the vectors' values.

    Returns:
        How many rows it has: those that have a vector.

    Raises:
        InputError: lance is not installed.
    """
    lance = imported("lance", "pylance")
    form = VectorFormat("fixed_size_list", dtype)
    schema = pa.schema([*dataset.schema, pa.field(dataset.column, form.arrow_type(dataset.dimensions))])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in dataset.batches():
            columns = [*batch.metadata.columns, vector_array(batch.vectors, None, form)]
            yield from pa.table(columns, schema=schema).to_batches()

    written = lance.write_dataset(batches(), str(folder / "data.lance"), schema=schema)
    return int(written.count_rows())
