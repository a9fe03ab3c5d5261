"""The parts of ``probe.routing_stats``, which is where their functions are called from."""
