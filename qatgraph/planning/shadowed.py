"""Rows that can never be chosen, since one in front of them takes all that they take: an error of the table.

Only what is sure is said: a row that several others take together is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qatgraph.planning.target import Row
    from qatgraph.specs import QuantSpec


def never_chosen(rows: Sequence[Row]) -> str:
    """The first row that can never be chosen, for one of its kinds, and the one that stands before it, as a sentence;
    empty if there is none."""
    for i, row in enumerate(rows):
        for kind in row.op.split("|"):
            before = (r for r in rows[:i] if kind in r.op.split("|") and r.id != row.id)
            front = next((r for r in before if takes_all_of(r, row)), None)
            if front is not None:
                return _sentence(kind, front, row)
    return ""


def _sentence(kind: str, front: Row, row: Row) -> str:
    other = (front.placement, front.kernel) != (row.placement, row.kernel)
    if other and takes_all_of(row, front):
        promises = " and ".join(f"{r.placement} as {r.kernel or 'no kernel of its own'}" for r in (front, row))
        return f"the rows '{front.id}' and '{row.id}' contradict each other: one and the same {kind} runs {promises}"
    return f"the row '{row.id}' is never chosen for a {kind}: '{front.id}' stands in front of it and takes all it takes"


def takes_all_of(front: Row, row: Row) -> bool:
    """Whether ``front`` fits every node, whatever is asked of it and stands around it, that ``row`` fits."""
    if front.placement == "int8" and row.placement != "int8":
        return False  # a node may be kept in float
    alike = all(
        (
            not front.rank or (row.rank and set(row.rank) <= set(front.rank)),
            front.dynamic in (None, row.dynamic),
            front.reads in (0, row.reads),
            front.depthwise in (None, row.depthwise),
            front.beyond in (None, row.beyond),
            front.batched <= row.batched,
            front.least_terms <= row.least_terms,
            set(front.not_read_by) <= set(row.not_read_by),
            # only who asks for such a grid gets it: of x, or of the weight
            not front.on_request or (row.on_request and front.dynamic_x == row.dynamic_x),
        )
    )
    return alike and _weight(front, row) and _bias(front, row) and (front.placement != "int8" or _around(front, row))


def _weight(front: Row, row: Row) -> bool:
    if not front.weight:  # an int8 row without a weight does not fit where one is asked for
        return front.placement != "int8" or not row.weight
    more = set(front.weight) - set(row.weight)
    same_wish = front.placement == "int8" or row.placement != "int8"  # other rows speak of a weight that is asked for
    return same_wish and _within(row.weight, front.weight) and all(s.axis in (None, 0) for s in more)


def _bias(front: Row, row: Row) -> bool:
    if not front.bias:
        return True
    same_wish = front.placement == "int8" or row.placement != "int8"
    return same_wish and bool(row.bias) and set(row.bias) <= set(front.bias)


def _around(front: Row, row: Row) -> bool:
    """Whether the neighbours of an int8 ``row`` let ``front`` be as well, and all of its grids can be those of it."""
    halves = ("", "inputs-int8", "readers-int8")
    weaker = front.needs in ("", row.needs) or (front.needs in halves and row.needs == "between-int8")
    same = all(getattr(front, key) == getattr(row, key) for key in ("moves", "fuses_after", "fuses_before"))
    reads = _within(row.x, front.x) or not (row.x or front.x)  # without a grid it does not fit where one is asked for
    writes = not front.out or _within(row.out, front.out)
    return weaker and same and reads and writes


def _within(some: tuple[QuantSpec, ...], more: tuple[QuantSpec, ...]) -> bool:
    return bool(some) and set(some) <= set(more)
