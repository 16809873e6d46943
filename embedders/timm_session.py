"""TimmSession: a TimmImageEmbedder opened on one worker: its model, its batch size, its loader."""

from __future__ import annotations

import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from embedders.batch_size import AUTO_BATCH_SIZE, Measured, decided_batch, images_per_second, measure
from embedders.compile import ALIKE, COMPILE_SECONDS, prepare
from embedders.decision import Decision
from embedders.decoder_choice import exact_rate, surely_fast
from embedders.errors import is_out_of_memory
from embedders.open_loader import LoaderKind, open_loader
from embedders.precision import Precision
from embedders.session import Session
from embedders.shard_batch import ShardBatch, encoded_images
from embedders.timm_parameters import TimmParameters
from embedders.webdataset import OpenShard

if TYPE_CHECKING:
    import torch

    from embedders.loader import Loader, ModelInput

logger = logging.getLogger(__name__)

LESS = 8
"""How much smaller a batch is tried if one is too large for a CPU's memory: the loader holds more of them."""


class _Placed(NamedTuple):
    """A model on its device, in its precision and memory layout, and an image for it: (channels, height, width).

    The model gives (n, dimensions), or a pair of these and (n, tokens, dimensions).
    """

    model: torch.nn.Module
    layout: torch.memory_format
    image: torch.Tensor


class TimmSession(Session):
    """A TimmImageEmbedder opened on one worker.

    It works on a copy of the embedder that refers back to it: so an overridden method that calls `super()` finds what
    was loaded and measured here, and the embedder itself stays the plain parameters that it is.
    """

    embedder: TimmParameters

    def __init__(
        self,
        embedder: TimmParameters,
        device: str,
        images: int = 0,
        cores: int = 0,
        decision: Decision | None = None,
    ) -> None:
        """Prepare to load `embedder` on `device`; see `Session`."""
        copy = object.__new__(type(embedder))
        # Not copy.copy, which leaves out the resolved weights as pickle does: they would be looked up again.
        vars(copy).update(vars(embedder), _session=weakref.ref(self))
        super().__init__(copy, device, images, cores, decision)
        if not self.on_gpu:  # a CPU always decodes exactly, and what suits a GPU may be too large for it
            self.decision = None
        self.measured: Measured | None = None
        """What the model was measured to do here; None on a CPU where nothing depends on it."""
        self.batch_limit = sys.maxsize
        """Images of the largest batch that this worker has memory for, or that sessions beside this one agree on."""
        self._placed: _Placed | None = None
        self._loader: Loader | None = None
        self._decoder = ""
        self.input_number = 0
        """Which of the loader's inputs is this session's."""

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a GPU."""
        return self.device.startswith("cuda")

    @property
    def num_threads(self) -> int:
        """Threads that decode: as asked for, else one per core of this worker."""
        return self.embedder.num_threads_per_worker or self.cores

    @property
    def batch_size(self) -> int:
        """Images of a full batch; on a GPU with "auto" as decided, or measured before the model is loaded."""
        asked = self.embedder.batch_size
        if asked == "auto" and self.decision is not None:
            asked = self.decision.batch_size
        elif asked == "auto":
            asked = self.measured.size if self.measured else AUTO_BATCH_SIZE[self.device.partition(":")[0]]
        return min(asked, self.batch_limit)

    @property
    def decoder(self) -> str:
        """ "exact" or "fast" for DALI's decoders, "reference" for Pillow; empty until the first batch."""
        return self._decoder if self._loader else ""

    @property
    def decoders_differ(self) -> bool:
        """Whether exact or fast decoding is chosen by measuring."""
        options = self.embedder.decode_options
        return self.on_gpu and options.kind is LoaderKind.DALI and options.decode == "auto"

    @property
    def undecided(self) -> bool:
        """Whether something is left to decide by measuring."""
        if not self.on_gpu or self.decision is not None:
            return False
        return self.embedder.batch_size == "auto" or self.decoders_differ

    def decide(self, shard: OpenShard) -> Decision | None:
        """Decide on decoder and batch size; None on a CPU, or where neither has to be measured."""
        return decide_for([self], shard)

    @property
    def loader(self) -> Loader:
        """The loader, which is opened when it is first asked for and lives as long as the session."""
        if self._loader is None:
            open_loader_for([self])
        assert self._loader is not None
        return self._loader

    def batches(self, shards: Iterable[OpenShard]) -> Iterator[ShardBatch]:
        """Yield batches that run on across shards, as the embedder's own `batches` gives them."""
        yield from self.embedder.batches(shards, self.device)

    def close(self) -> None:
        """Free the model, and the loader with its threads and device memory, also for sessions that share it."""
        super().close()
        self._placed = None
        self.close_loader()

    def close_loader(self) -> None:
        """Free the loader. It is opened again if it is asked for."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def place(self) -> None:
        """Put the model on the device; on a GPU, measure which batch size suits it. Called again, it does nothing."""
        if self._placed is not None:
            return
        self.embedder.check_weights()
        self._placed = placed = _place(self.embedder, self.device)
        if self.on_gpu:
            self.measured = self._measure(placed)

    def _measure(self, placed: _Placed) -> Measured:
        """Return the batch size that a model on the GPU will have, and what the model does with it."""

        def model(images: torch.Tensor) -> Any:
            return placed.model(images.to(memory_format=placed.layout))

        asked = self.embedder.batch_size
        if asked != "auto" or self.decision is None:
            return measure(model, placed.image, asked)
        measured = decided_batch(model, placed.image, self.decision.batch_size)
        if measured.size < self.decision.batch_size:
            self.batch_limit = measured.size
            logger.warning(
                "a batch of %d images needs more memory than there is: taking %d",
                self.decision.batch_size,
                measured.size,
            )
        return measured

    def load(self) -> Callable[[torch.Tensor], Any]:
        """Load the model and make it fast for batches of `batch_size`; see `TimmImageEmbedder.load_embedding_model`."""
        import torch

        self.place()
        assert self._placed is not None
        placed, self._placed = self._placed, None
        forward: Callable[[torch.Tensor], Any] = self._fast(placed)
        device, layout, dtype = self.device, placed.layout, placed.image.dtype
        normalize, layers = self.embedder.normalize_embeddings, self.embedder.layers

        def embed(images: torch.Tensor) -> torch.Tensor:
            vectors = forward(images.to(device=device, dtype=dtype, memory_format=layout)).float()
            return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors

        def embed_with_tokens(images: torch.Tensor) -> dict[str, torch.Tensor]:
            pooled, tokens = forward(images.to(device=device, dtype=dtype, memory_format=layout))
            vectors = pooled.float()
            vectors = torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors
            return dict(zip(layers, (vectors, tokens.float()), strict=True))

        return embed_with_tokens if self.embedder.output_tokens else embed

    def _fast(self, placed: _Placed) -> Callable[[torch.Tensor], Any]:
        """Return the model as fast as it gets here, with what it does in a second noted in `measured`."""
        import torch

        while True:
            size = self.batch_size
            try:
                example = placed.image.expand(size, *placed.image.shape).contiguous(memory_format=placed.layout)
                if self.device == "cpu" and self.embedder.compile_model is None and self.images:
                    self.measured = Measured(size, images_per_second(placed.model, example, 1, 1))
                forward = self._prepared(placed.model, example)
                if self.on_gpu:
                    self.measured = Measured(size, images_per_second(forward, example))
                return forward
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    name = self.embedder.model_name
                    what = f"{name} needs more memory for a single image than there is on this worker"
                    raise MemoryError(what) from error
            if self.on_gpu:  # a batch size that was asked for; the engine halves such batches
                torch.cuda.empty_cache()
                return placed.model
            self.batch_limit = max(1, size // LESS)
            logger.warning("a batch of %d images needs more memory than there is: taking %d", size, self.batch_limit)

    def _prepared(self, model: torch.nn.Module, example: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """Return the model compiled and recorded for batches like `example`; with tokens, as it is, run once."""
        import torch

        from embedders.float8 import ALIKE_IN_FLOAT8

        if self.embedder.output_tokens:
            with torch.inference_mode():
                model(example)
            return model
        alike = ALIKE_IN_FLOAT8 if self.embedder.precision is Precision.FLOAT8 else ALIKE
        return prepare(model, example, self._compiles(), alike)

    def _compiles(self) -> bool:
        if self.embedder.compile_model is not None:
            return self.embedder.compile_model
        if self.embedder.precision is Precision.FLOAT8:
            return True  # each product has its operands scaled and rounded first, which pays only as one kernel
        if self.measured is None or not self.measured.rate:
            return False
        return self.images / self.measured.rate > COMPILE_SECONDS[self.device.partition(":")[0]]


def _place(embedder: TimmParameters, device: str) -> _Placed:
    """Create the model and put it on the device."""
    import torch

    from embedders.gpu_layers import rewrite

    dtype = embedder.model_dtype(device)
    model = embedder.create_model().eval().requires_grad_(False)
    if device.startswith("cuda"):
        model = rewrite(model)
    model = model.to(device=device, dtype=dtype)
    if embedder.precision is Precision.FLOAT8:
        from embedders.float8 import to_float8

        model = to_float8(model, device)
    convolutional = sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) > 2
    layout = torch.channels_last if convolutional else torch.contiguous_format
    # Noise, since a model without biases makes zeros of zeros, and those have no direction to compare.
    noise = torch.randn(embedder.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    model, image = model.to(memory_format=layout), noise.to(device=device, dtype=dtype)
    if embedder.output_tokens:
        from embedders.tokens import with_tokens

        model = with_tokens(model, image, embedder.model_name)
    return _Placed(model, layout, image)


def open_loader_for(sessions: Sequence[TimmSession]) -> None:
    """Open one loader for sessions whose images are decoded in the same way.

    Sessions that want the same input get the very same tensor. Batches have the size of the smallest.
    """
    first = sessions[0]
    wanted: list[tuple[dict[str, Any], torch.dtype | None]] = []
    inputs: list[ModelInput] = []
    for session in sessions:
        model_input = session.embedder.model_input(session.device)
        want = session.embedder.data_config, model_input.dtype
        if want not in wanted:
            wanted.append(want)
            inputs.append(model_input)
        session.input_number = wanted.index(want)
    loader, decoder = open_loader(
        first.embedder.decode_options,
        inputs,
        fast=_decodes_fast(sessions),
        batch_size=min(session.batch_size for session in sessions),
        num_threads=_threads(sessions),
        device=first.device,
    )
    for session in sessions:
        session._loader, session._decoder = loader, decoder


def reopen_loader_for(sessions: Sequence[TimmSession]) -> None:
    """Close the loader that sessions share, and open another by what they say now."""
    sessions[0].loader.close()
    open_loader_for(sessions)


def decide_first(sessions: Sequence[TimmSession], shards: Iterable[OpenShard]) -> Iterator[OpenShard]:
    """Decide by the first of a stream of shards, where sessions of one loader have not decided; return the stream.

    A run decides before its first shard, and gives its sessions the decision. This is for whoever opens one by hand.
    """
    shards = iter(shards)
    if not any(session.undecided for session in sessions):
        return shards
    first = list(itertools.islice(shards, 1))
    for shard in first:
        decide_for(sessions, shard)
    return itertools.chain(first, shards)


def decide_for(sessions: Sequence[TimmSession], shard: OpenShard) -> Decision | None:
    """Decide on the decoder and the batch size of sessions that share a loader; they keep to it.

    Args:
        sessions: One or more, with their models loaded.
        shard: Its images are decoded for the trial, and thrown away.

    Returns:
        The decision; None where nothing has to be measured.
    """
    first = sessions[0]
    if not any(session.undecided for session in sessions):
        return first.decision
    if first._loader is None:
        open_loader_for(sessions)
    decoder, size = first.decoder, min(session.batch_size for session in sessions)
    if decoder == "exact" and first.decoders_differ and (model := _rate_of(sessions)):
        exact = exact_rate(first.loader, encoded_images([shard]), size)
        logger.info("exact decoding gives %.0f images/s, the model takes %.0f", exact, model)
        if 0 < exact < model:
            decoder = "fast"
    decision = Decision(decoder, size)
    for session in sessions:
        session.decision = decision
    if decoder != first.decoder:
        reopen_loader_for(sessions)
    return decision


def _decodes_fast(sessions: Sequence[TimmSession]) -> bool:
    """Return whether sessions that share a loader decode on the GPU: as asked, as decided, or as is sure to be best."""
    first = sessions[0]
    if not first.decoders_differ:
        return first.on_gpu and first.embedder.decode == "fast"
    if first.decision is not None:
        return first.decision.decoder == "fast"
    return surely_fast(_rate_of(sessions), _threads(sessions))


def _threads(sessions: Sequence[TimmSession]) -> int:
    return max(session.num_threads for session in sessions)


def _rate_of(sessions: Sequence[TimmSession]) -> float:
    """Return the images per second that the models of sessions take together, as far as it was measured; else 0."""
    return rate_together([session.measured.rate if session.measured else 0.0 for session in sessions])


def rate_together(rates: Sequence[float]) -> float:
    """Return the images per second of models that run one after the other on each batch; 0 if one is unknown."""
    return 1 / sum(1 / rate for rate in rates) if all(rates) else 0.0
