"""``python -m probe`` is the command ``probe``."""

from probe.cli import app

app(prog_name="probe")
