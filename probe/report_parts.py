"""What the sections of the report's page are made of: tables of text, figures as data, names of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from markupsafe import Markup

from probe import schema, text_view

LARGEST_TABLE = 4_000
"""Cells of a table in the page; larger ones are only in ``tables/``."""


@dataclass(frozen=True)
class Table:
    """A table of the page: a heading, column names and rows of text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    ``title`` says what one sees, ``reading`` how to read it, ``definition`` what exactly it is and ``source`` where
    that comes from; ``file`` and ``more_files`` name the tables in ``tables/``. Without a figure, ``figure`` says why,
    and only the title need be there.
    """

    anchor: str
    title: str
    reading: str
    definition: str
    source: str
    file: str
    figure: Markup
    tables: list[Table] = field(default_factory=list)
    more_files: list[str] = field(default_factory=list)


def figure_html(figure: go.Figure, label: str) -> Markup:
    """A figure as data for the page's script, and room for it."""
    html = (
        '<div class="figure" role="img" aria-label="{}" style="min-height:{}px">'
        "<noscript>Figures need JavaScript; the numbers are in the data below.</noscript>"
        '<script type="application/json">{}</script></div>'
    )
    return Markup(html).format(label, figure.layout.height, Markup(text_view.script_safe(figure.to_json())))


def missing_html(reason: str) -> Markup:
    """What stands where a figure would: why there is none."""
    return Markup('<p class="missing">{}</p>').format(reason)


def layer_name(result: xr.Dataset | xr.DataArray, at: int) -> str:
    """The layer at a position of a result, with the sign of a NoPE layer."""
    kind = schema.labels(result["attention_kind"])[at]
    return text_view.layer_label(int(result["layer"][at]), kind == "nope")


def by_layer(caption: str, result: xr.Dataset, columns: Mapping[str, str | Sequence[str]]) -> Table:
    """A row for each layer; a column is a variable, or a variable with those of its two bounds."""
    names = {name: [key] if isinstance(key, str) else key for name, key in columns.items()}
    rows = [
        [layer_name(result, at), *(bounded(*(result[key].values[at] for key in keys)) for keys in names.values())]
        for at in range(result.sizes["layer"])
    ]
    return Table(caption, ["layer", *columns], rows)


def layer_by(dim: str, caption: str, values: xr.DataArray) -> list[Table]:
    """One table of layers × experts (or heads, …), or none where it would be too large to read."""
    values = values.transpose("layer", dim)
    if values.size > LARGEST_TABLE:
        return []
    rows = [[layer_name(values, at), *map(number, row)] for at, row in enumerate(values.values)]
    return [Table(caption, [f"layer \\ {dim}", *map(str, values[dim].values)], rows)]


def bounded(value: float, lower: float = np.nan, upper: float = np.nan) -> str:
    """A number with its interval, where there is one."""
    return number(value) if np.isnan(lower) else f"{number(value)} [{number(lower)}, {number(upper)}]"


def number(value: float) -> str:
    """A number of a table, – where there is none."""
    return f"{value:.3g}" if np.isfinite(value) else "–"
