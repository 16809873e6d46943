"""What an output's files say of its shards: one listing of each folder, and footers and first lines in bulk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from weakref import WeakValueDictionary

from embedders.tar_index import indexed_samples
from tasks.records import LayerRecord, MergeRecord, read_footers, read_layer_records, read_merge_records
from tasks.shards import Shard
from tasks.storage.folder import OBJECT_STORES, FileInfo, Folder, in_bulk

SUFFIXES = {"layers": ".parquet", "quarantine": ".parquet", "unmatched": ".parquet", "index": ".idx"}
"""The folders of an output that a plan looks at, and what their files end with."""
FIRST_LINE = 512
"""Bytes that are read of an index."""

_balanced: WeakValueDictionary[tuple[str, str, str, str], LayerRecord] = WeakValueDictionary()
"""Records that some plan of this process holds and that agree with the quarantine and the index of these etags."""


class OutputFiles:
    """The files of an output as they are when this is made, and what they say. Files that vanish later count as gone.

    Example:
        >>> files = OutputFiles(shards, options.folder(shards[0]))  # doctest: +SKIP
        >>> dict(files.layer_records("image_embedding"))["00000"].samples  # doctest: +SKIP
        10000
    """

    def __init__(self, shards: Sequence[Shard], merged: Folder) -> None:
        """List the folders.

        Args:
            shards: All of the dataset, with one output.
            merged: The folder of the merged files.
        """
        self.shards = {shard.name: shard for shard in shards}
        self.merged = merged
        self.target = shards[0].target
        folders = [(self._folder(kind), suffix) for kind, suffix in SUFFIXES.items()]
        *found, self._merged_files = in_bulk(lambda it: it[0].list(it[1]), [*folders, (merged, ".parquet")])
        self._files = {kind: {file.name: file for file in files} for kind, files in zip(SUFFIXES, found, strict=True)}
        self._samples: dict[str, int | None] = {}

    def _folder(self, kind: str) -> Folder:
        return Folder(self.target.place(kind))

    @property
    def layers(self) -> set[str]:
        """The names of the layers that there are files of."""
        return {name.partition("/")[0] for name in self._files["layers"]}

    @property
    def gone(self) -> tuple[str, ...]:
        """The shards that the output has layers of and the dataset has no more."""
        there = {name.removesuffix(".parquet").partition("/")[2] for name in self._files["layers"]}
        return tuple(sorted(there.difference(self.shards)))

    def layer_records(self, layer: str) -> Iterator[tuple[str, LayerRecord]]:
        """Yield the shards that have a file of a layer, with its record."""
        names = {f"{layer}/{shard}.parquet": shard for shard in self.shards}
        files = [file for name, file in self._files["layers"].items() if name in names]
        for name, record in read_layer_records(self._folder("layers"), files):
            if record.layer == layer:
                yield names[name], record

    def merge_records(self) -> dict[str, MergeRecord]:
        """Return the records of merged files by shard, but for those whose file of unmatched ids is missing."""
        names = {f"{shard}.parquet": shard for shard in self.shards}
        files = [file for file in self._merged_files if file.name in names]
        found = read_merge_records(self.merged, files)
        unmatched = self._files["unmatched"]
        return {names[file]: record for file, record in found if not record.unmatched or file in unmatched}

    def balanced(self, records: Mapping[str, LayerRecord], *, index: bool) -> dict[str, LayerRecord]:
        """Return the records that say as many samples as the quarantine, and the tar's index where there is one.

        Args:
            records: Of one layer, by shard.
            index: Whether to read the indexes.
        """
        keys = {}
        if self.target.protocol in OBJECT_STORES:
            keys = {name: self._etags(record.layer, name) for name, record in records.items()}
        proven = {name for name, key in keys.items() if _balanced.get(key) is records[name]}
        asked = {name: record for name, record in records.items() if name not in proven} if proven else records
        rows = self._quarantined(asked)
        samples = self._indexed(asked) if index else {}
        bad = {
            name
            for name, record in asked.items()
            if (record.quarantined and rows.get(name) != sum(record.quarantined.values()))
            or samples.get(name) not in (None, record.samples)
        }
        good = {name: record for name, record in records.items() if name not in bad} if bad else dict(records)
        if index:
            _balanced.update((keys[name], record) for name, record in good.items() if name in keys)
        return good

    def _etags(self, layer: str, shard: str) -> tuple[str, str, str, str]:
        """Return what changes when the quarantine or the index of a shard does, and names neither another's."""
        files = self._files["quarantine"].get(f"{layer}/{shard}.parquet"), self._files["index"].get(f"{shard}.idx")
        quarantine, index = (file.fingerprint if file else "" for file in files)
        return self.target.url, f"{layer}/{shard}", quarantine, index

    def _quarantined(self, records: Mapping[str, LayerRecord]) -> dict[str, int]:
        """Return the rows of the quarantine files of shards that should have one."""
        names = {f"{it.layer}/{shard}.parquet": shard for shard, it in records.items() if it.quarantined}
        files = [file for name in names if (file := self._files["quarantine"].get(name)) is not None]
        footers = read_footers(self._folder("quarantine"), files)
        return {names[name]: int(footer.num_rows) for name, footer in footers}

    def _indexed(self, shards: Collection[str]) -> dict[str, int | None]:
        """Return the samples of each tar by its index, None where there is no index of it; each is read once."""
        names = [f"{shard}.idx" for shard in shards if shard not in self._samples]
        files: list[FileInfo] = [file for name in names if (file := self._files["index"].get(name)) is not None]
        for file, head in self._folder("index").read_heads(files, FIRST_LINE):
            shard = self.shards[file.name.removesuffix(".idx")]
            first = head.decode("utf-8", "replace")
            self._samples[shard.name] = indexed_samples(first, shard.tar_fingerprint, shard.key_dot)
        return self._samples
