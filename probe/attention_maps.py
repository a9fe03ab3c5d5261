"""Statistics of attention: what a recording's ``/attention`` and ``/attention_profiles`` say about where heads look.

Every function takes that Dataset, or the whole recording, and returns a DataArray or Dataset whose dims are named after
what they hold. A mean is over a sample's recorded queries first, then over samples, each counting the same; samples of
which no query was recorded are left out. What is undefined is NaN. A store is read one layer at a time, so that it need
not fit into memory.

Bounds hold at ``level`` (95 % unless told otherwise) for one number at a time, over samples; where they would not hold
they are NaN. Only :func:`query_mean` speaks of the samples themselves, whose queries may have been drawn at random. The
functions live in ``probe.attention``, by what they look at.
"""

from probe.attention.copying import induction_score, needle_score
from probe.attention.heads import head_mean, query_mean, segment_mass, sinks
from probe.attention.kinds import by_kind, chunk_reach, position_profile
from probe.attention.profiles import distance_profile, head_similarity

__all__ = [
    "by_kind",
    "chunk_reach",
    "distance_profile",
    "head_mean",
    "head_similarity",
    "induction_score",
    "needle_score",
    "position_profile",
    "query_mean",
    "segment_mass",
    "sinks",
]
