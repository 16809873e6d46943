"""The parameters of a run as one value: the command line's options and the Prefect form are made from it."""

from __future__ import annotations

import contextlib
import enum
import importlib
import re
import shlex
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from embedders import ImageEmbedder
from embedders.errors import InputError
from embedders.fingerprint import digest
from embedders.images import MAX_PIXELS
from embedders.precision import Precision
from embedders.samples import KeyDot
from tasks.dataset.vectors import VectorFormat
from tasks.merge_options import MergeOptions
from tasks.run_part import RunPart
from tasks.storage.download_ahead import SPACE


class OnError(enum.StrEnum):
    """What becomes of a metadata row whose image cannot be embedded."""

    QUARANTINE = "quarantine"
    """It is left out of the dataset and listed in quarantine."""
    NULL = "null"
    """It stays, with a null in place of its vector, and is listed in quarantine."""
    RAISE = "raise"
    """Its whole shard fails."""


_COMMAND = ("python", "-m", "flows.embed")
_launcher: ContextVar[tuple[str, ...]] = ContextVar("launcher", default=_COMMAND)


@contextlib.contextmanager
def started_by(launcher: tuple[str, ...]) -> Iterator[None]:
    """Within the block, name another command as the one that finishes a run: it brings a scheduler of its own.

    Args:
        launcher: The words in front of the command line of flows.embed.
    """
    token = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(token)


_PERCENT = re.compile(r"[0-9]{1,3}([.][0-9]+)?%")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


MODEL = "vit_large_patch14_clip_quickgelu_224.openai"
COLUMN = "image_embedding"


def _as_names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_names),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    Parameter(negative=(), consume_multiple=False),
]
"""One name, or several: a text in Python and in a form, an option that may be repeated on the command line."""


class ModelOptions(_Options):
    """Which model, and how it computes."""

    model_name: Names = Field(
        (MODEL,),
        description="timm model name with or without a tag, hf-hub:ORG/NAME or local-dir:FOLDER; several, each for a "
        "layer of its own, in one pass.",
    )
    checkpoint: str | None = Field(None, description="Weights file, .safetensors or .pth, instead of the tag's own.")
    pretrained: bool = Field(True, description="Load trained weights; without, random ones from a fixed seed.")
    embedder: str | None = Field(None, description="A custom embedder as module:Class, instead of timm.")
    normalize_embeddings: bool = Field(True, description="Scale each vector to length 1.")
    autocast: bool = Field(True, description="float16 weights and arithmetic on a GPU; without, float32.")
    precision: Precision = Field(
        Precision.AUTO,
        description="float32, float16 or bfloat16 on any device, or float8 on a GPU, instead of what autocast says.",
    )
    output_tokens: bool = Field(
        False, description="Keep the model's tokens too, in a layer named by the column and _tokens."
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="Images per batch.")


class ImageOptions(_Options):
    """How images are found and decoded."""

    id_col: str = Field("key", description="The id's column in the metadata and field in the samples' json.")
    image_component: str | None = Field(
        None, description="Extension of the image to embed, such as left.jpg, or several: jpg,png, the first there is."
    )
    key_dot: KeyDot = Field(
        "first", description="Which dot of a file name ends the key; last for names such as 'at 10.13.22.jpeg'."
    )
    loader: Literal["auto", "dali", "reference"] = Field(
        "auto", description="Who decodes: DALI, or Pillow with timm's own transform."
    )
    decode: Literal["auto", "exact", "fast"] = Field(
        "auto", description="JPEG decoding: exact is Pillow's pixels, fast is the GPU's decoder."
    )
    exif: Literal["ignore", "apply"] = Field("ignore", description="Whether to turn images by their EXIF orientation.")
    max_pixels: Annotated[int, Field(ge=1)] = Field(
        MAX_PIXELS, description="Images with more pixels go to quarantine undecoded."
    )
    num_threads_per_worker: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Threads that decode in each worker; by default its share of the cores."
    )


class TableOptions(_Options):
    """The dataset that is made."""

    image_embedding_column: Names = Field(
        (COLUMN,), description="Name of the new column, and of its layer; one for each model."
    )
    on_error: OnError = Field(OnError.QUARANTINE, description="What becomes of rows whose image cannot be embedded.")
    max_quarantined: str | None = Field(
        None, description="Share of samples that may be quarantined, such as 5%; beyond it the run fails."
    )
    repeated_ids: Literal["raise", "quarantine"] = Field(
        "raise",
        description="Metadata rows that repeat an id: refuse them, or join the first and list the others.",
    )
    embedding_type: Literal["list", "fixed_size_list"] = Field(
        "list", description="Arrow type of the new column; dask-cudf refuses a fixed-size list."
    )
    embedding_dtype: Literal["float32", "float16"] = Field(
        "float32", description="Type of its values; cuDF reads float16 lists as text."
    )
    embedding_encoding: Literal["plain", "byte_stream_split"] = Field(
        "plain", description="Parquet encoding of its values; byte_stream_split with zstd is smaller and slower."
    )
    rows_per_file: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Rows of each file of the dataset, instead of one file a shard."
    )
    in_place: bool = Field(
        False, description="Add the column to the Parquets beside the tars, keeping every row, instead of new files."
    )

    @field_validator("max_quarantined")
    @classmethod
    def _is_share(cls, value: str | None) -> str | None:
        if value is None or (_PERCENT.fullmatch(value) and float(value.rstrip("%")) <= 100):
            return value
        raise PydanticCustomError("percent", "Input should be a percentage such as 5%")


class RunOptions(_Options):
    """Where it runs, and what is done again."""

    device: Literal["auto", "gpu", "cpu"] = Field("auto", description="Where models run.")
    workers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Worker processes; by default one a GPU, or one for every four cores."
    )
    worker_timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Seconds to wait for new workers once all are gone; then the run ends with what is done."
    )
    scheduler: str | None = Field(None, description="Address of a Dask scheduler to use, tcp://HOST:PORT.")
    part: str | None = Field(
        None,
        description="Do only a part of the shards, such as 3/16: every 16th, counted from 0/16 to 15/16. Parts may run "
        "side by side, on any machines.",
    )
    overwrite: bool = Field(False, description="Replace embeddings made with another model or setting.")
    verify: bool = Field(False, description="Read all that is done and check it against its checksums first.")
    fingerprint: Literal["stat", "content"] = Field(
        "stat", description="What tells tars apart: size and time or etag, or a hash of all their bytes."
    )
    use_index_files: bool = Field(True, description="Keep the shards' indexes in the output and use them again.")
    shard_timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds without a batch after which a shard is given up; 10 to 40 minutes by default."
    )
    staging_space: ByteSize = Field(
        ByteSize(SPACE), description="Bytes on each worker's disk that shards of a store may take, such as 20GB."
    )

    @field_validator("part")
    @classmethod
    def _is_part(cls, value: str | None) -> str | None:
        try:
            return None if value is None else str(RunPart.parse(value))
        except ValueError as error:
            raise PydanticCustomError("part", "Input should be {wanted}", {"wanted": str(error)}) from error

    @property
    def run_part(self) -> RunPart | None:
        """Which shards are to be done; None for all."""
        return None if self.part is None else RunPart.parse(self.part)


SWITCHED_OFF = {
    "--no-pretrained": "Random weights from a fixed seed, instead of trained ones.",
    "--no-normalize-embeddings": "Leave each vector as the model gives it, instead of scaling it to length 1.",
    "--no-autocast": "float32 weights and arithmetic on a GPU, instead of float16.",
    "--no-use-index-files": "Keep no indexes of the shards in the output, and use none.",
}
"""What the command line says of switches that are on: a form shows the field, the command line its opposite."""

GROUPS: dict[str, type[_Options]] = {
    "model": ModelOptions,
    "images": ImageOptions,
    "table": TableOptions,
    "work": RunOptions,
}
"""The groups of options, by the flow's parameters: a form shows each as one."""


class EmbedConfig(RunOptions, TableOptions, ImageOptions, ModelOptions):
    """One run over one dataset: the options of all groups side by side."""

    dataset: str = Field(description="Folder or fsspec URL with the .tar shards and their metadata .parquet.")
    output: str = Field(description="Folder or fsspec URL that gets layers, metadata, quarantine and manifest.")

    @classmethod
    def of(cls, dataset: str, output: str, *groups: _Options) -> EmbedConfig:
        """The options of some groups as one value; what was not said in them is not said in it."""
        said = {name: getattr(group, name) for group in groups for name in group.model_fields_set}
        return cls(dataset=dataset, output=output, **said)

    def groups(self) -> dict[str, Any]:
        """The value as the flow's parameters beside `dataset` and `output`; `of` is the way back."""
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return {
            name: kind(**{field: said[field] for field in kind.model_fields if field in said})
            for name, kind in GROUPS.items()
        }

    def command(self) -> str:
        """The command line that asks for this run, quoted for a shell."""
        launcher = _launcher.get()
        left_out = {"dataset", "output"} if launcher == _COMMAND else {"dataset", "output", "scheduler"}
        words = [*launcher, self.dataset, "--output", self.output]
        for name, field in type(self).model_fields.items():
            value, option = getattr(self, name), name.replace("_", "-")
            if name in left_out or value == field.default:
                continue
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            elif isinstance(value, tuple):
                words += [word for one in value for word in (f"--{option}", one)]
            else:
                words += [f"--{option}", str(value)]
        return shlex.join(words)

    @property
    def common_to_parts(self) -> str:
        """Return a short text that is the same for all parts of one run: what the merged dataset depends on."""
        options = self.merge_options()
        return digest([self.model_name, self.embedder, self.image_embedding_column, options.as_dict()])[:8]

    @property
    def strict_ids(self) -> bool:
        """Whether a repeated id in the metadata is an error."""
        return self.repeated_ids == "raise" or self.on_error is OnError.RAISE

    @property
    def quarantine_limit(self) -> float | None:
        """The share of samples that may be in quarantine, from 0 to 1; None for any."""
        return None if self.max_quarantined is None else float(self.max_quarantined.rstrip("%")) / 100

    def merge_options(self) -> MergeOptions:
        """How layers join the metadata.

        Raises:
            InputError: Options that exclude each other.
        """
        if self.in_place and self.rows_per_file is not None:
            raise InputError("--in-place and --rows-per-file exclude each other; leave one of them out")
        if self.part is not None and self.rows_per_file is not None:
            raise InputError(
                "--part and --rows-per-file exclude each other, since such files have rows of several parts; run the "
                "parts without it, and then once with --rows-per-file and without --part: that embeds nothing again"
            )
        return MergeOptions(
            self.id_col,
            null_rows=self.on_error is OnError.NULL,
            strict=self.strict_ids,
            form=VectorFormat(self.embedding_type, self.embedding_dtype, self.embedding_encoding),
            in_place=self.in_place,
            rows_per_file=self.rows_per_file,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column of each model.

        Without names, the first is `image_embedding`, and the others have their model's name added.

        Raises:
            InputError: There are more or fewer names than models.
        """
        models, names = self.model_name, self.image_embedding_column
        if len(names) == len(models):
            return names
        if len(names) > 1 or self.embedder is not None:
            raise InputError(
                f"{len(models)} --model-name, but {len(names)} --image-embedding-column; give one for each, or none"
            )
        return names[0], *(f"{names[0]}_{_word(model)}" for model in models[1:])

    def build_embedders(self) -> tuple[ImageEmbedder, ...]:
        """Make the embedders that these parameters describe.

        Raises:
            InputError: A custom embedder that cannot be imported or is none, or options that exclude each other.
        """
        if self.embedder is not None:
            if len(self.model_name) > 1:
                raise InputError("--embedder takes the place of --model-name; give one of the two")
            made = load_embedder(self.embedder)
            if self.image_embedding_column != (COLUMN,):
                made.image_embedding_column = self.columns[0]
            return (made,)
        if self.checkpoint is not None and len(self.model_name) > 1:
            raise InputError("--checkpoint belongs to one model; leave it out, or give one --model-name")
        return tuple(self._timm(model, column) for model, column in zip(self.model_name, self.columns, strict=True))

    def _timm(self, model_name: str, column: str) -> ImageEmbedder:
        from embedders import TimmImageEmbedder

        return TimmImageEmbedder(
            model_name,
            pretrained=self.pretrained,
            batch_size=self.batch_size,
            num_threads_per_worker=self.num_threads_per_worker,
            image_embedding_column=column,
            normalize_embeddings=self.normalize_embeddings,
            autocast=self.autocast,
            precision=self.precision,
            use_index_files=self.use_index_files,
            checkpoint=self.checkpoint,
            loader=self.loader,
            decode=self.decode,
            exif=self.exif,
            max_pixels=self.max_pixels,
            image_component=self.image_component,
            output_tokens=self.output_tokens,
        )


def _word(model: str) -> str:
    """Return a model's name without its tag, as part of a column's name."""
    name = model.rpartition("/")[2].partition(".")[0]
    return re.sub(r"\W+", "_", name)


def load_embedder(name: str) -> ImageEmbedder:
    """Make a custom embedder from `module:Class`, whose class takes no arguments.

    Raises:
        InputError: No such module or class, or not an ImageEmbedder.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InputError(f"--embedder {name!r}: give it as module:Class")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--embedder {name!r}: {error}") from error
    made = kind() if isinstance(kind, type) else kind
    if not isinstance(made, ImageEmbedder):
        raise InputError(f"--embedder {name!r} is no ImageEmbedder; derive it from embedders.ImageEmbedder")
    return made
