"""TimmImageEmbedder: any timm model, fed by DALI or by the reference loader, giving the vectors timm gives.

The class holds parameters only. What is loaded, opened or measured is in the `TimmSession` that `open` gives.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from embedders.decision import Decision
from embedders.fingerprint import of_classes
from embedders.shard_batch import ShardBatch, encoded_images, shard_batch
from embedders.timm_parameters import NOT_SENT, TimmParameters
from embedders.timm_session import TimmSession, decide_first
from embedders.webdataset import OpenShard, open_shard

if TYPE_CHECKING:
    import torch


class TimmImageEmbedder(TimmParameters):
    """Embeds images with a timm model: pooled features, or the projection where the model has one (CLIP and kin).

    Its parameters are those of `TimmParameters`.

    Example:
        >>> embedder = TimmImageEmbedder("vit_base_patch16_clip_224.openai", batch_size=256)
        >>> session = embedder.open("cuda")
        >>> vectors = [session.model(batch.images) for batch in session.batches([open_shard("00000.tar")])]
    """

    def fingerprint(self, layer: str | None = None) -> dict[str, Any]:
        """Return what the parameters tell of the vectors, and of a subclass its code and attributes.

        Args:
            layer: One of `layers`; the pooled vectors by default.

        Raises:
            InputError: The weights cannot be had, an attribute of a subclass has no stable representation, or there is
                no such layer.
        """
        found = super().fingerprint(layer)
        if type(self) is TimmImageEmbedder:
            return found
        known = self.execution_parameters | NOT_SENT | {"_planned_weights"} | PARAMETERS
        return found | {"classes": of_classes(type(self), TimmImageEmbedder), "attributes": self._attributes(known)}

    def open(self, device: str, images: int = 0, cores: int = 0, decision: Decision | None = None) -> TimmSession:
        """Load the model on a device, together with all that is measured there.

        Args:
            device: "cuda" or "cpu".
            images: How many images this worker will probably see; 0 if unknown. Compiling pays where they are many.
            cores: How many processor cores it has for itself; 0 for all that the process may use.
            decision: The decoder and the batch size that the run has decided on. Without one, the session decides by
                the first shard that it gets.

        Raises:
            InputError: The weights are not those that the run was planned with, or do not fit.
        """
        session = TimmSession(self, device, images, cores, decision)
        _ = session.model
        return session

    def _session_on(self, device: str) -> TimmSession:
        """Return the session that this copy belongs to, or a new one for a call outside of any."""
        session = self._own_session()
        return session if session is not None and session.device == device else TimmSession(self, device)

    def _own_session(self) -> TimmSession | None:
        """Return the session that this copy belongs to, if it is one."""
        reference: weakref.ref[TimmSession] | None = vars(self).get("_session")
        return reference() if reference else None

    def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], Any]:
        """Load the timm model in evaluation mode, made fast for batches of `input_batch(device)`.

        Returns:
            A callable from (n, channels, height, width) to (n, dimensions) float32, normalised if asked for. With
            `output_tokens`, to a dict from each of `layers` to its array: these, and (n, tokens, dimensions) float32.

        Raises:
            InputError: The weights are not those that the run was planned with, or do not fit, or the model has no
                tokens to give.
        """
        return self._session_on(device).load()

    def input_batch(self, device: str) -> int:
        """Return the images of a full batch on `device`; on a GPU with "auto" a session measures it."""
        return self._session_on(device).batch_size

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """Yield `(images, metadata)` of one local tar, the id under "key", on the GPU where there is one.

        `images` is (n, channels, height, width), normalised, float32 or float16.
        """
        import torch

        session = self._own_session()
        device = session.device if session else "cuda" if torch.cuda.is_available() else "cpu"
        shard = open_shard(tar_path, image_component=self.image_component)
        batches = self._own_batches if self._goes_shard_by_shard() else self.batches
        for batch in batches([shard], device):
            if batch.rows:
                yield batch.images, [{shard.id_col: shard.ids[row.sample]} for row in batch.rows]

    def _goes_shard_by_shard(self) -> bool:
        """Return whether a subclass overrides `load_dataset_shard`, so that `batches` goes through that."""
        return type(self).load_dataset_shard is not TimmImageEmbedder.load_dataset_shard

    def batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        """Yield batches that run on across shards; within a session, from one loader that lives as long as it does."""
        yield from (
            super().batches(shards, device) if self._goes_shard_by_shard() else self._own_batches(shards, device)
        )

    def _own_batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        session = self._session_on(device)
        try:
            shards = decide_first([session], shards)
            for loaded in session.loader.batches(encoded_images(shards)):
                yield shard_batch(loaded[session.input_number])
        finally:
            if session.embedder is not self:  # it was opened for this call
                session.close()


PARAMETERS = frozenset(inspect.signature(TimmImageEmbedder.__init__).parameters)
"""Attributes of a subclass that the fingerprint of its parent covers."""
