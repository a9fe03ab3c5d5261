"""What FP8 does to a model: to its weights, its activations, its routing and its output, beside what BF16 itself does.

The reference is the model in BF16, however it was loaded. Every difference is measured beside two noise floors: BF16
with other kernels, and float32. A recipe says what is rounded and how; :func:`recipes` lists those that there are, and
a ``Recipe`` of one's own does as well. Experiments that run a model leave it as it was, to the bit. The functions live
in ``probe.fp8``, by what they look at.
"""

from probe.float8 import formats, quantize
from probe.fp8.activations import activation_range
from probe.fp8.drift import drift, noise_floor
from probe.fp8.flips import flip_probability, flip_share, flips_by_margin, loss_by_domain, loss_change
from probe.fp8.sensitivity import sensitivity
from probe.fp8.weights import weight_error
from probe.recipes import Recipe, recipes

__all__ = [
    "Recipe",
    "activation_range",
    "drift",
    "flip_probability",
    "flip_share",
    "flips_by_margin",
    "formats",
    "loss_by_domain",
    "loss_change",
    "noise_floor",
    "quantize",
    "recipes",
    "sensitivity",
    "weight_error",
]
