"""The explorer: the text of a recording in the notebook, every token coloured by its expert.

The browser holds all layers of the document on show, so a change of layer costs no round trip; only another document is
asked from the kernel. What is on show can be read and set from Python: ``explorer.sample`` and ``explorer.layer``.
"""

from __future__ import annotations

import json
import operator
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import traitlets
import xarray as xr

from probe import figures, routing_stats, schema, text_view, titles
from probe.schema import ProbeError

TEXT_BYTES = 4_000_000
"""Routing numbers that one document may send to the browser, before base64; 8,000 tokens of 48 layers are 2.3 MB."""

TOKENS_SHOWN = 20_000
"""Tokens that one document may put on the page."""

TOKENS_STATIC = 500
"""Tokens that stay readable in a saved notebook where no widget can run."""

PLOTLY_MIMETYPE = "application/vnd.plotly.v1+json"
FIGURE_CONFIG = {"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage"]]}

_ASSETS = Path(__file__).parent / "assets" / "widgets"


def explore(recording: xr.DataTree, *, sample: int = 0, layer: int | None = None) -> Explorer:
    """Show the text of a recording, every token coloured by its expert, with a choice of document and layer.

    Parameters
    ----------
    recording : a whole recording: ``/routing``, ``/samples`` and ``/vocabulary`` are read.
    sample : index into ``/samples`` of the document to begin with.
    layer : the decoder's own index of the layer to begin with; the middle one if not given.

    Returns
    -------
    Widget whose traits ``sample`` and ``layer`` follow what is on show, and change it when they are set.

    Raises
    ------
    SchemaError
        If a group or variable is missing; names it.
    ProbeError
        If the recording holds no document, or not this sample or layer; names those that it holds.
    """
    return Explorer(recording, sample=sample, layer=layer)


class TextView(anywidget.AnyWidget):
    """One document in the browser, with the controls; ``Explorer`` holds it and fills it.

    ``documents`` names all documents for the choice, ``view`` is the HTML of the one that is ``sample``.
    """

    documents: traitlets.List[Any] = traitlets.List().tag(sync=True)
    view = traitlets.Unicode().tag(sync=True)
    sample = traitlets.Int().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)

    _esm = traitlets.Unicode().tag(sync=True)
    _css = traitlets.Unicode().tag(sync=True)

    @traitlets.default("_esm")
    def _read_script(self) -> str:
        return text_view.script() + (_ASSETS / "explorer.js").read_text(encoding="utf-8")

    @traitlets.default("_css")
    def _read_style(self) -> str:
        return style()


class Explorer(ipywidgets.VBox):
    """What :func:`explore` shows: the text above, the load of its experts below.

    ``sample`` is an index into ``/samples``, ``layer`` the decoder's own index of a layer. Both are traits: set them to
    change what is on show, observe them to hear when someone moves the controls.
    """

    sample = traitlets.Int()
    layer = traitlets.Int()

    def __init__(self, recording: xr.DataTree, *, sample: int = 0, layer: int | None = None) -> None:
        self._recording = recording
        self._routing = schema.group(recording, "routing")
        self._samples = schema.group(recording, "samples")
        schema.require(self._routing, "expert_index", "router_logit", "router_margin", "token_id", "attention_kind")
        schema.require(schema.group(recording, "vocabulary"), "token_id", "piece")
        self._layers = [int(number) for number in self._routing["layer"].values]
        if not self._samples.sizes["sample"] or not self._layers:
            raise ProbeError("this recording holds no document to explore: record at least one text")
        self._text = TextView(documents=_documents(self._samples))
        self._figure = ipywidgets.Output()
        super().__init__([self._text, self._figure])
        self.add_class("probe-explorer-box")
        # Set one after the other, each is checked before anything is shown.
        self.layer = self._layers[len(self._layers) // 2] if layer is None else operator.index(layer)
        self.sample = operator.index(sample)
        self._show_document()
        self.observe(lambda change: self._show_document(), "sample")
        self.observe(lambda change: self._show_load(), "layer")
        for name in ("sample", "layer"):
            traitlets.link((self, name), (self._text, name))

    @traitlets.validate("sample")
    def _known_sample(self, proposal: Any) -> int:
        schema.require_sample(proposal["value"], self._samples.sizes["sample"])
        return proposal["value"]

    @traitlets.validate("layer")
    def _known_layer(self, proposal: Any) -> int:
        schema.require_layer(proposal["value"], self._layers)
        return proposal["value"]

    def _show_document(self) -> None:
        self._document = text_view.document(self._recording, self.sample, max_tokens=_most_tokens(self._routing))
        self._text.view = text_view.view_html([self._document], layer=self.layer)
        self._show_load()

    def _show_load(self) -> None:
        """Draw the figure anew: an Output keeps it in the widget's state, where no kernel is needed to see it."""
        load = routing_stats.document_load(self._samples, sample=self.sample, layer=self.layer)
        figure = figures.document_load(load, colours=self._colours(), title=titles.document_load(load))
        drawing = json.loads(figure.to_json()) | {"config": FIGURE_CONFIG}
        data = {PLOTLY_MIMETYPE: drawing, "text/plain": figure.layout.title.text}
        self._figure.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def _colours(self) -> list[str]:
        """The colour that each expert has in the text."""
        first = self._document.expert[self._layers.index(self.layer), :, 0]
        slots = text_view.colour_slots(np.bincount(first, minlength=self._document.n_experts))
        return [text_view.PALETTE[slot] if slot >= 0 else text_view.NEUTRAL for slot in slots]

    def __repr__(self) -> str:
        return f"Explorer(sample={self.sample}, layer={self.layer})"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The widget, and beside it what stays readable where no widget can run: a page that was exported, say."""
        shown = text_view.document(self._recording, self.sample, max_tokens=TOKENS_STATIC)
        return super()._repr_mimebundle_(**options) | {"text/html": static_html(shown, layer=self.layer)}


def style() -> str:
    """The style sheet of the explorer: everything sits below its own class, so that nothing leaks into the notebook."""
    own = (_ASSETS / "explorer.css").read_text(encoding="utf-8")
    return f".probe-explorer {{\n{text_view.style()}\n}}\n{own}"


def static_html(shown: text_view.Document, *, layer: int) -> str:
    """A document at one layer without any script: heading, legend and text, a tooltip on every token."""
    nope = shown.nope[shown.layers.index(layer)]
    heading = f"{shown.name} · {shown.domain} · layer {text_view.layer_label(layer, nope)}"
    cut = f"<p>The first {shown.n_shown:,} of {shown.n_tokens:,} tokens.</p>" if shown.n_shown < shown.n_tokens else ""
    return (
        f'<div class="probe-explorer"><style>{style()}</style><div class="probe-text"><p>{escape(heading)}</p>'
        f"{text_view.legend_html(shown, layer=layer)}"
        f'<div class="probe-box">{text_view.tokens_html(shown, layer=layer)}{cut}</div></div></div>'
    )


def _documents(samples: xr.Dataset) -> list[dict[str, Any]]:
    """Name, domain and length of every document, for the choice."""
    columns = (samples[name].values.tolist() for name in ("name", "domain", "n_tokens"))
    return [
        {"name": str(name), "domain": str(domain), "tokens": int(n_tokens)}
        for name, domain, n_tokens in zip(*columns, strict=True)
    ]


def _most_tokens(routing: xr.Dataset) -> int:
    """How many tokens of one document to show, so that the browser stays quick."""
    per_token = routing.sizes["layer"] * (4 * routing.sizes["slot"] + 4)
    return min(TOKENS_SHOWN, max(TEXT_BYTES // per_token, 1))
