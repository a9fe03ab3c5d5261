"""An FP8 study as the report shows it: which documents are run, and everything that is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from probe import schema
from probe.bootstrap import MIN_DOCUMENTS
from probe.schema import ProbeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from probe.corpus import Corpus, Document
    from probe.models import LoadedModel

STUDY_TOKENS = 10_000
"""Tokens of a study, unless told otherwise: each recipe and each spared part runs them all once more."""

SHORTEST_TEXT = 64
"""Texts are not cut below so many tokens, however many domains share a study."""


@dataclass(frozen=True)
class Selection:
    """Documents of a study, the tokens kept of each, and how many documents they were chosen from."""

    documents: list[Document]
    max_tokens: int
    n_given: int


def choose_documents(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_tokens: int = STUDY_TOKENS,
    max_tokens: int | None = None,
) -> Selection:
    """Which documents a study runs, and how many tokens it keeps of each.

    Parameters
    ----------
    corpus : what there is.
    tokenizer : the model's.
    n_tokens : in all.
    max_tokens : kept of each document at most.

    Returns
    -------
    One document of each domain in turn, in the corpus's order, until there are ``n_tokens`` of them; and the tokens
    kept of each: so few that every domain gets the five documents that an interval takes, but no fewer than 64, unless
    ``max_tokens`` says so.

    Raises
    ------
    ProbeError
        If no document has a token.
    """
    of_domain: dict[str, list[Document]] = {}
    for document in corpus.documents:
        of_domain.setdefault(document.domain, []).append(document)
    limit = max(n_tokens // (MIN_DOCUMENTS * len(of_domain)), SHORTEST_TEXT)
    limit = min(limit, max_tokens or limit)
    chosen: list[Document] = []
    total = 0
    for document in chain.from_iterable(zip_longest(*of_domain.values())):
        if total >= n_tokens:
            break
        if document is None:  # its domain has no more
            continue
        if own := min(len(tokenizer(document.text, verbose=False)["input_ids"]), limit):
            chosen.append(document)
            total += own
    if not chosen:
        raise ProbeError("no text of the corpus has a token, so there is nothing to run: check the corpus")
    return Selection(chosen, limit, len(corpus.documents))


def study(
    model: LoadedModel,
    selection: Selection,
    *,
    recipes: Sequence[str],
    leave_out: Collection[str] = (),
    progress: Callable[[str], None] | None = None,
) -> xr.DataTree:
    """Everything that the report says of FP8: drift and flips, sensitivity, weights and activations.

    Parameters
    ----------
    model : from :func:`probe.load`.
    selection : what is run, from :func:`choose_documents`.
    recipes : by name; the first one's sensitivity is measured.
    leave_out : of "sensitivity" and "activations", what is not measured.
    progress : called with the name of each step before it begins; steps then show progress bars in a terminal.

    Returns
    -------
    DataTree of the groups ``/fp8_…``; see ``probe.schema``.

    Raises
    ------
    ProbeError
        As :func:`probe.fp8_error.drift` does, before anything is run.
    """
    from rich.console import Console

    from probe import fp8_error

    step = progress or (lambda name: None)
    shown = progress is not None and Console().is_terminal  # a bar that nobody sees would leave blank lines
    documents = selection.documents
    texts = [document.text for document in documents]
    options: dict[str, Any] = {"max_tokens": selection.max_tokens, "progress": shown}
    step(f"Drift and flips: {', '.join(recipes)}")
    domains = [document.domain for document in documents]
    tree = fp8_error.drift(model, texts, recipe=list(recipes), domains=domains, **options)
    samples = tree["fp8_samples"].to_dataset()
    names = np.array([document.name for document in documents], np.dtypes.StringDType())
    samples = samples.assign_coords(name=("sample", names, samples["name"].attrs))
    tree["fp8_samples"] = xr.DataTree(samples.assign_attrs(documents_given=selection.n_given))
    if "sensitivity" not in leave_out:
        step(f"Which part costs what: {recipes[0]}")
        found = fp8_error.sensitivity(model, texts, recipe=recipes[0], **options)
        tree["fp8_sensitivity"] = xr.DataTree(found)
    if "activations" not in leave_out:
        step("Range of the activations")
        tree["fp8_activations"] = xr.DataTree(
            fp8_error.activation_range(model, texts, recipes=list(recipes), **options)
        )
    step("Error of the weights")
    tree["fp8_weights"] = xr.DataTree(fp8_error.weight_error(model, list(recipes), progress=shown))
    return tree


def alone(recording: xr.DataTree) -> xr.DataTree:
    """The FP8 study of a recording by itself.

    Raises
    ------
    ProbeError
        If it holds none.
    """
    there = [name for name in schema.FP8_GROUPS if name in recording.children]
    if not there:
        raise ProbeError("this recording holds no FP8 study: probe fp8 MODEL makes one")
    root = xr.Dataset(attrs=recording.attrs)
    return xr.DataTree.from_dict({"/": root} | {f"/{name}": recording[name].to_dataset() for name in there})


def joined(recording: xr.DataTree, fp8: xr.DataTree) -> xr.DataTree:
    """A recording with an FP8 study of the same model beside its own groups."""
    whole = recording.copy()
    for name in fp8.children:
        whole[name] = xr.DataTree(fp8[name].to_dataset())
    whole.attrs = recording.attrs | {"recipes": fp8.attrs["recipes"]}
    return whole
