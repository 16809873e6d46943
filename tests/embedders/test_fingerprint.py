"""What changes the fingerprint of an embedder, and what does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms

from embedders.errors import InputError
from embedders.fingerprint import of_value

SCRIPT = """
import enum, json, re
import numpy, torch
from pathlib import Path
from embedders import ImageEmbedder, TimmImageEmbedder


class Kind(enum.Enum):
    A = "a"


class Parent(ImageEmbedder):
    def helper(self):
        return {parent}

    def load_dataset_shard(self, tar_path):
        raise NotImplementedError

    def load_embedding_model(self, device):
        raise NotImplementedError


class Child(Parent):
    def __init__(self):
        self.function = lambda x: x + {lambda_}
        self.names = {{"b", "a", "c"}}
        self.options = {{"z": 1, "a": (2.0, None, Kind.A)}}
        self.pattern = re.compile("x+")
        self.where = Path("a/b")
        self.array = numpy.arange(4)
        self.tensor = torch.arange(4.0)
        self.object = Options({attribute})


class Options:
    def __init__(self, value):
        self.value = value


class Timm(TimmImageEmbedder):
    def __init__(self):
        super().__init__("test_vit", pretrained=False)
        self.extra = {attribute}

    def create_model(self):
        return super().create_model().to("cpu", {model})


if __name__ == "__main__":
    for made in (Child(), Timm()):
        print(json.dumps(made.fingerprint()))
"""
USUAL = {"parent": 1, "lambda_": 1, "attribute": 1, "model": "torch.float32"}


def fingerprints(folder: Path, script: str = SCRIPT, **changed: Any) -> list[dict[str, Any]]:
    """Those of the script's two embedders, taken in a process of its own."""
    path = folder / "script.py"
    path.write_text(script.format(**(USUAL | changed)))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_process_takes_the_same(tmp_path: Path) -> None:
    assert fingerprints(tmp_path) == fingerprints(tmp_path)  # their hash seeds differ


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({"parent": 2}, [True, False]),
        ({"lambda_": 2}, [True, False]),
        ({"attribute": 2}, [True, True]),
        ({"model": "torch.float64"}, [False, True]),
    ],
    ids=["a parent's method", "a lambda", "an attribute", "create_model"],
)
def test_code_and_state_change_it(tmp_path: Path, change: dict[str, Any], differ: list[bool]) -> None:
    usual, changed = fingerprints(tmp_path), fingerprints(tmp_path, **change)
    assert [a != b for a, b in zip(usual, changed, strict=True)] == differ


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        (np.zeros(2), np.zeros(2, np.float32)),
        (torch.float16, torch.float32),
        (transforms.Compose([transforms.Resize(8)]), transforms.Compose([transforms.Resize(9)])),
        (re.compile("a"), re.compile("b")),
        ([1, 2], (1, 2)),
        (1, "1"),
        (1, True),
        (len, print),
    ],
    ids=str,
)
def test_other_values_are_other_fingerprints(one: object, other: object) -> None:
    assert of_value(one) == of_value(one)
    assert json.dumps(of_value(one)) != json.dumps(of_value(other))


def test_the_same_model_has_the_same_fingerprint() -> None:
    def made(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())

    assert of_value(made(0)) == of_value(made(0))
    assert of_value(made(0)) != of_value(made(1))


@pytest.mark.parametrize(
    "value", [threading.Lock(), (i for i in range(3)), sys.stdout], ids=["lock", "generator", "file"]
)
def test_what_has_no_stable_form_is_refused_by_name(value: object) -> None:
    from tests.flows.test_keys import Scaled

    made = Scaled()
    made.held = value  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"^Scaled\.held \(.*\) cannot be pickled.*load_embedding_model"):
        made.fingerprint()


def test_what_refers_to_itself_is_refused() -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(ValueError, match="refers to itself"):
        of_value(knot)


def without_source(parent: str) -> type:
    """A class as an interpreter's session defines it, whose methods refer to it and to its parent."""
    names: dict[str, Any] = {}
    exec(
        "from embedders import ImageEmbedder\n"
        "def make():\n"
        "    class Mine(ImageEmbedder):\n"
        "        def load_dataset_shard(self, tar_path): return Mine\n"
        f"        def load_embedding_model(self, device): return super().{parent}(device)\n"
        "    return Mine\n",
        names,
    )
    return names["make"]()


def test_classes_without_source_have_a_fingerprint() -> None:
    one, same, other = (without_source(name)() for name in ("a", "a", "b"))
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() != other.fingerprint()


def test_hiding_the_main_modules_file_changes_nothing(tmp_path: Path) -> None:
    """As it is while worker processes start, beside which a run is planned."""
    hidden = "    import __main__; del __main__.__file__; __main__.__spec__ = None\n    for made in"
    usual = fingerprints(tmp_path)
    assert fingerprints(tmp_path, SCRIPT.replace("    for made in", hidden)) == usual


def test_use_changes_nothing() -> None:
    """Python notes things on classes that are pickled."""
    from tests.flows.test_keys import Scaled

    class Used(Scaled):
        """Not pickled before."""

    made = Used()
    before = made.fingerprint()
    made.__reduce_ex__(4)
    assert "__slotnames__" in vars(Used)
    assert made.fingerprint() == before
