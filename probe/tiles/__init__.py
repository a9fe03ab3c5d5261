"""What :mod:`probe.tiling` computes with: strips of queries, and the walk over the keys that they see."""
