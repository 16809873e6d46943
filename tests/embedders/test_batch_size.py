"""The choice of a batch size, from curves as GPUs give them."""

from __future__ import annotations

from embedders.batch_size import Measured, choose, climb, halve


def curve(ceiling: float, half: float, fits: int = 10**9) -> list[Measured]:
    """Throughput that saturates: half of `ceiling` at a batch of `half`; nothing fits beyond `fits`."""
    return list(climb(lambda size: ceiling * size / (size + half) if size <= fits else None))


def test_the_smallest_size_on_the_flat_part() -> None:
    assert choose([Measured(16, 400.0), Measured(32, 700.0), Measured(64, 980.0), Measured(128, 1000.0)]).size == 64


def test_a_small_model_wants_large_batches() -> None:
    assert choose(curve(30_000, 100)).size == 1024


def test_a_large_model_is_flat_early_and_not_measured_further() -> None:
    measured = curve(2_000, 0.5)
    assert choose(measured).size == 16
    assert measured[-1].size < 1024


def test_what_does_not_fit_is_not_chosen() -> None:
    assert choose(curve(30_000, 100, fits=200)).size == 128


def test_a_dip_does_not_end_the_climb() -> None:
    rates = {16: 100.0, 32: 190.0, 64: 180.0, 128: 400.0, 256: 405.0, 512: 404.0, 1024: 1e9}
    measured = list(climb(rates.__getitem__))
    assert choose(measured).size == 128
    assert measured[-1].size == 512


def test_a_decided_size_is_halved_where_it_does_not_fit() -> None:
    asked: list[int] = []

    def rate_of(size: int) -> float | None:
        asked.append(size)
        return 10.0 * size if size <= 100 else None

    assert halve(rate_of, 64) == Measured(64, 640.0)
    assert halve(rate_of, 512) == Measured(64, 640.0)
    assert asked == [64, 512, 256, 128, 64]
    assert halve(lambda size: None, 5) == Measured(1, 0.0)
