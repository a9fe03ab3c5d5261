"""Build the training corpus from what a Debian machine installs and Python ships.

Run it as::

    python -m training.corpus [--handbook DIR] [--fortunes DIR] [--out training/build/corpus]

Nine domains come out, one JSON-lines file each for `train` and for `heldout`:

* six parallel editions of the Debian handbook: english, german, french, spanish, chinese, japanese;
* fortunes: English quotations and jokes;
* python: the standard library of the running interpreter;
* arithmetic: generated sums, products, comparisons and sequences.

Held-out text is set apart by source (whole chapters, whole modules, whole categories), never by
cutting a document in two.  The same input always gives the same bytes.
"""

import argparse
import ast
import hashlib
import json
import platform
import random
import re
import shutil
import subprocess
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bs4 import BeautifulSoup, NavigableString, Tag
from rich.progress import Progress

HANDBOOK = Path("/usr/share/doc/debian-handbook/html")
FORTUNES = Path("/usr/share/games/fortunes")
OUT = Path("training/build/corpus")

LOCALES = {
    "english": "en-US",
    "german": "de-DE",
    "french": "fr-FR",
    "spanish": "es-ES",
    "chinese": "zh-CN",
    "japanese": "ja-JP",
}
LANGUAGES = {domain: locale.split("-")[0] for domain, locale in LOCALES.items()}
DOMAINS = (*LOCALES, "fortunes", "python", "arithmetic")

# One chapter on planning a migration, one on system services, one on the desktop: about an eighth of
# the book, and each kind of text in them has its like in training.
HELDOUT_CHAPTERS = ("existing-setup", "unix-services", "workstation")
# Between them prose, aphorisms and jargon, as in the rest of the collection.
HELDOUT_FORTUNES = ("law", "linux", "literature", "science")
# Drawings are not prose; the others are jokes at the expense of groups of people, or about drugs.
SKIPPED_FORTUNES = ("art", "ascii-art", "ethnic", "men-women", "drugs")
HELDOUT_MODULES_PERCENT = 8
MODULE_HASH_PREFIX = "heldout/"

# Test data, tables, and modules that describe the machine rather than the language.
SKIPPED_PYTHON_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
SKIPPED_PYTHON_NAMES = re.compile(r"config-|_sysconfigdata|__phello__|sitecustomize|usercustomize")

HANDBOOK_BYTES = (600, 4000)
FORTUNE_BYTES = (800, 2500)
PYTHON_BYTES = (1000, 4000)
SMALLEST_DOCUMENT = 200
SHARED_PARAGRAPH_CHARACTERS = 80
ARITHMETIC_BYTES = {"heldout": 150_000, "train": 2_000_000}
ARITHMETIC_SEED = 4

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")
LONGER_WORD = re.compile(r"[^\W\d_]{3,}")
# Measured on the editions: translated paragraphs lie clear of these values on one side, paragraphs
# left in English (some with a translated cross-reference in them) on the other.
SMALLEST_CJK_SHARE = 0.25
LARGEST_ENGLISH_SHARE = 0.5


@dataclass(frozen=True)
class Document:
    """One piece of text, with where it comes from."""

    text: str
    domain: str
    name: str
    language: str


@dataclass(frozen=True)
class Block:
    """One paragraph or heading of a handbook page; `kind` is "section", "title" or "paragraph"."""

    text: str
    kind: str


@dataclass
class Split:
    """The documents of one domain on both sides of the split, and what was held out."""

    train: list[Document]
    heldout: list[Document]
    held_out_sources: list[str]


def size(text: str) -> int:
    """Length in UTF-8 bytes."""
    return len(text.encode("utf-8"))


def squeeze(text: str) -> str:
    """The text with every run of white space made one space."""
    return " ".join(text.split())


def read_documents(path: Path) -> list[Document]:
    """Read one JSON-lines file of documents."""
    with path.open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line, readable (no escapes for non-ASCII text)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def pack(pieces: Iterable[str], joint: str, smallest: int, largest: int) -> Iterator[str]:
    """Join neighbouring pieces into texts of `smallest` to `largest` bytes, as far as that goes.

    A text is closed as soon as it is big enough and the next piece would make it too big.
    """
    held: list[str] = []
    held_bytes = 0
    for piece in pieces:
        if held_bytes >= smallest and held_bytes + size(piece) > largest:
            yield joint.join(held)
            held, held_bytes = [], 0
        held.append(piece)
        held_bytes += size(piece) + len(joint)
    if held:
        yield joint.join(held)


# --- The Debian handbook -------------------------------------------------------------------------


def chapters_of_pages(index: Path) -> dict[str, str]:
    """Which chapter each page belongs to, from the table of contents; chapters named by their page."""
    contents = BeautifulSoup(index.read_text("utf-8"), "html.parser").find("div", class_="toc")
    chapters: dict[str, str] = {}
    chapter = ""
    for link in contents.find_all("a"):
        page = link["href"].split("#")[0].removesuffix(".html")
        if link.parent.get("class") != ["section"]:
            chapter = page
        chapters.setdefault(page, chapter)
    return chapters


def is_block(tag: Tag) -> bool:
    """Whether this element is a paragraph, a heading or a term of a definition list."""
    classes = tag.get("class") or []
    return tag.name == "dt" or "title" in classes or "para" in classes


def block_kind(tag: Tag) -> str:
    """A heading that opens a section, another title (a sidebar's, a list's), or a paragraph."""
    if "title" not in (tag.get("class") or []):
        return "paragraph"
    return "title" if tag.name == "p" else "section"


def page_blocks(page: Path) -> list[Block]:
    """The blocks of one handbook page, in order.

    Blocks left empty by what is removed (code, figures, links) stay in the list, so that block
    number n of a page is the same paragraph in every language.
    """
    body = BeautifulSoup(page.read_text("utf-8"), "html.parser").body
    root = body.find("div", class_=["chapter", "preface", "appendix", "section"], recursive=False)
    for unwanted in root.select("div.toc, div.example, div.figure, div.table, div.mediaobject, div.url, pre"):
        unwanted.decompose()
    texts: dict[int, list[str]] = {}
    for string in root.descendants:
        if type(string) is NavigableString:
            # A paragraph may contain a list: each string goes to the innermost block around it.
            owner = string.find_parent(is_block)
            if owner is not None:
                texts.setdefault(id(owner), []).append(string)
    return [make_block(block_kind(tag), "".join(texts.get(id(tag), []))) for tag in root.find_all(is_block)]


def make_block(kind: str, text: str) -> Block:
    """A block on one line; a section heading loses its "6.2.1." or "B.1.3." in front."""
    text = squeeze(text)
    return Block(re.sub(r"^([A-Z]|\d+)(\.\d+)*\.\s", "", text) if kind == "section" else text, kind)


def plan_page(blocks: list[Block]) -> list[range]:
    """Which blocks make up each document of a page, decided on the English edition.

    A document starts at a section heading once the one before is big enough, or anywhere when
    the one before would get too big; a heading is never parted from what follows it.
    """
    smallest, largest = HANDBOOK_BYTES
    starts = [0]
    held_bytes = 0
    for number, block in enumerate(blocks):
        after_heading = number > 0 and blocks[number - 1].kind != "paragraph"
        at_section = block.kind == "section" and held_bytes >= smallest
        too_big = held_bytes + size(block.text) > largest
        if held_bytes and not after_heading and (at_section or too_big):
            starts.append(number)
            held_bytes = 0
        held_bytes += size(block.text) + 2
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(blocks)], strict=True)]


def english_share(text: str, english: str) -> float:
    """How many of a paragraph's words (of three letters or more) its English counterpart has too."""
    words = [word.lower() for word in LONGER_WORD.findall(text)]
    known = {word.lower() for word in LONGER_WORD.findall(english)}
    return sum(word in known for word in words) / len(words) if words else 0.0


def is_translated(text: str, english: str, domain: str, english_texts: set[str]) -> bool:
    """Whether a paragraph of a translated edition is in its language, not left in English.

    Paragraphs translated in part, or left in an older English wording, do not count as translated.
    """
    if text in english_texts:
        return False
    if domain in ("chinese", "japanese"):
        return len(CJK.findall(text)) >= SMALLEST_CJK_SHARE * len(text)
    return english_share(text, english) < LARGEST_ENGLISH_SHARE


def without_lone_headings(blocks: list[Block]) -> list[Block]:
    """Drop headings whose paragraphs were all dropped."""
    kept: list[Block] = []
    for block in reversed(blocks):
        heads_nothing = not kept or (block.kind == "title" and kept[-1].kind != "paragraph")
        if block.kind == "paragraph" or not heads_nothing:
            kept.append(block)
    return kept[::-1]


def page_text(blocks: list[Block]) -> str:
    """Blocks as plain text: a blank line between them; no empty block, no lone mark or number."""
    worded = [block for block in blocks if any(character.isalpha() for character in block.text)]
    return "\n\n".join(block.text for block in without_lone_headings(worded))


def handbook_documents(page: str, domain: str, english: list[Block], translated: list[Block],
                       english_texts: set[str]) -> Iterator[Document]:  # fmt: skip
    """The documents of one page in one language, cut where the English page is cut."""
    if [block.kind for block in translated] != [block.kind for block in english]:
        return  # not parallel: which paragraphs are translated could not be told
    locale = LOCALES[domain]
    for number, places in enumerate(plan_page(english), start=1):
        text = page_text(
            [
                translated[place] for place in places
                if domain == "english"
                or is_translated(translated[place].text, english[place].text, domain, english_texts)
            ]
        )  # fmt: skip
        if size(text) >= SMALLEST_DOCUMENT:
            yield Document(text, domain, f"handbook/{locale}/{page}#{number}", LANGUAGES[domain])


def handbook(folder: Path, advance: Callable[[], None]) -> dict[str, Split]:
    """All six editions, with the same chapters held out in each (the text is parallel)."""
    chapters = chapters_of_pages(folder / "en-US" / "index.html")
    english = {page: page_blocks(folder / "en-US" / f"{page}.html") for page in chapters}
    english_texts = {block.text for blocks in english.values() for block in blocks}
    splits = {}
    for domain, locale in LOCALES.items():
        split = splits[domain] = Split([], [], list(HELDOUT_CHAPTERS))
        for page, chapter in chapters.items():
            file = folder / locale / f"{page}.html"
            translated = english[page] if domain == "english" else page_blocks(file)
            documents = handbook_documents(page, domain, english[page], translated, english_texts)
            (split.heldout if chapter in HELDOUT_CHAPTERS else split.train).extend(documents)
            advance()
    return splits


# --- Fortunes ------------------------------------------------------------------------------------


def fortune_categories(folder: Path) -> list[Path]:
    """The plain category files: not the indexes, not the links, not the skipped categories."""
    return sorted(
        path for path in folder.iterdir()
        if path.is_file() and not path.is_symlink() and not path.suffix and path.name not in SKIPPED_FORTUNES
    )  # fmt: skip


def fortunes_of(category: Path) -> list[str]:
    """The single fortunes of a category, without overstrikes, control characters, trailing white space."""
    text = re.sub(r".\x08", "", category.read_text("utf-8"))
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", "", text)
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    pieces = re.split(r"^%$\n?", text, flags=re.MULTILINE)
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def fortunes(folder: Path, advance: Callable[[], None]) -> dict[str, Split]:
    """Neighbouring fortunes of one category joined to documents; whole categories held out."""
    split = Split([], [], list(HELDOUT_FORTUNES))
    for category in fortune_categories(folder):
        texts = pack(fortunes_of(category), "\n\n", *FORTUNE_BYTES)
        documents = [
            Document(text, "fortunes", f"fortunes/{category.name}#{number}", "en")
            for number, text in enumerate(texts, start=1)
            if size(text) >= SMALLEST_DOCUMENT
        ]
        (split.heldout if category.name in HELDOUT_FORTUNES else split.train).extend(documents)
        advance()
    return {"fortunes": split}


# --- The Python standard library -----------------------------------------------------------------


def python_modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the standard library that is worth reading."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        skipped = SKIPPED_PYTHON_FOLDERS.intersection(parts) or SKIPPED_PYTHON_NAMES.match(parts[0])
        if not skipped:
            modules.append((".".join(parts).removesuffix(".__init__"), path))
    return modules


def is_heldout_module(module: str) -> bool:
    """Whether a module's top-level package is held out: decided by a hash of its name."""
    top = module.split(".")[0]
    digest = hashlib.sha256((MODULE_HASH_PREFIX + top).encode()).hexdigest()
    return int(digest, 16) % 100 < HELDOUT_MODULES_PERCENT


def source_lines(source: str) -> list[str]:
    """Lines as Python counts them (`splitlines` would also cut at rarer separators)."""
    return [line + "\n" for line in source.split("\n")]


def boundary_lines(source: str) -> list[int]:
    """Lines (from 0) where a definition, or a method of a class, starts; comments above belong to it."""
    lines = source_lines(source)
    top = ast.parse(source).body
    members = [member for node in top if isinstance(node, ast.ClassDef) for member in node.body]
    boundaries = {0}
    for node in (*top, *members):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            while first > 0 and lines[first - 1].lstrip().startswith("#"):
                first -= 1
            boundaries.add(first)
    return sorted(boundaries)


def module_pieces(source: str) -> Iterator[str]:
    """A module cut at its definitions; a definition that is too long is cut between lines."""
    lines = source_lines(source)
    starts = boundary_lines(source)
    largest = PYTHON_BYTES[1]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        piece = lines[start:stop]
        if size("".join(piece)) > largest:
            yield from pack(piece, "", largest // 2, largest)
        else:
            yield "".join(piece)


def python(advance: Callable[[], None]) -> dict[str, Split]:
    """The standard library, with whole top-level modules and packages held out."""
    split = Split([], [], [])
    for module, path in python_modules():
        with tokenize.open(path) as file:  # heeds the file's own encoding
            source = file.read().replace("\f", "")
        documents = [
            Document(text.strip("\n"), "python", f"python/{module}#{number}", "python")
            for number, text in enumerate(pack(module_pieces(source), "", *PYTHON_BYTES), start=1)
            if size(text.strip("\n")) >= SMALLEST_DOCUMENT
        ]
        heldout = is_heldout_module(module)
        (split.heldout if heldout else split.train).extend(documents)
        top = module.split(".")[0]
        if heldout and documents and top not in split.held_out_sources:
            split.held_out_sources.append(top)
        advance()
    return {"python": split}


# --- Arithmetic ----------------------------------------------------------------------------------


def addition(rng: random.Random) -> str:
    """Such as `27 + 458 = 485`."""
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    return f"{a} + {b} = {a + b}"


def subtraction(rng: random.Random) -> str:
    """Such as `91 - 17 = 74`; never below zero."""
    b, a = sorted((rng.randint(10, 999), rng.randint(10, 999)))
    return f"{a} - {b} = {a - b}"


def multiplication(rng: random.Random) -> str:
    """Such as `112 * 7 = 784`."""
    a, b = rng.randint(10, 999), rng.randint(2, 99)
    return f"{a} * {b} = {a * b}"


def bracket(rng: random.Random) -> str:
    """Such as `(13 + 24) * 5 = 185`."""
    a, b, c = rng.randint(10, 99), rng.randint(10, 99), rng.randint(2, 19)
    return f"({a} + {b}) * {c} = {(a + b) * c}"


def comparison(rng: random.Random) -> str:
    """Such as `17 < 423`."""
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b}"


def sequence(rng: random.Random) -> str:
    """Such as `12, 19, 26, 33, 40`: a fixed step upwards."""
    first, step, length = rng.randint(10, 499), rng.randint(2, 99), rng.randint(4, 6)
    return ", ".join(str(first + step * place) for place in range(length))


EXERCISES = (addition, subtraction, multiplication, bracket, comparison, sequence)


def arithmetic_document(rng: random.Random, forbidden: set[str]) -> str:
    """A page of 20 to 60 lines, of two to four kinds of exercise, without any forbidden line."""
    kinds = rng.sample(EXERCISES, rng.randint(2, 4))
    wanted = rng.randint(20, 60)
    lines: list[str] = []
    while len(lines) < wanted:
        line = rng.choice(kinds)(rng)
        if line not in forbidden:
            lines.append(line)
    return "\n".join(lines)


def arithmetic(advance: Callable[[], None]) -> dict[str, Split]:
    """Held-out pages first; then training pages that share no line with them."""
    rng = random.Random(ARITHMETIC_SEED)
    forbidden: set[str] = set()
    split = Split([], [], ["every line of the held-out documents"])
    for side, documents in (("heldout", split.heldout), ("train", split.train)):
        made = 0
        while made < ARITHMETIC_BYTES[side]:
            text = arithmetic_document(rng, forbidden)
            made += size(text)
            name = f"arithmetic/{side}#{len(documents) + 1}"
            documents.append(Document(text, "arithmetic", name, "numbers"))
        forbidden.update(line for document in split.heldout for line in document.text.split("\n"))
    advance()
    return {"arithmetic": split}


# --- The split, and writing it out ---------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines."""
    return text.split("\n\n")


def drop_shared_paragraphs(splits: dict[str, Split]) -> int:
    """Take out of train every long paragraph that some held-out document contains; how many went."""
    heldout = {
        squeeze(paragraph)
        for split in splits.values() for document in split.heldout for paragraph in paragraphs(document.text)
        if len(paragraph) > SHARED_PARAGRAPH_CHARACTERS
    }  # fmt: skip
    dropped = 0
    for split in splits.values():
        kept_documents = []
        for document in split.train:
            all_of_them = paragraphs(document.text)
            kept = [paragraph for paragraph in all_of_them if squeeze(paragraph) not in heldout]
            dropped += len(all_of_them) - len(kept)
            text = document.text if len(kept) == len(all_of_them) else "\n\n".join(kept).strip("\n")
            if size(text) >= SMALLEST_DOCUMENT:
                kept_documents.append(Document(text, document.domain, document.name, document.language))
        split.train = kept_documents
    return dropped


def package_version(package: str) -> str | None:
    """The installed version of a Debian package, or None where dpkg does not know it."""
    if shutil.which("dpkg-query") is None:
        return None
    command = ["dpkg-query", "--show", "--showformat=${Version}", package]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout or None


def write_split(out: Path, side: str, domain: str, documents: list[Document]) -> dict:
    """Write one file; what the summary says about it."""
    path = out / side / f"{domain}.jsonl"
    write_json_lines(path, (asdict(document) for document in documents))
    return {
        "documents": len(documents),
        "bytes": sum(size(document.text) for document in documents),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def write_corpus(out: Path, splits: dict[str, Split], dropped: int) -> dict:
    """Write every file and the summary; the summary."""
    summary = {
        "sources": {
            "debian-handbook": package_version("debian-handbook"),
            "fortunes": package_version("fortunes"),
            "python": platform.python_version(),
        },
        "paragraphs_dropped_from_train": dropped,
        "domains": {
            domain: {
                "train": write_split(out, "train", domain, splits[domain].train),
                "heldout": write_split(out, "heldout", domain, splits[domain].heldout),
                "held_out_sources": splits[domain].held_out_sources,
            }
            for domain in DOMAINS
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return summary


def check_sources(handbook_folder: Path, fortunes_folder: Path) -> None:
    """Leave with one line that names the package to install when a source is missing."""
    for marker, package in ((handbook_folder / "en-US" / "index.html", "debian-handbook"),
                            (fortunes_folder / "literature", "fortunes")):  # fmt: skip
        if not marker.is_file():
            raise SystemExit(f"{marker} is missing: apt-get install {package}")


def build(handbook_folder: Path, fortunes_folder: Path, out: Path) -> dict:
    """Build the whole corpus and write it under `out`; the summary."""
    check_sources(handbook_folder, fortunes_folder)
    pages = len(list((handbook_folder / "en-US").glob("*.html"))) - 1
    steps = pages * len(LOCALES) + len(fortune_categories(fortunes_folder)) + len(python_modules()) + 1
    with Progress() as progress:
        task = progress.add_task("corpus", total=steps)

        def advance() -> None:
            progress.advance(task)

        splits = handbook(handbook_folder, advance)
        splits |= fortunes(fortunes_folder, advance) | python(advance) | arithmetic(advance)
    return write_corpus(out, splits, drop_shared_paragraphs(splits))


def main() -> None:
    """Read the command line, build the corpus, print its sizes."""
    parser = argparse.ArgumentParser(prog="python -m training.corpus", description="Build the corpus.")
    parser.add_argument("--handbook", type=Path, default=HANDBOOK, help="HTML folder of debian-handbook")
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, help="folder of the fortune files")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write")
    arguments = parser.parse_args()
    summary = build(arguments.handbook, arguments.fortunes, arguments.out)
    for domain, sides in summary["domains"].items():
        train, heldout = sides["train"], sides["heldout"]
        print(
            f"{domain:<11} train {train['documents']:>6} documents {train['bytes']:>9} bytes"
            f"   held out {heldout['documents']:>5} documents {heldout['bytes']:>8} bytes"
        )


if __name__ == "__main__":
    main()
