"""Results of ``fp8_error`` as ``plotly`` figures.

Nothing is computed here but where a mark goes, and which of many cells is the worst. The rules of ``probe.figures``
hold: layers on y with 0 at the bottom, the sign ``◇`` at NoPE layers, transparent pages, a colour scale for a dark one
in ``layout.meta``. A recipe has the same colour and the same symbol in every figure, and the noise floors ``bf16`` and
``fp32`` are always drawn, in grey. What has no place on an axis, such as an infinite SQNR or a share of 0 on a log
axis, stands beside it under its own name. The figures live in the modules of this package, by what they draw.
"""

from probe.fp8_figures.activations import activation_amax, activation_loss, activation_percentiles
from probe.fp8_figures.drift import drift_by_layer
from probe.fp8_figures.flips import flips_by_domain, flips_by_layer, flips_by_margin
from probe.fp8_figures.parts import FigureChoiceError
from probe.fp8_figures.rows import loss_by_domain, loss_change
from probe.fp8_figures.sensitivity import sensitivity
from probe.fp8_figures.weights import weight_sqnr

__all__ = [
    "FigureChoiceError",
    "activation_amax",
    "activation_loss",
    "activation_percentiles",
    "drift_by_layer",
    "flips_by_domain",
    "flips_by_layer",
    "flips_by_margin",
    "loss_by_domain",
    "loss_change",
    "sensitivity",
    "weight_sqnr",
]
