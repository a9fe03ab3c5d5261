"""Experiments: a model that was built to copy, and dense computations from transformers' own attention weights."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import probe
from probe import attention_maps, experiments
from probe.experiments import ExperimentError
from probe.interventions import InterventionError, temperature_factor
from probe.prompts import Haystack, PromptError, long_texts, needle_prompts
from probe.schema import ProbeError
from tests.random_models import random_ids, random_model, text_config
from tests.test_prompts import word_tokenizer

N_WORDS = 40
HAYSTACK = Haystack(
    sentence="The secret code of the {key} is {value} .",
    keys=["castle"],
    values=["one two three", "nine ten"],
    filler=["red green blue four five six", "seven eight eleven twelve"],
)


def copier(*, chunk_size: int = 512) -> nn.Module:
    """A model of two layers whose first heads copy: whatever followed a token the last time comes next.

    The residual stream holds a constant and three stretches of one entry for each token: the token itself, the token
    before it, which the RoPE layer 0 fetches, and the guess, which the NoPE layer 1 fetches from where the token before
    is the token here. The second heads attend evenly to all that they see. The first token of a chunk has none before
    it that layer 0 could see: it fetches that token itself.
    """
    n_hidden = 1 + 3 * N_WORDS
    config = text_config(
        vocab_size=N_WORDS,
        hidden_size=n_hidden,
        head_dim=N_WORDS,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        no_rope_layers=[1, 0],
        num_local_experts=2,
        interleave_moe_layer_step=1,
        use_qk_norm=False,
        attention_chunk_size=chunk_size,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},
    )
    model = probe.models.Llama4ForCausalLM(config).eval()
    own, before, guess = (slice(1 + i * N_WORDS, 1 + (i + 1) * N_WORDS) for i in range(3))
    first = slice(N_WORDS)  # what projections give the first head
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.embed_tokens.weight[:, own] = torch.eye(N_WORDS)
        fetch_before, fetch_guess = (layer.self_attn for layer in model.model.layers)
        # Rotated back by one step: query and key agree best at distance 1.
        angle = -(10.0 ** -(torch.arange(0, N_WORDS, 2) / N_WORDS))
        fetch_before.q_proj.weight[first, 0] = 4 * torch.stack([angle.cos(), angle.sin()], dim=1).flatten()
        fetch_before.k_proj.weight[first, 0] = torch.tensor([1.0, 0.0]).repeat(N_WORDS // 2)
        fetch_before.v_proj.weight[first, own] = torch.eye(N_WORDS)
        fetch_before.o_proj.weight[before, first] = torch.eye(N_WORDS) * (2 / n_hidden) ** 0.5  # undo the norm
        fetch_guess.q_proj.weight[first, own] = 10 * torch.eye(N_WORDS)
        fetch_guess.k_proj.weight[first, before] = torch.eye(N_WORDS)
        fetch_guess.v_proj.weight[first, own] = torch.eye(N_WORDS)
        fetch_guess.o_proj.weight[guess, first] = torch.eye(N_WORDS)
        model.lm_head.weight[:, guess] = 10 * torch.eye(N_WORDS)
    return model


@contextmanager
def seen_ids(model):
    """The token ids of all forwards of a model, while the block lasts."""
    seen = []

    def keep(module, args, kwargs):
        seen.extend(kwargs["input_ids"].tolist())

    handle = model.model.register_forward_pre_hook(keep, with_kwargs=True)
    yield seen
    handle.remove()


@torch.no_grad()
def dense(model, ids):
    """Attention (layer, head, query, key) in float64 and logits (position, token) of one text, eagerly."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = model(torch.tensor([ids]), output_attentions=True)
    model.set_attn_implementation(before)
    return torch.cat(outputs.attentions).double().numpy(), outputs.logits[0].double()


def losses_of(logits, ids):
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:], dtype=torch.long), reduction="none").numpy()


# --- induction --------------------------------------------------------------------------------------------------------


def test_the_copying_head_is_found_and_no_other():
    result = experiments.induction(copier(chunk_size=16), period=10, n_sequences=6, progress=False)
    # All weight a period less one back, but of two queries: the first token come again matches the text's first place
    # too, and the token at 16, the first of its chunk, matches itself.
    assert result["score"].sel(layer=1, head=0).item() == pytest.approx(0.9, abs=1e-4)
    # Even attention to queries 10 to 19: the NoPE layer sees all; chunks of 16 hide the key of queries 16 and on.
    over_all = np.mean([1 / (query + 1) for query in range(10, 20)])
    in_chunk = np.sum([1 / (query + 1) for query in range(10, 16)]) / 10
    np.testing.assert_allclose(result["score"].sel(head=1), [in_chunk, over_all], atol=1e-6)
    np.testing.assert_allclose(result["even_score"], [in_chunk, over_all], rtol=1e-12)
    assert result["score"].sel(layer=0, head=0).item() < 1e-4
    # All sequences are alike to this model.
    for bound in ("lower", "upper"):
        np.testing.assert_allclose(result[bound], result["score"], atol=1e-6)


def test_even_attention_has_the_even_score_over_many_chunks():
    result = experiments.induction(copier(chunk_size=16), period=10, n_sequences=2, repeats=5, progress=False)
    # Of queries 10 to 49, those at 10 to 15, 25 to 31 and 41 to 47 have the key in their chunk, its first one included.
    chunks = [*range(10, 16), *range(9, 16), *range(9, 16)]
    assert result["even_score"].sel(layer=0).item() == pytest.approx(np.sum([1 / (q + 1) for q in chunks]) / 40)
    np.testing.assert_allclose(result["score"].sel(head=1), result["even_score"], rtol=1e-5)


def test_repeats_are_cheap_for_a_model_that_copies():
    result = experiments.induction(copier(), period=7, n_sequences=5, repeats=3, progress=False)
    first, second, third = result["loss"].values
    assert first > 20
    assert max(second, third) < 0.2
    assert result["loss_change"].values.tolist() == [0, second - first, third - first]
    assert (result["loss_change_upper"].values[1:] < 0).all()
    # In the third repeat two keys match, and at its first token three.
    expected = np.mean([0.5, *[1] * 6, 1 / 3, *[0.5] * 6])
    assert result["score"].sel(layer=1, head=0).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("period", "repeats"), [(2, 2), (7, 2), (11, 3)])
def test_induction_agrees_with_a_dense_computation(period, repeats):
    model = random_model()
    with seen_ids(model) as texts:
        result = experiments.induction(model, period=period, repeats=repeats, n_sequences=9, progress=False)
    assert len(texts) == 9
    scores, losses = [], []
    for ids in texts:
        assert ids == ids[:period] * repeats
        assert len(set(ids[:period])) == period
        weights, logits = dense(model, ids)
        scores.append(np.mean([weights[:, :, q, q - period + 1] for q in range(period, len(ids))], axis=0))
        # Padded by the loss that the last token does not have, so that repeats are rows; first tokens are left out.
        loss = np.append(losses_of(logits, ids), np.nan).reshape(repeats, period)[:, :-1]
        losses.append(loss.mean(axis=1))
    np.testing.assert_allclose(result["score"], np.mean(scores, axis=0), atol=1e-5)
    np.testing.assert_allclose(result["loss"], np.mean(losses, axis=0), rtol=1e-4)
    change = np.array(losses) - np.array(losses)[:, :1]
    reach = 2.306004 * change.std(axis=0, ddof=1) / 3  # Student's t with 8 degrees of freedom
    np.testing.assert_allclose(result["loss_change"], change.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(result["loss_change_lower"], change.mean(axis=0) - reach, atol=1e-4)
    np.testing.assert_allclose(result["loss_change_upper"], change.mean(axis=0) + reach, atol=1e-4)


def test_induction_score_is_that_of_the_statistics():
    model = random_model()
    with seen_ids(model) as texts:
        result = experiments.induction(model, period=6, n_sequences=5, seed=4, progress=False)
    spec = probe.AttentionSpec(statistics=(), offsets=(5,))
    trace = probe.record(model, texts, attention=spec, progress=False)
    np.testing.assert_allclose(result["score"], attention_maps.induction_score(trace, period=6), rtol=1e-6)
    repeated = experiments.induction(model, period=6, n_sequences=5, seed=4, progress=False)
    assert repeated.identical(result)
    other = experiments.induction(model, period=6, n_sequences=5, seed=5, progress=False)
    assert not np.array_equal(other["score"], result["score"])


def test_induction_uses_tokens_that_mean_text_only():
    lm = probe.load("tiny-scout")
    with seen_ids(lm.model) as texts:
        result = experiments.induction(lm, period=300, n_sequences=6, progress=False)
    special = {*lm.tokenizer.all_special_ids, *lm.tokenizer.get_added_vocab().values()}
    assert not special & {token for ids in texts for token in ids}
    assert result.attrs["model"] == "tiny-scout"
    assert result.sizes == {"layer": 8, "head": 4, "repeat": 2}
    # The repeat lies in another chunk of 128: RoPE layers see nothing of it.
    is_rope = np.array([layer % 4 != 3 for layer in range(8)])
    assert (result["score"].values[is_rope] == 0).all()
    assert (result["score"].values[~is_rope] > 0).all()


def test_a_model_without_output_head_has_scores_but_no_loss():
    model = random_model()
    whole = experiments.induction(model, period=5, n_sequences=5, progress=False)
    headless = experiments.induction(model.model, period=5, n_sequences=5, progress=False)
    assert "loss" in whole and "loss" not in headless
    np.testing.assert_array_equal(headless["score"], whole["score"])


def test_few_sequences_give_no_interval():
    result = experiments.induction(random_model(), period=5, n_sequences=4, progress=False)
    assert np.isnan(result["upper"]).all() and np.isnan(result["loss_upper"]).all()
    assert not np.isnan(result["score"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(period=1), "period is 1"),
        (dict(period=161), "period is 161, but only 160 different tokens"),
        (dict(repeats=1), "repeats is 1"),
        (dict(n_sequences=0), "n_sequences is 0"),
        (dict(n_sequences=2.0), "n_sequences is 2.0"),
        (dict(seed=-1), "seed is -1"),
        (dict(level=1.5), "level is 1.5"),
    ],
)
def test_induction_refuses_before_anything_runs(options, message):
    model = random_model()
    with seen_ids(model) as texts, pytest.raises(ProbeError, match=message):
        experiments.induction(model, progress=False, **options)
    assert texts == []


# --- needle -----------------------------------------------------------------------------------------------------------


def test_the_copying_head_finds_the_needle_anywhere():
    tokenizer = word_tokenizer()
    assert len(tokenizer) <= N_WORDS
    result = experiments.needle(
        copier(),
        lengths=[40, 150],
        depths=[0, 0.5, 1],
        haystack=HAYSTACK,
        tokenizer=tokenizer,
        n_trials=3,
        progress=False,
    )
    assert result["copying_score"].dims == ("length", "depth", "layer", "head")
    assert result["is_found"].dims == ("length", "depth")
    at_head = result.sel(layer=1, head=0)
    assert (at_head["copying_score"] == 1).all()
    np.testing.assert_allclose(at_head["needle_mass"], 1, atol=1e-4)
    assert (at_head["key_rank"] == 0).all()
    assert (result["is_found"] == 1).all() and (result["answer_rank"] == 0).all()
    assert (result["answer_loss"] < 0.1).all() and (result["needle_loss"] > 1).all()
    others = result["copying_score"].stack(place=["layer", "head"]).drop_sel(place=(1, 0))
    assert (others == 0).all()
    # Even attention gives the needle its share of the keys: the query of the token at t sees t of them.
    shares = []
    for prompt in needle_prompts(tokenizer, length=150, depth=0.5, haystack=HAYSTACK, n_prompts=3):
        n_needle = prompt.needle[1] - prompt.needle[0]
        shares.append(np.mean([n_needle / token for token in range(*prompt.answer)]))
    even = result["needle_mass"].sel(length=150, depth=0.5, head=1)
    np.testing.assert_allclose(even, np.mean(shares), rtol=1e-5)


def test_an_answer_that_is_second_best_is_not_found():
    model = copier()
    with torch.no_grad():
        model.lm_head.weight[0] = model.lm_head.weight[1:].sum(dim=0) * 2  # likelier than whatever is guessed
    result = experiments.needle(
        model, lengths=[60], depths=[0.5], haystack=HAYSTACK, tokenizer=word_tokenizer(), progress=False
    )
    assert (result["answer_rank"].item(), result["is_found"].item()) == (1, 0)


def test_a_rope_layer_cannot_see_a_needle_in_another_chunk():
    result = experiments.needle(
        copier(chunk_size=16), lengths=[100], depths=[0], haystack=HAYSTACK, tokenizer=word_tokenizer(), n_trials=2,
        progress=False,
    )  # fmt: skip
    assert (result["needle_mass"].sel(layer=0) == 0).all()
    assert np.isnan(result["key_rank"].sel(layer=0)).all()
    assert (result["needle_mass"].sel(layer=1) > 0).all()


RANDOM_VALUES = Haystack(filler=HAYSTACK.filler, keys=["castle"], n_value_tokens=4)


@pytest.mark.parametrize("haystack", [HAYSTACK, RANDOM_VALUES], ids=["text", "random tokens"])
def test_needle_agrees_with_a_dense_computation(haystack):
    model, tokenizer = random_model(), word_tokenizer()
    result = experiments.needle(
        model, lengths=[50, 33], depths=[0.2, 0.9], haystack=haystack, tokenizer=tokenizer, n_trials=5, seed=7,
        progress=False,
    )  # fmt: skip
    for length in (50, 33):
        for depth in (0.2, 0.9):
            prompts = needle_prompts(tokenizer, length=length, depth=depth, haystack=haystack, n_prompts=5, seed=7)
            expected = [dense_needle(model, prompt) for prompt in prompts]
            found = result.sel(length=length, depth=depth)
            means = {}
            for name in expected[0]:
                values = np.array([of_text[name] for of_text in expected])
                n_defined = (~np.isnan(values)).sum(axis=0)
                means[name] = np.where(n_defined > 0, np.nansum(values, axis=0) / np.maximum(n_defined, 1), np.nan)
            # Keys of like tokens at like places of a chunk are alike: rounding decides which of them is heavier.
            lowest, highest, ranks = means.pop("lowest_rank"), means.pop("highest_rank"), found["key_rank"].values
            assert (np.isnan(ranks) == np.isnan(lowest)).all() and not np.isnan(lowest).all()
            assert not ((ranks < lowest - 1e-6) | (ranks > highest + 1e-6)).any()
            for name, mean in means.items():
                np.testing.assert_allclose(found[name], mean, atol=1e-5, rtol=1e-4, err_msg=name)


def dense_needle(model, prompt):
    """What one text adds to each variable of the result."""
    ids = prompt.token_ids
    weights, logits = dense(model, ids)
    n_layers, n_heads = weights.shape[:2]
    chunk = model.config.attention_chunk_size
    mass, lowest, highest, copied = np.full((4, len(range(*prompt.answer)), n_layers, n_heads), np.nan)
    for i, token in enumerate(range(*prompt.answer)):
        query = token - 1
        for layer in range(n_layers):
            start = query // chunk * chunk if model.config.no_rope_layers[layer] else 0
            visible = np.arange(start, query + 1)
            in_needle = (visible >= prompt.needle[0]) & (visible < prompt.needle[1])
            for head in range(n_heads):
                row = weights[layer, head, query, visible]
                mass[i, layer, head] = row[in_needle].sum()
                if in_needle.any():
                    heavier = row[~in_needle] - row[in_needle].max()
                    lowest[i, layer, head], highest[i, layer, head] = (heavier > 1e-6).sum(), (heavier > -1e-6).sum()
                heaviest = row.argmax()
                copied[i, layer, head] = in_needle[heaviest] and ids[visible[heaviest]] == ids[token]
    predicted = [(logits[token - 1] > logits[token - 1, ids[token]]).sum().item() for token in range(*prompt.answer)]
    loss = losses_of(logits, ids)
    n_visible = (~np.isnan(lowest)).sum(axis=0)
    return {
        "needle_mass": mass.mean(axis=0),
        "lowest_rank": np.where(n_visible > 0, np.nansum(lowest, axis=0) / np.maximum(n_visible, 1), np.nan),
        "highest_rank": np.where(n_visible > 0, np.nansum(highest, axis=0) / np.maximum(n_visible, 1), np.nan),
        "copying_score": copied.mean(axis=0),
        "answer_rank": np.mean(predicted),
        "answer_loss": loss[prompt.answer[0] - 1 : prompt.answer[1] - 1].mean(),
        "needle_loss": loss[prompt.mention[0] - 1 : prompt.mention[1] - 1].mean(),
        "is_found": float(max(predicted) == 0),
    }


def test_needle_of_a_loaded_model_says_what_was_asked_for():
    lm = probe.load("tiny-scout")
    result = experiments.needle(lm, lengths=[90], depths=[0.5], n_trials=2, seed=3, progress=False)
    assert {name: result.attrs[name] for name in ("model", "n_trials", "seed", "chunk_size")} == {
        "model": "tiny-scout",
        "n_trials": 2,
        "seed": 3,
        "chunk_size": 128,
    }
    assert result.sizes == {"length": 1, "depth": 1, "layer": 8, "head": 4}
    assert probe.schema.labels(result["attention_kind"]).tolist() == ["rope"] * 3 + ["nope"] + ["rope"] * 3 + ["nope"]
    for name, variable in result.variables.items():
        assert "units" in variable.attrs, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=[]), "lengths is \\[\\]"),
        (dict(lengths=[50, 50]), "each of them once"),
        (dict(lengths=[60, 12]), "12 tokens has no room for needle"),
        (dict(depths=[0.5, 2]), "a depth is 2"),
        (dict(n_trials=0), "n_trials is 0"),
        (dict(seed=1.5), "seed is 1.5"),
        (dict(tokenizer=None), "pass tokenizer="),
    ],
)
def test_needle_refuses_before_anything_runs(options, message):
    model = random_model()
    defaults = dict(lengths=[60], depths=[0.5], haystack=HAYSTACK, tokenizer=word_tokenizer())
    with seen_ids(model) as texts, pytest.raises((ExperimentError, PromptError), match=message):
        experiments.needle(model, progress=False, **(defaults | options))
    assert texts == []


def test_needle_needs_an_output_head():
    with pytest.raises(ExperimentError, match="Llama4TextModel has no output head"):
        experiments.needle(random_model().model, lengths=[60], depths=[0], tokenizer=word_tokenizer())


def test_hooks_are_gone_whatever_happens():
    model = random_model(vocab_size=10)  # fewer than the tokenizer knows: recording refuses
    with pytest.raises(ProbeError, match="vocabulary ends at 9"):
        experiments.needle(
            model, lengths=[60], depths=[0], haystack=HAYSTACK, tokenizer=word_tokenizer(), progress=False
        )
    assert not model.model._forward_hooks


# --- temperature ------------------------------------------------------------------------------------------------------


def test_temperature_agrees_with_dense_computations():
    texts = random_ids(70, 64, 33, 70, 5, 1, 49)
    result = experiments.temperature(random_model(), texts, scales=[0, 1, 2.5], n_bins=5, progress=False)
    assert result["position_bin"].values.tolist() == [0, 16, 32, 48, 64]
    assert result["bin_stop"].values.tolist() == [16, 32, 48, 64, 70]
    assert result["n_texts"].values.tolist() == [7, 5, 5, 4, 2]
    assert result.attrs["layers"] == [3]
    losses = {}
    for scale in (0, 1, 2.5):
        model = random_model(attn_scale=0.1 * scale)
        expected = [dense_profile(model, ids, edges=[0, 16, 32, 48, 64, 80]) for ids in texts]
        for name in ("entropy", "far_mass", "loss"):
            values = np.array([of_text[name] for of_text in expected])
            mean = np.nansum(values, axis=0) / (~np.isnan(values)).sum(axis=0)
            np.testing.assert_allclose(result[name].sel(scale=scale), mean, atol=1e-5, rtol=1e-4, err_msg=name)
            losses[scale] = values
    for scale in (0, 1, 2.5):
        change = losses[scale] - losses[1]
        np.testing.assert_allclose(result["loss_change"].sel(scale=scale), np.nanmean(change, axis=0), atol=1e-4)
        assert np.isnan(result["loss_change_upper"].sel(scale=scale, position_bin=64))  # two texts
    # Every text is its own control. In later bins fewer than 5 texts have a loss.
    widths = [result[f"{name}_upper"] - result[f"{name}_lower"] for name in ("loss_change", "loss")]
    assert (widths[0] < widths[1]).sel(scale=[0, 2.5]).values.tolist() == [[True, True, False, False, False]] * 2


def dense_profile(model, ids, *, edges):
    """Means of one text over NoPE layers and heads, in bins of positions."""
    weights, logits = dense(model, ids)
    weights = weights[[layer for layer, has_rope in enumerate(model.config.no_rope_layers) if not has_rope]]
    chunk = model.config.attention_chunk_size
    log = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    entropy = -(weights * log).sum(axis=-1).mean(axis=(0, 1))
    far = np.array([weights[..., q, : q // chunk * chunk].sum(axis=-1).mean() for q in range(len(ids))])
    loss = np.append(losses_of(logits, ids), np.nan)
    profile = {}
    for name, values in {"entropy": entropy, "far_mass": far, "loss": loss}.items():
        means = []
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            own = values[start:stop][~np.isnan(values[start:stop])]
            means.append(own.mean() if own.size else np.nan)
        profile[name] = means
    return profile


@pytest.mark.parametrize(("n_bins", "width"), [(70, 1), (69, 2), (5, 16), (4, 32), (2, 64), (1, 128)])
def test_bins_are_as_narrow_as_their_number_allows(n_bins, width):
    result = experiments.temperature(random_model(), random_ids(70), scales=[1], n_bins=n_bins, progress=False)
    assert result["position_bin"].values.tolist() == list(range(0, 70, width))
    assert result.sizes["position_bin"] <= n_bins


def test_factor_is_that_of_the_queries():
    model = random_model()
    result = experiments.temperature(model, random_ids(40), scales=[0, 3], progress=False)
    assert result["factor"].dims == ("scale", "position")
    assert (result["factor"].sel(scale=0) == 1).all()
    expected = temperature_factor(model.config, np.arange(40), scale=3)
    np.testing.assert_array_equal(result["factor"].sel(scale=3), expected)
    assert len(np.unique(expected)) == 6


def test_without_scale_1_there_is_nothing_to_compare_with():
    result = experiments.temperature(random_model(), random_ids(*[20] * 6), scales=[2], n_bins=4, progress=False)
    assert np.isnan(result["loss_change"]).all()
    assert not np.isnan(result["loss_upper"]).any()


def test_a_larger_factor_sharpens_attention():
    result = experiments.temperature(random_model(), random_ids(*[60] * 6), scales=[0, 1, 8], progress=False)
    entropy = result["entropy"].isel(position_bin=slice(-4, None))
    assert (entropy.sel(scale=0) > entropy.sel(scale=1)).all()
    assert (entropy.sel(scale=1) > entropy.sel(scale=8)).all()


def test_temperature_leaves_the_model_as_it_was():
    model = random_model()
    ids = torch.tensor(random_ids(30))
    with torch.no_grad():
        before = model(ids).logits
        experiments.temperature(model, random_ids(50), progress=False)
        assert torch.equal(model(ids).logits, before)


def test_sampled_queries_are_the_same_at_every_scale_and_losses_are_of_all_tokens():
    model, texts = random_model(), random_ids(*[60] * 6)
    every = experiments.temperature(model, texts, scales=[0, 1], progress=False)
    some = experiments.temperature(model, texts, scales=[0, 1], queries=7, progress=False)
    np.testing.assert_array_equal(some["loss"], every["loss"])
    changes = [(result["entropy"].sel(scale=0) - result["entropy"].sel(scale=1)) for result in (every, some)]
    assert np.isnan(some["entropy"]).sum() >= np.isnan(every["entropy"]).sum()
    # Drawn anew at each scale, bins of few queries would differ by more than the temperature does, and by sign.
    assert (changes[1].fillna(0) >= 0).all() and (changes[0] >= 0).all()


def test_a_model_without_output_head_has_attention_only():
    result = experiments.temperature(random_model().model, random_ids(30), progress=False)
    assert "loss" not in result and "entropy" in result


def test_texts_longer_than_it_was_trained_on():
    lm = probe.load("tiny-scout")
    texts = long_texts(lm.tokenizer, n_texts=2, n_tokens=700)
    result = experiments.temperature(lm, texts, scales=[1], progress=False)
    assert result["bin_stop"].values[-1] == 700
    assert result.attrs["layers"] == [3, 7]
    for name, variable in result.variables.items():
        assert "units" in variable.attrs, name


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        (dict(no_rope_layers=[1] * 6), {}, InterventionError, "layers is NoPE"),
        (dict(attn_temperature_tuning=False), {}, InterventionError, "no temperature tuning"),
        ({}, dict(scales=[1, float("nan")]), InterventionError, "scale is nan"),
        ({}, dict(scales=[1, "2"]), InterventionError, "scale is '2'"),
        ({}, dict(scales=[]), ExperimentError, "scales is \\[\\]"),
        ({}, dict(scales=[1, 1.0]), ExperimentError, "each of them once"),
        ({}, dict(n_bins=0), ProbeError, "n_bins is 0"),
        ({}, dict(queries=0), ProbeError, "queries"),
        ({}, dict(level=2), ProbeError, "level is 2"),
    ],
)
def test_temperature_refuses_before_anything_runs(changes, options, error, message):
    model = random_model(**changes)
    with seen_ids(model) as texts, pytest.raises(error, match=message):
        experiments.temperature(model, random_ids(20), progress=False, **options)
    assert texts == []
