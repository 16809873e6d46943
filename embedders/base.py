"""ImageEmbedder: what turns a shard of images into vectors, and the two methods a custom one overrides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from embedders.decision import Decision
from embedders.errors import InputError
from embedders.fingerprint import NoFingerprint, cached_properties, of_classes, of_value
from embedders.ids import canonical_id
from embedders.quarantine import Reason, Rejected
from embedders.session import Session
from embedders.shard_batch import Row, ShardBatch
from embedders.webdataset import OpenShard


class ImageEmbedder(ABC):
    """Turns images into vectors.

    A custom embedder overrides `load_dataset_shard` and `load_embedding_model`; nothing else is asked of it, not
    even that its `__init__` calls this one. It is sent to workers by pickle and identified by the source of its classes
    and by its attributes, so keep the model itself out of these: `load_embedding_model` is called once per worker.
    """

    image_embedding_column: str = "image_embedding"
    use_index_files: bool = True
    image_component: str | None = None
    """The extension of the image to embed where samples have several; or several, such as "jpg,png": the first of them
    that a sample has."""

    extra_columns: tuple[str, ...] = ()
    """Names of the arrays that the model gives beside the vectors, if it gives a mapping; columns of the same layer."""

    execution_parameters: frozenset[str] = frozenset({"image_embedding_column", "use_index_files"})
    """Attributes that change how an embedder runs and not what vectors it gives: left out of its fingerprint."""

    def __init__(
        self,
        model_name: str = "",
        image_embedding_column: str = "image_embedding",
        classifiers: Sequence[object] = (),
    ) -> None:
        if classifiers:
            raise InputError("classifiers are not supported here; embed first, then score the embedding column")
        self.model_name = model_name
        self.image_embedding_column = image_embedding_column

    @abstractmethod
    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, list[dict[str, Any]]]]:
        """Yield `(batch, metadata)` pairs of one local tar.

        Args:
            tar_path: A path on the local disk.

        Returns:
            Pairs of anything the model takes and a list with one dict a sample, which holds the id column.
        """

    @abstractmethod
    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        """Load the model on a device.

        Args:
            device: "cuda" or "cpu".

        Returns:
            A callable that takes a batch of n images and returns an array (n, dimensions); or a mapping with this
            array under the name `image_embedding_column`, and one (n, ...) for each of `extra_columns`.
        """

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the layers that this embedder makes: the image vectors first, named by their column.

        If there are several, the model gives a mapping that has an array (n, ...) for each.
        """
        return (self.image_embedding_column,)

    def __call__(self, dataset: Any) -> Any:
        """Ask a dataset to embed itself with this embedder; lazy, as the dataset decides."""
        return dataset.embed_with(self)

    def fingerprint(self, layer: str | None = None) -> dict[str, Any]:
        """Return what a layer's values depend on, as plain JSON: equal fingerprints give equal values.

        It covers the source of every class between this one and ours, so whatever method they override, and every
        attribute that is not in `execution_parameters`.

        Args:
            layer: One of `layers`; by default the first.

        Raises:
            InputError: An attribute has no stable representation.
        """
        return {
            "embedder": type(self).__qualname__,
            "classes": of_classes(type(self), ImageEmbedder),
            "attributes": self._attributes(self.execution_parameters),
        }

    def _attributes(self, left_out: Collection[str]) -> dict[str, Any]:
        """Return the attributes but for some, as plain JSON.

        Raises:
            InputError: One has no stable representation.
        """
        kind = type(self).__name__
        left_out = {*left_out, *cached_properties(type(self))}
        try:
            return {k: of_value(v, f"{kind}.{k}") for k, v in sorted(vars(self).items()) if k not in left_out}
        except NoFingerprint as why:
            raise InputError(
                f"{why}, so it cannot be part of the embedder's fingerprint; make it in load_embedding_model or "
                "load_dataset_shard, or name it in execution_parameters if the vectors do not depend on it"
            ) from why

    def check(self) -> None:  # noqa: B027  # a custom embedder may have nothing to check
        """Raise InputError if this embedder cannot run, before anything is started or written."""

    def open(self, device: str, images: int = 0, cores: int = 0, decision: Decision | None = None) -> Session:
        """Load the model on this worker.

        Args:
            device: "cuda" or "cpu".
            images: How many images this worker will probably see; 0 if unknown.
            cores: How many processor cores it has for itself; 0 for all that the process may use.
            decision: The decoder and the batch size that the run has decided on; None if nobody has yet.

        Example:
            >>> session = MyEmbedder().open("cpu")  # doctest: +SKIP
            >>> vectors = [session.model(batch.images) for batch in session.batches([open_shard("00000.tar")])]
        """
        session = Session(self, device, images, cores, decision)
        _ = session.model
        return session

    def not_finite(self, device: str) -> str:
        """Return one line that says why a sample whose vector holds NaN or infinity is quarantined, and what helps."""
        return "the model gave NaN or infinity"

    @property
    def notice(self) -> str:
        """One line that a person should read before a run, or nothing."""
        return ""

    def precision_on(self, device: str) -> str:
        """What the model computes in on a device, such as "float32"; empty where that is the embedder's own affair."""
        return ""

    def accepts(self, decoder: str) -> bool:
        """Whether a shard that `decoder` decoded counts as done for this embedder."""
        return True

    def batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        """Batches of a stream of shards, by default shard by shard from `load_dataset_shard`, joined by id."""
        for number, shard in enumerate(shards):
            position = {sample_id: i for i, sample_id in reversed(list(enumerate(shard.ids)))}
            forgotten = set(range(len(shard.ids)))
            for images, metadata in self.load_dataset_shard(shard.path):
                samples = [_position(m, shard, position, self) for m in metadata]
                forgotten.difference_update(samples)
                yield ShardBatch(images, [Row(number, sample) for sample in samples])
            detail = f"{type(self).__name__} yielded no batch with this sample"
            yield ShardBatch(
                None, [], [Rejected(Row(number, i), Reason.NOT_EMBEDDED, detail) for i in sorted(forgotten)]
            )


def _position(metadata: dict[str, Any], shard: OpenShard, position: dict[str, int], embedder: object) -> int:
    name = f"{type(embedder).__name__}.load_dataset_shard({shard.path!r})"
    if shard.id_col not in metadata:
        raise InputError(f"{name} yields metadata without the id column {shard.id_col!r}; it has {list(metadata)}")
    sample_id = canonical_id(metadata[shard.id_col])
    if sample_id not in position:
        raise InputError(f"{name} yields id {sample_id!r}, which no sample of the shard has")
    return position[sample_id]
