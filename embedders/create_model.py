"""Create a timm model with the weights that `embedders.weights` resolved, and prove that a checkpoint fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedders.errors import InputError, one_line
from embedders.weights import RANDOM, Weights

if TYPE_CHECKING:
    import torch


def create_model(model_name: str, weights: Weights, checkpoint: str | None) -> torch.nn.Module:
    """Create the model as timm makes it, on the CPU in float32, without its classifier.

    Args:
        model_name: The name that `weights` was resolved from.
        weights: The resolved weights.
        checkpoint: A file with the weights, in place of the name's own.

    Returns:
        A module from (n, channels, height, width) to (n, dimensions). Random weights are the same on every worker.

    Raises:
        InputError: The checkpoint cannot be read or does not fit.
    """
    if checkpoint is not None:
        model = _with_checkpoint(model_name, weights, checkpoint)
    else:
        model = _create(model_name, weights, seed=0)
    theirs = checkpoint is not None or model_name.startswith(("local-dir:", "hf-hub:", "hf_hub:"))
    return _without_labels(model) if theirs and _may_have_labels(weights) else model


def _create(model_name: str, weights: Weights, seed: int, **overlay: Any) -> torch.nn.Module:
    import timm
    import torch

    head: dict[str, Any] = {} if weights.may_project else {"num_classes": 0}
    torch.manual_seed(seed)  # random weights must be the same on every worker
    return timm.create_model(model_name, pretrained=weights.identity != RANDOM, **overlay, **head)


def _with_checkpoint(model_name: str, weights: Weights, checkpoint: str) -> torch.nn.Module:
    """Create the model from a checkpoint file that holds every one of its tensors.

    timm loads what fits. What it left random differs from seed to seed, so two models show what the file lacks.
    """
    import torch

    overlay = {"pretrained_cfg_overlay": {"state_dict": read_checkpoint(checkpoint), "source": ""}}
    unfit = f"checkpoint {checkpoint!r} does not fit {model_name!r}"
    try:
        model = _create(model_name, weights, seed=0, **overlay)
        state, other = model.state_dict(), _create(model_name, weights, seed=1, **overlay).state_dict()
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{unfit}: {one_line(error, limit=200)}") from error
    missing = [name for name in state if not torch.equal(state[name], other[name])]
    if missing:
        raise InputError(f"{unfit}: it lacks {len(missing)} of {len(state)} tensors, such as {missing[0]}")
    return model


def _may_have_labels(weights: Weights) -> bool:
    """Return whether a head as wide as a projection may be a classifier; EVA-CLIP's are told by their width alone."""
    return weights.may_project and not weights.architecture.startswith("eva")


def _without_labels(model: torch.nn.Module) -> torch.nn.Module:
    """Remove the head if it turns out to be a classifier.

    CLIP's projections have no bias, which timm fills in as zeros, and a trained classifier has one. Only EVA-CLIP's
    projections have one as well.
    """
    classifier: Any = model
    bias = getattr(classifier.get_classifier(), "bias", None)
    if bias is not None and bool(bias.any()):
        classifier.reset_classifier(0)
    return model


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a state dict from safetensors, or from a torch file without running its pickle.

    Raises:
        InputError: The file is damaged, or of another kind.
    """
    from timm.models import load_state_dict

    try:
        state: dict[str, Any] = load_state_dict(path, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each raise their own
        raise InputError(f"cannot read checkpoint {path!r}: {one_line(error, limit=200)}") from error
    return state
