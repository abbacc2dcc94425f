"""DAWN (Luo et al., arXiv 2602.06953): commit what depends on committed positions, never two coupled ones at once.

The rule reads a dependency graph off the model's own attention. A is the attention averaged over heads and the last
layers; i <- j is an edge where query i attends to key j with at least `tau_edge`. The diagonal is left out, and so are
sinks: columns that attract more than `tau_sink` on average over the queries.

- `dependency_edges`: queries and keys in, edges of the block's positions out, one bit per key.
- `commit`: confidences and edges in, commit mask out.
- `Dawn`: the rule, which sees a forward's queries and keys through `fdpp.attention.Probe`.

The float64 specification is `fdpp.rules.dawn.reference`.
"""

from fdpp.rules.dawn.decide import commit
from fdpp.rules.dawn.edges import dependency_edges
from fdpp.rules.dawn.rule import Dawn, Dependencies

__all__ = ["Dawn", "Dependencies", "commit", "dependency_edges"]
