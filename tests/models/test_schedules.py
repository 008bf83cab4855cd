from __future__ import annotations

import pytest

from perturbed.models.nn.schedules import fall_linearly, warm_up_linearly


def test_weights_at_the_boundaries():
    assert warm_up_linearly(0, 0) == 1.0
    assert [warm_up_linearly(epoch, 3) for epoch in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [warm_up_linearly(epoch, 1, delay=2) for epoch in range(5)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_never_leaves_the_unit_interval_and_never_falls():
    weights = [warm_up_linearly(epoch, 7, delay=3) for epoch in range(40)]
    assert weights == sorted(weights)
    assert weights[0] == 0.0
    assert weights[-1] == 1.0
    assert weights.index(1.0) == 3 + 7


@pytest.mark.parametrize("arguments", [(-1, 3, 0), (0, -1, 0), (0, 3, -2)])
def test_negative_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="negative"):
        warm_up_linearly(*arguments)


def test_falling_at_the_boundaries():
    assert [fall_linearly(epoch, 5, 0.4, 0.0) for epoch in range(5)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert {fall_linearly(epoch, 5, 0.4, 1.0) for epoch in range(5)} == {0.4}
    assert fall_linearly(0, 1, 0.4, 0.1) == 0.4
