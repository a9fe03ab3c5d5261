"""Prompts: exact lengths and positions, with tokenizers that merge what they like."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import probe
from probe.prompts import Haystack, PromptError, long_texts, needle_prompts

FILLER = ["one two three four five six seven eight", "nine ten eleven twelve", "red green blue"]
WORDS = sorted({*" ".join(FILLER).split(), "The", "secret", "code", "of", "the", "castle", "is", "."})


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One id for each word, nothing for spaces and line ends, no beginning of text."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def greedy_tokenizer() -> PreTrainedTokenizerFast:
    """Merges across words, spaces and line ends, and puts a token before and another after each text."""
    tokenizer = Tokenizer(BPE())
    needles = [f"\nThe secret code of the castle is {word} six.\n" for word in FILLER[0].split()]
    tokenizer.train_from_iterator(
        [*FILLER, *needles], BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "shipped": lambda: probe.load("tiny-scout").tokenizer,
    "words": word_tokenizer,
    "greedy": greedy_tokenizer,
}
HAYSTACKS = {
    "random tokens": Haystack(filler=FILLER, keys=["castle"], n_value_tokens=3),
    "text": Haystack(filler=FILLER, keys=["castle"], values=["three six", "red"]),
}


@pytest.mark.parametrize("haystack", HAYSTACKS.values(), ids=HAYSTACKS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_lengths_and_positions_are_exact(name, haystack, depth):
    tokenizer = TOKENIZERS[name]()
    begin = [] if name == "words" else [tokenizer.bos_token_id]
    ends = {"castle": tokenizer("\nThe secret code of the castle is", add_special_tokens=False)["input_ids"]}
    for prompt in needle_prompts(tokenizer, length=97, depth=depth, haystack=haystack, n_prompts=5):
        ids = prompt.token_ids
        assert len(ids) == 97 == prompt.answer[1]
        assert ids[: len(begin)] == begin
        assert not set(ids[len(begin) :]) & {*tokenizer.all_special_ids}
        value = ids[slice(*prompt.answer)]
        assert value == ids[slice(*prompt.mention)]
        assert prompt.needle[0] < prompt.mention[0] < prompt.mention[1] <= prompt.needle[1] <= prompt.answer[0]
        # What stands before the value is the same in needle and question.
        asked = ends["castle"]
        assert ids[prompt.needle[0] : prompt.mention[0]] == asked
        assert ids[prompt.answer[0] - len(asked) : prompt.answer[0]] == asked
        n_before, n_after = prompt.needle[0] - len(begin), prompt.answer[0] - len(asked) - prompt.needle[1]
        assert n_before == round(depth * (n_before + n_after))


def test_a_value_of_text_is_the_text_with_its_space():
    tokenizer = TOKENIZERS["shipped"]()
    haystack = Haystack(keys=["castle"], values=["1234"], filler=FILLER)
    prompt = needle_prompts(tokenizer, length=80, depth=0.5, haystack=haystack, n_prompts=1)[0]
    assert tokenizer.decode(prompt.token_ids[slice(*prompt.mention)]) == " 1234"
    assert tokenizer.decode(prompt.token_ids[slice(*prompt.needle)]) == "\nThe secret code of the castle is 1234.\n"
    assert tokenizer.decode(prompt.token_ids[prompt.needle[1] :]).endswith("\nThe secret code of the castle is 1234")


def test_random_values_are_different_tokens_of_the_filler():
    tokenizer = word_tokenizer()
    known = set(tokenizer(" ".join(FILLER), add_special_tokens=False)["input_ids"])
    values = []
    for prompt in needle_prompts(tokenizer, length=60, depth=0, haystack=HAYSTACKS["random tokens"], n_prompts=40):
        values.append(tuple(prompt.token_ids[slice(*prompt.answer)]))
        assert len(set(values[-1])) == 3
        assert set(values[-1]) <= known
    assert len(set(values)) > 30


def test_key_and_value_stay_the_same_over_lengths_and_depths_and_the_filler_grows():
    tokenizer, haystack = word_tokenizer(), HAYSTACKS["random tokens"]

    def parts(length, depth):
        found = []
        for prompt in needle_prompts(tokenizer, length=length, depth=depth, haystack=haystack, n_prompts=4, seed=3):
            ids, (start, stop) = prompt.token_ids, prompt.needle
            n_question = prompt.mention[0] - start
            found.append((ids[start:stop], ids[:start] + ids[stop : prompt.answer[0] - n_question]))
        return found

    for (needle, filler), (other, short) in zip(parts(90, 0.2), parts(60, 1), strict=True):
        assert needle == other
        assert filler[: len(short)] == short
        assert len(filler) == len(short) + 30


def test_seeds_differ_and_repeat():
    def ids(seed, n_prompts=3):
        prompts = needle_prompts(
            word_tokenizer(), length=70, depth=0.5, haystack=HAYSTACKS["text"], n_prompts=n_prompts, seed=seed
        )
        return [prompt.token_ids for prompt in prompts]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)
    assert ids(0, n_prompts=5)[:3] == ids(0)
    assert len({tuple(text[:20]) for text in ids(0, n_prompts=8)}) > 3  # filler only, each time in another order


def test_no_filler_at_all_when_the_text_is_just_long_enough():
    tokenizer, haystack = word_tokenizer(), HAYSTACKS["random tokens"]
    # Twice 7 words and 3 of the value, and the full stop.
    prompt = needle_prompts(tokenizer, length=21, depth=0.5, haystack=haystack, n_prompts=1)[0]
    assert (prompt.needle, prompt.mention, prompt.answer) == ((0, 11), (7, 10), (18, 21))
    with pytest.raises(PromptError, match="20 tokens has no room for needle, question and answer: they need 21"):
        needle_prompts(tokenizer, length=20, depth=0.5, haystack=haystack, n_prompts=1)


def test_the_bundled_corpus_is_the_filler_unless_told_otherwise():
    tokenizer = TOKENIZERS["shipped"]()
    prompt = needle_prompts(tokenizer, length=400, depth=1, n_prompts=1)[0]
    text = tokenizer.decode(prompt.token_ids[1:300])
    documents = probe.read_corpus(probe.corpus.bundled_corpus()).texts
    assert any(document[:40] in text or text[:40] in document for document in documents)
    assert len(set(prompt.token_ids)) > 80


def test_long_texts_are_documents_in_random_order_each_once_before_any_twice():
    tokenizer = word_tokenizer()
    texts = long_texts(tokenizer, n_texts=3, n_tokens=10, documents=FILLER, seed=1)
    assert [len(text) for text in texts] == [10, 10, 10]
    words = tokenizer.convert_ids_to_tokens([token for text in texts for token in text])
    assert sorted(words[:15]) == sorted(" ".join(FILLER).split()) == sorted(words[15:])
    runs = {tuple(document.split()) for document in FILLER}
    while words:
        run = next(run for run in runs if tuple(words[: len(run)]) == run)
        words = words[len(run) :]


def test_long_texts_begin_like_a_text():
    tokenizer = greedy_tokenizer()
    texts = long_texts(tokenizer, n_texts=2, n_tokens=50, documents=FILLER)
    for text in texts:
        assert (text[0], len(text)) == (tokenizer.bos_token_id, 50)
        assert not set(text[1:]) & {*tokenizer.all_special_ids}
    assert long_texts(tokenizer, n_texts=1, n_tokens=1, documents=FILLER) == [[tokenizer.bos_token_id]]
    assert texts != long_texts(tokenizer, n_texts=2, n_tokens=50, documents=FILLER, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sentence="nothing to find"), "must hold {value} once"),
        (dict(sentence="{value} and {value}"), "must hold {value} once"),
        (dict(sentence=" {value} is the code"), "and words before it"),
        (dict(keys=[]), "keys must be a list of texts"),
        (dict(keys=None), "keys must be a list of texts"),
        (dict(values="abc"), "values must be a list of texts"),
        (dict(values=["a", ""]), "values must be a list of texts, none of them empty"),
        (dict(filler=[3]), "filler must be a list of texts"),
        (dict(n_value_tokens=0), "n_value_tokens is 0"),
    ],
)
def test_a_haystack_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(PromptError, match=message):
        Haystack(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=0), "a length is 0"),
        (dict(length=60.5), "a length is 60.5"),
        (dict(depth=1.01), "a depth is 1.01"),
        (dict(depth=float("nan")), "a depth is nan"),
        (dict(n_prompts=0), "n_prompts is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(haystack=Haystack(filler=["one two"])), "n_value_tokens is 8, but the filler has 2 different tokens"),
        (dict(haystack=Haystack(filler=[" "])), "makes no token of these documents"),
        (dict(haystack=Haystack(filler=FILLER, values=[" "])), "makes no token of ' +'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    defaults = dict(length=60, depth=0.5, haystack=HAYSTACKS["text"])
    with pytest.raises(PromptError, match=message):
        needle_prompts(word_tokenizer(), **(defaults | options))


def test_long_texts_of_nothing_are_refused():
    with pytest.raises(PromptError, match="n_tokens is 0"):
        long_texts(word_tokenizer(), n_texts=1, n_tokens=0)
    with pytest.raises(PromptError, match="list of documents, got 'abc'"):
        long_texts(word_tokenizer(), n_texts=1, n_tokens=3, documents="abc")


def test_prompts_load_neither_torch_nor_plotly():
    code = "import probe.prompts, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "plotly", "transformers"} & set(done.stdout.split())
