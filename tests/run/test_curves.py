"""The curves of a run: no dot is hidden by another."""

import pytest

from mosaic_fast.run.summary import _mark


@pytest.mark.parametrize("values", [[0.99, 1.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
def test_dots_that_coincide_are_rings_around_each_other(values: list[float]):
    """Each next one at a place is wider and hollow; the same value at another place is a dot."""
    drawn, marks = [], []
    for value in values:
        marks.append(_mark(drawn, 60.0, value))
        drawn.append((60.0, value))
    for i, value in enumerate(values):
        near = [j for j in range(i) if abs(values[j] - value) < 0.02]
        assert ("fillstyle" in marks[i]) == bool(near)
        assert all(marks[i]["markersize"] > marks[j]["markersize"] for j in near)
    assert _mark(drawn, 0.0, values[0]) == {"marker": "o", "markersize": 7}
