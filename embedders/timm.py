"""TimmImageEmbedder: any timm model, fed by DALI or by the reference loader, giving the vectors timm gives."""

from __future__ import annotations

import enum
import functools
import inspect
import itertools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from embedders.base import ImageEmbedder, Row, ShardBatch
from embedders.batch_size import Measured, best_batch, images_per_second
from embedders.compile import ALIKE, COMPILE_SECONDS, prepare
from embedders.errors import InputError, is_out_of_memory
from embedders.fingerprint import of_classes
from embedders.images import MAX_PIXELS
from embedders.loader import Encoded, LoadedBatch, Loader
from embedders.preprocess import NotConvertible, Preprocessing, sizes, timm_transform
from embedders.webdataset import OpenShard, open_shard
from embedders.weights import RANDOM, Weights, resolve_weights

if TYPE_CHECKING:
    import torch

    from embedders.compile import Forward

logger = logging.getLogger(__name__)

AUTO_BATCH_SIZE = {"cuda": 256, "cpu": 32}

TRIAL = 6
"""Batches by which exact decoding is timed against the model, the first one not counted."""

NO_CORE_DECODES = 1000
"""Images a second that no core decodes exactly, unless they are thumbnails: 330 to 420 photographs of 500x375."""

LESS = 8
"""How much smaller a batch is tried if one is too large for a CPU's memory: the loader holds more of them."""

PROCESS_OWNED = frozenset(
    {"_loader", "_decoder", "_measured", "_expected", "_decided", "_largest", "_planned_weights", "weights"}
)
"""Attributes that belong to one process and do not travel."""


class LoaderKind(enum.StrEnum):
    """Who decodes and preprocesses."""

    AUTO = "auto"
    DALI = "dali"
    REFERENCE = "reference"


class Precision(enum.StrEnum):
    """What a model computes in."""

    AUTO = "auto"
    """float16 on a GPU if `autocast`, else float32."""
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8"
    """float16 with linear layers in float8."""


class TimmImageEmbedder(ImageEmbedder):
    """Embeds images with a timm model: pooled features, or the projection where the model has one (CLIP and kin).

    :param model_name: a timm name with or without a pretrained tag, `hf-hub:…` or `local-dir:…`.
    :param pretrained: load the tag's weights; False gives random ones, the same on every worker.
    :param batch_size: images a batch; "auto" chooses by device.
    :param num_threads_per_worker: threads that decode; by default the processor cores of the worker's share.
    :param image_embedding_column: the name of the new column.
    :param normalize_embeddings: scale each vector to length 1.
    :param autocast: float16 weights and arithmetic on a GPU; False for float32. A CPU computes in float32.
    :param precision: "float32", "float16" or "bfloat16" on any device, instead of what `autocast` says. bfloat16 costs
        accuracy: a mean cosine of 0.9987 to float32 where float16 has 0.99998.
    :param use_index_files: keep the shards' indexes in the output's index folder.
    :param checkpoint: a .safetensors or .pth file with the weights (loaded without pickle).
    :param loader: "dali", "reference" (Pillow and timm's own transform), or "auto": DALI where it can.
    :param exif: "apply" turns images by their EXIF orientation; timm's own loader does not.
    :param max_pixels: images with more, by their header, go to quarantine undecoded.
    :param image_component: the extension of the image to embed where samples have several, such as "left.jpg"; or
        several of them, "jpg,png": the first one that a sample has.
    :param decode: "exact" decodes on the CPU to Pillow's very pixels, "fast" on the GPU; "auto" is exact where the
        model is the slower of the two anyway, as the first batches show.
    :param compile_model: torch.compile, or never; by default where the run is long enough to pay for it.
    """

    _expected: int = 0
    """Images that this worker will probably see; 0 where nobody said."""
    _largest: int = sys.maxsize
    """Images of the largest batch that this worker has memory for, as far as that was found out."""

    _planned_weights: str = ""
    """What identified the weights where the run was planned; empty in that process."""

    execution_parameters = ImageEmbedder.execution_parameters | {
        "batch_size",
        "num_threads_per_worker",
        "compile_model",
    }

    def __init__(
        self,
        model_name: str,
        pretrained: bool = True,
        batch_size: int | Literal["auto"] = "auto",
        num_threads_per_worker: int | None = None,
        image_embedding_column: str = "image_embedding",
        normalize_embeddings: bool = True,
        classifiers: Sequence[object] = (),
        autocast: bool = True,
        use_index_files: bool = True,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        loader: str = "auto",
        decode: str = "auto",
        exif: Literal["ignore", "apply"] = "ignore",
        max_pixels: int = MAX_PIXELS,
        image_component: str | None = None,
        precision: str = "auto",
        compile_model: bool | None = None,
    ) -> None:
        super().__init__(model_name, image_embedding_column, classifiers)
        if batch_size != "auto" and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give 1 or more, or 'auto'")
        if num_threads_per_worker is not None and num_threads_per_worker < 1:
            raise InputError(f"num_threads_per_worker is {num_threads_per_worker}; give 1 or more")
        self.pretrained = pretrained
        self.batch_size = batch_size
        self.num_threads_per_worker = num_threads_per_worker
        self.normalize_embeddings = normalize_embeddings
        self.autocast = autocast
        self.use_index_files = use_index_files
        self.checkpoint = None if checkpoint is None else os.path.abspath(checkpoint)
        self.loader = LoaderKind(loader)
        self.decode = decode
        self.exif = exif
        self.max_pixels = max_pixels
        self.image_component = image_component
        self.precision = Precision(precision)
        self.compile_model = compile_model

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one process, the loader and the resolved weights, but with what identifies these."""
        state = {k: v for k, v in vars(self).items() if k not in PROCESS_OWNED}
        return state | ({"_planned_weights": self.weights.identity} if "weights" in vars(self) else {})

    @functools.cached_property
    def weights(self) -> Weights:
        """The resolved weights; see `embedders.weights`."""
        return resolve_weights(self.model_name, self.pretrained, self.checkpoint)

    @functools.cached_property
    def data_config(self) -> dict[str, Any]:
        """timm's data configuration of the model: input size, interpolation, crop, mean and std."""
        from timm.data import resolve_data_config

        return resolve_data_config(pretrained_cfg=self.weights.pretrained_cfg)

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """The data configuration as one plain value.

        :raises NotConvertible: it has no such form; only the reference loader follows it.
        """
        return Preprocessing.from_timm(self.data_config)

    @property
    def keeps_head(self) -> bool:
        """Whether the model's head is a projection into a shared space, not a classifier, by its configuration.

        Where the weights are not timm's own, `create_model` looks at the head as well.
        """
        return self.weights.may_project

    def check(self) -> None:
        """Resolve the weights now, and see that a checkpoint fits.

        :raises InputError: unknown model, weights that cannot be had, or that are another model's.
        """
        _ = self.weights
        if self.checkpoint is not None:
            self.create_model()

    def fingerprint(self, layer: str | None = None) -> dict[str, Any]:
        """Return model, weights, preprocessing, precision and normalisation, and of a subclass its code and attributes.

        Raises:
            InputError: The weights cannot be had, or an attribute of a subclass has no stable representation.
        """
        timm = {
            "embedder": type(self).__qualname__,
            "model": self.model_name,
            "weights": self.weights.identity,
            "preprocessing": _plain(self.data_config),
            "precision": self._policy,
            "normalized": self.normalize_embeddings,
        } | self._choice_of_images()
        if type(self) is TimmImageEmbedder:
            return timm
        known = self.execution_parameters | PROCESS_OWNED | PARAMETERS | CACHED
        return timm | {"classes": of_classes(type(self), TimmImageEmbedder), "attributes": self._attributes(known)}

    def _choice_of_images(self) -> dict[str, Any]:
        """What else decides which pixels are embedded, where it is not as usual: usual keys stay short and stable."""
        chosen = {"exif": self.exif, "max_pixels": self.max_pixels, "image_component": self.image_component}
        usual = {"exif": "ignore", "max_pixels": MAX_PIXELS, "image_component": None}
        return {name: value for name, value in chosen.items() if value != usual[name]}

    @property
    def _policy(self) -> str:
        """The precision as the fingerprint says it: `autocast` is a policy, whatever device a worker has."""
        if self.precision is not Precision.AUTO:
            return str(self.precision)
        return "float16 on a GPU" if self.autocast else "float32"

    def expect(self, images: int) -> None:
        """Compiling pays where this worker has enough of them to do."""
        self._expected = images

    def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The timm model in evaluation mode, made quick for batches of `input_batch(device)`.

        :return: a callable from (n, channels, height, width) to (n, dimensions) float32, normalised if asked for.
        """
        import torch

        from embedders.gpu_layers import rewrite

        self._check_weights()
        dtype = self._dtype(device)
        model = self.create_model().eval().requires_grad_(False)
        if device.startswith("cuda"):
            model = rewrite(model)
        model = model.to(device=device, dtype=dtype)
        if self.precision is Precision.FLOAT8:
            from embedders.float8 import to_float8

            model = to_float8(model, device)
        convolutional = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) > 2
        layout = torch.channels_last if convolutional else torch.contiguous_format
        model = model.to(memory_format=layout)
        forward = self._prepared(model, device, layout)

        def embed(images: torch.Tensor) -> torch.Tensor:
            vectors = forward(images.to(device=device, dtype=dtype, memory_format=layout)).float()
            return torch.nn.functional.normalize(vectors, dim=-1) if self.normalize_embeddings else vectors

        return embed

    def _check_weights(self) -> None:
        """Prove that the weights found here are those that the run was planned with.

        Raises:
            InputError: They are others, such as an older file under the same path on this machine.
        """
        if self._planned_weights not in ("", self.weights.identity):
            raise InputError(
                f"{self.model_name}: the weights on {platform.node()} ({self.weights.identity}) are not those that the "
                f"run was planned with ({self._planned_weights}); give every worker the same file"
            )

    def _prepared(self, model: torch.nn.Module, device: str, layout: torch.memory_format) -> Forward:
        """The model as fast as it gets here, with what it does in a second noted in `_measured`."""
        import torch

        from embedders.float8 import ALIKE_IN_FLOAT8

        # Noise, since a model without biases makes zeros of zeros, and those have no direction to compare.
        noise = torch.randn(self.data_config["input_size"], generator=torch.Generator().manual_seed(0))
        image = noise.to(device=device, dtype=self._dtype(device))
        if device.startswith("cuda"):
            self._measured = self._measure(lambda images: model(images.to(memory_format=layout)), image)
        alike = ALIKE_IN_FLOAT8 if self.precision is Precision.FLOAT8 else ALIKE
        while True:
            size = self.input_batch(device)
            try:
                example = _batch_of(image, size, layout)
                if device == "cpu" and self.compile_model is None and self._expected:
                    self._measured = Measured(size, images_per_second(model, example, 1, 1))
                forward = prepare(model, example, self._compiles(device), alike)
                if device.startswith("cuda"):
                    self._measured = Measured(len(example), images_per_second(forward, example))
                return forward
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    what = f"{self.model_name} needs more memory for a single image than there is on this worker"
                    raise MemoryError(what) from error
            if device.startswith("cuda"):  # a batch size that was asked for; the engine halves such batches
                torch.cuda.empty_cache()
                return model
            self._largest = max(1, size // LESS)
            logger.warning("a batch of %d images needs more memory than there is: taking %d", size, self._largest)

    def _compiles(self, device: str) -> bool:
        if self.compile_model is not None:
            return self.compile_model
        if self.precision is Precision.FLOAT8:
            return True  # each product has its operands scaled and rounded first, which pays only as one kernel
        measured: Measured | None = getattr(self, "_measured", None)
        if measured is None or not measured.rate:
            return False
        return self._expected / measured.rate > COMPILE_SECONDS[device.partition(":")[0]]

    def _measure(self, model: Forward, image: torch.Tensor) -> Measured:
        """The batch size to use on this GPU and what the model alone does with it."""
        import torch

        if self.batch_size == "auto":
            return best_batch(model, image)
        try:
            rate = images_per_second(model, image.expand(self.batch_size, *image.shape).contiguous())
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rate = 0.0
        return Measured(self.batch_size, rate)

    def input_batch(self, device: str) -> int:
        """Images of a full batch on `device`; on a GPU with "auto" it is measured when the model is loaded."""
        if self.batch_size != "auto":
            return min(self.batch_size, self._largest)
        measured: Measured | None = getattr(self, "_measured", None)
        return min(measured.size if measured else AUTO_BATCH_SIZE[device.partition(":")[0]], self._largest)

    def create_model(self) -> torch.nn.Module:
        """The model as timm makes it, on the CPU in float32, without its classifier.

        :raises InputError: the checkpoint does not fit.
        """
        import timm
        import torch

        head: dict[str, Any] = {} if self.keeps_head else {"num_classes": 0}
        overlay: dict[str, Any] = {}
        if self.checkpoint is not None:
            overlay = {"pretrained_cfg_overlay": {"state_dict": _read_checkpoint(self.checkpoint), "source": ""}}
        pretrained = self.weights.identity != RANDOM

        def create(seed: int) -> torch.nn.Module:
            torch.manual_seed(seed)  # random weights must be the same on every worker
            return timm.create_model(self.model_name, pretrained=pretrained, **overlay, **head)

        if self.checkpoint is None:
            return self._without_labels(create(0))
        try:
            model = create(0)
            # timm loads what fits. What it left random differs from seed to seed.
            state, other = model.state_dict(), create(1).state_dict()
        except (RuntimeError, KeyError) as error:
            raise InputError(
                f"checkpoint {self.checkpoint!r} does not fit {self.model_name!r}: {_first_lines(error)}"
            ) from error
        missing = [name for name in state if not torch.equal(state[name], other[name])]
        if missing:
            raise InputError(
                f"checkpoint {self.checkpoint!r} does not fit {self.model_name!r}: "
                f"it lacks {len(missing)} of {len(state)} tensors, such as {missing[0]}"
            )
        return self._without_labels(model)

    def _without_labels(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model without a head that turns out to be a classifier.

        CLIP's projections have no bias, which timm fills in as zeros, and a trained classifier has one. Only EVA-CLIP's
        have one as well: theirs are told by their width alone.
        """
        theirs = self.checkpoint is not None or self.model_name.startswith(("local-dir:", "hf-hub:", "hf_hub:"))
        if not (theirs and self.keeps_head) or self.weights.architecture.startswith("eva"):
            return model
        classifier: Any = model
        bias = getattr(classifier.get_classifier(), "bias", None)
        if bias is not None and bool(bias.any()):
            classifier.reset_classifier(0)
        return model

    def _dtype(self, device: str) -> torch.dtype:
        """What the model computes in."""
        import torch

        if self.precision is Precision.FLOAT8:
            return torch.float16
        if self.precision is not Precision.AUTO:
            return getattr(torch, self.precision)
        return torch.float16 if self.autocast and device.startswith("cuda") else torch.float32

    def precision_on(self, device: str) -> str:
        """What the model computes in on a device, such as "float32"."""
        if self.precision is Precision.FLOAT8:
            return str(self.precision)
        return str(self._dtype(device)).removeprefix("torch.")

    def _input_dtype(self, device: str) -> torch.dtype:
        """What the loader gives: half of the bytes where the model halves them anyway; DALI has no bfloat16."""
        import torch

        return torch.float16 if self._dtype(device) != torch.float32 and device.startswith("cuda") else torch.float32

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """Yield `(images, metadata)` of one local tar, the id under "key", on the GPU where there is one."""
        import torch

        shard = open_shard(tar_path, image_component=self.image_component)
        for batch in self.batches([shard], "cuda" if torch.cuda.is_available() else "cpu"):
            if batch.rows:
                yield batch.images, [{shard.id_col: shard.ids[row.sample]} for row in batch.rows]

    def batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        """Batches that run on across shards, from one loader that lives as long as this object."""
        if type(self).load_dataset_shard is not TimmImageEmbedder.load_dataset_shard:
            yield from super().batches(shards, device)
            return
        samples = _encoded(shards)
        for batch in itertools.chain(self._trial(samples, device), self._rest(samples, device)):
            yield ShardBatch(batch.images, batch.tags, batch.rejected)  # type: ignore[arg-type]

    def _rest(self, samples: Iterator[Encoded], device: str) -> Iterator[LoadedBatch]:
        yield from self._open_loader(device).batches(samples)

    def _trial(self, samples: Iterator[Encoded], device: str) -> Iterator[LoadedBatch]:
        """The first batches, decoded exactly; where the model turns out to be faster, the loader is then a fast one."""
        loader = self._open_loader(device)
        if getattr(self, "_decided", True):
            return
        size = self.input_batch(device)
        batches, times = [], []
        for batch in loader.batches(itertools.islice(samples, TRIAL * size)):
            batches.append(replace(batch, images=batch.images.clone()))  # its memory is valid until the next one only
            times.append(time.perf_counter())
        yield from batches
        if len(batches) < TRIAL:
            return  # too few to tell; they are done anyway
        exact, model = (TRIAL - 1) * size / (times[-1] - times[0]), self._measured.rate
        self._decided = True
        logger.info("exact decoding gives %.0f images/s, the model takes %.0f", exact, model)
        if exact < model:
            loader.close()
            self._loader = self._build_loader(device, fast=True)

    def not_finite(self, device: str) -> str:
        """Return what a quarantine row says of NaN, with the way out where the model computed in half precision."""
        import torch

        what = super().not_finite(device)
        if self._dtype(device) != torch.float16:
            return what
        way = "--no-autocast" if self.precision is Precision.AUTO else "--precision float32"
        return f"{what}: float16 may be too narrow for it; {way} helps, it computes in float32"

    @property
    def notice(self) -> str:
        """Why DALI is not used, where it could be asked to and cannot follow the model's transform."""
        if self.loader is LoaderKind.REFERENCE:
            return ""
        try:
            _ = self.preprocessing
        except NotConvertible as why:
            return f"{self.model_name}: using the reference loader, since {why}"
        return ""

    @property
    def decoder(self) -> str:
        """ "exact" or "fast" for DALI's decoders, "reference" for Pillow; empty until the first batch."""
        return getattr(self, "_decoder", "")

    def accepts(self, decoder: str) -> bool:
        """A shard decoded more exactly than asked for is as good; one decoded less exactly is to be done again."""
        if self.loader is LoaderKind.REFERENCE:
            return decoder == "reference"
        return self.decode != "exact" or decoder != "fast"

    def _open_loader(self, device: str) -> Loader:
        if not hasattr(self, "_loader"):
            on_gpu = device.startswith("cuda")
            measured: Measured | None = getattr(self, "_measured", None)
            rate = measured.rate if measured and on_gpu and self.decode == "auto" else 0.0
            fast = rate > NO_CORE_DECODES * self._threads or (on_gpu and self.decode == "fast")
            self._loader = self._build_loader(device, fast)
            self._decided = not (rate and self._decoder == "exact")
        return self._loader

    def _build_loader(self, device: str, fast: bool) -> Loader:
        from embedders.dali import DaliLoader, Decode
        from embedders.reference import ReferenceLoader

        common: dict[str, Any] = {
            "transform": timm_transform(self.data_config),
            "batch_size": self.input_batch(device),
            "num_threads": self._threads,
            "device": device,
            "dtype": self._input_dtype(device),
            "apply_exif": self.exif == "apply",
            "max_pixels": self.max_pixels,
        }
        try:
            preprocessing = self.preprocessing
        except NotConvertible as why:
            self._decoder = "reference"
            if self.loader is LoaderKind.DALI:
                raise InputError(
                    f"{self.model_name}: DALI cannot follow its transform ({why}); use --loader auto"
                ) from why
            return ReferenceLoader(preprocessing=sizes(self.data_config), **common)
        if self.loader is LoaderKind.REFERENCE:
            self._decoder = "reference"
            return ReferenceLoader(preprocessing=preprocessing, mode=preprocessing.mode, **common)
        decode = Decode.FAST if fast else Decode.EXACT
        self._decoder = str(decode)
        if fast:
            # Half of the cores are enough to keep the hardware decoder busy, and the others serve the rest: 29,800
            # images/s with 8 threads on 16 cores, 22,200 with 16.
            common["num_threads"] = max(1, self._threads // 2)
        return DaliLoader(preprocessing=preprocessing, decode=decode, **common)

    @property
    def _threads(self) -> int:
        return self.num_threads_per_worker or _available_cores()


PARAMETERS = frozenset(inspect.signature(TimmImageEmbedder.__init__).parameters)
CACHED = frozenset(k for k, v in vars(TimmImageEmbedder).items() if isinstance(v, functools.cached_property))
"""Attributes of a subclass that the fingerprint of its parent covers."""


def _encoded(shards: Iterable[OpenShard]) -> Iterator[Encoded]:
    """Every image of a stream of shards that is worth looking at."""
    for number, shard in enumerate(shards):
        for i, data, header in shard.encoded():
            yield Encoded(Row(number, i), data, header)


def _read_checkpoint(path: str) -> dict[str, Any]:
    """A state dict from safetensors, or from a torch file without running its pickle."""
    from timm.models import load_state_dict

    try:
        return load_state_dict(path, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each raise their own
        raise InputError(f"cannot read checkpoint {path!r}: {_first_lines(error)}") from error


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _batch_of(image: torch.Tensor, size: int, layout: torch.memory_format) -> torch.Tensor:
    """`size` times the image (channels, height, width)."""
    return image.expand(size, *image.shape).contiguous(memory_format=layout)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(config.items())}


def _available_cores() -> int:
    """This worker's share of the cores: what its cluster says, else all that the process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
