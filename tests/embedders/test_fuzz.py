"""Inputs that the fuzzer once tripped over, and mutated tars: an index or one MalformedShard, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz_tar import CRASHES, check, seeds, signed

SEEDS = seeds()


@pytest.mark.parametrize("path", sorted(CRASHES.glob("*")), ids=lambda path: path.name)
def test_an_input_of_the_fuzzer(path: Path) -> None:
    data = path.read_bytes()
    check(signed(data[1:]) if data[:1] != b"\0" else data[1:])


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_are_tars_with_samples(seed: bytes) -> None:
    from embedders.tar import read_tar

    assert len(read_tar(seed).samples) >= 4
    check(seed)


@settings(deadline=2000, max_examples=300)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 1 << 13), st.binary(min_size=1, max_size=24)), max_size=6),
    st.integers(0, 1 << 14),
    st.booleans(),
)
def test_a_mutated_tar(seed: bytes, patches: list[tuple[int, bytes]], length: int, sign: bool) -> None:
    data = bytearray(seed)
    for at, patch in patches:
        data[at % len(data) : at % len(data) + len(patch)] = patch
    check(signed(bytes(data[:length])) if sign else bytes(data[:length]))


@settings(deadline=2000)
@given(st.binary(max_size=4096), st.booleans())
def test_any_bytes(data: bytes, sign: bool) -> None:
    check(signed(data) if sign else data)
