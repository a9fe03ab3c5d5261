from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import planted
import pytest
import typer
import xarray as xr
from typer.testing import CliRunner

import probe
from probe import cli, schema
from probe.corpus import bundled_corpus, read_corpus

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in an empty folder, with what it prints kept as it would print it."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the slow steps; what they were called with, by name, in the order of the calls."""
    made = {}
    recording = planted.from_experts(np.zeros((5, 2), int), n_experts=4, lengths=[2, 3])

    def stand_in(name, result):
        def call(*args, **kwargs):
            made[name] = SimpleNamespace(args=args, **kwargs)
            return result

        # Into the module's dict: setattr would look the slow one up first, to put it back.
        monkeypatch.setitem(vars(probe), name, call)

    stand_in("load", "a model")
    stand_in("record", recording)
    stand_in("write_report", Path("report/index.html"))
    return made


def assert_one_message(result, *words):
    """A failure ends with exit status 2 and a message that holds ``words``, and without a traceback."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


# --- the command itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "report --help", "fp8 --help", "--version"])
def test_help_and_version_load_nothing_slow(arguments):
    code = (
        f"import sys; sys.argv = ['probe', *{arguments!r}.split()]\n"
        "from probe.cli import app\n"
        "try: app()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout
    assert not set(done.stderr.split()) & {"torch", "plotly", "transformers", "numpy", "xarray", "pandas", "dask"}


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "probe", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"probe {probe.__version__}\n")


def test_unknown_command_is_refused(run):
    result = run("reprot")
    assert result.exit_code == 2
    assert "reprot" in result.stderr


def test_interrupt_ends_in_one_line(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(probe), "load", interrupt)
    result = run("report")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in result.stderr


def test_fault_of_ours_is_not_hidden(run, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setitem(vars(probe), "load", fail)
    assert isinstance(run("report").exception, ZeroDivisionError)


# --- report -----------------------------------------------------------------------------------------------------------


def test_report_takes_the_shipped_model_and_corpus_unless_told_otherwise(run, calls):
    result = run("report")
    assert result.exit_code == 0, result.output
    assert list(calls) == ["load", "record", "write_report"]
    assert calls["load"].args == ("tiny-scout",)
    corpus = read_corpus(bundled_corpus())
    assert calls["record"].args == ("a model", corpus.texts)
    assert (calls["record"].domains, calls["record"].names) == (corpus.domains, corpus.names)
    assert not hasattr(calls["record"], "batch_size") and not hasattr(calls["record"], "max_tokens")
    assert calls["write_report"].args[1] == Path("report")
    assert result.stdout == "Report: report/index.html (2 documents, 5 tokens)\n"


def test_report_passes_on_what_it_is_told(run, calls, tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.txt"
    first.write_text('{"text": "one", "topic": "x"}\nbad\n', "utf-8")
    second.write_text("two", "utf-8")
    options = ["--corpus", first, "--corpus", second, "--domain-column", "topic", "--out", "there"]
    result = run("report", "some/model", *options, "--max-tokens", 7, "--batch-size", 3, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert (calls["load"].args, calls["load"].dtype) == (("some/model",), "bfloat16")
    record = calls["record"]
    assert (record.args[1], record.domains) == (["one", "two"], ["x", schema.NO_DOMAIN])
    assert (record.max_tokens, record.batch_size) == (7, 3)
    assert calls["write_report"].args[1] == Path("there")
    assert [problem.line for problem in calls["write_report"].problems] == [2]
    assert f"Left out {first}:2: it is not JSON" in result.stderr
    assert "1 bad line left out" in result.stdout


@pytest.fixture
def tiny(monkeypatch):
    """A stand-in for a model of 2 layers of 4 heads, whose tokens are words."""
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4)
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, tokenizer=lambda text, verbose: {"input_ids": text.split()})
    return lambda: monkeypatch.setitem(vars(probe), "load", lambda *args, **kwargs: model)


def test_report_records_attention_only_when_told_to(run, calls, tiny, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two"}\n', "utf-8")
    tiny()
    assert run("report", "--corpus", path).exit_code == 0
    assert not hasattr(calls["record"], "attention")
    assert run("report", "--corpus", path, "--attention").exit_code == 0
    spec = calls["record"].attention
    assert spec.queries is None and "map_max" in spec.statistics
    assert run("report", "--corpus", path, "--attention", "--attention-queries", 9).exit_code == 0
    assert calls["record"].attention.queries == 9
    path.write_text(json.dumps({"text": "word " * 1025}), "utf-8")
    assert run("report", "--corpus", path, "--attention").exit_code == 0
    assert calls["record"].attention.queries == 256
    assert run("report", "--corpus", path, "--attention", "--max-tokens", 1000).exit_code == 0
    assert calls["record"].attention.queries is None


def test_queries_without_attention_are_refused_before_any_work(run, calls):
    result = run("report", "--attention-queries", 9, "--corpus", "missing")
    assert_one_message(result, "--attention-queries", "add --attention")
    assert not calls


def test_from_takes_no_attention(run, calls):
    result = run("report", "--from", "run.zarr", "--attention", "--attention-queries", 9)
    assert_one_message(result, "leave out --attention, --attention-queries")
    assert_one_message(run("report", "--from", "run.zarr", "--attention-queries", 9), "leave out --attention-queries")
    assert not calls


def test_help_says_which_queries_are_recorded(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run("report", "--help").stdout
    assert "--attention-queries" in text and "1,024 tokens" in text and "256" in text


def test_report_names_the_first_bad_lines_and_counts_the_rest(run, calls, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + "bad\n" * 8, "utf-8")
    result = run("report", "--corpus", path)
    assert result.stderr.count("Left out") == cli.SHOWN_PROBLEMS
    assert "… and 3 more; the report counts them all." in result.stderr
    assert "8 bad lines left out" in result.stdout


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, [], ["no such corpus file or folder", "corpus.jsonl"]),
        (b"", [], ["the corpus is empty", "corpus.jsonl"]),
        (b"bad\n", [], ["the corpus is empty", "corpus.jsonl:1"]),
        (b'{"text": "t"}\n', ["--domain-column", "topic"], ["no record of the corpus has a column 'topic'", "'text'"]),
    ],
    ids=["missing", "empty", "only bad lines", "domain column"],
)
def test_corpus_that_cannot_be_used_ends_before_a_model_is_loaded(run, calls, content, options, words):
    if content is not None:
        Path("corpus.jsonl").write_bytes(content)
    assert_one_message(run("report", "--corpus", "corpus.jsonl", *options), *words)
    assert not calls
    assert not Path("report").exists()


def test_unreadable_corpus_ends_with_a_message(run, calls, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").symlink_to("gone")
    assert_one_message(run("report", "--corpus", "corpus"), "cannot read corpus/a.txt")


def test_unknown_model_ends_with_the_shipped_ones(run):
    assert_one_message(run("report", "tiny-scuot"), "no model 'tiny-scuot'", "the shipped models are tiny-scout")


@pytest.mark.parametrize("out", ["file", "file/report"])
def test_out_that_is_a_file_is_refused_before_any_work(run, calls, out):
    Path("file").write_text("mine", "utf-8")
    assert_one_message(run("report", "--out", out, "--corpus", "missing"), f"to {out}:", "is a file")
    assert Path("file").read_text("utf-8") == "mine"


@pytest.mark.parametrize("option", ["--max-tokens", "--batch-size", "--attention-queries"])
def test_counts_must_be_positive(run, option):
    result = run("report", option, "0")
    assert result.exit_code == 2
    assert option in result.stderr and "Traceback" not in result.stderr


def test_report_from_a_store_runs_no_model(run, calls):
    probe.save(planted.from_experts(np.zeros((6, 2), int), n_experts=4, lengths=[2, 3, 1]), "run.zarr")
    result = run("report", "--from", "run.zarr")
    assert result.exit_code == 0, result.output
    assert list(calls) == ["write_report"]
    assert "(3 documents, 6 tokens)" in result.stdout


def test_from_takes_no_options_of_a_recording(run, calls):
    result = run("report", "tiny-scout", "--from", "run.zarr", "--max-tokens", 5)
    assert_one_message(result, "--from", "leave out MODEL, --max-tokens")
    assert not calls


def test_missing_store_is_named(run):
    assert_one_message(run("report", "--from", "gone.zarr"), "gone.zarr")


def test_report_adds_a_study_of_some_texts_where_it_is_told_to(run, calls, studies, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two"}\n', "utf-8")
    assert run("report", "--corpus", path).exit_code == 0
    assert not studies
    result = run("report", "--corpus", path, "--fp8", "meta", "--fp8", "rowwise", "--max-tokens", 20)
    assert result.exit_code == 0, result.output
    (study,) = studies
    assert (study.recipes, study.leave_out) == (["meta", "rowwise"], ())
    assert [document.text for document in study.args[1].documents] == ["one two"]
    assert study.args[1].max_tokens == 20
    written = calls["write_report"].args[0]
    assert {"routing", "fp8_weights"} <= set(written.children) and written.attrs["recipes"] == "{}"


def test_report_refuses_an_unknown_recipe_before_any_work(run, calls):
    result = run("report", "--fp8", "fp7", "--corpus", "missing")
    assert_one_message(result, "no recipe is called 'fp7'", "meta, tensorwise")
    assert_one_message(run("report", "--from", "run.zarr", "--fp8", "meta"), "leave out --fp8")
    assert not calls


# --- fp8 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def studies(monkeypatch):
    """A stand-in for the run of a study, and what it was called with."""
    from probe import fp8_study

    made = []
    group = schema.dataset("fp8_weights", {"recipe": ["meta"], "layer": [0], "module": ["q_proj"], "expert": [0]})
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"recipes": "{}"}), "/fp8_weights": group})

    def study(*args, **kwargs):
        made.append(SimpleNamespace(args=args, **kwargs))
        return tree

    monkeypatch.setattr(fp8_study, "study", study)
    words = SimpleNamespace(tokenizer=lambda text, verbose: {"input_ids": text.split()})
    monkeypatch.setitem(vars(probe), "load", lambda *args, **kwargs: words)
    return made


def test_fp8_takes_metas_recipe_and_a_part_of_the_shipped_corpus_unless_told_otherwise(run, calls, studies):
    result = run("fp8")
    assert result.exit_code == 0, result.output
    (study,) = studies
    assert (study.recipes, study.leave_out) == (["meta"], [])
    selection, corpus = study.args[1], read_corpus(bundled_corpus())
    assert selection.n_given == len(corpus.documents) > len(selection.documents)
    domains = [document.domain for document in selection.documents]
    assert min(domains.count(domain) for domain in set(corpus.domains)) >= 5
    assert calls["write_report"].args[1] == Path("fp8-report")


def test_fp8_passes_on_what_it_is_told(run, calls, studies, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two three", "topic": "x"}\nbad\n{"text": "four five six", "topic": "y"}\n', "utf-8")
    options = ["--recipe", "rowwise", "--recipe", "int4", "--corpus", path, "--domain-column", "topic"]
    options += ["--tokens", 2, "--max-tokens", 2, "--no-sensitivity", "--no-activations", "--out", "there"]
    result = run("fp8", "m", *options)
    assert result.exit_code == 0, result.output
    (study,) = studies
    assert (study.recipes, study.leave_out) == (["rowwise", "int4"], ["sensitivity", "activations"])
    assert [document.domain for document in study.args[1].documents] == ["x"]
    assert study.args[1].max_tokens == 2
    assert calls["write_report"].args[1] == Path("there")
    assert [problem.line for problem in calls["write_report"].problems] == [2]
    assert "1 bad line left out" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "fp7"], ["no recipe is called 'fp7'", "meta, tensorwise, rowwise", "int4"]),
        (["--recipe", "meta", "--recipe", "meta"], ["two recipes are called 'meta'"]),
        (["--corpus", "missing"], ["no such corpus file or folder: missing"]),
        (["--out", "mine"], ["mine holds an index.html that is no report of probe's"]),
        (
            ["m", "--from", "a.zarr", "--recipe", "meta", "--tokens", 5, "--no-sensitivity", "--no-activations"],
            ["leave out MODEL, --recipe, --tokens, --no-sensitivity, --no-activations"],
        ),
        (["--from", "gone.zarr"], ["no store at gone.zarr"]),
    ],
)
def test_fp8_refuses_before_any_work(run, calls, options, words):
    Path("mine").mkdir()
    Path("mine/index.html").write_text("mine", "utf-8")
    assert_one_message(run("fp8", *options), *words)
    assert not calls
    assert not Path("fp8-report").exists()


def test_fp8_refuses_models_that_it_cannot_round(run, monkeypatch):
    from tests.random_models import random_model

    model = random_model(0)
    model.model.layers[1].feed_forward.experts.down_proj.data[0, 0, 0] = float("nan")
    tokenizer = lambda texts, verbose: {"input_ids": [[1, 2, 3]] if isinstance(texts, list) else [1, 2, 3]}  # noqa: E731
    loaded = probe.LoadedModel(model=model, tokenizer=tokenizer, config=model.config, name="m")
    monkeypatch.setitem(vars(probe), "load", lambda *args, **kwargs: loaded)
    Path("a.txt").write_text("text", "utf-8")
    result = run("fp8", "--corpus", "a.txt")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("use intact weights\n") and "Traceback" not in result.stderr
    model.config.quantization_config = {"quant_method": "fbgemm_fp8"}
    result = run("fp8", "--corpus", "a.txt")
    assert result.exit_code == 2
    assert "quantised already" in result.stderr and "load the checkpoint that it was made from" in result.stderr


def test_fp8_from_a_recording_without_a_study(run):
    probe.save(planted.from_experts(np.zeros((5, 2), int), n_experts=4, lengths=[2, 3]), "run.zarr")
    assert_one_message(run("fp8", "--from", "run.zarr"), "holds no FP8 study", "probe fp8 MODEL")


def test_fp8_measures_a_shipped_model_and_draws_it_again(run, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"Number {at} is a short text of a few words.", "domain": "x"}) for at in range(6)]
    path.write_text("\n".join(lines), "utf-8")
    result = run("fp8", "tiny-scout", "--corpus", path, "--tokens", 60, "--max-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Report: fp8-report/index.html (5 documents, 60 tokens)\n"
    html = Path("fp8-report/index.html").read_text("utf-8")
    assert "What FP8 does to tiny-scout" in html and "60 tokens of 5 of 6 documents" in html
    again = run("fp8", "--from", "fp8-report/fp8.zarr", "--out", "again")
    assert again.exit_code == 0, again.output
    assert Path("again/index.html").read_text("utf-8") == html
    summaries = [json.loads(Path(folder, "summary.json").read_text("utf-8")) for folder in ("fp8-report", "again")]
    assert summaries[0] == summaries[1]
    validated = run("validate", "fp8-report/fp8.zarr")
    assert validated.stdout == "fp8-report/fp8.zarr is whole: tiny-scout, 5 documents, 60 tokens\n"
    bare = run("fp8", "tiny-scout", "--corpus", path, "--tokens", 12, "--no-sensitivity", "--no-activations")
    assert bare.exit_code == 0, bare.output
    html = Path("fp8-report/index.html").read_text("utf-8")
    assert "probe fp8 without --no-sensitivity" in html and "probe fp8 without --no-activations" in html


# --- the other commands -----------------------------------------------------------------------------------------------


def test_validate_says_what_a_whole_store_holds(run):
    recording = planted.from_experts(np.zeros((5, 2), int), n_experts=4, lengths=[2, 3])
    recording.attrs["model"] = "planted"
    probe.save(recording, "run.zarr")
    result = run("validate", "run.zarr")
    assert result.exit_code == 0, result.output
    assert result.stdout == "run.zarr is whole: planted, 2 documents, 5 tokens\n"


def test_validate_names_every_fault_of_a_foreign_store(run):
    planted.from_experts(np.zeros((5, 2), int), n_experts=4, lengths=[2, 3])["routing"].to_dataset().to_zarr(
        "run.zarr", zarr_format=3, consolidated=False
    )
    assert_one_message(run("validate", "run.zarr"), "group /samples is missing", "root attribute 'model' is missing")


def test_validate_of_something_else(run):
    Path("folder").mkdir()
    assert_one_message(run("validate", "folder"), "folder")
    assert_one_message(run("validate", "gone"), "gone")


def test_models_lists_every_shipped_model_with_its_size(run):
    from probe.models import shipped_models

    result = run("models")
    assert result.exit_code == 0, result.output
    for name in shipped_models():
        (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == [name]]
        megabytes, unit = line.split()[1:3]
        assert unit == "MB" and 0 < float(megabytes) < 11


def test_lab_opens_the_notebooks_of_the_current_folder(run, monkeypatch):
    opened = []
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", fake_lab := ModuleType("jupyterlab.labapp"))
    fake_lab.main = opened.append
    Path("notebooks").mkdir()
    Path("notebooks/01.ipynb").write_text(json.dumps({}), "utf-8")
    result = run("lab")
    assert result.exit_code == 0, result.output
    assert opened == [[str(Path.cwd() / "notebooks")]]


def test_lab_without_jupyterlab_names_the_extra(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_one_message(run("lab"), 'pip install "llama4-probe[lab]"')


def test_lab_of_a_folder_that_is_not_there(run):
    assert_one_message(run("lab", "gone"), "no such folder: gone")


def test_entry_point_is_a_typer_app():
    assert isinstance(cli.app, typer.Typer)
