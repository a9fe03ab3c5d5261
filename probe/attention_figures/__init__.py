"""Results of ``attention_maps`` and of the attention experiments as ``plotly`` figures.

Nothing is computed here but where a mark goes, and means over cells that are narrower than a pixel. The rules of
``probe.figures`` hold: layers on y with 0 at the bottom, the sign ``◇`` at NoPE layers, transparent pages, a colour
scale for a dark one in ``layout.meta``. RoPE and NoPE layers have the same two colours everywhere, and chunk borders
are drawn wherever an axis holds positions or distances. The figures live in the modules of this package, by what they
draw.
"""

from probe.attention_figures.experiments import needle, temperature
from probe.attention_figures.heads import head_grid, induction, sinks
from probe.attention_figures.kinds import by_kind
from probe.attention_figures.lines import chunk_reach, distance_profile, entropy_by_position
from probe.attention_figures.maps import MAX_PANELS, attention_map, map_grid
from probe.attention_figures.parts import MAX_BORDERS, SEQUENTIAL
from probe.attention_figures.similarity import head_similarity

__all__ = [
    "MAX_BORDERS",
    "MAX_PANELS",
    "SEQUENTIAL",
    "attention_map",
    "by_kind",
    "chunk_reach",
    "distance_profile",
    "entropy_by_position",
    "head_grid",
    "head_similarity",
    "induction",
    "map_grid",
    "needle",
    "sinks",
    "temperature",
]
