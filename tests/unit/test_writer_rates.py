"""Whether compressing pays."""

from __future__ import annotations

import pytest

from asyncckpt.writer.rates import CompressionRates

MB = 10**6
ENOUGH_BYTES = 100 * MB


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def measured(compressed_mb_per_s: float, written_mb_per_s: float, num_bytes: int = ENOUGH_BYTES) -> CompressionRates:
    clock = Clock()
    rates = CompressionRates(clock)
    rates.note_compressed(num_bytes, num_bytes / MB / compressed_mb_per_s)
    with rates.writing(num_bytes):
        clock.now_s += num_bytes / MB / written_mb_per_s
    return rates


@pytest.mark.parametrize(
    ("compressed_mb_per_s", "written_mb_per_s", "num_cores", "is_worth"),
    [
        (1400, 500, 1, True),  # a disk that waits for nobody
        (1400, 1300, 1, True),
        (1400, 2700, 1, True),  # smaller is worth up to twice the time
        (1400, 2900, 1, False),  # NVMe, and training has all cores but one
        (1400, 6000, 1, False),
        (1400, 6000, 8, True),  # the same with cores to spare
    ],
)
def test_what_is_measured_decides(
    compressed_mb_per_s: float, written_mb_per_s: float, num_cores: int, is_worth: bool
) -> None:
    rates = measured(compressed_mb_per_s, written_mb_per_s)
    assert rates.is_worth_compressing(num_cores) == is_worth


def test_until_enough_is_known_chunks_are_compressed() -> None:
    assert CompressionRates().is_worth_compressing(1)
    assert measured(100, 10_000, 10 * MB).is_worth_compressing(1)


def test_every_save_judges_anew() -> None:
    rates = measured(100, 10_000)
    assert not rates.is_worth_compressing(1)
    rates.begin()
    assert rates.is_worth_compressing(1)


def test_threads_that_write_at_the_same_time_share_the_storage() -> None:
    clock = Clock()
    rates = CompressionRates(clock)
    rates.note_compressed(ENOUGH_BYTES, 0.1)  # 1 GB/s
    with rates.writing(ENOUGH_BYTES):
        clock.now_s += 0.02
        with rates.writing(ENOUGH_BYTES):
            clock.now_s += 0.06
    # 200 MB in 0.08 s are 2.5 GB/s; one thread alone seems to get 1.25.
    assert not rates.is_worth_compressing(1)


def test_a_write_that_fails_is_over() -> None:
    clock = Clock()
    rates = CompressionRates(clock)
    rates.note_compressed(ENOUGH_BYTES, 0.1)

    def fail() -> None:
        with rates.writing(ENOUGH_BYTES):
            clock.now_s += 0.01
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    clock.now_s += 100
    assert not rates.is_worth_compressing(1)
