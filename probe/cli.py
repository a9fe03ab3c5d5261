"""The command ``probe``.

Whatever is slow to import is imported by the command that needs it, so that ``probe --help`` answers at once. An error
that probe raises on purpose ends as one message and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    import xarray as xr

    from probe.corpus import BadLine, Corpus
    from probe.models import LoadedModel

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
SHOWN_PROBLEMS = 5


class _Commands(TyperGroup):
    """The commands, with one place that says how a failure ends."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            # Not imported: probe.schema loads xarray, and where it was never loaded it raised nothing.
            schema = sys.modules.get("probe.schema")
            if schema is None or not isinstance(error, schema.ProbeError):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(
    cls=_Commands,
    help="Look inside Llama 4: which expert takes each token, and how sure the router is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Precision(StrEnum):
    """Dtypes that a model can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Options that come before a command."""
    if version:
        import probe

        typer.echo(f"probe {probe.__version__}")
        raise typer.Exit


ModelArgument = Annotated[
    str | None, typer.Argument(help="Shipped model, local folder or hub id.", show_default="tiny-scout")
]
CorpusOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="JSONL, Parquet or text file, or a folder of them; may be given several times.",
        show_default="the bundled corpus",
    ),
]
DomainColumnOption = Annotated[
    str | None, typer.Option(help="Column that names each record's domain.", show_default="domain")
]


@app.command()
def report(
    model: ModelArgument = None,
    corpus: CorpusOption = None,
    domain_column: DomainColumnOption = None,
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier report in it is replaced.")] = Path("report"),
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens kept of each text.", show_default="all")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts in one forward.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Dtype to load the model in.")] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="Record attention too: who attends where, NoPE against RoPE layers.")
    ] = False,
    attention_queries: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Queries of each text whose attention is recorded, drawn at random.",
            show_default="all if no text has over 1,024 tokens, else 256",
        ),
    ] = None,
    fp8_recipes: Annotated[
        list[str] | None,
        typer.Option(
            "--fp8", metavar="RECIPE", help="Also what FP8 does to the model, as probe fp8; may be given several times."
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--from", help="Report on a recording made earlier; no model is run.")
    ] = None,
) -> None:
    """Record a model's routing on a corpus and write the report: HTML, tables and the recording itself."""
    if attention_queries is not None and not attention and store is None:
        _refuse_queries_alone()
    from probe.report import check_folder

    check_folder(out)  # now, and not after an hour of recording
    problems: Sequence[BadLine] = ()
    if store is not None:
        given: dict[str, object] = {
            "MODEL": model,
            "--corpus": corpus,
            "--domain-column": domain_column,
            "--max-tokens": max_tokens,
        }
        given |= {"--batch-size": batch_size, "--dtype": dtype, "--fp8": fp8_recipes}
        _refuse_beside_from(given | {"--attention": attention or None, "--attention-queries": attention_queries})
        recording = _open(store)
    else:
        recording, problems = _record(
            model or "tiny-scout",
            corpus,
            domain_column=domain_column,
            dtype=dtype,
            options={"max_tokens": max_tokens, "batch_size": batch_size},
            attention=attention,
            queries=attention_queries,
            recipes=fp8_recipes or (),
        )
    import probe

    page = probe.write_report(recording, out, problems=problems, progress=True)
    typer.echo(f"Report: {page} ({_size(recording)}{_left_out(problems)})")


@app.command()
def fp8(
    model: ModelArgument = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What is rounded, and how; may be given several times, and the first one's parts are tried one by "
            "one. An unknown one lists those that there are.",
            show_default="meta",
        ),
    ] = None,
    corpus: CorpusOption = None,
    domain_column: DomainColumnOption = None,
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier report in it is replaced.")] = Path(
        "fp8-report"
    ),
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the study: one document of each domain in turn, until so many.",
            show_default="10,000",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens kept of each text.", show_default="so many that each domain has five documents"
        ),
    ] = None,
    no_sensitivity: Annotated[
        bool, typer.Option("--no-sensitivity", help="Do not try parts one by one, which takes most of the time.")
    ] = False,
    no_activations: Annotated[
        bool, typer.Option("--no-activations", help="Do not measure the range of the activations.")
    ] = False,
    store: Annotated[
        Path | None, typer.Option("--from", help="Report on a study made earlier; no model is run.")
    ] = None,
) -> None:
    """Measure what FP8 does to a model (drift, routing flips, which part cannot take it) and write the report."""
    from probe.report import check_folder

    check_folder(out)
    problems: Sequence[BadLine] = ()
    if store is not None:
        given: dict[str, object] = {
            "MODEL": model,
            "--recipe": recipe,
            "--corpus": corpus,
            "--domain-column": domain_column,
        }
        given |= {"--tokens": tokens, "--max-tokens": max_tokens, "--no-sensitivity": no_sensitivity or None}
        _refuse_beside_from(given | {"--no-activations": no_activations or None})
        from probe.fp8_study import alone

        study = alone(_open(store))
    else:
        left_out = {"sensitivity": no_sensitivity, "activations": no_activations}
        study, problems = _study_alone(
            model or "tiny-scout",
            corpus,
            domain_column=domain_column,
            recipes=recipe or ["meta"],
            options={"n_tokens": tokens, "max_tokens": max_tokens},
            leave_out=[name for name, is_left_out in left_out.items() if is_left_out],
        )
    import probe

    page = probe.write_report(study, out, problems=problems, progress=True)
    typer.echo(f"Report: {page} ({_size(study)}{_left_out(problems)})")


@app.command()
def models() -> None:
    """List the models that come with probe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from probe.models import shipped_models

    table = Table("name", "size", "what it is", box=None, pad_edge=False)
    for name, description in shipped_models().items():
        table.add_row(Text(name), Text(_weights_size(name), justify="right"), Text(description))
    Console().print(table)


@app.command()
def validate(store: Annotated[Path, typer.Argument(help="Zarr store of a recording.")]) -> None:
    """Check that a store is a whole recording."""
    recording = _open(store)
    typer.echo(f"{store} is whole: {recording.attrs['model']}, {_size(recording)}")


@app.command()
def lab(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder to open.", show_default="the notebooks of this checkout")
    ] = None,
) -> None:
    """Start JupyterLab on the notebooks."""
    from importlib.util import find_spec

    from probe.schema import ProbeError

    if find_spec("jupyterlab") is None:
        raise ProbeError('JupyterLab is not installed: pip install "llama4-probe[lab]"')
    folder = folder or _notebooks()
    if not folder.is_dir():
        raise ProbeError(f"no such folder: {folder}")
    from jupyterlab.labapp import main as start_lab

    start_lab([str(folder)])


# --- steps of a report ------------------------------------------------------------------------------------------------


def _record(
    model: str,
    corpus: Sequence[Path] | None,
    *,
    domain_column: str | None,
    dtype: Precision | None,
    options: Mapping[str, Any],
    attention: bool,
    queries: int | None,
    recipes: Sequence[str],
) -> tuple[xr.DataTree, Sequence[BadLine]]:
    if recipes:
        _check_recipes(recipes)
    texts = _read(corpus, domain_column=domain_column)
    loaded = _load(model, dtype=dtype and dtype.value)
    given = {name: value for name, value in options.items() if value is not None}
    if attention:
        from probe.report_attention import choose_spec

        given["attention"] = choose_spec(loaded, texts.texts, queries=queries, max_tokens=options["max_tokens"])
    # The study first: it refuses models and texts that the recording takes.
    study = _study(loaded, texts, recipes, max_tokens=options["max_tokens"]) if recipes else None
    import probe

    recording = probe.record(
        loaded,
        texts.texts,
        domains=texts.domains,
        names=texts.names,
        progress=True,
        **given,
    )
    if study is not None:
        from probe.fp8_study import joined

        recording = joined(recording, study)
    return recording, texts.problems


def _study_alone(
    model: str,
    corpus: Sequence[Path] | None,
    *,
    domain_column: str | None,
    recipes: Sequence[str],
    options: Mapping[str, Any],
    leave_out: Sequence[str],
) -> tuple[xr.DataTree, Sequence[BadLine]]:
    _check_recipes(recipes)
    texts = _read(corpus, domain_column=domain_column)
    given = {name: value for name, value in options.items() if value is not None}
    return _study(_load(model), texts, recipes, leave_out=leave_out, **given), texts.problems


def _check_recipes(recipes: Sequence[str]) -> None:
    """Raise a ProbeError for a recipe that is not known, or given twice."""
    from rich.console import Console

    with Console(stderr=True).status("Starting up"):
        from probe.fp8.streams import resolved
    resolved(recipes)


def _read(corpus: Sequence[Path] | None, *, domain_column: str | None) -> Corpus:
    """Read the corpus first, so that what is wrong with it shows before a model is loaded."""
    from rich.console import Console

    from probe.corpus import bundled_corpus, read_corpus

    with Console(stderr=True).status("Reading the corpus"):
        texts = read_corpus(corpus or bundled_corpus(), domain_column=domain_column)
    _warn(texts.problems)
    return texts


def _load(model: str, **options: Any) -> LoadedModel:
    from rich.console import Console
    from rich.markup import escape

    status = Console(stderr=True).status
    with status("Starting up"):
        import probe
    with status(f"Loading {escape(model)}"):
        return probe.load(model, **options)


def _study(
    model: LoadedModel, texts: Corpus, recipes: Sequence[str], *, leave_out: Sequence[str] = (), **options: Any
) -> xr.DataTree:
    """An FP8 study of some of the texts."""
    from rich.console import Console

    from probe import fp8_study

    console = Console(stderr=True)
    return fp8_study.study(
        model,
        fp8_study.choose_documents(texts, model.tokenizer, **options),
        recipes=recipes,
        leave_out=leave_out,
        progress=lambda step: console.print(step, markup=False, highlight=False),
    )


def _open(store: Path) -> xr.DataTree:
    from probe.store import open as open_store

    return open_store(store)


def _warn(problems: Sequence[BadLine]) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        typer.echo(f"Left out {problem}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        typer.echo(f"… and {len(problems) - SHOWN_PROBLEMS} more; the report counts them all.", err=True)


def _refuse_beside_from(given: Mapping[str, object]) -> None:
    from probe.schema import ProbeError

    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ProbeError(f"--from reports on a recording as it is: leave out {', '.join(named)}")


def _refuse_queries_alone() -> None:
    from probe.schema import ProbeError

    raise ProbeError("--attention-queries says how much of attention to record: add --attention, or leave it out")


# --- words ------------------------------------------------------------------------------------------------------------


def _size(recording: xr.DataTree) -> str:
    from probe.findings import counted

    name = next((name for name in ("samples", "fp8_samples") if name in recording.children), None)
    if name is None:
        return "an FP8 study without texts"
    samples = recording[name]
    return f"{counted(samples.sizes['sample'], 'document')}, {counted(int(samples['n_tokens'].sum()), 'token')}"


def _left_out(problems: Sequence[BadLine]) -> str:
    from probe.findings import counted

    return f", {counted(len(problems), 'bad line')} left out" if problems else ""


def _weights_size(model: str) -> str:
    from importlib.resources import files

    folder = Path(str(files("probe") / "assets" / "models" / model))
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.1f} MB"


def _notebooks() -> Path:
    """The notebooks of the current folder, or of the checkout that probe runs from."""
    from probe.schema import ProbeError

    for parent in (Path.cwd(), Path(__file__).parents[1]):
        if any((parent / "notebooks").glob("*.ipynb")):
            return parent / "notebooks"
    raise ProbeError("found no notebooks here: get probe's source, or name a folder (probe lab FOLDER)")
