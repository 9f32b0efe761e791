"""networkx views: never storage, only questions about shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import networkx as nx


def partitions(edges: Iterable[tuple[str, str]], placement: Mapping[str, str]) -> list[tuple[str, tuple[str, ...]]]:
    """Maximal connected groups of nodes with one placement: ``(placement, names)``.

    ``edges`` are producer -> consumer pairs over the names in ``placement``; names keep its order.
    """
    view: nx.Graph[str] = nx.Graph()
    view.add_nodes_from(placement)
    view.add_edges_from((a, b) for a, b in edges if placement[a] == placement[b])
    rank = {name: i for i, name in enumerate(placement)}
    groups = [tuple(sorted(c, key=rank.__getitem__)) for c in nx.connected_components(view)]
    return sorted(((placement[g[0]], g) for g in groups), key=lambda p: rank[p[1][0]])
