from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probe.corpus import CorpusError, CorpusReader, Document, bundled_corpus, read_corpus
from probe.schema import NO_DOMAIN


def write(path, *lines, end="\n"):
    """Lines, given as text or as records, in UTF-8."""
    spelled = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in spelled).encode("utf-8"))
    return path


# --- what is read -----------------------------------------------------------------------------------------------------


def test_jsonl_keeps_domain_and_name_and_makes_up_what_is_missing(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "one", "domain": "x", "name": "first"}, {"text": "two"})
    assert read_corpus(path).documents == (Document("one", "x", "first"), Document("two", NO_DOMAIN, "a.jsonl:2"))


def test_texts_domains_and_names_are_in_order(tmp_path):
    corpus = read_corpus(write(tmp_path / "a.jsonl", {"text": "one", "domain": "x"}, {"text": "two", "domain": "y"}))
    assert (corpus.texts, corpus.domains, corpus.names) == (["one", "two"], ["x", "y"], ["a.jsonl:1", "a.jsonl:2"])


def test_null_and_empty_labels_count_as_missing_and_numbers_as_text(tmp_path):
    path = write(
        tmp_path / "a.jsonl", {"text": "t", "domain": None, "name": ""}, {"text": "t", "domain": 7, "name": 1.5}
    )
    assert read_corpus(path).documents == (Document("t", NO_DOMAIN, "a.jsonl:1"), Document("t", "7", "1.5"))


def test_byte_order_mark_crlf_and_blank_lines_are_no_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "one"}', "", "   ", {"text": "two"}, end="\r\n")
    corpus = read_corpus(path)
    assert corpus.documents == (Document("one", name="a.jsonl:1"), Document("two", name="a.jsonl:4"))
    assert corpus.problems == ()


def test_line_separators_inside_a_json_string_do_not_end_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one\u2028two\x85three"}')
    assert read_corpus(path).texts == ["one\u2028two\x85three"]


def test_last_line_needs_no_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}')
    assert read_corpus(path).texts == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".rst", ".md", ".TXT"])
def test_text_file_is_one_document_without_bom_and_carriage_returns(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert read_corpus(path).documents == (Document("one\ntwo\nthree\n", NO_DOMAIN, f"a{suffix}"),)


def test_folder_is_read_in_order_with_the_inner_folders_as_domains(tmp_path):
    write(tmp_path / "b.txt", "top")
    write(tmp_path / "english" / "a.txt", "english")
    write(tmp_path / "english" / "old" / "a.rst", "old english")
    write(tmp_path / "german" / "a.jsonl", {"text": "german"}, {"text": "own", "domain": "mine"})
    write(tmp_path / "english" / "skipped.py", "no kind of ours")
    write(tmp_path / ".git" / "a.txt", "hidden")
    write(tmp_path / "english" / ".a.txt", "hidden")
    assert read_corpus(tmp_path).documents == (
        Document("top\n", NO_DOMAIN, "b.txt"),
        Document("english\n", "english", "english/a.txt"),
        Document("old english\n", "english/old", "english/old/a.rst"),
        Document("german", "german", "german/a.jsonl:1"),
        Document("own", "mine", "german/a.jsonl:2"),
    )


def test_folder_may_be_called_like_a_file(tmp_path):
    write(tmp_path / "a.jsonl" / "b.txt", "text")
    assert read_corpus(tmp_path).domains == ["a.jsonl"]


def test_parquet_across_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["one", "two", "three"], "domain": ["x", None, "y"], "other": [1, 2, 3]})
    pq.write_table(table, path, row_group_size=2)
    assert read_corpus(path).documents == (
        Document("one", "x", "a.parquet:1"),
        Document("two", NO_DOMAIN, "a.parquet:2"),
        Document("three", "y", "a.parquet:3"),
    )


def test_parquet_reads_categories_and_lists_the_rows_that_are_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    domain = pa.array(["x", "y", "x"]).dictionary_encode()
    pq.write_table(pa.table({"text": ["one", None, " "], "domain": domain, "name": ["n", "m", "o"]}), path)
    corpus = read_corpus(path)
    assert corpus.documents == (Document("one", "x", "n"),)
    assert [(problem.line, problem.reason) for problem in corpus.problems] == [
        (2, "its text is null, not a string"),
        (3, "its text is empty"),
    ]


def test_several_paths_are_read_one_after_another(tmp_path):
    second = write(tmp_path / "a.txt", "second")
    first = write(tmp_path / "b.jsonl", {"text": "first"})
    assert read_corpus([first, str(second)]).texts == ["first", "second\n"]


def test_another_domain_column(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "t", "topic": "x", "domain": "no"}, {"text": "t", "domain": "no"})
    assert read_corpus(path, domain_column="topic").domains == ["x", NO_DOMAIN]


def test_reading_is_a_stream_and_problems_start_anew(tmp_path):
    reader = CorpusReader(write(tmp_path / "a.jsonl", "bad", {"text": "one"}, "bad"))
    documents = iter(reader)
    assert next(documents).text == "one"
    assert len(reader.problems) == 1
    assert next(documents, None) is None
    assert len(reader.problems) == 2
    assert (len(list(reader)), len(reader.problems)) == (1, 2)


def test_bundled_corpus_is_whole():
    corpus = read_corpus(bundled_corpus())
    assert corpus.problems == ()
    assert len(set(corpus.domains)) >= 5
    assert len(set(corpus.names)) == len(corpus.documents)


# --- one bad line -----------------------------------------------------------------------------------------------------

BAD_LINES = [
    pytest.param(b'{"text": "cut off', "it is not JSON: Unterminated string starting at column 10", id="cut off"),
    pytest.param(b"plain words", "it is not JSON: Expecting value at column 1", id="no JSON"),
    pytest.param(b'["text"]', "it is a list, not an object", id="list"),
    pytest.param(b"null", "it is null, not an object", id="null"),
    pytest.param(b"3", "it is a number, not an object", id="number"),
    pytest.param(b'{"txt": "t"}', "it has no text", id="no text"),
    pytest.param(b'{"text": null}', "its text is null, not a string", id="null text"),
    pytest.param(b'{"text": {"a": 1}}', "its text is an object, not a string", id="object"),
    pytest.param(b'{"text": true}', "its text is a boolean, not a string", id="boolean"),
    pytest.param(b'{"text": ""}', "its text is empty", id="empty"),
    pytest.param(b'{"text": " \\n\\u00a0"}', "its text is empty", id="white space"),
    pytest.param(b'{"text": "caf\xe9"}', "it is not UTF-8 (byte 0xe9)", id="Latin-1"),
    pytest.param(b'{"text": "\\ud83d"}', "its text holds half of a surrogate pair", id="surrogate"),
    pytest.param(b'{"text": "t", "domain": "\\udc00"}', "its domain holds half of a surrogate pair", id="in domain"),
    pytest.param(b'{"text": "t", "domain": ["x"]}', "its domain is a list, not a string", id="domain"),
    pytest.param(b'{"text": "t", "name": {}}', "its name is an object, not a string", id="name"),
    pytest.param(b"[" * 100_000, "its JSON is nested too deeply", id="nested"),
    pytest.param(b'{"text": ' + b"1" * 5000 + b"}", "it is not JSON that can be read", id="huge number"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line_is_named_and_the_rest_goes_on(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}\n')
    corpus = read_corpus(path)
    assert corpus.texts == ["before", "after"]
    assert [(problem.path, problem.line) for problem in corpus.problems] == [(str(path), 3)]
    assert corpus.problems[0].reason.startswith(reason)
    assert str(corpus.problems[0]).startswith(f"{path}:3: {reason}")


def test_text_file_that_is_not_utf8_is_named_with_the_line_of_the_bad_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo caf\xe9\n")
    write(tmp_path / "b.txt", "fine")
    corpus = read_corpus(tmp_path)
    assert corpus.texts == ["fine\n"]
    assert str(corpus.problems[0]) == f"{tmp_path}/a.txt:2: it is not UTF-8 (byte 0xe9)"


def test_name_on_disk_that_is_not_utf8_is_made_readable(tmp_path):
    folder = os.fsencode(tmp_path)
    with open(os.path.join(folder, b"caf\xe9.txt"), "wb") as stream:
        stream.write(b"text")
    assert read_corpus(tmp_path).names == ["caf\ufffd.txt"]


# --- a corpus that cannot be used -------------------------------------------------------------------------------------


def test_missing_path_is_named_at_once(tmp_path):
    with pytest.raises(CorpusError, match="no such corpus file or folder: .*gone"):
        CorpusReader(tmp_path / "gone")


def test_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path):
    with pytest.raises(CorpusError, match=r"a\.csv: a corpus file ends in one of \.jsonl, \.parquet, \.txt"):
        CorpusReader(write(tmp_path / "a.csv", "text"))


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(CorpusError, match=r"cannot read .*a\.txt: No such file or directory"):
        read_corpus(tmp_path)


def test_broken_parquet_is_unreadable(tmp_path):
    with pytest.raises(CorpusError, match=r"a\.parquet"):
        read_corpus(write(tmp_path / "a.parquet", "PAR1 this is no Parquet"))
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"b\.parquet"):
        read_corpus(tmp_path / "b.parquet")


def test_parquet_without_text_names_its_columns(tmp_path):
    pq.write_table(pa.table({"content": ["t"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="no column 'text': its columns are 'content', 'id'"):
        read_corpus(tmp_path / "a.parquet")


def test_empty_corpus_says_what_was_looked_at(tmp_path):
    with pytest.raises(CorpusError, match=r"the corpus is empty \(.*\): no file with one of the endings"):
        read_corpus(tmp_path)
    with pytest.raises(CorpusError, match="the corpus is empty"):
        read_corpus(write(tmp_path / "a.jsonl", "", ""))
    with pytest.raises(CorpusError, match="the corpus is empty"):
        read_corpus([])


def test_corpus_of_bad_lines_only_counts_them_and_shows_the_first(tmp_path):
    with pytest.raises(
        CorpusError, match=r"none of its 2 lines could be used, the first is .*a\.jsonl:1: it has no text"
    ):
        read_corpus(write(tmp_path / "a.jsonl", {"t": 1}, {"t": 2}))


def test_unknown_domain_column_names_the_columns_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "t", "source": "x"})
    with pytest.raises(
        CorpusError, match="no record of the corpus has a column 'topic': its columns are 'source', 'text'"
    ):
        read_corpus(path, domain_column="topic")


def test_unknown_domain_column_in_parquet_and_in_text(tmp_path):
    pq.write_table(pa.table({"text": ["t"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="its columns are 'id', 'text'"):
        read_corpus(tmp_path / "a.parquet", domain_column="topic")
    with pytest.raises(CorpusError, match="its records have no column at all"):
        read_corpus(write(tmp_path / "a.txt", "t"), domain_column="topic")


def test_wide_records_do_not_flood_the_message(tmp_path):
    record = {"text": "t"} | {f"column {index:03}": 0 for index in range(100)}
    with pytest.raises(CorpusError, match="'column 019' and 81 more"):
        read_corpus(write(tmp_path / "a.jsonl", record), domain_column="topic")
