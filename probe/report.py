"""A recording as one HTML page for people, and tables and a summary for programs.

:func:`write_report` is the way of the data in small: it validates the recording, computes every statistic once, draws,
and writes. The page holds its scripts, figures and text, so it opens from disk with no network; most of its size is
plotly.js (4.8 MB).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from probe import (
    findings,
    fp8_findings,
    report_attention,
    report_card,
    report_fp8,
    report_sections,
    routing_stats,
    schema,
    store,
    text_view,
    titles,
)
from probe.findings import counted
from probe.report_parts import layer_name
from probe.report_sections import Results
from probe.report_tables import write_tables
from probe.routing.rows import Routing, grouped
from probe.schema import ProbeError

if TYPE_CHECKING:
    from probe.corpus import BadLine

DOCUMENTS_PER_DOMAIN = 3
TOKENS_SHOWN = 40_000
TEXT_BYTES = 4_000_000
"""Routing numbers of the shown text, before base64: a recording of many layers shows fewer tokens."""

PROBLEMS_LISTED = 100
LISTED_EXPERTS = 1_000
"""Experts over all layers up to which the page lists the top tokens of each, beside the cards."""


def write_report(
    recording: xr.DataTree,
    folder: str | Path,
    *,
    problems: Sequence[BadLine] = (),
    progress: bool = False,
) -> Path:
    """Write ``index.html``, ``tables/``, ``summary.json`` and the recording, ``routing.zarr`` (a study: ``fp8.zarr``).

    Parameters
    ----------
    recording : a whole recording; or an FP8 study by itself, which has a page of its own.
    folder : where to; made if it is not there, and what it holds under these names is replaced.
    problems : lines of the corpus that could not be used; they are counted on the page and listed in the summary.
    progress : show a progress bar.

    Returns
    -------
    Path of ``index.html``.

    Raises
    ------
    SchemaError
        If ``recording`` is not a whole recording.
    ProbeError
        If it holds no token, or if ``folder`` is no place for a report: see :func:`check_folder`.
    """
    schema.validate(recording)
    is_study = "routing" not in recording.children
    if not is_study and not schema.group(recording, "routing").sizes["token"]:
        raise ProbeError(
            "this recording holds no token, so there is nothing to report: check the corpus that was recorded"
        )
    folder = Path(folder)
    check_folder(folder)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    n_steps = (0 if is_study else len(_STATISTICS)) + len(_optional(recording)) + len(_OTHER_STEPS)
    with _progress(progress, n_steps=n_steps) as step:
        results = compute(recording, step=step)
        found = fp8_findings.find(results) if is_study else find(results)
        step("tables")
        write_tables(results, recording, folder / "tables", makers=_MAKERS)
        summary = summarize(recording, results, found, problems=problems)
        (folder / "summary.json").write_text(strict_json(summary), encoding="utf-8")
        step("page")
        draw = render_study if is_study else render
        page.write_text(draw(recording, results, found, summary, problems), encoding="utf-8")
        step("store")
        store.save(recording, folder / store.STORES[is_study])
    return page


def check_folder(folder: Path) -> None:
    """Raise a ProbeError where no report can be written, or where one would replace a page that is not ours.

    Nothing is left behind: a folder that is not there yet is made and removed again.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ProbeError(f"no report can be written to {folder}: {there} is a file; name another folder")
    if (folder / "index.html").exists() and not _is_report(folder / "summary.json"):
        raise ProbeError(f"{folder} holds an index.html that is no report of probe's: name another folder")
    for name in store.STORES:
        store.check_place(folder / name)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_new:
            folder.rmdir()
    except OSError as error:
        raise ProbeError(f"{folder}: nothing can be written there ({error.strerror}); name another folder") from error


def _is_report(summary: Path) -> bool:
    """Whether this is the summary that stands beside a report."""
    try:
        content = json.loads(summary.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"recording", "findings"} <= content.keys()


def _progress(shown: bool, *, n_steps: int) -> AbstractContextManager[Callable[[str], None]]:
    """A function that moves a progress bar on by one named step, or does nothing."""
    if not shown:
        return nullcontext(lambda name: None)
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        with Progress(console=Console(stderr=True)) as display:
            task = display.add_task("report", total=n_steps)
            yield lambda name: display.update(task, advance=1, description=f"report: {name}")

    return bar()


# --- numbers ----------------------------------------------------------------------------------------------------------

PATHS_SHOWN = 15

BATCH_SIZES = (1, 4, 16, 64, 256)
PERMUTATIONS = {"token_id": 60, "domain": 200}
"""How often each label of the mutual information is permuted: tokens, which take longer, just often enough."""

CELL_PERMUTATIONS = 1000
"""How often domains are permuted for the p-values of single cells."""

_STATISTICS: dict[str, Callable[..., xr.Dataset]] = {
    "load_interval": routing_stats.load_interval,
    "imbalance": routing_stats.imbalance,
    "specialization": routing_stats.specialization,
    "mutual_information": lambda routing, **options: _information(routing, **options),
    "margin": routing_stats.margin,
    "gate_histogram": routing_stats.gate_histogram,
    "transition": routing_stats.transition,
    "paths": partial(routing_stats.paths, n=PATHS_SHOWN),
    "repetition": routing_stats.repetition,
    "distinct_experts": partial(routing_stats.distinct_experts, batch_sizes=BATCH_SIZES),
    "top_tokens": lambda routing: _top_tokens(routing),
}

_OTHER_STEPS = ("tables", "page", "store")

_MAKERS = (
    {name: f"routing_stats.{name}" for name in _STATISTICS}
    | {name: f"attention_maps.{function}" for name, function in report_attention.FUNCTIONS.items()}
    | {name: f"fp8_error.{function}" for name, function in report_fp8.FUNCTIONS.items()}
)
"""Where each statistic that a report may hold comes from."""


def compute(
    recording: xr.DataTree, *, permutations: bool = True, step: Callable[[str], None] = lambda name: None
) -> Results:
    """Every statistic of the report under the name of its function.

    ``specialization`` only for two domains or more; ``mutual_information`` has a dim ``label``, the domain among them
    only then. What starts with ``attention_`` or ``fp8_`` only where that was recorded; see
    :mod:`probe.report_attention` and :mod:`probe.report_fp8`. Of an FP8 study by itself there is nothing else.

    Parameters
    ----------
    recording : a whole recording, or an FP8 study.
    permutations : False leaves out what needs permutations, the p-values and nulls of domains and tokens: they are NaN.
    step : called with the name of each statistic before it is computed.
    """
    results: Results = {}
    if "routing" in recording.children:
        results |= _routing_results(recording, permutations=permutations, step=step)
    for name, compute_one in _optional(recording).items():
        step(name.replace("_", " "))
        results[name] = compute_one()
    return results


def _optional(recording: xr.DataTree) -> dict[str, Callable[[], xr.Dataset]]:
    """What is computed of the parts that not every recording has, by name."""
    return report_attention.plan(recording) | report_fp8.plan(recording)


def _routing_results(recording: xr.DataTree, *, permutations: bool, step: Callable[[str], None]) -> Results:
    several_domains = len(_domains(recording)) > 1
    rows = grouped(recording).kept("expert_index")  # so that they are read, and documents counted, only once
    options: dict[str, dict[str, Any]] = {
        "specialization": {"n_permutations": CELL_PERMUTATIONS if permutations else 0},
        "mutual_information": {
            "permutations": {
                label: n if permutations else 0
                for label, n in PERMUTATIONS.items()
                if label != "domain" or several_domains
            }
        },
    }
    results: Results = {}
    for name, statistic in _STATISTICS.items():
        step(name.replace("_", " "))
        if name != "specialization" or several_domains:
            results[name] = statistic(rows, **options.get(name, {}))
    return results


def find(results: Results) -> list[findings.Finding]:
    """The findings on routing; where FP8 was studied its answer stands in the place of the last of them."""
    answer = fp8_findings.find(results)[:1]
    return [*findings.find(results)[: findings.MAX_FINDINGS - len(answer)], *answer]


def _information(routing: Routing, *, permutations: Mapping[str, int]) -> xr.Dataset:
    """What token and domain say about the expert, along ``label``."""
    labels = list(permutations)
    parts = [routing_stats.mutual_information(routing, of=label, n_permutations=n) for label, n in permutations.items()]
    result = xr.concat(parts, dim="label", coords="minimal", compat="override", combine_attrs="drop_conflicts")
    del result.attrs["seed"]
    for name, variable in result.data_vars.items():
        variable.attrs = parts[0][name].attrs | {
            "long_name": parts[0][name].attrs["long_name"].replace("token_id", "label")
        }
    return result.assign_coords(
        label=("label", labels, {"long_name": "label of tokens", "units": "1"}),
        n_permutations=(
            "label",
            list(permutations.values()),
            {"long_name": "permutations of the label", "units": "1"},
        ),
    )


def _top_tokens(routing: Routing) -> xr.Dataset:
    rows = grouped(routing)
    return routing_stats.top_tokens(rows, n=report_card.tokens_per_expert(rows.n_layers * rows.n_experts))


def _domains(recording: xr.DataTree) -> list[str]:
    """Domains with at least one token, in the order in which they came."""
    samples = schema.group(recording, "samples")
    return list(dict.fromkeys(samples["domain"].values[samples["n_tokens"].values > 0].astype(object).tolist()))


def summarize(
    recording: xr.DataTree,
    results: Results,
    found: Sequence[findings.Finding],
    *,
    problems: Sequence[BadLine] = (),
) -> dict[str, Any]:
    """What a program wants to know: attributes, counts, findings and problems; of attention and FP8 where they are."""
    parts = {
        "counts": _counts(recording) if "routing" in recording.children else None,
        "attention": report_attention.summarize(recording),
        "fp8": report_fp8.summarize(recording, results),
    }
    return {
        "recording": {name: recording.attrs[name] for name in schema.ROOT_ATTRIBUTES},
        **{name: part for name, part in parts.items() if part is not None},
        "findings": [asdict(finding) for finding in found],
        "problems": {
            "count": len(problems),
            "first": [
                {"file": str(bad.path), "line": bad.line, "reason": bad.reason} for bad in problems[:PROBLEMS_LISTED]
            ],
        },
    }


def _counts(recording: xr.DataTree) -> dict[str, int]:
    """How much of everything was recorded."""
    samples, routing = schema.group(recording, "samples"), schema.group(recording, "routing")
    cut = samples["n_cut"].values
    return {
        "tokens": int(samples["n_tokens"].sum()),
        "documents": int((samples["n_tokens"] > 0).sum()),
        "domains": len(_domains(recording)),
        "documents_cut": int((cut > 0).sum()),
        "tokens_cut": int(cut.sum()),
        "layers": routing.sizes["layer"],
        "experts": routing.sizes["expert"],
    }


def strict_json(value: Any) -> str:
    """JSON that every parser reads: NaN and infinity become null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- page -------------------------------------------------------------------------------------------------------------


def render(
    recording: xr.DataTree,
    results: Results,
    found: Sequence[findings.Finding],
    summary: Mapping[str, Any],
    problems: Sequence[BadLine],
) -> str:
    """The page as one string of HTML; ``summary`` is that of :func:`summarize`."""
    pointed = _pointed(found)
    layer, expert = _first_card(results["load_interval"], found)
    return _template("report.html.j2").render(
        model=str(recording.attrs["model"]) or "a model without a name",
        overview=_overview(summary),
        skipped=_skipped(summary),
        found=found,
        level=results["load_interval"].attrs["level"],
        summary=summary,
        problems=[str(bad) for bad in problems[:20]],
        sections=report_sections.build(results)
        + report_attention.build(recording, results)
        + report_fp8.build(recording, results),
        card_title=titles.expert(results["load_interval"], layer=layer, expert=expert, unit=_unit(recording)),
        card=Markup(_card(recording, results, layer=layer, expert=expert)),
        with_domains="specialization" in results,
        with_attention="attention" in summary,
        token_layers=_token_layers(results, recording),
        text=Markup(_text(recording, pointed)),
        recorded=_recorded(recording),
        style=Markup(text_view.style() + _asset("report.css")),
        script=Markup(text_view.script() + _asset("report_card.js") + _asset("report.js")),
        plotly=Markup(get_plotlyjs()),
    )


def render_study(
    recording: xr.DataTree,
    results: Results,
    found: Sequence[findings.Finding],
    summary: Mapping[str, Any],
    problems: Sequence[BadLine],
) -> str:
    """:func:`render` of an FP8 study by itself."""
    attributes = summary["recording"]
    where = f"against bfloat16 on {attributes['device']}" if attributes["device"] else "against bfloat16"
    overview = [report_fp8.overview(summary["fp8"]), where, _date(str(attributes["created_at"]))]
    return _template("fp8.html.j2").render(
        model=str(recording.attrs["model"]) or "a model without a name",
        overview=[part for part in overview if part],
        skipped=_skipped({"counts": summary["fp8"], "problems": summary["problems"]}),
        found=found,
        level=results["fp8_flips"].attrs["level"] if "fp8_flips" in results else None,
        recipes=report_fp8.described(recording),
        summary=summary,
        problems=[str(bad) for bad in problems[:20]],
        sections=report_fp8.build(recording, results),
        recorded=_recorded(recording),
        style=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
        plotly=Markup(get_plotlyjs()),
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(text_view.ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _recorded(recording: xr.DataTree) -> list[tuple[str, str]]:
    """Attributes of the recording for the foot of the page."""
    return [(name.replace("_", " "), str(recording.attrs[name])) for name in schema.ROOT_ATTRIBUTES if name != "config"]


def _asset(name: str) -> str:
    return (text_view.ASSETS / name).read_text(encoding="utf-8")


def _overview(summary: Mapping[str, Any]) -> list[str]:
    """What was recorded: the parts of one line."""
    counts, attributes = summary["counts"], summary["recording"]
    amount = f"{counted(counts['tokens'], 'token')} of {counted(counts['documents'], 'document')}"
    if counts["domains"] > 1:
        amount += f" in {counts['domains']} domains"
    router = (
        f"{counted(counts['layers'], 'layer')} of {counted(counts['experts'], 'expert')}, top {attributes['top_k']}"
    )
    where = " on ".join(str(attributes[name]) for name in ("dtype", "device") if attributes[name])
    attention = report_attention.overview(summary["attention"]) if "attention" in summary else ""
    fp8 = report_fp8.overview(summary["fp8"]) if "fp8" in summary else ""
    return [part for part in (amount, router, attention, fp8, where, _date(str(attributes["created_at"]))) if part]


def _date(created_at: str) -> str:
    try:
        return datetime.fromisoformat(created_at).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return created_at


def _skipped(summary: Mapping[str, Any]) -> str:
    """What is not in the recording, or nothing."""
    counts, n_bad = summary["counts"], summary["problems"]["count"]
    parts = []
    if counts.get("documents_cut"):
        documents, tokens = counted(counts["documents_cut"], "document"), counted(counts["tokens_cut"], "token")
        parts.append(f"{documents} cut short by {tokens} in all")
    if n_bad:
        parts.append(f"{counted(n_bad, 'line')} of the corpus could not be used")
    return "; ".join(parts)


def _first_card(load: xr.Dataset, found: Sequence[findings.Finding]) -> tuple[int, int]:
    """The layer and the expert that the first finding about one names, or else the busiest of all."""
    for finding in found:
        if {"layer", "expert"} <= finding.where.keys():
            return int(finding.where["layer"]), int(finding.where["expert"])
    shares = load["load"].transpose("layer", "expert")
    row, column = np.unravel_index(int(np.nanargmax(shares.values)), shares.shape)
    return int(shares["layer"][row]), int(shares["expert"][column])


def _card(recording: xr.DataTree, results: Results, *, layer: int, expert: int) -> str:
    """The data of all expert cards, opened at one of them, for the page's script."""
    domains: list[str] = []
    if "specialization" in results:
        domains = report_sections.telling_domains(findings.specialized_cells(results["specialization"]))
    data = report_card.card_data(results, schema.group(recording, "vocabulary"), domains=domains)
    return text_view.script_json(data | {"layer": layer, "expert": expert, "unit": _unit(recording)})


def _unit(recording: xr.DataTree) -> str:
    """What a load is a share of."""
    return "tokens" if recording.attrs["top_k"] == 1 else "assignments"


def _token_layers(results: Results, recording: xr.DataTree) -> list[dict[str, Any]]:
    """Layers with their experts and the tokens that each attracts; none where there are too many experts to list."""
    load = results["load_interval"]["load"].transpose("layer", "expert")
    if load.size > LISTED_EXPERTS:
        return []
    pieces = schema.pieces(schema.group(recording, "vocabulary"))
    chips: dict[tuple[int, int], list[Markup]] = {}
    top = results["top_tokens"]
    for layer, expert, token_id in zip(
        *(top[name].values.tolist() for name in ("layer", "expert", "token_id")), strict=True
    ):
        label = Markup(text_view.text_html(text_view.piece_label(pieces[token_id])))
        chips.setdefault((layer, expert), []).append(label)
    return [
        {
            "layer": int(layer),
            "label": layer_name(load, at),
            "experts": [
                {
                    "number": int(expert),
                    "load": findings.percent(float(load[at, place])),
                    "tokens": chips.get((int(layer), int(expert)), []),
                }
                for place, expert in enumerate(load["expert"].values)
            ],
        }
        for at, layer in enumerate(load["layer"].values)
    ]


def _pointed(found: Sequence[findings.Finding]) -> Mapping[str, Any]:
    """Where the first finding about a domain points, or else the first that names a layer."""
    places = [finding.where for finding in found if finding.where]
    return next((where for where in places if "domain" in where), places[0] if places else {})


def _text(recording: xr.DataTree, pointed: Mapping[str, Any]) -> str:
    """The text of some documents, opened at the domain and layer that ``pointed`` names."""
    chosen = choose_documents(recording, first_domain=pointed.get("domain"))
    n_layers = schema.group(recording, "routing").sizes["layer"]
    budget = min(TOKENS_SHOWN, TEXT_BYTES // (n_layers * 6))
    share = max(budget // len(chosen), 1)
    documents = [text_view.document(recording, sample, max_tokens=share) for sample in chosen]
    return text_view.view_html(documents, layer=pointed.get("layer"))


def choose_documents(recording: xr.DataTree, *, first_domain: str | None = None) -> list[int]:
    """Samples to show: the first few of each domain that have a token, ``first_domain`` at the front."""
    samples = schema.group(recording, "samples")
    domains, n_tokens = samples["domain"].values.astype(object), samples["n_tokens"].values
    order = sorted(_domains(recording), key=lambda name: name != first_domain)
    return [
        int(sample)
        for domain in order
        for sample in np.flatnonzero((domains == domain) & (n_tokens > 0))[:DOCUMENTS_PER_DOMAIN]
    ]
