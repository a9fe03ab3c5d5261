"""The answer in the first line of notebook 04 is what its own cells measure."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

import probe
from probe import fp8_error

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "04_fp8_drift.ipynb"


@pytest.fixture(scope="module")
def study():
    """As the notebook makes it, with fewer recipes: each stands for itself."""
    documents = probe.read_corpus(probe.corpus.bundled_corpus()).documents[::4]
    texts = [document.text for document in documents]
    recipes = ["meta", "rowwise"]
    return fp8_error.drift(probe.load("tiny-scout"), texts, recipe=recipes, max_tokens=128, progress=False)


def test_the_answer_on_the_first_line_is_measured(study):
    first = nbformat.read(NOTEBOOK, as_version=4).cells[0].source.split("\n\n")[0].replace("\n", " ")
    said = re.fullmatch(
        r"\*\*Does FP8 flip the routing\? Not with Meta's own recipe, .* of 1,000 decisions of tiny-scout it "
        r"changes (?P<m>\d+), and BF16 by itself changes (?P<floor>\d+) when .* change (?P<rows>\d+), nineteen of "
        r"twenty of them near ties, and the loss rises by 0\.01 nats at most\.\*\*",
        first,
    )
    assert said is not None, first
    flips = fp8_error.flip_share(study, pooled=True)
    measured = (1000 * flips["flip_share"]).to_series()
    # Another processor sums in another order, which moves a few of a thousand near ties.
    for name, recipe in (("m", "meta"), ("floor", "bf16"), ("rows", "rowwise")):
        assert measured[recipe] == pytest.approx(int(said[name]), abs=max(2, 0.1 * int(said[name])))
    assert flips["lower"].sel(recipe="meta") < flips["upper"].sel(recipe="bf16")

    rows = study["fp8_flips"].to_dataset().sel(recipe="rowwise")
    near_ties = rows["router_margin"].values[rows["flipped"].values] < 0.125
    assert near_ties.mean() == pytest.approx(19 / 20, abs=0.02)
    loss = fp8_error.loss_change(study).sel(recipe=["meta", "rowwise"])
    assert np.all(loss["loss_change_upper"] < 0.01)
