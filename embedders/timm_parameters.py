"""TimmParameters: what a TimmImageEmbedder is told, and what follows from it without loading the model."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from embedders import create_model
from embedders import precision as precisions
from embedders.base import ImageEmbedder
from embedders.errors import InputError
from embedders.fingerprint import cached_properties
from embedders.images import MAX_PIXELS
from embedders.loader import ModelInput
from embedders.open_loader import DecodeOptions, LoaderKind
from embedders.precision import Precision
from embedders.preprocess import NotConvertible, Preprocessing, sizes, timm_transform
from embedders.weights import Weights, resolve_weights

if TYPE_CHECKING:
    import torch

NOT_SENT = frozenset({"_session"})
"""Attributes that belong to a session; cached properties do not travel either."""


class TimmParameters(ImageEmbedder):
    """The parameters of a `TimmImageEmbedder`, and what follows from them without loading the model.

    Args:
        model_name: A timm name with or without a pretrained tag, `hf-hub:…` or `local-dir:…`.
        pretrained: Load the tag's weights; False gives random ones, the same on every worker.
        batch_size: Images per batch; "auto" chooses by device.
        num_threads_per_worker: Threads that decode; by default the processor cores of the worker's share.
        image_embedding_column: The name of the new column.
        normalize_embeddings: Scale each vector to length 1.
        autocast: float16 weights and arithmetic on a GPU; False for float32. A CPU computes in float32.
        use_index_files: Keep the shards' indexes in the output's index folder.
        checkpoint: A .safetensors or .pth file with the weights (loaded without pickle).
        loader: "dali", "reference" (Pillow and timm's own transform), or "auto": DALI where it can.
        decode: "exact" decodes on the CPU to Pillow's very pixels, "fast" on the GPU; "auto" times exact decoding once
            in a run and uses the GPU decoder only if exact decoding would slow the model down.
        exif: "apply" turns images by their EXIF orientation; timm's own loader does not.
        max_pixels: Images with more, by their header, go to quarantine undecoded.
        image_component: The extension of the image to embed where samples have several, such as "left.jpg"; or
            several of them, "jpg,png": the first one that a sample has.
        precision: "float32", "float16" or "bfloat16" on any device, instead of what `autocast` says. bfloat16 costs
            accuracy: a mean cosine of 0.9987 to float32 where float16 has 0.99998.
        compile_model: Always use torch.compile, or never; by default where the run is long enough to pay for it. A
            model that gives tokens is not compiled.
        output_tokens: Give the model's tokens too, as a layer named by the column and `_tokens`: what
            `forward_features` gives, (tokens, dimensions) per image, prefix tokens included, not normalised.

    Raises:
        InputError: A parameter is out of range.
    """

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
        output_tokens: bool = False,
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
        self.output_tokens = output_tokens

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a session and what is cached, but keep what identifies the weights, if that is known."""
        left_out = NOT_SENT | cached_properties(type(self))
        state = {k: v for k, v in vars(self).items() if k not in left_out}
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

        Raises:
            NotConvertible: It has no such form; only the reference loader follows it.
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

        Raises:
            InputError: Unknown model, weights that cannot be had, or that are another model's.
        """
        _ = self.weights
        if self.checkpoint is not None:
            self.create_model()

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the arrays that the loaded model gives: the column, and the tokens if they are asked for."""
        column = self.image_embedding_column
        return (column, f"{column}_tokens") if self.output_tokens else (column,)

    def fingerprint(self, layer: str | None = None) -> dict[str, Any]:
        """Return model, weights, preprocessing, precision and normalisation, and of a subclass its code and attributes.

        Args:
            layer: One of `layers`; the pooled vectors by default, whose fingerprint is the same with tokens beside it.

        Raises:
            InputError: The weights cannot be had, an attribute of a subclass has no stable representation, or there is
                no such layer.
        """
        if layer not in (None, *self.layers):
            raise InputError(f"{self.model_name} gives no layer {layer!r}; it gives {', '.join(self.layers)}")
        output = {"output": "tokens"} if layer not in (None, self.image_embedding_column) else {}
        timm = {
            "embedder": type(self).__qualname__,
            "model": self.model_name,
            "weights": self.weights.identity,
            "preprocessing": _plain(self.data_config),
            "precision": precisions.policy(self.precision, self.autocast),
            "normalized": self.normalize_embeddings,
        }
        return timm | self._choice_of_images() | output

    def _choice_of_images(self) -> dict[str, Any]:
        """Return what else decides which pixels are embedded; defaults are left out, so usual keys stay stable."""
        chosen = {"exif": self.exif, "max_pixels": self.max_pixels, "image_component": self.image_component}
        usual = {"exif": "ignore", "max_pixels": MAX_PIXELS, "image_component": None}
        return {name: value for name, value in chosen.items() if value != usual[name]}

    def create_model(self) -> torch.nn.Module:
        """Create the model as timm makes it, on the CPU in float32, without its classifier.

        Raises:
            InputError: The checkpoint does not fit.
        """
        return create_model.create_model(self.model_name, self.weights, self.checkpoint)

    def check_weights(self) -> None:
        """Prove that the weights found here are those that the run was planned with.

        Raises:
            InputError: They are others, such as an older file under the same path on this machine.
        """
        if self._planned_weights not in ("", self.weights.identity):
            raise InputError(
                f"{self.model_name}: the weights on {platform.node()} ({self.weights.identity}) are not those that the "
                f"run was planned with ({self._planned_weights}); give every worker the same file"
            )

    @property
    def decode_options(self) -> DecodeOptions:
        """How the images are decoded.

        Raises:
            InputError: DALI is asked for and cannot follow the model's transform.
        """
        kind, mode = LoaderKind.REFERENCE, "RGB"
        try:
            mode = self.preprocessing.mode
            if self.loader is not LoaderKind.REFERENCE:
                kind = LoaderKind.DALI
        except NotConvertible as why:
            if self.loader is LoaderKind.DALI:
                what = f"DALI cannot follow its transform ({why}); use --loader auto"
                raise InputError(f"{self.model_name}: {what}") from why
        return DecodeOptions(kind, self.decode, mode, self.exif == "apply", self.max_pixels, self.image_component)

    def model_input(self, device: str) -> ModelInput:
        """Return what the model wants of each decoded image."""
        try:
            preprocessing = self.preprocessing
        except NotConvertible:
            preprocessing = sizes(self.data_config)
        dtype = precisions.input_dtype(self.precision, self.autocast, device)
        return ModelInput(timm_transform(self.data_config), preprocessing, dtype)

    def model_dtype(self, device: str) -> torch.dtype:
        """Return what the model's weights and activations are on a device."""
        return precisions.model_dtype(self.precision, self.autocast, device)

    def precision_on(self, device: str) -> str:
        """Return what the model computes in on a device, such as "float32"."""
        return precisions.name_on(self.precision, self.autocast, device)

    def not_finite(self, device: str) -> str:
        """Return what a quarantine row says of NaN, with the way out where the model computed in half precision."""
        import torch

        what = super().not_finite(device)
        if self.model_dtype(device) != torch.float16:
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

    def accepts(self, decoder: str) -> bool:
        """Return whether a shard was decoded at least as exactly as asked for; if not, it is done again."""
        if self.loader is LoaderKind.REFERENCE:
            return decoder == "reference"
        return self.decode != "exact" or decoder != "fast"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(config.items())}
