"""The report's tables: every statistic as CSV and Parquet, one row for each cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import xarray as xr

from probe import schema, text_view
from probe.routing.margins import MARGIN_QUANTILES

Results = Mapping[str, xr.Dataset]

_NOTES = {
    "attention_chunk_reach": " Places in the chunk without a query are left out. Bounds: 95%, over documents.",
    "attention_query_mean": " Of one text alone. Bounds: 95%, over the draw of its queries.",
}
"""What a table says of itself where that is not what all say."""

SAMPLES = ("samples", "fp8_samples")
"""Groups that say which texts a table rests on."""

_DEFINED = {"fp8_drift": "sqnr", "fp8_weights": "amax", "fp8_activations": "amax", "fp8_sensitivity": "flip_share"}
"""Tables that leave out what a layer lacks, or an expert that saw nothing, and the column that tells."""


def tidy(result: xr.Dataset) -> pd.DataFrame:
    """One row for each cell, coords as columns, category codes by their names."""
    coded = {name: variable for name, variable in result.variables.items() if "categories" in variable.attrs}
    words = {name: (result[name].dims, schema.labels(result[name])) for name in coded}
    labelled = result.assign_coords({name: value for name, value in words.items() if name in result.coords})
    labelled = labelled.assign({name: value for name, value in words.items() if name in result.data_vars})
    return labelled.to_dataframe().reset_index()


def write_tables(results: Results, recording: xr.DataTree, folder: Path, *, makers: Mapping[str, str]) -> None:
    """Write each statistic as ``NAME.csv`` and ``NAME.parquet``, and ``README.md`` with the meaning of the columns.

    ``makers`` holds all statistics that a report may have, by name, and the function that computes each: files of an
    earlier report under these names go.
    """
    frames = {name: _frame(name, result, recording) for name, result in results.items()}
    frames |= {name: _sample_frame(recording[name].to_dataset()) for name in SAMPLES if name in recording.children}
    for stale in {*makers, *SAMPLES} - frames.keys():  # of an earlier report, with other domains
        for suffix in ("csv", "parquet"):
            (folder / f"{stale}.{suffix}").unlink(missing_ok=True)
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    (folder / "README.md").write_text(_guide(results, makers), encoding="utf-8")


def _sample_frame(samples: xr.Dataset) -> pd.DataFrame:
    """What is known of each text."""
    return pd.DataFrame(
        {
            name: samples[name].values.astype(object) if name in ("name", "domain") else samples[name].values
            for name in ("name", "domain", "n_tokens", "n_cut")
        }
    )


def _frame(name: str, result: xr.Dataset, recording: xr.DataTree) -> pd.DataFrame:
    if name == "margin":
        return _margin_frame(result)
    if name == "paths":
        return _path_frame(result)
    if name == "top_tokens":
        return _token_frame(result, schema.group(recording, "vocabulary"))
    frame = tidy(result)
    if name in _DEFINED:
        return frame[frame[_DEFINED[name]].notna()]
    if name in ("transition", "gate_histogram"):
        return frame[frame["count"] > 0]
    return frame[frame["n_documents"] > 0] if name == "attention_chunk_reach" else frame


def _margin_frame(result: xr.Dataset) -> pd.DataFrame:
    """Margins with columns for each quantile and its bounds."""
    columns = {}
    for at, quantile in enumerate(MARGIN_QUANTILES):
        for suffix in ("", "_lower", "_upper"):
            values = result[f"margin{suffix}"].transpose("layer", "quantile").values
            columns[f"quantile_{round(100 * quantile):02d}{suffix}"] = values[:, at]
    return tidy(result[["mean", "tie_share"]].drop_vars("quantile", errors="ignore")).assign(**columns)


def _path_frame(result: xr.Dataset) -> pd.DataFrame:
    """Paths with a column for the expert at each layer."""
    experts = result["expert"].transpose("path", "layer")
    columns = {f"expert_at_layer_{layer}": experts.sel(layer=layer).values for layer in experts["layer"].values}
    return tidy(result.drop_dims("layer")).assign(**columns)


def _token_frame(result: xr.Dataset, vocabulary: xr.Dataset) -> pd.DataFrame:
    """Top tokens with what they look like."""
    pieces = schema.pieces(vocabulary)
    frame = tidy(result).drop(columns="row", errors="ignore")
    frame["token"] = [text_view.piece_label(pieces[token_id]) for token_id in frame["token_id"]]
    return frame


def _guide(results: Results, makers: Mapping[str, str]) -> str:
    lines = [
        "# Tables",
        "",
        "One row for each cell. `transition` and `gate_histogram` leave out cells without a token. Bounds are empty "
        "where they are withheld; `interval_status` says why. `margin` has three columns for each quantile, "
        "`paths` one for the expert at each layer.",
        "",
    ]
    for name, result in results.items():
        level = result.attrs.get("level")
        note = f" Bounds: {level:.0%}, over documents." if level else ""
        note = _NOTES.get(name, note)
        lines += [
            f"## {name}",
            "",
            f"Made by `probe.{makers[name]}`.{note}",
            "",
            "| column | unit | meaning |",
            "|---|---|---|",
        ]
        for key, variable in result.variables.items():
            unit = variable.attrs.get("units", "1")
            lines.append(f"| {key} | {unit} | {variable.attrs.get('long_name', key)} |")
        lines.append("")
    return "\n".join(lines)
