"""The last stage: the account of a run, from the records the files carry."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from embedders.errors import InputError
from tasks.dataset.even_files import missing_parts
from tasks.dataset.metadata import MISMATCH_WARNED
from tasks.plan import Layer, Plan, columns_of
from tasks.relocation import as_stored, find_places
from tasks.retries import ShardFailure
from tasks.storage.arrow_file import arrow_file
from tasks.storage.folder import Folder
from tasks.vector_checks import check_vectors
from tasks.wording import counted

MANIFEST = "manifest.json"
QUARANTINE_WARNED = 0.1
"""The share of samples in quarantine from which a run warns."""
EXAMPLES = 3


@dataclass(frozen=True)
class Timing:
    """Seconds from the start of a run to its end, to its first group of shards, and that shards were in work.

    The last two are 0 where there was no shard to embed.
    """

    total: float
    first: float = 0.0
    working: float = 0.0


class LayerAccount(BaseModel):
    """The account of one layer, over all shards that have it: samples = embedded + quarantined."""

    shards: int
    samples: int
    embedded: int
    quarantined: int
    quarantined_by_reason: dict[str, int] = {}
    rows: int = Field(0, description="Rows of its files; more than embedded if a sample has several.")
    columns: dict[str, Any] = Field({}, description="Type and shape of each column.")
    made_of: dict[str, Any] = Field({}, description="What its values depend on.")
    decoders: dict[str, int] = Field({}, description="Shards by what decoded them.")
    computed: dict[str, int] = Field({}, description="Shards by the precision and the device of their model.")


class PartAccount(BaseModel):
    """What a part of a run (`--part 3/16`) has done of its own shards, by this run or an earlier one."""

    part: str = Field(description="Which part, counted from 0: 3/16.")
    shards: int = Field(description="Shards of this part.")
    shards_done: int = Field(description="Those that are embedded and merged.")
    samples: int = Field(description="Samples in its embedded shards.")
    embedded: int
    quarantined: int


class Manifest(BaseModel):
    """What a run did and what the output holds. Counts are of samples unless they say shards.

    Those of samples are of the first layer that the run was asked for; `layers` has all. The manifest of a part of a
    run (`--part`) is of the whole output too, as far as it is done; `part` says what the part has done.
    """

    samples: int = Field(description="Samples in the shards that are done.")
    embedded: int
    quarantined: int
    shards: int = Field(description="Shards of the dataset.")
    shards_cached: int = Field(description="Shards that were done before this run.")
    shards_failed: int = Field(description="Shards that this run, or this part of one, should have done and has not.")
    shards_missing: int = Field(
        0, description="Shards of the dataset that are not done: those that failed, and those of parts still to end."
    )
    left_out: list[str] = Field(
        [],
        description="Shards that no count is of, since they failed, are gone, or are of a part that has not done them "
        "yet; the output may have their old files.",
    )
    part: PartAccount | None = Field(None, description="What this part of a run has done; null for a whole run.")
    images_per_second: float = Field(
        description="Samples of this run by the time from the first shard's begin to the last one's end."
    )
    seconds: float
    seconds_to_first: float = Field(0.0, description="From the start to the first finished group of shards.")
    dimensions: int
    model: str
    output: str
    column: str = Field("", description="The column of vectors, of the first layer that the run was asked for.")
    layers: dict[str, LayerAccount] = Field({}, description="The account of each layer of the output.")
    metadata: str = Field("", description="The folder with the merged dataset.")
    dataset: str = ""
    checkpoint: str = Field("", description="The weights file that the run was given.")
    id_col: str = Field("", description="The id's column in the metadata.")
    quarantined_by_reason: dict[str, int] = {}
    rows: int = Field(0, description="Rows of the merged metadata.")
    rows_without_embedding: int = 0
    rows_left_out: int = Field(0, description="Rows without an embedding that are not in the dataset.")
    rows_without_image: int = Field(0, description="Rows whose id no sample has, part of those without an embedding.")
    rows_repeated: int = Field(0, description="Rows that repeat an id, part of those without an embedding.")
    embeddings_without_row: int = 0
    ignored: int = Field(0, description="Members of the tars that are part of no sample.")
    ignored_examples: list[str] = []
    over_limit: str = Field(
        "", description="By how much the quarantine exceeds --max-quarantined; empty if it does not."
    )
    warnings: list[str] = Field([], description="What a person should look at.")
    failures: dict[str, str] = Field({}, description="Why each shard failed that this run, or this part of one, did.")
    failures_of_other_parts: dict[str, str] = Field(
        {}, description="Why shards failed in other parts of a run, as far as they are still not done."
    )
    finish_with: str = Field("", description="The call that does what failed; empty if nothing did.")
    embedder: dict[str, Any] = Field({}, description="What the vectors depend on.")
    decoders: dict[str, int] = Field({}, description="Shards by what decoded them.")
    computed: dict[str, int] = Field({}, description="Shards by the precision and the device of their model.")
    versions: dict[str, str] = {}
    wrong: list[str] = Field([], description="What is wrong with the vectors as a whole.")

    def of_layer(self, name: str) -> Manifest:
        """Return this account with another layer's in place of the main one.

        Args:
            name: The layer, which must hold vectors.

        Raises:
            InputError: There is no such layer, or it has no vectors.
        """
        if name == self.column:
            return self
        vectors = [
            name for name, layer in self.layers.items() if len(layer.columns.get(name, {}).get("shape", ())) == 1
        ]
        if name not in vectors:
            raise InputError(
                f"{self.output}: no layer of vectors is called {name!r}; give one of: {', '.join(vectors)}"
            )
        layer = self.layers[name]
        shared = ("samples", "embedded", "quarantined", "quarantined_by_reason", "decoders", "computed")
        return self.model_copy(
            update={field: getattr(layer, field) for field in shared}
            | {
                "column": name,
                "embedder": layer.made_of,
                "model": str(layer.made_of.get("model", layer.made_of.get("embedder", ""))),
                "dimensions": layer.columns[name]["shape"][0],
                "checkpoint": "",  # it was another model's
            }
        )

    @property
    def told_shards(self) -> str:
        """The shards of the dataset, and what became of them, for a person."""
        others = self.shards_missing - self.shards_failed if self.part is not None else 0
        told = f"{self.shards:,}, {self.shards_cached:,} done before, {self.shards_failed:,} failed"
        return told + (f", {others:,} not done yet by other parts" if others else "")

    @property
    def told_rows(self) -> str:
        """The rows of the dataset, and what became of those without an embedding, for a person."""
        if self.rows_left_out:
            return f"{self.rows:,}; {self.rows_left_out:,} more have no embedding and are left out"
        return f"{self.rows:,}, {self.rows_without_embedding:,} of them without an embedding"


def account(
    plan: Plan,
    cached: int,
    failures: Sequence[ShardFailure],
    spent: Timing,
    fresh: int,
    finish_with: str = "",
    max_quarantined: float | None = None,
    checkpoint: str | None = None,
) -> Manifest:
    """Return the manifest of a plan read after the work.

    Args:
        plan: What the output holds.
        cached: Shards that were done before.
        failures: Of the shards that failed.
        spent: Seconds.
        fresh: Samples embedded or quarantined by this run.
        finish_with: The call that does what failed.
        max_quarantined: The share of samples that may be in quarantine, None for any.
        checkpoint: The weights file that the embedder was given.
    """
    embedder = plan.main.made_of
    records = list(plan.embedded.values())
    reasons = sum((Counter(record.quarantined) for record in records), Counter[str]())
    return Manifest(
        samples=sum(record.samples for record in records),
        embedded=sum(record.embedded for record in records),
        quarantined=reasons.total(),
        shards_cached=cached,
        **_shards(plan),
        images_per_second=round(fresh / (spent.working or spent.total), 1),
        seconds=round(spent.total, 2),
        seconds_to_first=round(spent.first, 2),
        dimensions=max((record.dimensions for record in records), default=0),
        model=str(embedder.get("model", embedder.get("embedder", ""))),
        output=plan.shards[0].output,
        column=plan.main.name,
        layers={layer.name: layer_account(layer) for layer in plan.layers},
        metadata=plan.shards[0].dataset if plan.options.in_place else f"{plan.shards[0].output}/metadata",
        dataset=plan.shards[0].dataset,
        checkpoint=checkpoint or "",
        id_col=plan.options.id_col,
        quarantined_by_reason=dict(sorted(reasons.items())),
        **_rows(plan),
        ignored=sum(record.ignored for record in records),
        ignored_examples=_ignored_examples(plan),
        over_limit="; ".join(filter(None, (over_limit(layer, max_quarantined) for layer in plan.asked))),
        warnings=warnings(plan),
        failures={failure.shard: failure.error for failure in failures},
        finish_with=finish_with if failures else "",
        embedder=dict(embedder),
        decoders=dict(Counter(record.decoder for record in records if record.decoder)),
        computed=dict(Counter(record.computed for record in records if record.computed)),
        versions=records[0].versions if records else {},
        wrong=[line for layer in plan.asked for line in _wrong(layer, plan)],
    )


def _shards(plan: Plan) -> dict[str, Any]:
    """Return what the manifest says of the shards, those of other parts of the run included."""
    return {
        "shards": len(plan.shards),
        "shards_failed": len(plan.to_embed) + len(plan.to_merge) + len(missing_parts(plan)),
        "shards_missing": len(plan.unfinished),
        "left_out": sorted({*(shard.name for shard in plan.shards if shard.name not in plan.embedded), *plan.gone}),
        "part": _part_account(plan),
        "failures_of_other_parts": _failures_of_other_parts(plan),
    }


def _part_account(plan: Plan) -> PartAccount | None:
    """Return what the part of a run that a plan is for has done; None for a whole run."""
    if plan.part is None:
        return None
    records = [plan.embedded[shard.name] for shard in plan.own if shard.name in plan.embedded]
    samples, embedded = sum(record.samples for record in records), sum(record.embedded for record in records)
    return PartAccount(
        part=str(plan.part),
        shards=len(plan.own),
        shards_done=sum(shard.name in plan.embedded and shard.name in plan.merged for shard in plan.own),
        samples=samples,
        embedded=embedded,
        quarantined=samples - embedded,
    )


def _failures_of_other_parts(plan: Plan) -> dict[str, str]:
    """Return why shards of other parts failed that are not done yet, as the manifest says that is there."""
    if plan.part is None:
        return {}
    try:
        before = read_manifest(plan.shards[0].output)
    except InputError:
        return {}
    others = {shard.name for shard in plan.unfinished} - {shard.name for shard in plan.own}
    said = before.failures_of_other_parts | before.failures
    return {name: why for name, why in said.items() if name in others}


def _rows(plan: Plan) -> dict[str, Any]:
    """Return what the manifest says of the rows of the merged dataset."""
    merges = list(plan.merged.values())
    without_embedding = sum(record.rows_without_embedding for record in merges)
    return {
        "rows": sum(record.rows for record in merges),
        "rows_without_embedding": without_embedding,
        "rows_left_out": 0 if plan.options.keep_rows else without_embedding,
        "rows_without_image": sum(record.rows_without_image for record in merges),
        "rows_repeated": sum(record.rows_repeated for record in merges),
        "embeddings_without_row": sum(record.embeddings_without_row for record in merges),
    }


def layer_account(layer: Layer) -> LayerAccount:
    """Return the account of a layer."""
    records = list(layer.records.values())
    reasons = sum((Counter(record.quarantined) for record in records), Counter[str]())
    columns = {
        name: {"dtype": column.dtype, "shape": list(column.shape)} for name, column in columns_of(records).items()
    }
    return LayerAccount(
        shards=len(records),
        samples=sum(record.samples for record in records),
        embedded=sum(record.embedded for record in records),
        quarantined=reasons.total(),
        quarantined_by_reason=dict(sorted(reasons.items())),
        rows=sum(record.rows for record in records),
        columns=columns,
        made_of=dict(layer.made_of),
        decoders=dict(Counter(record.decoder for record in records if record.decoder)),
        computed=dict(Counter(record.computed for record in records if record.computed)),
    )


def _wrong(layer: Layer, plan: Plan) -> list[str]:
    """Return what is wrong with a layer's vectors as a whole; which layer it is, if there are several."""
    lines = check_vectors(layer.records, layer.made_of)
    return lines if len(plan.asked) == 1 else [f"{layer.name}: {line}" for line in lines]


def warnings(plan: Plan) -> list[str]:
    """Return what a person should look at.

    A large quarantine, doubtful tars, shards that have gone, layers that lack shards, ids without a partner.
    """
    return [*_quarantined(plan), *_doubtful(plan), *_gone(plan), *_incomplete(plan), *_mismatch(plan)]


def _incomplete(plan: Plan) -> list[str]:
    """Return a line for each earlier layer that lacks shards: its columns are null there."""
    found = []
    for layer in plan.layers:
        lacking = [name for name in plan.embedded if name not in layer.records]
        if not layer.asked and lacking:
            shards = f"{counted(len(lacking), 'shard')}, such as {', '.join(lacking[:EXAMPLES])}"
            found.append(
                f"layer {layer.name} is missing or older than its tar in {shards}; its columns are null there; "
                "the command that made it does what is missing"
            )
    return found


def over_limit(layer: Layer, limit: float | None) -> str:
    """Return by how much a layer's quarantine exceeds the share of samples it may hold; empty if it does not."""
    samples = sum(record.samples for record in layer.records.values())
    bad = samples - sum(record.embedded for record in layer.records.values())
    if limit is None or bad <= limit * samples:
        return ""
    return f"{bad:,} of {samples:,} samples ({bad / samples:.1%}) are quarantined, more than {100 * limit:.4g}%"


def _quarantined(plan: Plan) -> list[str]:
    """A line where nothing was embedded, or 10 % of the samples or more are in quarantine; with the main reason."""
    records = list(plan.embedded.values())
    samples, embedded = sum(record.samples for record in records), sum(record.embedded for record in records)
    bad = samples - embedded
    if not records or (samples and bad < samples * QUARANTINE_WARNED):
        return []
    if not samples:
        found = "NOTHING WAS EMBEDDED: the tars hold no samples"
        if ignored := sum(record.ignored for record in records):
            examples = ", ".join(_ignored_examples(plan))
            found += f", but {ignored:,} members without a key and an extension, such as {examples}"
        return [f"{found}; name members KEY.EXTENSION, such as 0001.jpg"]
    much = "MORE THAN HALF" if bad * 2 > samples else f"{bad / samples:.0%}"
    head = "NOTHING WAS EMBEDDED" if not embedded else f"{much} OF THE SAMPLES ARE QUARANTINED"
    reasons = sum((Counter(record.quarantined) for record in records), Counter[str]())
    (reason, count), *_ = reasons.most_common(1)
    listed = f"quarantine/{plan.main.name}/*.parquet lists them with details"
    return [f"{head}: {bad:,} of {samples:,}, {count:,} of them {reason}; {listed}"]


def _doubtful(plan: Plan) -> list[str]:
    """A line where tars could be read and yet may have lost their end."""
    doubts = [f"{name}.tar ({record.doubt})" for name, record in plan.embedded.items() if record.doubt]
    if not doubts:
        return []
    examples = ", ".join(doubts[:EXAMPLES])
    found = f"{len(doubts):,} of {len(plan.embedded):,} tars, such as {examples}"
    return [f"samples may be missing at the end of {found}; compare them with their source"]


def _ignored_examples(plan: Plan) -> list[str]:
    """Names of members that are part of no sample, with their tars."""
    found = (f"{name}.tar/{it}" for name, record in plan.embedded.items() for it in record.ignored_examples)
    return list(itertools.islice(found, EXAMPLES))


def _gone(plan: Plan) -> list[str]:
    if not plan.gone:
        return []
    examples = ", ".join(plan.gone[:3])
    stay = "their rows stay in the output until their files are deleted"
    gone = counted(len(plan.gone), "shard")
    return [f"{gone} of the output no longer in the dataset, such as {examples}; {stay}"]


def _mismatch(plan: Plan) -> list[str]:
    """A line where over 1 % of the images have no metadata row, or of the rows no image; with examples.

    Rows of images that could not be fetched, as img2dataset notes them, are no mismatch.
    """
    embedded = sum(plan.embedded[name].embedded for name in plan.merged)
    images = sum(record.embeddings_without_row for record in plan.merged.values())
    without = sum(record.rows_without_embedding for record in plan.merged.values())
    rows = sum(record.rows_without_image - record.rows_not_fetched for record in plan.merged.values())
    sides = (
        ("images have no metadata row", images, embedded),
        ("metadata rows have no image", rows, embedded - images + without),
    )
    found = [f"{count:,} of {total:,} {what}" for what, count, total in sides if count > total * MISMATCH_WARNED]
    if not found:
        return []
    examples = [f"{example!r} ({name})" for name, record in plan.merged.items() for example in record.examples[:1]]
    listed = "unmatched/*.parquet lists them"
    return [f"{', '.join(found)}, such as {', '.join(examples[:3])}; check --id-col; {listed}"]


def write_manifest(manifest: Manifest) -> None:
    """Write manifest.json into the output, whole or not at all; see `tasks.relocation` for the places in it."""
    places = {name: getattr(manifest, name) for name in ("dataset", "metadata", "checkpoint")}
    stored = manifest.model_dump(mode="json") | as_stored(manifest.output, places)
    Folder(manifest.output).write_text(MANIFEST, json.dumps(stored, indent=2) + "\n")


def read_manifest(output: str, dataset: str | None = None, layer: str | None = None) -> Manifest:
    """Return the account in an output, with the places where things are now.

    Args:
        output: Folder or URL of the output.
        dataset: Where the dataset is, if it is not where the manifest says.
        layer: The layer of vectors that is meant; by default the first of the last run.

    Raises:
        InputError: There is no manifest or no such layer, or the manifest is not readable.
    """
    text = Folder(output).read_text(MANIFEST)
    if text is None:
        raise InputError(f"{output}: no {MANIFEST} in it; give the --output of a finished run")
    try:
        stored = json.loads(text)
        places = find_places(output, stored, dataset)
        manifest = Manifest(**stored | vars(places) | {"output": output})
    except (ValueError, TypeError, AttributeError) as error:  # pydantic's are ValueErrors
        raise InputError(f"{output}/{MANIFEST}: not readable; run the embedding again to have it written") from error
    return manifest if layer is None else manifest.of_layer(layer)


def read_quarantine(
    output: Folder, layer: str, limit: int = 20, left_out: Collection[str] = ()
) -> list[dict[str, str]]:
    """Return the first quarantined samples of a layer: shard, id, member, reason, detail.

    Args:
        output: The output.
        layer: The layer's name.
        limit: How many at most.
        left_out: Shards whose rows are an earlier run's; see `Manifest`.
    """
    rows: list[dict[str, str]] = []
    folder = Folder(output.place(f"quarantine/{layer}"))
    for found in folder.list(".parquet"):
        shard = found.name.removesuffix(".parquet")
        if shard in left_out:
            continue
        with arrow_file(folder, found.name) as file:
            # Not `read_table`: threads of its scanner may let go of the Python file after the interpreter has ended,
            # and abort the process.
            rows += [{"shard": shard, **row} for row in pq.ParquetFile(file).read(use_threads=False).to_pylist()]
        if len(rows) >= limit:
            break
    return rows[:limit]
