"""Texts from files: JSONL, plain text, Parquet, and folders of them, read as a stream.

One bad line must not cost a night: it is put on a list with its file and line, and the rest goes on. What makes the
whole corpus meaningless (no such file, nothing in it, no such column) is a :class:`CorpusError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from probe.schema import NO_DOMAIN, ProbeError

TEXT_KINDS = (".txt", ".rst", ".md")
KINDS = (".jsonl", ".parquet", *TEXT_KINDS)

DOMAIN_COLUMN = "domain"
PARQUET_BATCH_ROWS = 1024
NAMED_COLUMNS = 20


class CorpusError(ProbeError):
    """A corpus cannot be read at all, or has nothing in it."""


@dataclass(frozen=True)
class Document:
    """One text, the domain it belongs to, and what to call it."""

    text: str
    domain: str = NO_DOMAIN
    name: str = ""


@dataclass(frozen=True)
class BadLine:
    """What was left out of a corpus, and why; ``line`` counts from 1, and is a row in a Parquet file."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Corpus:
    """A corpus held in memory, with what was left out of it."""

    documents: tuple[Document, ...]
    problems: tuple[BadLine, ...]

    @property
    def texts(self) -> list[str]:
        """The text of each document."""
        return [document.text for document in self.documents]

    @property
    def domains(self) -> list[str]:
        """The domain of each document."""
        return [document.domain for document in self.documents]

    @property
    def names(self) -> list[str]:
        """The name of each document."""
        return [document.name for document in self.documents]


class CorpusReader:
    """Documents of some files, one at a time, however large the files are.

    Iterate over it; ``problems`` then lists what was left out so far, and starts anew with every iteration.

    Parameters
    ----------
    paths : files (``.jsonl``, ``.parquet``; ``.txt``, ``.rst`` and ``.md`` are one document each) and folders, read
        with their subfolders in the order of the names. In a folder, links to folders, hidden files and files of
        other kinds are passed over.
    domain_column : column of JSONL and Parquet records that holds the domain. Left out, it is ``domain``, where a
        record has one; given, it must exist somewhere.

    Raises
    ------
    CorpusError
        At once if a path does not exist or is of no known kind; while reading if a file is unreadable; at the end if
        there was no document, or if no record had the column ``domain_column``.

    Notes
    -----
    Columns are ``text`` and, optional, the domain and ``name``. Without a domain of its own a document has that of its
    folder: the path of the folder inside the one that was given, ``"(none)"`` at the top. Without a name it is called
    by its path in that folder, with the line for JSONL and Parquet. A byte order mark is dropped, and in a text file
    line ends become ``\\n``. Blank lines in JSONL mean nothing.
    """

    def __init__(self, paths: Iterable[str | Path] | str | Path, *, domain_column: str | None = None) -> None:
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self.problems: list[BadLine] = []
        self._domain_column = domain_column
        self._sources = [source for path in self.paths for source in _sources(path)]

    def __iter__(self) -> Iterator[Document]:
        self.problems = []
        seen = _Seen()
        for source in self._sources:
            with _readable(source.path):
                yield from self._documents(source, seen)
        if not seen.n_documents:
            raise CorpusError(self._nothing_found())
        if self._domain_column is not None and self._domain_column not in seen.columns:
            raise CorpusError(
                f"no record of the corpus has a column {self._domain_column!r}: {_listed_columns(seen.columns)}"
            )

    def _documents(self, source: _Source, seen: _Seen) -> Iterator[Document]:
        for line, record in self._records(source, seen.columns):
            try:
                document = self._document(record, source, line)
            except _Fault as fault:
                self.problems.append(BadLine(_printable(source.path), line, str(fault)))
            else:
                seen.n_documents += 1
                yield document

    def _records(self, source: _Source, columns: set[str]) -> _Records:
        suffix = source.path.suffix.lower()
        if suffix in TEXT_KINDS:
            return _text_record(source)
        if suffix == ".jsonl":
            return _json_records(source.path, columns)
        return _parquet_records(source.path, columns, wanted={"text", "name", self._domain_column or DOMAIN_COLUMN})

    def _document(self, record: Mapping[str, Any] | _Fault, source: _Source, line: int) -> Document:
        if isinstance(record, _Fault):
            raise record
        if "text" not in record:
            raise _Fault("it has no text")
        text = record["text"]
        if not isinstance(text, str):
            raise _Fault(f"its text is {_kind(text)}, not a string")
        if not text.strip():
            raise _Fault("its text is empty")
        return Document(
            _unicode(text, "text"),
            domain=_label(record, self._domain_column or DOMAIN_COLUMN) or source.domain,
            name=_label(record, "name") or f"{source.name}:{line}",
        )

    def _nothing_found(self) -> str:
        where = ", ".join(map(str, self.paths)) or "no path given"
        if not self._sources:
            return f"the corpus is empty ({where}): no file with one of the endings {', '.join(KINDS)}"
        if not self.problems:
            return f"the corpus is empty ({where}): nothing in {len(self._sources)} file(s) to record"
        return (
            f"the corpus is empty ({where}): none of its {len(self.problems)} lines could be used, "
            f"the first is {self.problems[0]}"
        )


def read_corpus(paths: Iterable[str | Path] | str | Path, *, domain_column: str | None = None) -> Corpus:
    """Read a whole corpus into memory.

    Parameters and errors are those of :class:`CorpusReader`, which reads one document at a time.
    """
    reader = CorpusReader(paths, domain_column=domain_column)
    documents = tuple(reader)
    return Corpus(documents, tuple(reader.problems))


def bundled_corpus() -> Path:
    """The corpus that comes with probe: documents in several domains, none of which a shipped model was trained on."""
    return Path(str(files("probe") / "assets" / "corpus" / "heldout.jsonl"))


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A file, what its documents are called, and their domain if they name none."""

    path: Path
    name: str
    domain: str


def _sources(path: Path) -> list[_Source]:
    if path.is_dir():
        return [_source_in_folder(file, path) for file in _files_below(path)]
    if not path.exists():
        raise CorpusError(f"no such corpus file or folder: {path}")
    if path.suffix.lower() not in KINDS:
        raise CorpusError(f"{path}: a corpus file ends in one of {', '.join(KINDS)}")
    return [_Source(path, _printable(Path(path.name)), NO_DOMAIN)]


def _source_in_folder(file: Path, folder: Path) -> _Source:
    inside = file.relative_to(folder)
    return _Source(file, _printable(inside), _printable(inside.parent) if inside.parent.name else NO_DOMAIN)


def _printable(path: Path) -> str:
    """``path`` as text; a name on disk need not be UTF-8, and what is not becomes U+FFFD."""
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _files_below(folder: Path) -> list[Path]:
    found = []
    with _readable(folder):
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = [Path(parent, name) for name in names if not name.startswith(".")]
            found += [path for path in paths if path.suffix.lower() in KINDS]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the operating system says about ``path`` into a CorpusError."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from error


# --- records ----------------------------------------------------------------------------------------------------------


class _Fault(Exception):
    """Why one line is no document."""


@dataclass
class _Seen:
    """What one pass over a corpus has met."""

    n_documents: int = 0
    columns: set[str] = field(default_factory=set)


_Records = Iterator[tuple[int, Mapping[str, Any] | _Fault]]
"""Line and record, or line and what is wrong with it."""


def _text_record(source: _Source) -> _Records:
    """A text file as one record."""
    content = source.path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield content[: error.start].count(b"\n") + 1, _not_utf8(error)
    else:
        yield 1, {"text": text.replace("\r\n", "\n").replace("\r", "\n"), "name": source.name}


def _json_records(path: Path, columns: set[str]) -> _Records:
    """The records of a JSONL file; the columns that they have are added to ``columns``."""
    with path.open("rb") as stream:
        for line, content in enumerate(stream, start=1):
            if line == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")
            if content := content.strip():
                record = _json_record(content)
                if not isinstance(record, _Fault):
                    columns.update(record)
                yield line, record


def _json_record(content: bytes) -> Mapping[str, Any] | _Fault:
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        return _Fault(f"it is not JSON: {reason} at column {error.colno}")
    except ValueError as error:
        return _Fault(f"it is not JSON that can be read: {error}")
    except RecursionError:
        return _Fault("its JSON is nested too deeply")
    return record if isinstance(record, dict) else _Fault(f"it is {_kind(record)}, not an object")


def _parquet_records(path: Path, columns: set[str], *, wanted: set[str]) -> _Records:
    """The ``wanted`` part of the records of a Parquet file; the columns that it has are added to ``columns``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            present = table.schema_arrow.names
            if "text" not in present:
                raise CorpusError(f"{path} has no column 'text': {_listed_columns(present)}")
            columns.update(present)
            kept = [column for column in present if column in wanted]
            rows = (
                {column: batch.column(column)[row] for column in kept}
                for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=kept)
                for row in range(batch.num_rows)
            )
            for line, cells in enumerate(rows, start=1):
                yield line, _parquet_record(cells)
    except pa.ArrowException as error:
        raise CorpusError(f"{path} is not a Parquet file that can be read: {error}") from error


def _parquet_record(cells: Mapping[str, Any]) -> Mapping[str, Any] | _Fault:
    try:
        return {column: cell.as_py() for column, cell in cells.items()}
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _label(record: Mapping[str, Any], column: str) -> str:
    """A domain or a name as text, "" where the record has none."""
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise _Fault(f"its {column} is {_kind(value)}, not a string")
    return _unicode(str(value), column)


def _unicode(text: str, column: str) -> str:
    """``text``, if it can be written as UTF-8: JSON may spell half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _Fault(f"its {column} holds half of a surrogate pair, which is no character") from None
    return text


def _not_utf8(error: UnicodeDecodeError) -> _Fault:
    return _Fault(f"it is not UTF-8 (byte 0x{error.object[error.start]:02x})")


_JSON_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object"
    return _JSON_KINDS.get(type(value), "a list" if isinstance(value, list) else type(value).__name__)


def _listed_columns(columns: Iterable[str]) -> str:
    names = sorted(columns)
    if not names:
        return "its records have no column at all"
    more = f" and {len(names) - NAMED_COLUMNS} more" if len(names) > NAMED_COLUMNS else ""
    return f"its columns are {', '.join(map(repr, names[:NAMED_COLUMNS]))}{more}"
