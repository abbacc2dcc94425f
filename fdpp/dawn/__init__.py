"""DAWN (Luo et al., arXiv 2602.06953): commit what depends on committed positions, never two coupled ones at once.

The rule reads a dependency graph off the model's own attention. A is the attention averaged over heads and the last
layers; i <- j is an edge where query i attends to key j with at least `tau_edge`. Left out are the diagonal and sinks,
columns that attract more than `tau_sink` on average, whatever the query.

- `dependency_edges`: queries and keys in, edges of the block's positions out, one bit per key.
- `commit`: confidences and edges in, commit mask out.
- `select`: a whole denoising step, as `fdpp.select`.
- `Probe`: stands in for a decode's cache and keeps the queries and keys of the last layers.

The float64 specification is `fdpp.dawn.reference`.
"""

from fdpp.dawn.decide import commit
from fdpp.dawn.edges import dependency_edges
from fdpp.dawn.probe import Probe
from fdpp.dawn.rule import Dawn
from fdpp.dawn.step import select, softmax_maximum

__all__ = ["Dawn", "Probe", "commit", "dependency_edges", "select", "softmax_maximum"]
