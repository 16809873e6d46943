"""What a timm model computes in: the precision that a user asks for, and the dtype that follows from it on a device."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Precision(enum.StrEnum):
    """What a model computes in."""

    AUTO = "auto"
    """float16 on a GPU if `autocast`, else float32."""
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8"
    """float16 with linear layers in float8."""


def model_dtype(precision: Precision, autocast: bool, device: str) -> torch.dtype:
    """Return the dtype of the model's weights and activations on a device; float8 layers sit in a float16 model."""
    import torch

    if precision is Precision.FLOAT8:
        return torch.float16
    if precision is not Precision.AUTO:
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    return torch.float16 if autocast and device.startswith("cuda") else torch.float32


def input_dtype(precision: Precision, autocast: bool, device: str) -> torch.dtype:
    """Return the dtype of the images that the loader gives: half the bytes where the model halves them anyway.

    DALI has no bfloat16, so models in bfloat16 get float16 images.
    """
    import torch

    half = model_dtype(precision, autocast, device) != torch.float32 and device.startswith("cuda")
    return torch.float16 if half else torch.float32


def name_on(precision: Precision, autocast: bool, device: str) -> str:
    """Return what a model computes in on a device, as users and records name it, such as "float32"."""
    if precision is Precision.FLOAT8:
        return str(precision)
    return str(model_dtype(precision, autocast, device)).removeprefix("torch.")


def policy(precision: Precision, autocast: bool) -> str:
    """Return the precision as the fingerprint says it: `autocast` is a policy, whatever device a worker has."""
    if precision is not Precision.AUTO:
        return str(precision)
    return "float16 on a GPU" if autocast else "float32"
