"""Statistics of drift studies that were made by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from scipy.special import erfc

import probe
from probe import fp8_error, schema
from probe.bootstrap import FEW_DOCUMENTS, INTERVAL_STATUS, UNUSED, Bootstrap
from probe.fp8.flips import flip_probability, flip_share, flips_by_margin, loss_by_domain, loss_change
from probe.schema import ProbeError, SchemaError
from tests.random_models import random_ids, random_model


def flips_of(flipped, margin, change=None, *, sample=None, domains=("a",), domain=None):
    """``/fp8_flips`` from ``flipped`` (recipe, token, layer) and the reference's ``margin`` (token, layer)."""
    flipped, margin = np.asarray(flipped, bool), np.asarray(margin, np.float32)
    n_recipes, n_tokens, n_layers = flipped.shape
    return schema.dataset(
        "fp8_flips",
        {
            "flipped": flipped,
            "margin_change": np.zeros(flipped.shape) if change is None else change,
            "router_margin": margin,
            "recipe": [f"recipe {i}" for i in range(n_recipes)],
            "sample": np.zeros(n_tokens, int) if sample is None else sample,
            "position": np.arange(n_tokens),
            "token_id": np.arange(n_tokens),
            "domain": np.zeros(n_tokens, np.uint8) if domain is None else np.asarray(domain, np.uint8),
            "layer": np.arange(n_layers),
            "attention_kind": np.zeros(n_layers, np.uint8),
        },
        categories={"domain": domains, "attention_kind": schema.ATTENTION_KINDS},
    )


def samples_of(kl, agreement, change, n_tokens, *, domain=None, reference=None):
    n_recipes, n_samples = np.shape(kl)
    return schema.dataset(
        "fp8_samples",
        {
            "logit_kl": kl,
            "top1_agreement": agreement,
            "loss_change": change,
            "reference_loss": np.full(n_samples, 2.0) if reference is None else reference,
            "n_cut": np.zeros(n_samples),
            "text_sha256": [""] * n_samples,
            "recipe": [f"recipe {i}" for i in range(n_recipes)],
            "sample": np.arange(n_samples),
            "name": [f"sample {i}" for i in range(n_samples)],
            "domain": domain or ["a"] * n_samples,
            "n_tokens": n_tokens,
        },
    )


# Flips by margin


def test_a_margin_of_one_sigma_flips_in_24_percent():
    # METRICS: m = 0.1, σ = 0.1 gives ½·erfc(0.5)
    assert flip_probability(np.array(0.1), 0.1) == pytest.approx(0.240, abs=5e-4)
    assert flip_probability(np.array(0.0), 0.1) == 0.5
    assert flip_probability(np.array([0.1, 0.0]), 0.0).tolist() == [0, 0]


@pytest.mark.parametrize("sigma", [0.1, 0.03])
def test_the_prediction_holds_for_two_experts_with_noisy_logits(sigma):
    random = np.random.default_rng(0)
    n = 200_000
    logits = random.normal(size=(n, 2))
    noisy = logits + random.normal(size=(n, 2), scale=sigma)
    first = logits.argmax(axis=1)
    rows = np.arange(n)
    margin = logits[rows, first] - logits[rows, 1 - first]
    change = noisy[rows, first] - noisy[rows, 1 - first] - margin
    flipped = noisy.argmax(axis=1) != first
    data = flips_of(flipped[None, :, None], margin[:, None], change[None, :, None], sample=rows // 2000)
    found = flips_by_margin(data, edges=[0, 0.02, 0.05, 0.1, 0.2, 0.4]).sel(recipe="recipe 0")
    assert float(found["logit_noise"]) == pytest.approx(sigma, rel=0.01)
    np.testing.assert_allclose(found["flip_share"], found["predicted"], atol=0.015)
    # The bin holds what the formula says of its own margins.
    inside = (margin >= 0.05) & (margin < 0.1)
    expected = (erfc(margin[inside] / (2 * sigma)) / 2).mean()
    assert float(found["predicted"].isel(margin_bin=2)) == pytest.approx(expected, rel=0.01)
    assert (found["lower"] < found["upper"]).all()


def test_decisions_are_binned_by_the_references_margin():
    margin = [[0.0, 0.5], [0.25, 0.75], [0.5, 1.0], [0.1, np.nan]]
    flipped = [[[1, 0], [0, 1], [1, 0], [1, 0]], [[0, 0], [0, 0], [0, 0], [0, 1]]]
    data = flips_of(flipped, margin)
    found = flips_by_margin(data, edges=[0, 0.25, 0.5, 1])
    # 0 and 0.1; 0.25; 0.5, 0.75, 0.5 and 1: a bin holds its lower edge, the last one both.
    assert found["n_decisions"].values.tolist() == [2, 1, 4]
    assert found["flip_share"].values.tolist() == [[1, 0, 0.5], [0, 0, 0]]
    assert found["margin_from"].values.tolist() == [0, 0.25, 0.5]
    assert found["margin_to"].values.tolist() == [0.25, 0.5, 1]
    apart = flips_by_margin(data, edges=[0, 0.25, 0.5, 1], by_layer=True)
    assert apart["flip_share"].dims == ("recipe", "layer", "margin_bin")
    assert apart["n_decisions"].values.tolist() == [[2, 1, 1], [0, 0, 3]]
    np.testing.assert_array_equal(apart["flip_share"].values[0], [[1, 0, 1], [np.nan, np.nan, 1 / 3]])


def test_default_bins_reach_the_largest_margin():
    found = flips_by_margin(flips_of(np.zeros((1, 3, 1)), [[0.01], [0.3], [0.9]]))
    assert found["margin_to"].values.tolist() == [2**-5, 2**-4, 2**-3, 0.25, 0.5, 1]
    assert found["n_decisions"].sum() == 3
    assert flips_by_margin(flips_of(np.zeros((1, 1, 1)), [[2**-5]]))["n_decisions"].values.tolist() == [1]
    nowhere = flips_by_margin(flips_of(np.zeros((1, 2, 1)), [[np.nan], [np.nan]]))
    assert nowhere["n_decisions"].values.tolist() == [0]
    assert nowhere["flip_share"].isnull().all()


def test_noise_is_the_deviation_of_the_margins_change_over_root_two():
    change = np.array([[0.2, 2.0], [-0.2, 4.0], [0.2, np.nan], [-0.2, np.nan]])[None]
    data = flips_of(np.zeros((1, 4, 2)), np.ones((4, 2)), change)
    apart = flips_by_margin(data, by_layer=True)["logit_noise"].values[0]
    np.testing.assert_allclose(apart, [0.2 / math.sqrt(2), 1 / math.sqrt(2)])
    pooled = flips_by_margin(data)["logit_noise"].item()
    assert pooled == pytest.approx(np.nanstd(change) / math.sqrt(2))


def test_each_layer_is_predicted_from_its_own_noise():
    change = np.array([[0.0, 2.0], [0.0, -2.0]])[None]
    found = flips_by_margin(flips_of(np.zeros((1, 2, 2)), np.full((2, 2), 1.0), change), edges=[0, 2])
    # σ is 0 in the first layer and 2 / √2 in the second: half of the decisions cannot flip.
    expected = erfc(1 / (2 * math.sqrt(2))) / 2 / 2
    assert found["predicted"].item() == pytest.approx(expected)


@pytest.mark.parametrize("edges", [[0.5], [0, 0], [1, 0], [[0, 1]], [0, np.nan]])
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(ProbeError, match="edges"):
        flips_by_margin(flips_of(np.zeros((1, 1, 1)), [[1.0]]), edges=edges)


# Shares of flips


def test_shares_by_layer_and_domain():
    flipped = [[[1, 0], [0, 0], [1, 1], [1, 1]]]
    data = flips_of(flipped, np.ones((4, 2)), sample=[0, 0, 1, 1], domains=("b", "a"), domain=[0, 0, 1, 1])
    assert flip_share(data)["flip_share"].values.tolist() == [[0.75, 0.5]]
    assert flip_share(data, pooled=True)["flip_share"].values.tolist() == [0.625]
    by_domain = flip_share(data, by="domain")
    assert by_domain["flip_share"].dims == ("recipe", "domain", "layer")
    assert by_domain["domain"].values.tolist() == ["a", "b"]
    assert by_domain["flip_share"].values.tolist() == [[[1, 1], [0.5, 0]]]
    assert by_domain["n_documents"].values.tolist() == [1, 1]
    assert flip_share(data, by="domain", pooled=True)["flip_share"].values.tolist() == [[1, 0.25]]
    with pytest.raises(ProbeError, match="not a coord on token"):
        flip_share(data, by="layer")
    with pytest.raises(SchemaError, match="'role'"):
        flip_share(data, by="role")


def test_intervals_resample_texts_and_few_texts_have_none():
    random = np.random.default_rng(0)
    sample = np.repeat(np.arange(20), 50)
    flipped = random.random((1, 1000, 1)) < 0.1
    data = flips_of(flipped, np.ones((1000, 1)), sample=sample)
    found = flip_share(data, pooled=True)
    counts = np.stack(
        [np.bincount(sample[flipped[0, :, 0]], minlength=20), np.bincount(sample[~flipped[0, :, 0]])], axis=-1
    )
    expected = Bootstrap().share_interval(counts[:, None])
    assert found["lower"].item() == expected.lower[0, 0]
    assert found["upper"].item() == expected.upper[0, 0]
    assert 0.05 < found["lower"].item() < flipped.mean() < found["upper"].item() < 0.2
    few = flip_share(data.isel(token=slice(200)), pooled=True)
    assert few["lower"].isnull().all() and few["interval_status"].item() == FEW_DOCUMENTS
    assert few["interval_status"].attrs["categories"] == list(INTERVAL_STATUS)


def test_no_flip_at_all_has_an_upper_bound():
    data = flips_of(np.zeros((1, 1000, 1)), np.ones((1000, 1)), sample=np.repeat(np.arange(20), 50))
    by_construction = flip_share(data, pooled=True)  # no margin changed: there is no chance in it
    assert (by_construction["lower"].item(), by_construction["upper"].item()) == (0, 0)
    data["margin_change"][0, 0, 0] = 0.01
    found = flip_share(data, pooled=True)
    assert found["interval_status"].item() == UNUSED
    # Texts are all alike, so nothing says that tokens of one are independent: 3 in 20 texts.
    assert found["lower"].item() == 0
    assert found["upper"].item() == pytest.approx(-np.log(0.05) / 20)


def test_a_text_without_a_decision_in_a_bin_is_no_document_of_it():
    margin = np.where(np.arange(60) < 30, 0.1, 0.9)[:, None]
    data = flips_of(np.arange(60)[None, :, None] % 5 == 0, margin, sample=np.arange(60) // 10)
    found = flips_by_margin(data, edges=[0, 0.5, 1])
    assert (found["interval_status"] == FEW_DOCUMENTS).all()
    pooled = flips_by_margin(data, edges=[0, 1])
    assert (pooled["interval_status"] != FEW_DOCUMENTS).all()


# Loss


def test_means_are_over_tokens():
    data = samples_of(
        kl=[[0.1, 0.4]],
        agreement=[[1.0, 0.5]],
        change=[[0.2, -0.1]],
        n_tokens=[3, 9],  # two and eight of them have a next one
        reference=[1.0, 2.0],
    )
    found = loss_change(data).sel(recipe="recipe 0")
    assert float(found["logit_kl"]) == pytest.approx((3 * 0.1 + 9 * 0.4) / 12)
    assert float(found["loss_change"]) == pytest.approx((2 * 0.2 - 8 * 0.1) / 10)
    assert float(found["reference_loss"]) == pytest.approx((2 * 1 + 8 * 2) / 10)
    # Half of nine tokens is no whole number: 4 (to even) of 9 agree.
    assert float(found["top1_agreement"]) == pytest.approx((3 + 4) / 12)
    for name in ("logit_kl", "loss_change", "top1_agreement"):
        assert found[f"{name}_lower"].isnull() and found[f"{name}_upper"].isnull()
    assert int(found["n_tokens"]) == 12 and int(found["n_documents"]) == 2


def test_domains_apart_and_texts_of_one_token():
    data = samples_of(
        kl=[[0.1, 0.2, 0.4]],
        agreement=[[1, 1, 0]],
        change=[[0.5, np.nan, 0.25]],
        n_tokens=[3, 1, 1001],
        domain=["code", "code", "prose"],
        reference=[1.0, np.nan, 3.0],
    )
    found = loss_by_domain(data)
    assert found["domain"].values.tolist() == ["code", "prose"]
    assert found["loss_change"].values.tolist() == [[0.5, 0.25]]
    assert found["reference_loss"].values.tolist() == [1, 3]
    np.testing.assert_allclose(found["logit_kl"], [[0.125, 0.4]])
    with pytest.raises(ProbeError, match="split by"):
        loss_change(data, by="name")
    only_single = loss_change(data.isel(sample=[1]))
    assert only_single["loss_change"].isnull().all() and only_single["reference_loss"].isnull()


def test_intervals_of_the_loss_cover_the_truth():
    """Texts whose loss changes by 0.02 in the mean: 95 % intervals of it, and of a KL that errs by a factor."""
    random = np.random.default_rng(1)
    covered = np.zeros(2)
    for _ in range(200):
        change = 0.02 + 0.05 * random.normal(size=(1, 12))
        kl = 0.01 * random.lognormal(sigma=0.5, size=(1, 12)) / math.exp(0.125)
        data = samples_of(kl=kl, agreement=np.ones((1, 12)), change=change, n_tokens=np.full(12, 101))
        found = loss_change(data, n_resamples=200)
        for i, (name, truth) in enumerate((("loss_change", 0.02), ("logit_kl", 0.01))):
            covered[i] += found[f"{name}_lower"].item() <= truth <= found[f"{name}_upper"].item()
    assert (covered / 200 > 0.88).all()
    assert (covered / 200 < 0.99).all()


def test_what_never_differs_has_the_interval_of_zero():
    data = samples_of(kl=np.zeros((1, 8)), agreement=np.ones((1, 8)), change=np.zeros((1, 8)), n_tokens=np.full(8, 10))
    found = loss_change(data)
    for name in ("logit_kl", "loss_change"):
        assert [found[name].item(), found[f"{name}_lower"].item(), found[f"{name}_upper"].item()] == [0, 0, 0]
    assert found["top1_agreement_upper"].item() == 1


def test_a_model_without_a_head_has_no_loss():
    nothing = np.full((1, 8), np.nan)
    data = samples_of(kl=nothing, agreement=nothing, change=nothing, n_tokens=np.full(8, 10), reference=nothing[0])
    found = loss_change(data)
    for name in ("logit_kl", "loss_change", "top1_agreement"):
        for suffix in ("", "_lower", "_upper"):
            assert found[name + suffix].isnull().all()


# Studies


def test_the_same_from_memory_and_from_a_store(tmp_path):
    model = random_model(0, num_hidden_layers=3)
    study = fp8_error.drift(model, random_ids(20, 15, 12, 9, 8, 7), domains=list("ababab"), progress=False)
    probe.save(study, tmp_path / "study.zarr")
    stored = probe.open(tmp_path / "study.zarr")
    for function, options in (
        (flips_by_margin, dict(by_layer=True)),
        (flips_by_margin, {}),
        (flip_share, dict(by="domain")),
        (loss_by_domain, {}),
    ):
        result = function(study, **options)
        xr.testing.assert_identical(result, function(stored, **options))
        for variable in result.variables.values():
            assert variable.attrs["long_name"] and variable.attrs["units"]
    shares = flip_share(study, pooled=True)
    np.testing.assert_allclose(shares["flip_share"], study["fp8_flips"]["flipped"].mean(["token", "layer"]))
    losses = loss_change(study)
    for name in ("logit_kl", "loss_change", "top1_agreement"):
        np.testing.assert_allclose(losses[name], study["fp8_drift"][name], atol=1e-12)
    assert losses.attrs["level"] == 0.95


def test_a_recording_has_no_flips():
    trace = probe.record(random_model(0, num_hidden_layers=1), random_ids(5), progress=False)
    with pytest.raises(SchemaError, match=r"/fp8_flips.*fp8_error\.drift"):
        flips_by_margin(trace)


def test_statistics_load_no_torch():
    code = "import sys, probe.fp8.flips; sys.exit('torch' in sys.modules or 'plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
