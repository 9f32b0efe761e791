"""Estimated microseconds of what a placement took and of what it left; ``None`` where the target has no costs."""

from __future__ import annotations

from dataclasses import dataclass

from qatgraph.planning.choices import Choice
from qatgraph.planning.cost import Cost
from qatgraph.planning.partitions import Borders
from qatgraph.planning.target import Row


@dataclass(frozen=True)
class Prices:
    """``size``: elements of every value on the example batch."""

    cost: Cost | None
    borders: Borders
    size: dict[str, int]

    def taken(self, choice: Choice) -> float | None:
        """The node at its placement, without borders."""
        return self._kernel(choice, choice.row)

    def in_float(self, choice: Choice) -> float | None:
        return self._kernel(choice, None)

    def other(self, choice: Choice, row: Row) -> float | None:
        """The node by another row, with the quantizes that would have to be put in front of it for that."""
        kernel = self._kernel(choice, row)
        if kernel is None or self.cost is None or row.placement != "int8" or not row.x:
            return kernel
        there = {*self.borders.reads, *self.borders.writes}
        values = dict.fromkeys(value for _, value in choice.fact.inputs if value not in there)
        return kernel + self.cost.border_us([self.size[v] for v in values], [])

    def _kernel(self, choice: Choice, row: Row | None) -> float | None:
        if self.cost is None:
            return None
        int8 = row is not None and row.placement == "int8"
        inside = int8 and row is not None and not row.kernel
        return 0.0 if inside else self.cost.node_us(choice.fact, int8=int8)
