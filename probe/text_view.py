"""The text of a sample, every token coloured by its expert: HTML for the report and for the notebook.

Two steps. :func:`document` turns one sample of a recording into a plain :class:`Document`: the text that each token
shows, and the router's numbers. :func:`tokens_html` and :func:`legend_html` draw it for one layer, :func:`view_html`
draws a whole view with controls; ``assets/report/text_view.js`` recolours what they drew, so a change of layer costs no
round trip.

A token of a byte BPE may end inside a UTF-8 character. Such a character is shown once, on the token that completes it;
the tokens that hold only its first bytes stay where they are, as narrow boxes without a letter. So the shown text, read
from end to end, is the original text.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from probe import schema

PALETTE = (
    "#0a6cfe",
    "#fccc0e",
    "#8c2769",
    "#53e9c3",
    "#ec8513",
    "#5731c1",
    "#a8b47b",
    "#da406a",
    "#005c43",
    "#c2caff",
    "#977006",
    "#19a5fd",
    "#cd90b9",
    "#4f5501",
    "#7b6b9b",
    "#329581",
)
"""Colours of up to 16 experts; see ``tests/test_text_view.py`` for how far apart they stay."""

NEUTRAL = "#8a8f98"
"""Colour of every expert beyond the palette."""

NOPE_SIGN = "◇"
"""Marks a layer whose attention has no positions (NoPE), in every figure."""

ASSETS = Path(__file__).parent / "assets" / "report"

_BIDI_CONTROLS = {0x202A, 0x202B, 0x202C, 0x202D, 0x202E, 0x2066, 0x2067, 0x2068, 0x2069}
_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
_MARKED = re.compile(r" +|\t|\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class TokenText:
    """What one token shows.

    ``text`` holds the characters that the token completes, so it may be empty; ``note`` says in words which bytes a
    token shares with a neighbour, and is empty for most; ``broken`` says that bytes in it are part of no character at
    all.
    """

    text: str
    note: str = ""
    broken: bool = False


@dataclass(frozen=True)
class Document:
    """One sample, ready to draw: ``tokens`` and the router's numbers (layer, token[, slot]) of as many tokens."""

    name: str
    domain: str
    n_tokens: int
    tokens: list[TokenText]
    layers: list[int]
    nope: list[bool]
    n_experts: int
    expert: np.ndarray
    logit: np.ndarray
    margin: np.ndarray
    runner_up: np.ndarray | None

    @property
    def n_shown(self) -> int:
        """Tokens shown; fewer than ``n_tokens`` where the document was too long."""
        return len(self.tokens)


def layer_label(layer: int, nope: bool) -> str:
    """A layer as every figure names it: its number, and the sign of a NoPE layer."""
    return f"{layer} {NOPE_SIGN}" if nope else str(layer)


def document(recording: xr.DataTree, sample: int, *, max_tokens: int | None = None) -> Document:
    """Text and routing of one sample.

    Parameters
    ----------
    recording : a whole recording: ``/routing``, ``/samples`` and ``/vocabulary`` are read.
    sample : index into ``/samples``.
    max_tokens : show at most so many tokens, from the start.

    Raises
    ------
    ProbeError
        If there is no such sample.
    """
    routing, samples = schema.group(recording, "routing"), schema.group(recording, "samples")
    schema.require_sample(sample, samples.sizes["sample"])
    start, n_tokens = int(samples["row_offset"][sample]), int(samples["n_tokens"][sample])
    n_shown = n_tokens if max_tokens is None else min(n_tokens, max_tokens)
    rows = routing.isel(token=slice(start, start + n_shown)).transpose("layer", "token", ...)
    token_ids = rows["token_id"].values
    entries = schema.group(recording, "vocabulary")
    vocabulary = schema.pieces(entries.isel(entry=np.isin(entries["token_id"].values, token_ids)))
    return Document(
        name=str(samples["name"].values[sample]),
        domain=str(samples["domain"].values[sample]),
        n_tokens=n_tokens,
        tokens=join([vocabulary[int(token_id)] for token_id in token_ids]),
        layers=[int(layer) for layer in rows["layer"].values],
        nope=[str(kind) == "nope" for kind in schema.labels(rows["attention_kind"])],
        n_experts=routing.sizes["expert"],
        expert=rows["expert_index"].values,
        logit=rows["router_logit"].values,
        margin=rows["router_margin"].values,
        runner_up=rows["runner_up_index"].values if "runner_up_index" in rows else None,
    )


def join(pieces: Sequence[bytes]) -> list[TokenText]:
    """Characters of consecutive tokens, each on the token that completes it.

    Bytes that are part of no character are written as ``\\xe6``. Concatenated, the texts are the original text wherever
    that was valid UTF-8.
    """
    characters = b"".join(pieces).decode("utf-8", errors="surrogateescape")
    widths = [1 if _is_stray(character) else len(character.encode()) for character in characters]
    character_ends = np.cumsum(widths, dtype=np.int64)
    token_ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    owners = np.searchsorted(token_ends, character_ends, side="left")
    first = np.searchsorted(owners, np.arange(len(pieces) + 1), side="left")
    return [
        _token_text(
            piece,
            characters[start:stop],
            _split_character(characters, character_ends, begin),
            _split_character(characters, character_ends, begin + len(piece)),
        )
        for piece, start, stop, begin in zip(
            pieces, first[:-1], first[1:], token_ends - np.diff(token_ends, prepend=0), strict=True
        )
    ]


def _is_stray(character: str) -> bool:
    """Whether it stands for a byte that is part of no character (Python's ``surrogateescape``)."""
    return "\udc80" <= character <= "\udcff"


def _split_character(characters: str, character_ends: np.ndarray, offset: int) -> str:
    """The character that a token boundary at a byte offset cuts in two, or nothing."""
    index = int(np.searchsorted(character_ends, offset, side="right"))
    if index == len(characters):
        return ""
    begin = int(character_ends[index - 1]) if index else 0
    return characters[index] if begin < offset else ""


def _token_text(piece: bytes, text: str, cut_before: str, cut_after: str) -> TokenText:
    """One token, told which characters its two ends cut."""
    broken = any(map(_is_stray, text))
    if broken:
        text = "".join(f"\\x{ord(character) - 0xDC00:02x}" if _is_stray(character) else character for character in text)
        return TokenText(text, f"bytes {_hexadecimal(piece)}: not all of them are valid UTF-8", broken)
    if cut_after and not text:
        return TokenText(text, f"bytes {_hexadecimal(piece)}, part of {cut_after}")
    notes = [f"completes {cut_before}"] * bool(cut_before) + [f"begins {cut_after}"] * bool(cut_after)
    return TokenText(text, f"bytes {_hexadecimal(piece)}: {' and '.join(notes)}" if notes else "")


def _hexadecimal(piece: bytes) -> str:
    return piece.hex(" ").upper()


def piece_label(piece: bytes) -> str:
    """A lone token as a short label: its text, or its bytes in hexadecimal where they are not whole characters."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return f"⟨{_hexadecimal(piece)}⟩"


def text_html(text: str) -> str:
    """Escaped text with visible white space; copied from the page it is the plain text.

    A space shows a faint dot and a newline a ``⏎``, drawn by the style sheet; control characters, those that would turn
    the direction of the text among them, are replaced by visible symbols.
    """
    parts, end = [], 0
    for match in _MARKED.finditer(text):
        parts += [escape(text[end : match.start()]), _marked(match.group())]
        end = match.end()
    return "".join([*parts, escape(text[end:])])


def _marked(found: str) -> str:
    if found[0] == " ":
        return f"<u>{found}</u>"
    if found == "\n":
        return "<b></b>\n"
    if found == "\t":
        return "<u class=tab>\t</u>"
    code = ord(found)
    symbol = f"⟨U+{code:04X}⟩" if code in _BIDI_CONTROLS or code > 0x7E else chr(0x2400 + code)
    return f"<u class=control>{symbol}</u>"


def token_html(token: TokenText, attributes: str = "") -> str:
    """One token as an ``<i>`` with the given attributes, which must be escaped already."""
    if _SPECIAL.fullmatch(token.text):
        kind = " data-special"
    else:
        kind = " data-broken" if token.broken else "" if token.text else " data-part"
    note = f' data-note="{escape(token.note)}"' if token.note else ""
    return f"<i{attributes}{kind}{note}>{text_html(token.text)}</i>"


def colour_slots(share: np.ndarray) -> np.ndarray:
    """Place in the palette of every expert, -1 for neutral.

    Up to 16 experts keep a colour of their own; beyond that, the 16 of the largest ``share`` (expert) get the palette.
    """
    n_colours = len(PALETTE)
    if len(share) <= n_colours:
        return np.arange(len(share))
    slots = np.full(len(share), -1)
    top = np.argsort(-share, kind="stable")[:n_colours]
    slots[top] = np.arange(n_colours)
    return slots


def tokens_html(shown: Document, *, layer: int, titles: bool = True) -> str:
    """The text of a document, coloured for one layer: a ``<div class="probe-tokens">``.

    Parameters
    ----------
    shown : from :func:`document`.
    layer : the decoder's own index of the layer.
    titles : give every token a ``title`` for a hover that needs no script.

    Raises
    ------
    ProbeError
        If ``layer`` was not recorded.
    """
    at = _layer_position(shown, layer)
    first = shown.expert[at, :, 0]
    slots = colour_slots(np.bincount(first, minlength=shown.n_experts))
    parts = []
    for index, token in enumerate(shown.tokens):
        attributes = f" class={_colour_class(slots[first[index]])} data-e={first[index]}"
        if titles:
            attributes += f' title="{escape(hover_text(shown, at, index))}"'
        parts.append(token_html(token, attributes))
    return f'<div class="probe-tokens" dir="auto">{"".join(parts)}</div>'


def _layer_position(shown: Document, layer: int) -> int:
    schema.require_layer(layer, shown.layers)
    return shown.layers.index(layer)


def _colour_class(slot: int) -> str:
    return f"c{slot}" if slot >= 0 else "cn"


def hover_text(shown: Document, at: int, index: int) -> str:
    """What hovering over a token says, in lines; ``at`` and ``index`` are positions of layer and token."""
    token = shown.tokens[index]
    lines = [json.dumps(token.text, ensure_ascii=False) if token.text else "part of a character"]
    if token.note:
        lines.append(token.note)
    for expert, logit in zip(shown.expert[at, index], shown.logit[at, index].astype(float), strict=True):
        lines.append(f"expert {expert} · gate {1 / (1 + np.exp(-logit)):.3f}")
    if shown.runner_up is not None:
        lines.append(f"runner-up {shown.runner_up[at, index]} · margin {float(shown.margin[at, index]):.3g} logits")
    return "\n".join(lines)


def legend_html(shown: Document, *, layer: int) -> str:
    """Experts of a document at one layer with their colours and shares of its tokens."""
    at = _layer_position(shown, layer)
    first = shown.expert[at, :, 0]
    counts = np.bincount(first, minlength=shown.n_experts)
    slots = colour_slots(counts)
    total = max(int(counts.sum()), 1)
    coloured = sorted(np.flatnonzero(slots >= 0), key=lambda expert: int(slots[expert]))
    chips = [
        f'<span class="chip c{slots[expert]}"><span>{expert}</span> {counts[expert] / total:.0%}</span>'
        for expert in coloured
    ]
    if len(coloured) < shown.n_experts:
        rest = counts[slots < 0].sum() / total
        chips.append(
            f'<span class="chip cn">the other {shown.n_experts - len(coloured)}: {rest:.0%}</span>'
            f"<small>colours: the {len(coloured)} experts most used in this document at this layer</small>"
        )
    return f'<div class="probe-legend">{"".join(chips)}</div>'


def numbers(shown: Document) -> dict[str, Any]:
    """A document's routing for the script: little-endian arrays (layer, token, slot) in base64."""
    return {
        "n": shown.n_shown,
        "domain": shown.domain,
        "expert": _packed(shown.expert, "<u2" if shown.n_experts > 256 else "u1"),
        "logit": _packed(shown.logit, "<f2"),
        "margin": _packed(shown.margin, "<f2"),
        "runnerUp": None
        if shown.runner_up is None
        else _packed(shown.runner_up, "<u2" if shown.n_experts > 256 else "u1"),
    }


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def script_json(value: Any) -> str:
    """JSON that is safe inside a ``<script>``: no ``<``, ``>`` or ``&`` is left in it."""
    return script_safe(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def script_safe(text: str) -> str:
    """JSON text with the characters that HTML could read as markup written as escapes."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def style() -> str:
    """The style sheet of every text view, palette included."""
    colours = "".join(f".c{slot}{{--c:{colour}}}" for slot, colour in enumerate(PALETTE))
    return f"{colours}.cn{{--c:{NEUTRAL}}}\n" + (ASSETS / "text_view.css").read_text(encoding="utf-8")


def script() -> str:
    """The script that brings views to life: it defines ``probeTextView(root)`` and runs nothing by itself."""
    return (ASSETS / "text_view.js").read_text(encoding="utf-8")


def view_html(documents: Sequence[Document], *, layer: int | None = None) -> str:
    """A whole view: choice of document and layer, legend, text; wants :func:`style` and :func:`script` on the page.

    Parameters
    ----------
    documents : at least one, all of one recording.
    layer : the layer to begin with; the middle one if not given.

    Raises
    ------
    ProbeError
        If there is no document, or no such layer.
    """
    if not documents:
        raise schema.ProbeError("there is no document to show: give at least one")
    first = documents[0]
    layer = first.layers[len(first.layers) // 2] if layer is None else layer
    at = _layer_position(first, layer)
    labels = [layer_label(number, nope) for number, nope in zip(first.layers, first.nope, strict=True)]
    data = {
        "layers": first.layers,
        "labels": labels,
        "nExperts": first.n_experts,
        "slots": int(first.expert.shape[-1]),
        "colours": len(PALETTE),
        "documents": [numbers(shown) for shown in documents],
    }
    bodies = [
        f"<div class=probe-document{'' if index == 0 else ' hidden'}>{tokens_html(shown, layer=layer, titles=False)}"
        f"{_cut_note(shown)}</div>"
        for index, shown in enumerate(documents)
    ]
    return (
        '<div class="probe-text">'
        f'<div class="probe-controls">{_document_select(documents)}'
        f'<label class="grow">Layer <input type="range" class="layer" min="0" max="{len(first.layers) - 1}" step="1" '
        f'value="{at}"><output>{escape(labels[at])}</output></label>'
        '<label><input type="checkbox" class="numbers"> expert numbers</label></div>'
        f"{legend_html(first, layer=layer)}"
        f'<div class="probe-box" tabindex="0" role="group" aria-label="text of the document">{"".join(bodies)}</div>'
        '<div class="probe-tip" role="status" hidden></div>'
        f'<script type="application/json">{script_json(data)}</script></div>'
    )


def _document_select(documents: Sequence[Document]) -> str:
    groups: dict[str, list[str]] = {}
    for index, shown in enumerate(documents):
        option = f'<option value="{index}">{escape(shown.name)} ({shown.n_tokens:,} tokens)</option>'
        groups.setdefault(shown.domain, []).append(option)
    inner = "".join(
        f'<optgroup label="{escape(domain)}">{"".join(options)}</optgroup>' for domain, options in groups.items()
    )
    return f'<label>Document <select class="document">{inner}</select></label>'


def _cut_note(shown: Document) -> str:
    if shown.n_shown == shown.n_tokens:
        return ""
    return f'<p class="cut">The first {shown.n_shown:,} of {shown.n_tokens:,} tokens.</p>'
