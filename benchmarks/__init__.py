"""Measurements, never tests: each module prints a table of ratios that were taken side by side in one process."""
