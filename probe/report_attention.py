"""The report's part on attention: its statistics, and what each section shows in words, as a figure and as tables.

A recording without ``/attention`` has no such part. One that was told to keep only some statistics has all sections,
and a section says what it lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import attention_figures, attention_maps, figure_parts, schema
from probe import attention_titles as titles
from probe.attention_titles import DOES, KINDS
from probe.bootstrap import MIN_DOCUMENTS
from probe.findings import counted
from probe.report_parts import Section, Table, bounded, figure_html, layer_by, missing_html
from probe.text_view import NOPE_SIGN

if TYPE_CHECKING:
    from probe import AttentionSpec
    from probe.models import LoadedModel

Results = dict[str, xr.Dataset]

HEAD_STATISTICS = {
    "entropy": "entropy",
    "sink_mass": "first token",
    "previous_mass": "token before",
    "far_mass": "before the chunk",
}
"""Statistics that the grids of heads show, with the names of their buttons."""

FUNCTIONS = {
    "attention_by_kind": "by_kind",
    "attention_head_mean": "head_mean",
    "attention_sinks": "sinks",
    "attention_distance_profile": "distance_profile",
    "attention_head_distance": "distance_profile",
    "attention_chunk_reach": "chunk_reach",
    "attention_position_profile": "position_profile",
    "attention_query_mean": "query_mean",
}
"""Every result about attention that a report may hold, with the function of ``attention_maps`` that made it."""

DRAWN_HEADS = 64
"""Heads up to which the distance profile has a line for each of them."""

MAP_SIZE = 32
"""Bins along a side of the maps that ``probe report --attention`` records: the panels have room for no more."""

MAP_BYTES = 1 << 28
"""Maps of all texts, layers and heads up to which ``probe report --attention`` records them."""

SHORT_TEXT = 1024
"""Tokens of the longest text up to which ``probe report --attention`` records every query."""

SAMPLED_QUERIES = 256
"""Queries of each text that it records otherwise."""

FAR = "keys before the query's own chunk"


# --- what is recorded and computed ------------------------------------------------------------------------------------


def choose_spec(
    model: LoadedModel, texts: Sequence[str], *, queries: int | None = None, max_tokens: int | None = None
) -> AttentionSpec:
    """What the report records of attention.

    Parameters
    ----------
    model : from :func:`probe.load`.
    texts : what is recorded.
    queries : of each text; all unless given, where no text is longer than 1,024 tokens, and otherwise 256.
    max_tokens : tokens kept of each text.

    Returns
    -------
    Spec of all statistics that need no options; of maps where those of all texts and heads fit in 256 MB.
    """
    from probe import AttentionSpec

    if queries is None and not _are_short(model, texts, max_tokens):
        queries = SAMPLED_QUERIES
    config = model.config.get_text_config()
    n_maps = 2 * len(texts) * config.num_hidden_layers * config.num_attention_heads
    options: dict[str, Any] = {"queries": queries, "map_size": MAP_SIZE}
    if 4 * n_maps * MAP_SIZE**2 <= MAP_BYTES:
        options["statistics"] = "all"
    return AttentionSpec(**options)


def _are_short(model: LoadedModel, texts: Sequence[str], max_tokens: int | None) -> bool:
    if max_tokens is not None and max_tokens <= SHORT_TEXT:
        return True
    # A token has at least a byte, so that most texts need not be tokenized to know.
    return all(
        len(model.tokenizer(text, verbose=False)["input_ids"]) <= SHORT_TEXT
        for text in texts
        if len(text.encode()) >= SHORT_TEXT
    )


def recorded_statistics(recording: xr.DataTree, dims: tuple[str, ...] = ("query", "layer", "head")) -> list[str]:
    """Names of the statistics of a query, layer and head that ``/attention`` holds, in the order of the schema."""
    if "attention" not in recording.children:
        return []
    held = schema.group(recording, "attention").data_vars
    return [name for name, spec in schema.ATTENTION.items() if spec.dims == dims and name in held]


def plan(recording: xr.DataTree) -> dict[str, Callable[[], xr.Dataset]]:
    """What the report computes of attention, by name; nothing for a recording without ``/attention``."""
    if "attention" not in recording.children:
        return {}
    statistics = recorded_statistics(recording)
    steps: dict[str, Callable[[], xr.Dataset]] = {}
    if statistics:
        steps["attention_by_kind"] = partial(attention_maps.by_kind, recording)
        steps["attention_head_mean"] = partial(_by_statistic, partial(attention_maps.head_mean, recording), statistics)
    if "sink_mass" in statistics:
        steps["attention_sinks"] = partial(attention_maps.sinks, recording)
    if "distance_mass" in _profiles(recording):
        steps["attention_distance_profile"] = partial(attention_maps.distance_profile, recording, by_kind=True)
        steps["attention_head_distance"] = partial(attention_maps.distance_profile, recording)
    steps["attention_chunk_reach"] = partial(attention_maps.chunk_reach, recording)
    if "entropy" in statistics:
        steps["attention_position_profile"] = partial(attention_maps.position_profile, recording, "entropy")
    if _has_maps(recording) and set(DOES) & set(statistics):
        steps["attention_query_mean"] = partial(_of_one_text, recording, [name for name in DOES if name in statistics])
    return steps


def _profiles(recording: xr.DataTree) -> xr.Dataset:
    return schema.group(recording, "attention_profiles")


def _has_maps(recording: xr.DataTree) -> bool:
    return {"map_max", "map_sum", "bin_width"} <= set(_profiles(recording).data_vars)


def _by_statistic(compute: Callable[[str], xr.Dataset], statistics: Sequence[str]) -> xr.Dataset:
    """The same for several statistics, along ``statistic``, with their ``units``."""
    parts = [compute(name) for name in statistics]
    result = xr.concat(parts, dim="statistic", coords="minimal", compat="override", combine_attrs="drop_conflicts")
    for name, variable in result.data_vars.items():
        first = parts[0][name].attrs
        variable.attrs = {
            "long_name": first["long_name"].split(":")[0],
            "units": "document" if first["units"] == "document" else "by statistic",
        }
    units = [schema.ATTENTION[name].units for name in statistics]
    return result.assign_coords(
        statistic=("statistic", list(statistics), {"long_name": "statistic", "units": "1"}),
        units=("statistic", units, {"long_name": "units of the statistic", "units": "1"}),
    )


def _of_one_text(recording: xr.DataTree, statistics: Sequence[str]) -> xr.Dataset:
    """Means of every head in the longest text, the one whose maps are drawn; attributes ``profile`` and ``sample``."""
    profile = int(np.argmax(_profiles(recording)["n_tokens"].values))
    sample = int(_profiles(recording)["sample_id"][profile])
    attention = schema.group(recording, "attention")
    own = attention.isel(query=np.flatnonzero(attention["sample"].values == sample))
    n_tokens = schema.group(recording, "samples")["n_tokens"].values
    result = _by_statistic(partial(attention_maps.query_mean, own, n_tokens=n_tokens), statistics)
    return result.isel(sample=0).assign_attrs(profile=profile, sample=sample)


def summarize(recording: xr.DataTree) -> dict[str, int] | None:
    """Counts of what was recorded of attention; None where nothing was. 0 ``queries_per_text`` are all."""
    if "attention" not in recording.children:
        return None
    attention = schema.group(recording, "attention")
    n_tokens = schema.group(recording, "samples")["n_tokens"].values
    return {
        "layers": attention.sizes["layer"],
        "heads": attention.sizes["head"],
        "queries": attention.sizes["query"],
        "tokens": int(n_tokens[np.unique(attention["sample"].values)].sum()),
        "queries_per_text": int(attention.attrs["queries"]),
        "seed": int(attention.attrs["seed"]),
        "chunk_size": int(attention.attrs["chunk_size"]),
    }


def overview(summary: Mapping[str, Any]) -> str:
    """What was recorded of attention, for the first line of the page."""
    where = f"attention of {counted(summary['layers'], 'layer')} of {counted(summary['heads'], 'head')}"
    if summary["queries"] < summary["tokens"]:
        where += f", {summary['queries']:,} of {summary['tokens']:,} queries"
    return where


# --- sections ---------------------------------------------------------------------------------------------------------


def build(recording: xr.DataTree, results: Results) -> list[Section]:
    """The sections on attention, in the order in which a person asks; none for a recording without ``/attention``."""
    if "attention" not in recording.children:
        return []
    return [
        _kinds(recording, results.get("attention_by_kind")),
        _heads(results.get("attention_head_mean"), results.get("attention_sinks")),
        _distances(results.get("attention_distance_profile"), results.get("attention_head_distance")),
        _borders(recording, results["attention_chunk_reach"]),
        _positions(results.get("attention_position_profile"), chunk_size=_chunk_size(recording)),
        _maps(recording, results.get("attention_query_mean")),
    ]


def _kinds(recording: xr.DataTree, result: xr.Dataset | None) -> Section:
    anchor = "attention"
    if result is None:
        return _missing(anchor, "No statistic of single queries was recorded", _remedy("entropy", "far_mass"))
    title = titles.by_kind(result)
    drawn = result
    if "far_mass" in result["statistic"]:  # what it leaves of 1 is the chunk's
        drawn = result.sel(statistic=result["statistic"] != "chunk_mass")
    reading = f"Orange diamonds are NoPE layers, which see the whole text before a query ({NOPE_SIGN} in all figures); "
    reading += "blue dots are RoPE layers, which see only the query's own chunk of "
    reading += f"{counted(_chunk_size(recording), 'token')}. Each panel has an axis of its own; lines are intervals."
    if len(there := titles.kinds_with(result["mean"])) == 1:
        other = next(kind for kind in KINDS if kind not in there)
        reading += f" None of the recorded layers is a {KINDS[other].removesuffix('s')}: there is nothing to compare."
    return Section(
        anchor=anchor,
        title=title,
        reading=f"{reading}{_too_few(recording)}{_sampled(recording)}",
        definition=f"Sink mass is the weight on the text's first token, previous mass that on the token before, far "
        f"mass that on {FAR}: 0 in RoPE layers, which cannot see them. Entropy is −Σ p ln p over the keys that a query "
        "sees. The mean is over a text's queries, over a kind's heads and layers, then over texts, each counting the "
        "same; the interval over texts is Student's t on the logit scale for shares and on the logarithm for all else. "
        "The difference in the hover is taken within each text.",
        source="Chunked attention and NoPE layers: Meta 2025 (Llama 4), transformers, models/llama4",
        file="attention_by_kind",
        figure=figure_html(attention_figures.by_kind(drawn, title=""), title),
        tables=[_kind_table(result)],
    )


def _heads(means: xr.Dataset | None, sinks: xr.Dataset | None) -> Section:
    anchor = "heads"
    shown = [] if means is None else [name for name in HEAD_STATISTICS if name in means["statistic"]]
    if means is None or not shown:
        return _missing(anchor, "No statistic that tells heads apart was recorded", _remedy(*HEAD_STATISTICS))
    title = titles.heads(means.sel(statistic=shown), sinks)
    grids = {}
    for name in shown:
        own = _statistic(means, name)
        grids[HEAD_STATISTICS[name]] = (
            attention_figures.sinks(sinks, title="")
            if name == "sink_mass" and sinks is not None
            else attention_figures.head_grid(own, title="")
        )
    return Section(
        anchor=anchor,
        title=title,
        reading="Each row is a layer, each cell a head; the buttons choose what the colour shows. A head of high "
        "entropy spreads its attention; one with much on the token before looks at its neighbour; one with a ring on "
        "the first token parks its attention there (a sink).",
        definition="Means over a text's queries, then over texts; hover for the interval over texts. A head is a sink "
        "if the mean weight on the text's first token exceeds 0.3. Every query at the first token has a sink mass of "
        "1, and a RoPE layer sees that token from the first chunk only. A head's number means nothing across layers.",
        source="Sinks: Gu et al. 2024, arXiv 2410.10781; Xiao et al. 2023, arXiv 2309.17453; previous-token heads: "
        "Elhage et al. 2021",
        file="attention_head_mean",
        more_files=[] if sinks is None else ["attention_sinks"],
        figure=figure_html(switched(grids), title),
        tables=[
            table for name in shown for table in layer_by("head", _with_unit(name), _statistic(means, name)["mean"])
        ],
    )


def _distances(result: xr.Dataset | None, heads: xr.Dataset | None) -> Section:
    anchor = "distance"
    if result is None or heads is None:
        return _missing(anchor, "How far back attention reaches was not recorded", _remedy("distance_mass"))
    title = titles.distance_profile(result)
    drawn = heads if heads.sizes["layer"] * heads.sizes["head"] <= DRAWN_HEADS else None
    thin = "; thin lines are single heads" if drawn is not None else ""
    chunk_size = result.attrs["chunk_size"]
    border = f"No text is longer than a chunk of {counted(chunk_size, 'token')}, so that no border is drawn."
    if chunk_size <= int(result["distance_bin"].max()):
        border = f"The dotted line is a chunk of {counted(chunk_size, 'token')}, at which RoPE layers end."
    rows = [
        [_distance_label(int(own["distance_bin"])), *_of_kinds(own, ("distance_mass", "lower", "upper"))]
        for own in (result.isel(distance_bin=at) for at in range(result.sizes["distance_bin"]))
    ]
    return Section(
        anchor=anchor,
        title=title,
        reading=f"How much of its attention a query gives to tokens so far back, on average{thin}. Bins double in "
        f"width, so attention that is even over all tokens rises. {border}",
        definition="The weights of a query on all keys at distances 0, 1, 2–3, 4–7, … summed by bin; means over a "
        "text's queries, over a kind's heads and layers, then over the texts that reach so far. Bands are intervals "
        "over texts.",
        source="Distance of attention: Vig & Belinkov 2019, arXiv 1906.04284",
        file="attention_distance_profile",
        more_files=["attention_head_distance"],
        figure=figure_html(attention_figures.distance_profile(result, heads=drawn, title=""), title),
        tables=[Table("Attention by distance (share)", ["tokens back", *_kind_names(result["distance_mass"])], rows)],
    )


def _borders(recording: xr.DataTree, result: xr.Dataset) -> Section:
    anchor = "chunks"
    chunk_size = int(result.attrs["chunk_size"])
    if not bool(result["n_documents"].any()):
        longest = int(schema.group(recording, "samples")["n_tokens"].max())
        return _missing(
            anchor,
            "No text reaches a chunk border",
            f"A chunk has {counted(chunk_size, 'token')} and no recorded query lies behind the first one: the longest "
            f"text has {counted(longest, 'token')}. Within a chunk NoPE and RoPE layers see the same tokens.",
        )
    title = titles.chunk_reach(result)
    there = titles.kinds_with(result["reach"])
    told = " RoPE layers start again with a single visible token." if "rope" in there else ""
    if "nope" in there:
        told += " NoPE layers know no border and see everything on both sides of it."
    names = [name for name in ("reach", "entropy", "mean_distance") if name in result]
    columns = [f"{name.replace('_', ' ')}, {KINDS[kind]}" for name in names for kind in titles.kinds_with(result[name])]
    rows = []
    for at in np.flatnonzero(result["n_documents"].values):
        own = result.isel(chunk_position=at)
        cells = [cell for name in names for cell in _of_kinds(own, _bounds_of(name), of=result[name])]
        loss = [bounded(*(float(own[key]) for key in _bounds_of("loss")))] if "loss" in result else []
        rows.append([_span(int(own["chunk_position"]), int(own["bin_stop"])), *cells, *loss])
    units = "keys, nat and tokens" if {"entropy", "mean_distance"} <= set(names) else "keys"
    return Section(
        anchor=anchor,
        title=title,
        reading=f"Left of the dotted line is the end of a chunk, right of it the beginning of the next.{told}",
        definition=f"A query at position q sees q + 1 keys in a NoPE layer and q mod {chunk_size:,} + 1 in a RoPE "
        "layer. Means by place on the two sides of the same borders, over a text's queries, a kind's heads and "
        "layers, then over texts; bands are intervals over texts.",
        source="Chunked attention: Meta 2025 (Llama 4), transformers, models/llama4",
        file="attention_chunk_reach",
        figure=figure_html(attention_figures.chunk_reach(result, title=""), title),
        tables=[
            Table(
                f"By place in the chunk ({units})",
                ["place", *columns, *(["loss (nat)"] if "loss" in result else [])],
                rows,
            )
        ],
    )


def _positions(result: xr.Dataset | None, *, chunk_size: int) -> Section:
    anchor = "positions"
    if result is None:
        return _missing(anchor, "The entropy of attention was not recorded", _remedy("entropy"))
    title = titles.position_profile(result)
    crossed = "rope" in titles.kinds_with(result["mean"]) and int(result["bin_stop"].max()) > chunk_size
    border = " RoPE layers start again at each dotted chunk border." if crossed else ""
    rows = [
        [_span(int(own["position_bin"]), int(own["bin_stop"])), *_of_kinds(own, ("mean", "lower", "upper"))]
        for own in (result.isel(position_bin=at) for at in range(result.sizes["position_bin"]))
    ]
    return Section(
        anchor=anchor,
        title=title,
        reading="The dashed lines are the most there can be: attention that is even over all keys that a query sees. "
        f"The further a line lies below its dashed one, the more selective the layers are.{border}",
        definition="Entropy is −Σ p ln p over visible keys, at most ln of their number. Means over a text's queries in "
        "a bin of positions, over a kind's heads and layers, then over the texts that are so long: the last bins rest "
        "on few. Bands are intervals over texts.",
        source="Entropy of attention: Clark et al. 2019, arXiv 1906.04341",
        file="attention_position_profile",
        figure=figure_html(attention_figures.entropy_by_position(result, chunk_size=chunk_size, title=""), title),
        tables=[Table("Entropy by position (nat)", ["positions", *_kind_names(result["mean"])], rows)],
    )


def _maps(recording: xr.DataTree, result: xr.Dataset | None) -> Section:
    anchor = "maps"
    if not _has_maps(recording):
        return _missing(
            anchor,
            "No map of a text was recorded",
            "Maps of every head take room, so they are kept where they are asked for: "
            'probe.record(…, attention=probe.AttentionSpec(statistics="all")), then probe report --from. '
            "probe report --attention records them where all fit in 256 MB.",
        )
    if result is None:
        why = "No statistic was recorded that tells which heads' maps are worth a look"
        return _missing(anchor, why, f"{_remedy(*DOES)} probe.attention_figures.attention_map draws any head's map.")
    chosen = telling_heads(result)
    profiles = _profiles(recording)
    profile, sample = result.attrs["profile"], result.attrs["sample"]
    n_tokens, width = (int(profiles[name][profile]) for name in ("n_tokens", "bin_width"))
    name = str(schema.group(recording, "samples")["name"].values[sample])
    title = titles.one_text(result, chosen, name=name, n_tokens=n_tokens)
    layers, heads = profiles["layer"].values.tolist(), profiles["head"].values.tolist()
    pairs = [(layers[layer], heads[head]) for layer, head in chosen.values()]
    figure = attention_figures.map_grid(profiles, heads=pairs, profile=profile, title="")
    columns = [_with_unit(statistic) for statistic in map(str, result["statistic"].values)]
    cells = result.transpose("layer", "head", "statistic")
    rows = [
        [
            titles.head_name(result, *at),
            *(bounded(*(float(cells[key].values[at][column]) for key in ("mean", "lower", "upper")))
              for column in range(len(columns))),
        ]
        for at in chosen.values()
    ]  # fmt: skip
    order = ", ".join(_CHOSEN_FOR[statistic] for statistic in chosen)
    return Section(
        anchor=anchor,
        title=title,
        reading="Queries run down, the keys that they look at across, on a log scale. Grey is what a query cannot see, "
        f"dotted lines are chunk borders. These heads are, of all in this text, in order, {order}.",
        definition=f"A cell holds {counted(width, 'query').replace('querys', 'queries')} and as many keys: their "
        "largest weight, which keeps a single needle, or the mass that a query of the row gives to the cell on "
        "average. The text is the longest of the recording; the means in the table are of this text alone"
        f"{_sampling_bounds(profiles, profile)}.",
        source="The maps of all heads and texts are in /attention_profiles of routing.zarr",
        file="attention_query_mean",
        figure=figure_html(figure, title),
        tables=[Table("These heads in this text", ["head", *columns], rows)],
    )


_CHOSEN_FOR = {
    "far_mass": "the one with most mass before the chunk",
    "previous_mass": "on the token before",
    "sink_mass": "on the first token",
    "entropy": "and the one of highest entropy",
}


def telling_heads(result: xr.Dataset) -> dict[str, tuple[int, int]]:
    """Heads worth a look: for each statistic the one that has most of it and was not chosen before.

    Parameters
    ----------
    result : ``mean`` (statistic, layer, head).

    Returns
    -------
    Places of layer and head by statistic; a statistic that is 0 or undefined in all heads left has none.
    """
    chosen: dict[str, tuple[int, int]] = {}
    for statistic in (name for name in DOES if name in result["statistic"]):
        values = result["mean"].sel(statistic=statistic, drop=True).transpose("layer", "head").copy()
        for taken in chosen.values():
            values.values[taken] = np.nan
        if (at := titles.largest(values)) is not None:
            chosen[statistic] = at
    return chosen


# --- what they are made of --------------------------------------------------------------------------------------------


def switched(figures: Mapping[str, go.Figure]) -> go.Figure:
    """One figure that shows one of several at a time, chosen by buttons; their axes must be the same."""
    first = next(iter(figures.values()))
    whole = go.Figure(layout=first.layout)
    owner = []
    for label, figure in figures.items():
        for trace in figure.data:
            whole.add_trace(trace.update(visible=figure is first))
            owner.append(label)
    choices = []
    for label, figure in figures.items():
        colours = figure.layout.coloraxis
        layout = {
            "coloraxis.cmin": colours.cmin,
            "coloraxis.cmax": colours.cmax,
            "coloraxis.colorbar.title.text": colours.colorbar.title.text,
        }
        choices.append((label, {"visible": [label == own for own in owner]}, layout))
    room = 40
    return whole.update_layout(
        updatemenus=figure_parts.switch(*choices),
        height=first.layout.height + room,
        margin_t=first.layout.margin.t + room,
    )


def _missing(anchor: str, title: str, reason: str) -> Section:
    """A section that says why it has no figure."""
    return Section(
        anchor=anchor, title=title, reading="", definition="", source="", file="", figure=missing_html(reason)
    )


def _remedy(*statistics: str) -> str:
    names = ", ".join(repr(name) for name in statistics)
    return f"probe.record(…, attention=probe.AttentionSpec(statistics=[{names}, …])) records it."


def _chunk_size(recording: xr.DataTree) -> int:
    return int(schema.group(recording, "attention").attrs["chunk_size"])


def _too_few(recording: xr.DataTree) -> str:
    """Why there are no intervals, where there are none."""
    n_texts = len(np.unique(schema.group(recording, "attention")["sample"].values))
    if n_texts >= MIN_DOCUMENTS:
        return ""
    return f" There are no intervals: {counted(n_texts, 'text')} of the {MIN_DOCUMENTS} that they take."


def _sampled(recording: xr.DataTree) -> str:
    """That not all queries were recorded, where that is so."""
    summary = summarize(recording)
    assert summary is not None
    if summary["queries"] >= summary["tokens"]:
        return ""
    return (
        f" All numbers on attention rest on {summary['queries']:,} of {summary['tokens']:,} queries, at most "
        f"{summary['queries_per_text']:,} of each text, drawn at random (seed {summary['seed']}); intervals over texts "
        "contain the chance of that draw."
    )


def _sampling_bounds(profiles: xr.Dataset, profile: int) -> str:
    n_queries, n_tokens = (int(profiles[name][profile]) for name in ("n_queries", "n_tokens"))
    if n_queries >= n_tokens:
        return ""
    return f", estimated from {n_queries:,} of its {n_tokens:,} queries, and their intervals are of that draw"


def _statistic(means: xr.Dataset, name: str) -> xr.Dataset:
    """The result of one statistic, with its name and units where a figure looks for them."""
    own = means.sel(statistic=name, drop=True).assign_attrs(statistic=name)
    own["mean"].attrs["units"] = schema.ATTENTION[name].units
    return own


def _with_unit(statistic: str) -> str:
    unit = schema.ATTENTION[statistic].units
    return statistic.replace("_", " ") + (f" ({unit})" if unit != "1" else "")


def _bounds_of(name: str) -> tuple[str, ...]:
    return (name,) if name == "reach" else (name, f"{name}_lower", f"{name}_upper")


def _kind_names(values: xr.DataArray) -> list[str]:
    return [KINDS[kind] for kind in titles.kinds_with(values)]


def _of_kinds(own: xr.Dataset, names: Sequence[str], *, of: xr.DataArray | None = None) -> list[str]:
    """A cell of a table for each kind that ``of`` has values of."""
    kinds = titles.kinds_with(own[names[0]] if of is None else of)
    return [bounded(*(float(own[name].sel(attention_kind=kind)) for name in names)) for kind in kinds]


def _kind_table(result: xr.Dataset) -> Table:
    rows = []
    for at, statistic in enumerate(map(str, result["statistic"].values)):
        own = result.isel(statistic=at)
        difference = bounded(*(float(own[f"difference{end}"]) for end in ("", "_lower", "_upper")))
        rows.append([_with_unit(statistic), *_of_kinds(own, ("mean", "lower", "upper"), of=result["mean"]), difference])
    return Table("Attention by kind of layer", ["statistic", *_kind_names(result["mean"]), "NoPE − RoPE"], rows)


def _distance_label(first: int) -> str:
    return f"{first:,}" if first < 2 else f"{first:,}–{2 * first - 1:,}"


def _span(first: int, stop: int) -> str:
    return f"{first:,}" if stop - first == 1 else f"{first:,}–{stop - 1:,}"
