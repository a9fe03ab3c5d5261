"""Statistics of routing: what a recording's ``/routing`` says about where tokens go.

Every function takes that Dataset, or the whole recording, and returns a DataArray or Dataset whose dims are named
after what they hold. ``by="domain"``, or any other coord on ``token``, splits the tokens and puts that dim first;
several coords make several dims. A group that no token fell into is NaN. An expert's number means nothing across
layers. A store is read block by block, so that it need not fit into memory.

Bounds hold at ``level`` (95 % unless told otherwise) for one number at a time, and resample documents; where they would
not hold they are NaN. The functions live in ``probe.routing``, by what they look at.
"""

from probe.routing.card import expert_card
from probe.routing.flow import coactivation, repetition, transition
from probe.routing.information import mutual_information, vocabulary
from probe.routing.load import balance_loss, document_load, expert_load, imbalance, load_interval
from probe.routing.margins import gate_histogram, margin, margin_histogram, z_loss
from probe.routing.outputs import saliency, super_experts
from probe.routing.pairs import compare, flips, saturation
from probe.routing.paths import paths
from probe.routing.serving import capacity, device_load, distinct_experts
from probe.routing.similarity import divergence, signature
from probe.routing.specialization import specialization
from probe.routing.tokens import token_contexts, top_tokens

__all__ = [
    "balance_loss",
    "capacity",
    "coactivation",
    "compare",
    "device_load",
    "distinct_experts",
    "divergence",
    "document_load",
    "expert_card",
    "expert_load",
    "flips",
    "gate_histogram",
    "imbalance",
    "load_interval",
    "margin",
    "margin_histogram",
    "mutual_information",
    "paths",
    "repetition",
    "saliency",
    "saturation",
    "signature",
    "specialization",
    "super_experts",
    "token_contexts",
    "top_tokens",
    "transition",
    "vocabulary",
    "z_loss",
]
