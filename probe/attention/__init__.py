"""Statistics of attention, by what they look at; the public face is ``probe.attention_maps``."""
