"""Train the byte-level BPE tokenizer of the tiny models.

Run it as::

    python -m training.tokenizer [--corpus training/build/corpus] [--out training/build/tokenizer]

It is built like Llama 4's, only smaller: the same kind of pre-tokenisation, bytes underneath so that
every text comes back exactly, and the special tokens under Llama 4's names after the ordinary ones.
The result is a folder that `transformers.AutoTokenizer` loads.
"""

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.corpus import DOMAINS, OUT, read_documents, size

TOKENIZER = Path("training/build/tokenizer")
VOCABULARY = 4096
CONTEXT = 4096
# The same for every domain, so that Chinese and Japanese earn merges of their own.  Arithmetic is left
# out: it would spend a tenth of this small vocabulary on an arbitrary third of the three-digit numbers.
# Without it nearly every number is read digit by digit.
SAMPLED_DOMAINS = tuple(domain for domain in DOMAINS if domain != "arithmetic")
BYTES_PER_DOMAIN = 1_000_000

BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"
PAD = "<|finetune_right_pad|>"
SPECIAL_TOKENS = (
    BEGIN, END, "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>",
    PAD, "<|patch|>", "<|image_start|>", "<|image_end|>",
)  # fmt: skip

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Llama 4's pattern (that of o200k): words with the space before them, split where a small letter
# meets a capital; digits by at most three; punctuation; line ends; other white space.
PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def balanced_sample(corpus: Path) -> Iterator[str]:
    """Training documents, about the same number of bytes from every domain.

    A large domain gives documents spread evenly over it; a small one gives all it has, over again.
    """
    for domain in track(SAMPLED_DOMAINS, description="tokenizer sample"):
        texts = [document.text for document in read_documents(corpus / "train" / f"{domain}.jsonl")]
        stride = max(1, sum(map(size, texts)) // BYTES_PER_DOMAIN)
        given = 0
        while given < BYTES_PER_DOMAIN:
            for text in texts[::stride]:
                given += size(text)
                yield text
                if given >= BYTES_PER_DOMAIN:
                    break


def train(texts: Iterator[str]) -> Tokenizer:
    """Train the ordinary tokens, then put the special ones after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN}:1 $B:1",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Save as a transformers folder."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # transformers 5 writes its own new name for this class; this one loads with version 4 as well.
    settings = folder / "tokenizer_config.json"
    text = settings.read_text("utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text, "utf-8")


def load(folder: Path = TOKENIZER) -> PreTrainedTokenizerFast:
    """The saved tokenizer, as any user of it loads it (never from the network)."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    """The size is exact, special tokens come last, and a text starts with the beginning token."""
    assert len(tokenizer) == VOCABULARY
    first = VOCABULARY - len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, VOCABULARY))
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    """Tokens of all the texts, without special tokens; every text must come back exactly."""
    total = 0
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text, f"not the same after a round trip: {text[:80]!r}"
        total += len(ids)
    return total


def zlib_bits_per_byte(texts: list[str]) -> float:
    """What a general compressor makes of the texts as one stream, for comparison with a model."""
    stream = "\n".join(texts).encode("utf-8")
    return 8 * len(zlib.compress(stream, 9)) / len(stream)


def report(tokenizer: PreTrainedTokenizerFast, corpus: Path) -> None:
    """Check every round trip, and print tokens and bytes per token of each domain."""
    columns = ("train tokens", "held-out tokens", "bytes/token", "zlib bits/byte")
    print("{:<11} {:>12} {:>15} {:>11} {:>14}".format("domain", *columns))
    for domain in DOMAINS:
        tokens, texts = {}, {}
        for side in ("train", "heldout"):
            texts[side] = [document.text for document in read_documents(corpus / side / f"{domain}.jsonl")]
            tokens[side] = count_tokens(tokenizer, texts[side])
        per_token = sum(map(size, texts["heldout"])) / tokens["heldout"]
        bits = zlib_bits_per_byte(texts["heldout"])
        print(f"{domain:<11} {tokens['train']:>12} {tokens['heldout']:>15} {per_token:>11.3f} {bits:>14.3f}")


def main() -> None:
    """Read the command line, train, save, load again and check."""
    parser = argparse.ArgumentParser(prog="python -m training.tokenizer", description="Train the tokenizer.")
    parser.add_argument("--corpus", type=Path, default=OUT, help="folder that training.corpus wrote")
    parser.add_argument("--out", type=Path, default=TOKENIZER, help="folder to write")
    arguments = parser.parse_args()
    if not (arguments.corpus / "summary.json").is_file():
        raise SystemExit(f"no corpus in {arguments.corpus}: run python -m training.corpus first")
    save(train(balanced_sample(arguments.corpus)), arguments.out)
    tokenizer = load(arguments.out)
    check_vocabulary(tokenizer)
    report(tokenizer, arguments.corpus)


if __name__ == "__main__":
    main()
