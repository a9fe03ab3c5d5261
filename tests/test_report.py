"""The report: what the page says is what the statistics say, and nothing in a corpus can break it."""

import json
import re
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from probe import findings, report, routing_stats, schema, store, text_view
from probe.corpus import BadLine
from probe.schema import ProbeError
from tests import planted

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & \"quoted\""


class Page(HTMLParser):
    """What a reader sees of a page, what scripts it runs, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.scripts: list[str] = []
        self.data: list[str] = []
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.identifiers: list[str] = []
        self.anchors: list[str] = []
        self._section, self._script = "top", None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.handlers += [name for name in values if name.startswith("on")]
        self.identifiers += [values["id"]] if "id" in values else []
        if tag == "section":
            self._section = values["id"]
        if tag == "script":
            self._script = self.data if values.get("type") == "application/json" else self.scripts
            self._script.append("")
        if tag == "a":
            self.anchors.append(values["href"])
        elif values.get("src") or values.get("href"):
            self.loaded.append(tag)

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self._script[-1] += data
        else:
            self.text[self._section] = self.text.get(self._section, "") + data


def recorded(*, n_documents=60, length=12, layers=(0, 1, 2, 3), n_experts=8, top_k=1, names=("english", "python")):
    """Domains that prefer experts of their own at layer 0, tokens that prefer experts everywhere."""
    rng = np.random.default_rng(0)
    n_tokens = n_documents * length
    token_id = rng.integers(0, 12, n_tokens)
    domains = [names[index % len(names)] for index in range(n_documents)]
    group = np.repeat([names.index(domain) for domain in domains], length)
    logits = rng.normal(size=(n_tokens, len(layers), n_experts))
    logits += rng.normal(size=(12, len(layers), n_experts))[token_id]
    logits[np.arange(n_tokens), 0, group % n_experts] += 3
    pieces = {index: f" word{index}".encode() for index in range(12)} | {3: b"\n", 4: "日".encode()[:2], 5: b"\xa5"}
    tree = planted.from_logits(
        logits,
        lengths=[length] * n_documents,
        layers=layers,
        domains=domains,
        token_id=token_id,
        pieces=pieces,
        top_k=top_k,
    )
    tree.attrs |= {
        "model": "tiny-scout",
        "dtype": "float32",
        "device": "cpu",
        "created_at": "2026-05-04T11:22:33+00:00",
    }
    return tree


@pytest.fixture(scope="module")
def tree():
    return recorded()


@pytest.fixture(scope="module")
def folder(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    problems = [BadLine(Path("corpus.jsonl"), line, "it is not JSON") for line in range(1, 131)]
    assert report.write_report(tree, folder, problems=problems) == folder / "index.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def written(tree, folder, **options):
    return Page(report.write_report(tree, folder, **options).read_text(encoding="utf-8"))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_first_screen_says_what_was_recorded(page):
    assert "Where the tokens go in tiny-scout" in page.text["top"]
    overview = (
        "720 tokens of 60 documents in 2 domains · 4 layers of 8 experts, top 1 · float32 on cpu · 2026-05-04 11:22 UTC"
    )
    assert overview in page.text["top"]
    assert "130 lines of the corpus could not be used" in page.text["top"]


def test_findings_on_the_page_hold_the_numbers_of_the_statistics(tree, page):
    found = findings.find(report.compute(tree))
    for finding in found:
        assert finding.text in page.text["findings"]
    first = next(finding for finding in found if finding.kind == "specialization")
    where = {name: first.where[name] for name in ("domain", "layer", "expert")}
    cell = routing_stats.specialization(tree).sel(where)
    numbers = re.fullmatch(
        r"Layer (\d+) sends (\d+)\xa0% \[\d+,\xa0\d+\] of “(\w+)” tokens to expert (\d+), ([\d.]+)\xa0× .*", first.text
    ).groups()
    assert numbers == (
        str(where["layer"]),
        f"{100 * float(cell['share']):.0f}",
        where["domain"],
        str(where["expert"]),
        f"{float(cell['lift']):.1f}",
    )
    assert first.where["layer"] == 0  # where the preference was planted


def test_every_link_of_a_finding_leads_somewhere(page):
    targets = [anchor[1:] for anchor in page.anchors if anchor.startswith("#")]
    assert targets
    assert set(targets) <= set(page.identifiers)
    assert len(page.identifiers) == len(set(page.identifiers))


def test_files_that_the_page_links_to_are_there(folder, page):
    linked = [anchor for anchor in page.anchors if not anchor.startswith("#")]
    assert len(linked) > 10
    for anchor in linked:
        assert (folder / anchor).is_file(), anchor


def test_sections_come_in_the_order_of_the_questions(page):
    expected = (
        "findings load expert imbalance domains information margins transitions paths repetition batches text".split()
    )
    assert page.identifiers == expected


def test_page_needs_no_network_and_carries_plotly_once(folder, page):
    assert page.loaded == []
    assert page.handlers == []
    assert len(page.scripts) == 2
    assert page.scripts[0].count("plotly.js v") == 1
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert len(html) < 6_000_000
    assert "@import" not in html.split("<script>")[0] and "url(" not in html.split("<script>")[0]


def test_figures_travel_as_data(tree, page):
    drawn = [json.loads(text) for text in page.data if '"layout"' in text]
    assert len(drawn) == 9
    assert all(figure["layout"]["height"] > 100 for figure in drawn)


def test_tables_on_the_page_repeat_the_statistics(tree, page):
    repetition = routing_stats.repetition(tree)
    for name in ("repetition", "lower", "upper", "null"):
        for value in repetition[name].values:
            assert f"{value:.3g}" in page.text["repetition"]


def test_new_sections_hold_the_numbers_of_the_statistics(tree, page):
    results = report.compute(tree)
    information = results["mutual_information"]
    for column in ("normalized", "null", "null_upper", "mutual_information"):
        for value in information[column].values.ravel():
            assert f"{value:.3g}" in page.text["information"]
    paths = results["paths"]
    for at in range(paths.sizes["path"]):
        path = paths.isel(path=at)
        assert " → ".join(map(str, path["expert"].values)) in page.text["paths"]
        assert f"{100 * float(path['share']):.3g}" in page.text["paths"]
    batches = results["distinct_experts"]
    for name in ("distinct", "consecutive"):
        for value in np.median(batches[name].values, axis=0):
            assert (f"{value:.3g}" if np.isfinite(value) else "–") in page.text["batches"]


def test_top_tokens_are_shown_with_their_experts(tree, page):
    top = routing_stats.top_tokens(tree).to_dataframe()
    pieces = schema.pieces(tree["vocabulary"].to_dataset())
    for token_id in top["token_id"].unique():
        assert text_view.piece_label(pieces[token_id]).strip() in page.text["expert"]


def test_the_text_is_on_the_page(tree, page):
    view = next(json.loads(text) for text in page.data if '"documents"' in text)
    assert [shown["domain"] for shown in view["documents"]] in (
        ["english"] * 3 + ["python"] * 3,
        ["python"] * 3 + ["english"] * 3,
    )
    whole = "".join(token.text for token in text_view.document(tree, 0).tokens)
    assert whole in page.text["text"]


# --- programs ---------------------------------------------------------------------------------------------------------


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_summary_is_strict_json_with_findings_and_problems(tree, folder):
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary["counts"] == {
        "tokens": 720,
        "documents": 60,
        "domains": 2,
        "documents_cut": 0,
        "tokens_cut": 0,
        "layers": 4,
        "experts": 8,
    }
    found = findings.find(report.compute(tree))
    assert [finding["text"] for finding in summary["findings"]] == [finding.text for finding in found]
    assert summary["findings"][0]["value"] == pytest.approx(found[0].value)
    assert summary["problems"]["count"] == 130
    assert len(summary["problems"]["first"]) == 100
    assert summary["problems"]["first"][1] == {"file": "corpus.jsonl", "line": 2, "reason": "it is not JSON"}
    assert summary["recording"]["model"] == "tiny-scout"


def test_nan_becomes_null():
    text = report.strict_json({"a": [float("nan"), np.float32("inf"), np.int64(2)], "b": (1.5, None)})
    assert json.loads(text, parse_constant=refuse) == {"a": [None, None, 2], "b": [1.5, None]}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_tidy_and_equal_the_statistics(tree, folder, kind):
    def read(name):
        path = folder / "tables" / f"{name}.{kind}"
        return pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)

    load = routing_stats.load_interval(tree)
    table = read("load_interval").set_index(["layer", "expert"]).sort_index()
    np.testing.assert_allclose(table["load"], load["load"].values.ravel())
    np.testing.assert_allclose(table["upper"], load["upper"].values.ravel())
    assert table.loc[(3, 0), "attention_kind"] == "nope"

    lift = routing_stats.specialization(tree)["lift"]
    table = read("specialization").set_index(["domain", "layer", "expert"])["lift"]
    assert table["python", 0, 1] == pytest.approx(float(lift.sel(domain="python", layer=0, expert=1)))

    quantiles = routing_stats.margin(tree)["margin"]
    np.testing.assert_allclose(read("margin")["quantile_95"], quantiles.sel(quantile=0.95))
    np.testing.assert_allclose(
        read("margin")["quantile_50_upper"], routing_stats.margin(tree)["margin_upper"].sel(quantile=0.5)
    )
    transition = routing_stats.transition(tree)
    assert read("transition")["count"].sum() == int(transition["count"].sum())
    tokens = read("top_tokens")
    assert set(tokens.columns) >= {"layer", "expert", "rank", "token", "count", "share", "lift", "lift_lower"}
    assert read("samples")["n_tokens"].sum() == 720


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_new_tables_equal_the_statistics(tree, folder, kind):
    def read(name):
        path = folder / "tables" / f"{name}.{kind}"
        return pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)

    information = read("mutual_information").set_index(["label", "layer"]).sort_index()
    for label, n in report.PERMUTATIONS.items():
        own = routing_stats.mutual_information(tree, of=label, n_permutations=n)
        for column in ("normalized", "null", "null_upper", "p_value", "p_adjusted"):
            np.testing.assert_allclose(information.loc[label][column], own[column])
        assert (information.loc[label]["n_permutations"] == n).all()
    paths = routing_stats.paths(tree, n=15)
    np.testing.assert_allclose(read("paths")["share"], paths["share"])
    np.testing.assert_array_equal(read("paths")["expert_at_layer_2"], paths["expert"].sel(layer=2))
    distinct = routing_stats.distinct_experts(tree, batch_sizes=report.BATCH_SIZES)
    table = read("distinct_experts").set_index(["layer", "batch_size"])
    assert table.loc[(3, 16), "distinct"] == pytest.approx(float(distinct["distinct"].sel(layer=3, batch_size=16)))
    gates = routing_stats.gate_histogram(tree)
    assert read("gate_histogram")["count"].sum() == int(gates["count"].sum())
    words = schema.labels(routing_stats.specialization(tree)["interval_status"])
    assert sorted(read("specialization")["interval_status"]) == sorted(words.ravel())


def test_every_table_is_explained(folder):
    guide = (folder / "tables" / "README.md").read_text(encoding="utf-8")
    for path in (folder / "tables").glob("*.csv"):
        if path.stem != "samples":
            assert f"## {path.stem}\n" in guide
    assert "| lift |" in guide


def test_recording_is_saved_beside_the_page(tree, folder):
    again = store.open(folder / "routing.zarr")
    np.testing.assert_array_equal(again["routing"]["expert_index"].values, tree["routing"]["expert_index"].values)


# --- hostile and odd input --------------------------------------------------------------------------------------------


def test_nothing_in_a_recording_becomes_markup(tmp_path):
    tree = recorded(names=(HOSTILE, "b"))
    tree.attrs["model"] = HOSTILE
    vocabulary, samples = tree["vocabulary"].to_dataset(), tree["samples"].to_dataset()
    vocabulary["piece"].values[0] = HOSTILE
    samples["name"].values[:] = HOSTILE
    tree["vocabulary"], tree["samples"] = xr.DataTree(vocabulary), xr.DataTree(samples)
    problems = [BadLine(Path(HOSTILE), 1, HOSTILE)]
    page = written(tree, tmp_path, problems=problems)
    assert len(page.scripts) == 2
    assert page.handlers == [] and page.loaded == []
    assert "alert(" not in "".join(page.scripts[1:])
    assert HOSTILE in page.text["top"] and HOSTILE in page.text["text"] and HOSTILE in page.text["findings"]
    assert "{{ 7 * 7 }}" in page.text["top"]
    for data in page.data:
        assert "<" not in data
        json.loads(data, parse_constant=refuse)


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"names": ("only",)}, {"domains"}),
        ({"n_documents": 1, "names": ("only",)}, {"domains"}),
        ({"n_documents": 3, "length": 2}, set()),
        ({"layers": (5,)}, {"transitions", "paths"}),
        ({"layers": (1, 3, 5, 7), "n_experts": 128}, set()),
        ({"top_k": 2}, set()),
        ({"top_k": 4, "n_experts": 4}, {"margins", "information"}),
        ({"n_experts": 300, "layers": (0, 1)}, set()),
        ({"names": tuple(f"domain {index}" for index in range(15)), "n_documents": 15}, set()),
    ],
)
def test_odd_recordings_are_reported(tmp_path, options, absent):
    page = written(recorded(**options), tmp_path)
    everything = "findings load expert imbalance domains information margins transitions paths repetition batches text"
    assert set(page.identifiers) == set(everything.split()) - absent
    assert {anchor[1:] for anchor in page.anchors if anchor.startswith("#")} <= set(page.identifiers)
    assert "nan" not in page.text["findings"].lower()
    json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_one_token_is_enough(tmp_path):
    page = written(planted.from_experts([[0]], n_experts=2, lengths=[1]), tmp_path)
    assert "1 token of 1 document" in page.text["top"]
    assert "repetition" not in page.identifiers


def test_a_domain_without_a_token_is_no_domain(tmp_path):
    tree = planted.from_experts([[0], [1]] * 8, n_experts=2, lengths=[8, 0, 8], domains=["a", "empty", "a"])
    page = written(tree, tmp_path)
    assert "2 documents · 1 layer" in page.text["top"]
    assert "domains" not in page.identifiers


def test_long_documents_are_cut_and_many_are_chosen_from(tmp_path, monkeypatch):
    tree = recorded(n_documents=8)
    assert report.choose_documents(tree) == [0, 2, 4, 1, 3, 5]
    assert report.choose_documents(tree, first_domain="python") == [1, 3, 5, 0, 2, 4]
    monkeypatch.setattr(report, "TOKENS_SHOWN", 60)
    page = written(tree, tmp_path)
    assert "The first 10 of 12 tokens." in page.text["text"]


def test_an_empty_recording_is_refused(tmp_path):
    tree = planted.from_experts(np.zeros((0, 2), int), n_experts=4, lengths=[0])
    with pytest.raises(ProbeError, match="no token"):
        report.write_report(tree, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_file_in_the_way_is_named(tree, tmp_path):
    (tmp_path / "report").write_text("mine")
    with pytest.raises(ProbeError, match="is a file; name another folder"):
        report.write_report(tree, tmp_path / "report")
    assert (tmp_path / "report").read_text() == "mine"


def test_a_broken_recording_is_refused(tree, tmp_path):
    broken = tree.copy()
    del broken["vocabulary"]
    with pytest.raises(schema.SchemaError, match="/vocabulary is missing"):
        report.write_report(broken, tmp_path)


def test_a_report_can_be_made_from_its_own_store(folder, tmp_path):
    report.write_report(recorded(n_documents=4), tmp_path)
    before = (tmp_path / "summary.json").read_text(encoding="utf-8")
    report.write_report(store.open(tmp_path / "routing.zarr"), tmp_path)
    assert (tmp_path / "summary.json").read_text(encoding="utf-8") == before
    store.open(tmp_path / "routing.zarr")


def test_progress_has_as_many_steps_as_are_taken(tree, monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(report, "_progress", lambda shown, n_steps: nullcontext(taken.append))
    report.write_report(tree, tmp_path)
    assert len(taken) == len(report._STATISTICS) + len(report._OTHER_STEPS)
    assert len(set(taken)) == len(taken)


def test_progress_is_shown_on_request_only(tmp_path, capsys):
    tree = recorded(n_documents=2)
    report.write_report(tree, tmp_path)
    assert capsys.readouterr().err == ""
    report.write_report(tree, tmp_path, progress=True)
    assert "report" in capsys.readouterr().err


def test_tables_of_an_earlier_report_do_not_stay_behind(tree, tmp_path):
    written(tree, tmp_path)
    assert (tmp_path / "tables" / "specialization.csv").exists()
    (tmp_path / "tables" / "mine.csv").write_text("kept")
    written(recorded(names=("english",)), tmp_path)
    assert not list((tmp_path / "tables").glob("specialization.*"))
    assert (tmp_path / "tables" / "mine.csv").read_text() == "kept"


def test_a_page_of_somebody_else_is_not_replaced(tree, tmp_path):
    (tmp_path / "index.html").write_text("my site")
    with pytest.raises(ProbeError, match="no report of probe's"):
        written(tree, tmp_path)
    assert (tmp_path / "index.html").read_text() == "my site"


@pytest.mark.parametrize("summary", ["{}", "[]", "no JSON"])
def test_a_page_of_somebody_else_beside_a_summary_is_not_replaced_either(tree, tmp_path, summary):
    (tmp_path / "index.html").write_text("my site")
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ProbeError, match="no report of probe's"):
        written(tree, tmp_path)
    assert (tmp_path / "index.html").read_text() == "my site"


@pytest.mark.parametrize("name", ["routing.zarr", "fp8.zarr"])
def test_what_is_no_store_stops_a_report_before_anything_is_written(tree, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("kept")
    with pytest.raises(ProbeError, match=f"{name} exists and is not a recording"):
        written(tree, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_opening_a_reports_folder_names_its_store(tree, tmp_path):
    written(tree, tmp_path)
    with pytest.raises(ProbeError, match="is a report's folder: open its store, .*routing.zarr"):
        store.open(tmp_path)


def test_a_folder_that_cannot_be_made_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ProbeError, match="file is a file"):
        report.check_folder(tmp_path / "file" / "report")
    with pytest.raises(ProbeError, match="nothing can be written there"):
        report.check_folder(Path("/proc/nowhere/report"))
    report.check_folder(tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
