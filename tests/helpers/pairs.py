"""Parameters of two kinds, each of one with each of the other: for the long matrix. A fast run has
every one of either kind, but not all of their pairs."""

import itertools

import pytest


def params(named):
    """Parameters named as the keys of a dict, whose values are tuples of arguments."""
    return [pytest.param(*values, id=name) for name, values in named.items()]


def pairs(rows, columns, one_in):
    """Each of `rows` with each of `columns`, which are pytest.params, those of a fast run being
    one in so many."""
    made = []
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        # From row to row another column, and from one round of them to the next as well.
        is_fast = (i + i // one_in + j) % one_in == 0
        made.append(
            pytest.param(
                *row.values,
                *column.values,
                id=f"{row.id}-{column.id}",
                marks=() if is_fast else pytest.mark.slow,
            )
        )
    return made
