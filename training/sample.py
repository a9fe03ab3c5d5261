"""Write the held-out sample that is bundled with the package.

Run it as::

    python -m training.sample [--corpus training/build/corpus] [--tokenizer training/build/tokenizer]
                              [--out probe/assets/corpus]

Every domain gives 24 documents of 200 to 500 tokens, from held-out text only.  The six editions of the
Debian handbook give the same sections, so that languages can be compared on the same content.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from training.corpus import DOMAINS, LOCALES, OUT, Document, read_documents, write_json_lines
from training.tokenizer import TOKENIZER, load

ASSETS = Path("probe/assets/corpus")
PER_DOMAIN = 24
SHORTEST, LONGEST = 200, 500
# Fortunes quote old mail and chat; what is bundled should not pass on the addresses of real people.
ADDRESS = re.compile(r"\S@\S")

LICENSE_TEMPLATE = Path(__file__).with_name("sample_license.md")


def cut(text: str, joint: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The longest beginning of whole parts that is at most LONGEST tokens; None if it is too short."""
    parts = text.split(joint)
    for kept in range(len(parts), 0, -1):
        beginning = joint.join(parts[:kept])
        length = len(tokenizer(beginning, add_special_tokens=False)["input_ids"])
        if length <= LONGEST:
            return beginning if length >= SHORTEST else None
    return None


def cut_anywhere(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The text cut between paragraphs, or, where they are too long for that, between lines."""
    return cut(text, "\n\n", tokenizer) or cut(text, "\n", tokenizer)


def section(document: Document) -> str:
    """The part of a name that parallel documents share: `sect.quotas#2`."""
    return document.name.rsplit("/", 1)[1]


def source(name: str) -> str:
    """What a document belongs to: the page, the category, or the top-level Python module of its name."""
    whole = name.rsplit("#", 1)[0]
    return whole.split(".")[0] if whole.startswith("python/") else whole


def share_out(available: dict[str, int], wanted: int) -> dict[str, int]:
    """How many documents to take of each source: one of each, then a second of each, and so on."""
    taken = dict.fromkeys(available, 0)
    missing = min(wanted, sum(available.values()))
    while missing:
        for name in available:
            if missing and taken[name] < available[name]:
                taken[name] += 1
                missing -= 1
    return taken


def spread(names: Sequence[str], wanted: int) -> list[str]:
    """Choose names from as many sources as possible, and evenly spaced within each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(source(name), []).append(name)
    taken = share_out({group: len(own) for group, own in groups.items()}, wanted)
    return [
        own[(2 * place + 1) * len(own) // (2 * taken[group])]
        for group, own in groups.items() for place in range(taken[group])
    ]  # fmt: skip


def cut_domain(corpus: Path, domain: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Document]:
    """Every held-out document of a domain that can be cut to size, by name."""
    cuts = {}
    for document in read_documents(corpus / "heldout" / f"{domain}.jsonl"):
        text = cut_anywhere(document.text, tokenizer)
        private = domain == "fortunes" and text and ADDRESS.search(text)
        if text and not private:
            cuts[document.name] = Document(text, domain, document.name, document.language)
    return cuts


def parallel_sample(editions: dict[str, dict[str, Document]]) -> list[Document]:
    """The same sections of every edition, filled up with an edition's own sections if those are few."""
    sections = {domain: {section(document): document for document in cuts.values()}
                for domain, cuts in editions.items()}  # fmt: skip
    shared = [name for name in sections["english"] if all(name in own for own in sections.values())]
    chosen = spread(shared, PER_DOMAIN)
    sample = []
    for own in sections.values():
        rest = [name for name in own if name not in chosen]
        names = {*chosen, *spread(rest, PER_DOMAIN - len(chosen))}
        sample += [document for name, document in own.items() if name in names]
    return sample


def choose(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """The whole sample, domain by domain."""
    cuts = {domain: cut_domain(corpus, domain, tokenizer) for domain in DOMAINS}
    sample = parallel_sample({domain: cuts[domain] for domain in LOCALES})
    for domain in DOMAINS:
        if domain not in LOCALES:
            sample += [cuts[domain][name] for name in spread(list(cuts[domain]), PER_DOMAIN)]
    return sample


def check_unseen(sample: list[Document], corpus: Path) -> None:
    """No text of the sample is part of any training document."""
    for domain in DOMAINS:
        documents = read_documents(corpus / "train" / f"{domain}.jsonl")
        training = "\0".join(document.text for document in documents)
        assert not any(document.text in training for document in sample), f"sample text in train/{domain}"


def licence_text(corpus: Path) -> str:
    """LICENSE.md, with the versions the corpus was built from."""
    sources = json.loads((corpus / "summary.json").read_text("utf-8"))["sources"]
    return LICENSE_TEMPLATE.read_text("utf-8").format(
        handbook=sources["debian-handbook"], fortunes=sources["fortunes"], python=sources["python"]
    )


def main() -> None:
    """Read the command line, choose the sample and write it with its licences."""
    parser = argparse.ArgumentParser(prog="python -m training.sample", description="Write the sample.")
    parser.add_argument("--corpus", type=Path, default=OUT, help="folder that training.corpus wrote")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write")
    arguments = parser.parse_args()
    if not (arguments.corpus / "summary.json").is_file():
        raise SystemExit(f"no corpus in {arguments.corpus}: run python -m training.corpus first")
    sample = choose(arguments.corpus, load(arguments.tokenizer))
    check_unseen(sample, arguments.corpus)
    rows = ({"text": document.text, "domain": document.domain, "name": document.name} for document in sample)
    write_json_lines(arguments.out / "heldout.jsonl", rows)
    (arguments.out / "LICENSE.md").write_text(licence_text(arguments.corpus), "utf-8")
    for domain in DOMAINS:
        names = [document.name for document in sample if document.domain == domain]
        print(f"{domain:<11} {len(names)} documents of {len({source(name) for name in names})} sources")


if __name__ == "__main__":
    main()
