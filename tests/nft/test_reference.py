"""Comparing a rerun with a reference curve."""

from nft.reference import comparable, compare


def test_each_metric_is_equal_close_or_different():
    expected = [{"epoch": 1, "a": 1.0, "b": 1.0, "c": 1.0}, {"epoch": 2, "a": 2.0, "b": 2.0, "c": 2.0}]
    found = [{"epoch": 1, "a": 1.0, "b": 1.01, "c": 1.0}, {"epoch": 2, "a": 2.0, "b": 2.0, "c": 3.0}]
    verdicts = {name: verdict for name, verdict, _ in compare(expected, found)}
    assert verdicts == {"a": "equal", "b": "close", "c": "different"}


def test_a_metric_or_epoch_that_is_gone_or_not_finite_is_different():
    expected = [{"epoch": 1, "a": 1.0, "b": 1.0}, {"epoch": 2, "a": 1.0, "b": 1.0}]
    found = [{"epoch": 1, "a": 1.0, "b": float("nan")}]
    assert {verdict for _, verdict, _ in compare(expected, found)} == {"different"}


def test_the_worst_epoch_is_told():
    expected = [{"epoch": 1, "a": 1.0}, {"epoch": 2, "a": 1.0}]
    ((_, _, detail),) = compare(expected, [{"epoch": 1, "a": 1.1}, {"epoch": 2, "a": 4.0}])
    assert detail.startswith("epoch 2: 1 expected, 4.0 found")


def test_speed_is_not_compared():
    assert comparable({"epoch": 1, "seconds/train": 2.0, "images_per_second": 3.0, "a": 1.0}) == {"epoch": 1, "a": 1.0}
