"""``drift``: streams against an independent, slow implementation, against themselves, and against values by hand."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import probe
from probe import fp8_error, schema
from probe.dispatch import set_expert_dispatch
from probe.float8 import Rounding, Scaling, quantize, scaled_matmul
from probe.fp8 import streams
from probe.fp8.drift import MODES, deviation_sums, routing_change
from probe.fp8.layers import SITES, LayerOutputs, QuantizationError, rounded_product
from probe.fp8.streams import Batch, BatchOutputs, LayerStep, Walk
from probe.recipes import MODULE_KINDS, Recipe, RecipeError, recipes
from probe.recording import RecordingError
from probe.schema import ProbeError, SchemaError
from probe.sites import NotLlama4Error
from tests import brute_force_fp8
from tests.random_models import SHAPES, random_ids, random_model

E4M3_ROW = Rounding("e4m3fn", Scaling("row"))
EVERYTHING = Recipe("all of it", MODULE_KINDS, weight=E4M3_ROW, activation=Rounding("e4m3fn", Scaling("tensor")))
NOTHING = Recipe("nothing", (), weight=E4M3_ROW, activation=E4M3_ROW)
BLOCKS = Recipe(
    "blocks of tokens",
    ("attention", "routed_experts"),
    weight=Rounding("e5m2", Scaling("block", (16, 16))),
    activation=Rounding("e4m3fn", Scaling("block", (4, 8), power_of_two="ceil")),
)
COLUMNS = Recipe(
    "columns",
    ("routed_experts", "dense_mlp", "router"),
    weight=Rounding("e4m3fn", Scaling("column")),
    activation=Rounding("e4m3fn", Scaling("column")),
)
ACTIVATIONS = Recipe("inputs only", ("routed_experts", "attention"), weight=None, activation=E4M3_ROW)


def cast(model, dtype):
    """As from_pretrained(dtype=…) leaves a model: weights in ``dtype``, rotary frequencies in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def small(seed=0, shape="every layer MoE, top-1", dtype=torch.float32, **changes):
    return cast(random_model(seed, **(dict(num_hidden_layers=4) | SHAPES[shape] | changes)), dtype)


def drift(model, ids, **options):
    return fp8_error.drift(model, ids, progress=False, **options)


def state_of(model):
    """Everything that a run could change."""
    return (
        {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        model.config.to_json_string(),
        model.config._attn_implementation,
        [(type(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        [module.training for module in model.modules()],
    )


def assert_same_state(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert tensor.dtype == after[0][name].dtype
        assert torch.equal(tensor, after[0][name]), name


# The reference, and what equals it


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_models_own_forward_to_the_bit(shape):
    model = small(1, shape, torch.bfloat16)
    set_expert_dispatch(model, "sparse")
    ids = random_ids(20, 13, 11, seed=1)
    walk = Walk(model, ids, progress=False)
    (batch,) = walk.batches
    ((hidden,),) = walk.layers([], lambda step: None)[0]
    with torch.no_grad():
        own = model.model(input_ids=batch.token_ids, attention_mask=batch.is_real.long(), use_cache=False)
        assert torch.equal(model.model.norm(hidden)[batch.is_real], own.last_hidden_state[batch.is_real])


def test_a_model_loaded_in_float32_has_the_same_reference_as_one_in_bf16():
    ids = random_ids(17, 9)
    of_float32 = drift(small(2), ids)
    of_bf16 = drift(small(2, dtype=torch.bfloat16), ids)
    for name in ("fp8_samples", "fp8_flips"):
        one, other = (tree[name].to_dataset().sel(recipe=["bf16", "meta"]) for tree in (of_float32, of_bf16))
        assert one.identical(other)
    # The floor fp32 has the weights as they were loaded.
    one, other = (tree["fp8_drift"]["sqnr"].sel(recipe="fp32") for tree in (of_float32, of_bf16))
    assert not one.equals(other)


def test_a_model_against_itself_differs_nowhere():
    study = drift(small(3, "every second layer MoE, top-1"), random_ids(20, 1, 13), recipe=NOTHING)
    found = study["fp8_drift"].to_dataset().sel(recipe="nothing")
    for site in SITES:
        there = [1, 3] if site in ("router", "routed_experts", "shared_expert") else [0, 1, 2, 3]
        at = found.sel(site=site, layer=there)
        assert np.isposinf(at["sqnr"]).all()
        assert (at["relative_error"] == 0).all()
        assert (at["cosine"] == 1).all()
        assert found["sqnr"].sel(site=site).drop_sel(layer=there).isnull().all()
    assert float(found["logit_kl"]) == float(found["loss_change"]) == 0
    assert float(found["top1_agreement"]) == 1
    flips = study["fp8_flips"].to_dataset().sel(recipe="nothing")
    assert not flips["flipped"].any()
    assert (flips["margin_change"] == 0).all()
    samples = study["fp8_samples"].to_dataset().sel(recipe="nothing")
    assert (samples["logit_kl"] == 0).all()
    assert samples["loss_change"].values[[0, 2]].tolist() == [0, 0]


def test_a_recipe_with_neither_rounding_is_nothing_too():
    whole = Recipe("no rounding", MODULE_KINDS, weight=None)
    found = drift(small(3), random_ids(20, 13), recipe=whole)["fp8_drift"].to_dataset().sel(recipe="no rounding")
    assert np.isposinf(found["sqnr"]).all()
    assert float(found["logit_kl"]) == 0


# Against the slow implementation

FLOORS = ("bf16", "fp32")


def assert_parity(model, ids, recipe, study):
    name = recipe if isinstance(recipe, str) else recipe.name
    expected = brute_force_fp8.study(model, ids, recipe)
    found = study["fp8_drift"].to_dataset().sel(recipe=name)
    for variable in ("sqnr", "relative_error", "cosine"):
        values = found[variable].transpose("layer", "site", "mode").values
        np.testing.assert_allclose(values, getattr(expected, variable), rtol=2e-4, atol=1e-7, err_msg=variable)
    flips = study["fp8_flips"].to_dataset().sel(recipe=name)
    np.testing.assert_array_equal(flips["flipped"], expected.flipped)
    np.testing.assert_allclose(flips["router_margin"], expected.router_margin, rtol=1e-6)
    np.testing.assert_allclose(flips["margin_change"], expected.margin_change, atol=1e-5)
    samples = study["fp8_samples"].to_dataset().sel(recipe=name)
    for variable in ("logit_kl", "top1_agreement", "loss_change"):
        np.testing.assert_allclose(samples[variable], getattr(expected, variable), atol=2e-6, err_msg=variable)
    n_tokens = samples["n_tokens"].values
    n_next = n_tokens - 1
    np.testing.assert_allclose(found["logit_kl"], (expected.logit_kl * n_tokens).sum() / n_tokens.sum(), atol=2e-6)
    loss_change = np.nansum(expected.loss_change * n_next) / n_next.sum()
    np.testing.assert_allclose(found["loss_change"], loss_change, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_whole_copies_of_the_model(shape, dtype, monkeypatch):
    # In batches of one both sides hand the kernels tensors of the same shape, and BF16 sums agree to the bit.
    monkeypatch.setattr(streams, "BATCH_SIZE", 1)
    model, ids = small(4, shape, dtype), random_ids(19, 1, 8, 9, seed=4)  # chunks are of 8 tokens
    several = [recipes()[name] for name in ("meta", "tensorwise", "deepseek", "int4")]
    study = drift(model, ids, recipe=several)
    assert study["fp8_drift"]["recipe"].values.tolist() == [*FLOORS, "meta", "tensorwise", "deepseek", "int4"]
    for recipe in (*FLOORS, *several):
        assert_parity(model, ids, recipe, study)


@pytest.mark.parametrize(
    "recipe", [EVERYTHING, BLOCKS, COLUMNS, ACTIVATIONS, *(recipes()[n] for n in ("mxfp8", "mxfp8_ceil"))]
)
def test_parity_of_other_recipes(recipe, monkeypatch):
    monkeypatch.setattr(streams, "BATCH_SIZE", 1)
    for shape in ("every layer MoE, top-2", "every third layer MoE, top-3"):
        model, ids = small(5, shape), random_ids(18, 7, seed=5)
        assert_parity(model, ids, recipe, drift(model, ids, recipe=recipe))


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True),
        dict(head_dim=6, num_attention_heads=5, num_key_value_heads=1, hidden_size=30, intermediate_size=11),
        dict(attention_bias=True),
        dict(num_local_experts=1),
        dict(num_local_experts=3, num_experts_per_tok=3),
        dict(num_hidden_layers=1),
        dict(attn_temperature_tuning=False, attention_chunk_size=64),
    ],
    ids=str,
)
def test_parity_of_odd_shapes(changes, monkeypatch):
    monkeypatch.setattr(streams, "BATCH_SIZE", 1)
    model, ids = small(6, **changes), random_ids(17, 5, seed=6)
    if changes.get("attention_bias"):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    study = drift(model, ids, recipe=[EVERYTHING, "rowwise"])
    for recipe in (EVERYTHING, recipes()["rowwise"], "fp32"):
        assert_parity(model, ids, recipe, study)


def test_batches_change_no_more_than_the_noise_floor():
    model, ids = small(7), random_ids(40, 33, 38, 21, 30, seed=7)
    together = drift(model, ids, recipe="rowwise")["fp8_drift"].to_dataset()
    alone = [drift(model, [text], recipe="rowwise")["fp8_drift"].to_dataset() for text in ids]
    sites = ["attention", "routed_experts", "shared_expert"]
    place = dict(recipe="rowwise", mode="isolated", site=sites)
    squares = [np.square(own["relative_error"].sel(place)) for own in alone]
    apart = np.sqrt(sum(len(text) * own for text, own in zip(ids, squares, strict=True)) / sum(map(len, ids)))
    np.testing.assert_allclose(together["relative_error"].sel(place), apart, rtol=0.2)


@pytest.mark.parametrize("recipe", [EVERYTHING, BLOCKS], ids=lambda recipe: recipe.name)
def test_padding_enters_no_scale(recipe):
    """A rounded layer makes the same of its tokens, to the bit, whatever stands behind them."""
    model = small(8, num_local_experts=1)
    with torch.no_grad():
        for norm in (model.model.layers[1].input_layernorm, model.model.layers[1].post_attention_layernorm):
            norm.weight[0] *= 100
    walk = Walk(model, random_ids(20, 13, 11, seed=8), progress=False)
    (batch,) = walk.batches
    stream = streams.recipe_stream(Recipe("rounded", MODULE_KINDS, recipe.weight, recipe.activation), walk.n_layers)
    with torch.no_grad():
        hidden = torch.randn(3, 20, 32).bfloat16()
        # Norms take away how large a token is, but not that all of it lies in the channel that they enlarge.
        loudest = torch.zeros(32).bfloat16()
        loudest[0] = 1000
        loud = torch.where(batch.is_real[..., None], hidden, loudest)
        made = walk._copy(stream, 1)
        one, other = (walk._run(made, stream, 1, batch, own) for own in (hidden, loud))
    for site in SITES:
        rows = [BatchOutputs([batch], [outputs]).rows(site) for outputs in (one, other)]
        assert torch.equal(*rows), site


def test_what_stands_in_the_padding_changes_no_more_than_rounding(monkeypatch):
    """Padding is routed as tokens are, and other numbers of rows make other last bits; nothing else."""
    model, ids = small(8), random_ids(40, 33, 31, seed=8)
    plain = drift(model, ids, recipe=EVERYTHING)
    batches = streams._batches

    def poisoned(ids):
        made = batches(ids)
        for batch in made:
            batch.token_ids[~batch.is_real] = 7
        return made

    monkeypatch.setattr(streams, "_batches", poisoned)
    assert any((~batch.is_real).any() for batch in poisoned(ids))
    other = drift(model, ids, recipe=EVERYTHING)
    one, two = (tree["fp8_drift"]["relative_error"].sel(recipe="all of it", mode="isolated") for tree in (plain, other))
    np.testing.assert_allclose(one, two, rtol=0.2)
    one, two = (tree["fp8_drift"]["sqnr"].sel(recipe="all of it", layer=0) for tree in (plain, other))
    np.testing.assert_allclose(one, two, atol=0.05)


def test_a_scale_that_tokens_share_is_of_one_text():
    """A text with huge values in the same batch must not cost its neighbour any accuracy."""
    model = small(9, num_hidden_layers=1, num_local_experts=1)
    layer, loud_token = model.model.layers[0], 5
    with torch.no_grad():
        # Channel 0 is huge in the loud token, 0 in all others, and no matrix looks at it.
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[loud_token, 0] = 1
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[0] = 1e6
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight[:, 0] = 0
        layer.self_attn.o_proj.weight[0] = 0
        layer.feed_forward.router.weight[:, 0] = 0
        layer.feed_forward.experts.gate_up_proj[:, 0] = 0
        for name in ("gate_proj", "up_proj"):
            getattr(layer.feed_forward.shared_expert, name).weight[:, 0] = 0
    quiet = [token for token in random_ids(40, seed=9)[0] if token != loud_token][:30]
    for kind in ("attention", "routed_experts", "shared_expert"):
        recipe = Recipe("one scale", (kind,), recipes()["tensorwise"].weight, recipes()["tensorwise"].activation)
        divergence = {}
        for name, ids in (("alone", [quiet]), ("beside", [quiet, [loud_token] * 30])):
            kl = drift(model, ids, recipe=recipe)["fp8_samples"]["logit_kl"].sel(recipe="one scale")
            divergence[name] = kl.values
        np.testing.assert_allclose(divergence["beside"][0], divergence["alone"][0], rtol=0.3)
        # Where the scale is that of the loud token, nothing is left of all else.
        assert divergence["beside"][1] > 3 * divergence["beside"][0]


# What each number means


def test_errors_of_rows_by_hand():
    reference, own = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, 3.5]])
    sums = deviation_sums(reference, own)
    assert sums.tolist() == [25, 21.25, 23, 0.25]  # SQNR 10·log10(25 / 0.25) = 20 dB
    assert deviation_sums(reference, reference)[3] == 0


def step_of(logits, own_logits, top_k):
    def outputs(values):
        values = torch.tensor(values)
        index = values.topk(top_k, dim=1).indices
        scores = torch.zeros_like(values).scatter_(1, index, values.gather(1, index).sigmoid())
        nothing = torch.zeros(1, len(values), 1)
        batch = Batch([0], torch.zeros(1, len(values), dtype=torch.long), torch.ones(1, len(values), dtype=torch.bool))
        return batch, BatchOutputs([batch], [LayerOutputs(*[nothing] * 5, router=values, scores=scores)])

    batch, reference = outputs(logits)
    own = outputs(own_logits)[1]
    return LayerStep(0, batch, [0], reference, own, own)


def test_flips_and_margins_by_hand():
    step = step_of(
        [[2.0, 1.0, 0.0], [2.0, 1.5, 0.0], [1.0, 3.0, 2.5]], [[1.5, 1.0, 0.0], [1.0, 1.5, 3.0], [1.0, 2.5, 3.0]], 1
    )
    margin, change, flipped = routing_change(step, 1)
    assert margin.tolist() == [1.0, 0.5, 0.5]
    # The reference's two experts are followed, whoever comes first in the stream.
    assert change.tolist() == [-0.5, -1.0, -1.0]
    assert flipped.tolist() == [False, True, True]


def test_an_order_that_changes_within_the_chosen_set_is_no_flip():
    step = step_of([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]], [[2.0, 3.0, 1.0], [3.0, 1.0, 2.0]], 2)
    margin, change, flipped = routing_change(step, 2)
    assert flipped.tolist() == [False, True]
    assert margin.tolist() == [1, 1]
    assert change.tolist() == [1, -2]


def test_where_every_expert_is_chosen_there_is_no_margin():
    margin, change, flipped = routing_change(step_of([[1.0, 2.0]], [[2.0, 1.0]], 2), 2)
    assert margin.isnan().all() and change.isnan().all() and not flipped.any()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_product_is_that_of_real_fp8_matrices(granularity):
    """What this device makes of FP8 codes: they are multiplied and summed, then scaled and rounded once."""
    torch.manual_seed(0)
    x, w = torch.randn(32, 64), torch.randn(48, 64) / 8
    qx, qw = (quantize(matrix, scaling=Scaling(granularity)) for matrix in (x, w))
    real = scaled_matmul(qx, qw, dtype=torch.bfloat16).float()
    own = rounded_product(qx.dequantize(), qw.dequantize(), torch.bfloat16).float()
    exact = qx.dequantize().double() @ qw.dequantize().double().T
    # Both round to BF16 once; a sum that lies between two of its values may fall to either side.
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7).float()
    assert ((real - own).abs() <= ulp).all()
    assert (real == own).float().mean() > 0.98
    assert ((own - exact).abs() <= ulp / 2 * 1.001).all()


def test_isolated_errors_come_from_the_part_itself():
    study = drift(small(10), random_ids(30, 22), recipe="meta")
    sqnr = study["fp8_drift"]["sqnr"].sel(recipe="meta")
    isolated, accumulated = sqnr.sel(mode="isolated"), sqnr.sel(mode="accumulated")
    # Meta's recipe leaves the first and last layer, and all but the routed experts, as they are.
    assert np.isposinf(isolated.sel(layer=[0, 3])).all()
    assert np.isposinf(isolated.sel(site=["attention", "router", "shared_expert"])).all()
    assert np.isfinite(isolated.sel(layer=[1, 2], site=["routed_experts", "feed_forward", "residual"])).all()
    # Layer 1 is the first that differs: what enters it is the reference's.
    assert np.isposinf(accumulated.sel(layer=0)).all()
    np.testing.assert_array_equal(isolated.sel(layer=1), accumulated.sel(layer=1))
    assert np.isfinite(accumulated.sel(layer=[2, 3])).all()
    assert float(accumulated.sel(layer=3, site="residual")) < float(isolated.sel(layer=2, site="residual"))


def test_finer_rounding_is_closer():
    study = drift(small(11), random_ids(40, 35, 30), recipe=["rowwise", "int4"])
    sqnr = study["fp8_drift"]["sqnr"].sel(mode="isolated", site="routed_experts")
    assert (sqnr.sel(recipe="rowwise") > sqnr.sel(recipe="int4")).all()
    # Two roundings of 2^-4 at most each, of inputs and of weights: E4M3 products lie near 28.7 dB (METRICS).
    assert 24 < float(sqnr.sel(recipe="rowwise").mean()) < 33
    flips = study["fp8_flips"]["flipped"].mean(["token", "layer"])
    assert float(flips.sel(recipe="int4")) > float(flips.sel(recipe="bf16"))


def test_loss_is_that_of_the_reference_plus_the_change():
    model, ids = small(12, dtype=torch.bfloat16), random_ids(20, 15, 1)
    samples = drift(model, ids)["fp8_samples"].to_dataset()
    with torch.no_grad():
        for i, text in enumerate(ids[:2]):
            logits = model(torch.tensor([text])).logits[0].float()
            loss = nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]))
            np.testing.assert_allclose(samples["reference_loss"].values[i], loss, rtol=2e-3)
    assert np.isnan(samples["reference_loss"].values[2])
    assert samples["loss_change"].sel(sample=2).isnull().all()
    assert samples["logit_kl"].notnull().all()


def test_tokens_and_texts_are_named():
    study = drift(
        small(13, "every second layer MoE, top-1"), random_ids(9, 4, 12), domains=["a", None, "a"], max_tokens=8
    )
    samples, flips = study["fp8_samples"].to_dataset(), study["fp8_flips"].to_dataset()
    assert samples["n_tokens"].values.tolist() == [8, 4, 8]
    assert samples["n_cut"].values.tolist() == [1, 0, 4]
    assert samples["domain"].values.tolist() == ["a", schema.NO_DOMAIN, "a"]
    assert flips["sample"].values.tolist() == [0] * 8 + [1] * 4 + [2] * 8
    assert flips["position"].values.tolist() == [*range(8), *range(4), *range(8)]
    assert flips["token_id"].values.tolist() == [t for text in random_ids(9, 4, 12) for t in text[:8]]
    assert schema.labels(flips["domain"]).tolist() == ["a"] * 8 + [schema.NO_DOMAIN] * 4 + ["a"] * 8
    assert flips["layer"].values.tolist() == [1, 3]
    assert schema.labels(flips["attention_kind"]).tolist() == ["rope", "nope"]
    assert study["fp8_drift"]["layer"].values.tolist() == [0, 1, 2, 3]
    assert study["fp8_drift"]["mode"].values.tolist() == list(MODES)


def test_attributes_say_what_was_compared():
    study = drift(small(14), random_ids(9), recipe=["meta", EVERYTHING])
    assert set(schema.ROOT_ATTRIBUTES) <= set(study.attrs)
    assert (study.attrs["dtype"], study.attrs["expert_dispatch"]) == ("bfloat16", "sparse")
    described = json.loads(study.attrs["recipes"])
    assert list(described) == ["meta", "all of it"]
    assert described["meta"]["activation"]["scaling"]["cap"] == 1200


def test_noise_floor_is_drift_without_a_recipe():
    model, ids = small(15), random_ids(15, 9)
    floor = fp8_error.noise_floor(model, ids, progress=False)
    assert floor["fp8_drift"]["recipe"].values.tolist() == ["bf16", "fp32"]
    with_recipe = drift(model, ids)
    for name in ("fp8_drift", "fp8_samples", "fp8_flips"):
        assert floor[name].to_dataset().identical(with_recipe[name].to_dataset().sel(recipe=["bf16", "fp32"]))
    sqnr = floor["fp8_drift"]["sqnr"].sel(mode="accumulated", site="residual")
    assert ((sqnr > 20) & (sqnr < 70)).all()


def test_a_model_without_an_output_head_has_no_logits():
    study = drift(small(16).model, random_ids(12, 5))
    found, samples = study["fp8_drift"].to_dataset(), study["fp8_samples"].to_dataset()
    for name in ("logit_kl", "top1_agreement", "loss_change"):
        assert found[name].isnull().all() and samples[name].isnull().all()
    assert found["sqnr"].notnull().all()
    schema.validate(study)


def test_text_goes_through_the_tokenizer_of_a_loaded_model():
    loaded = probe.load("tiny-scout")
    study = drift(loaded, ["The cat sat on the mat.", "def f(x):"])
    assert study.attrs["model"] == "tiny-scout"
    ids = loaded.tokenizer(["The cat sat on the mat.", "def f(x):"])["input_ids"]
    assert study["fp8_flips"]["token_id"].values.tolist() == [token for text in ids for token in text]


# Nothing of the model changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_stays_as_it_was(dtype):
    model = small(17, "every second layer MoE, top-1", dtype)
    model.set_attn_implementation("eager")
    before = state_of(model)
    drift(model, random_ids(12, 7), recipe=[EVERYTHING, "meta"])
    assert_same_state(before, state_of(model))


def test_the_model_stays_as_it_was_after_an_error(monkeypatch):
    model = small(18)
    before = state_of(model)
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        return run(*args, **kwargs)

    run = streams.run_layer
    monkeypatch.setattr(streams, "run_layer", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        drift(model, random_ids(12, 7), recipe=EVERYTHING)
    assert_same_state(before, state_of(model))


def test_hooks_and_wrappers_of_the_model_do_not_run():
    model, ids = small(19), random_ids(12, 7)
    plain = drift(model, ids)

    def refuse(*args, **kwargs):
        raise AssertionError("a hook of the model ran")

    for module in model.modules():
        module.register_forward_hook(refuse)
        module.register_forward_pre_hook(refuse)
    model.model.layers[0].self_attn.forward = refuse
    assert drift(model, ids)["fp8_samples"].to_dataset().identical(plain["fp8_samples"].to_dataset())


def test_a_recorder_around_it_sees_nothing():
    model, ids = small(20), random_ids(12, 7)
    with probe.Recorder(model) as recorder:
        drift(model, ids)
    with pytest.raises(RecordingError, match="no forward"):
        recorder.trace()


def test_settings_that_an_intervention_changed_count():
    model, ids = small(21, attn_scale=0.5), random_ids(30)
    plain = drift(model, ids)["fp8_samples"]["reference_loss"].item()
    for layer in model.model.layers:
        layer.self_attn.attn_scale = 0.0
    assert drift(model, ids)["fp8_samples"]["reference_loss"].item() != plain


def test_autocast_and_training_mode_of_the_caller_change_nothing():
    model, ids = small(22), random_ids(12, 7)
    plain = drift(model, ids)["fp8_drift"].to_dataset()
    model.train()
    with torch.autocast("cpu", dtype=torch.float16):
        assert drift(model, ids)["fp8_drift"].to_dataset().identical(plain)
    assert model.training and model.model.layers[0].self_attn.training


# Refusals


class OwnLinear(nn.Linear):
    """What a quantiser puts in the place of a linear layer."""


def broken(change):
    model = small(23)
    change(model)
    return model


def put_foreign_linear(model):
    model.model.layers[2].self_attn.k_proj = OwnLinear(32, 16, bias=False)


def put_foreign_experts(model):
    model.model.layers[1].feed_forward.experts = nn.ModuleList()


def put_foreign_head(model):
    model.lm_head = OwnLinear(32, 160, bias=False)


def put_quantization_config(model):
    model.config.quantization_config = {"quant_method": "fbgemm_fp8"}


def put_nan(model):
    with torch.no_grad():
        model.model.layers[3].feed_forward.experts.down_proj[2, 1, 1] = torch.nan


def put_infinity(model):
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf


def put_codes(model):
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def put_elsewhere(model):
    model.model.layers[1].to("meta")


@pytest.mark.parametrize(
    "change, message",
    [
        (put_foreign_linear, "layer 2 k_proj is a OwnLinear"),
        (put_foreign_experts, "layer 1 experts is a ModuleList"),
        (put_foreign_head, "output head is a OwnLinear"),
        (put_quantization_config, "quantization_config"),
        (put_nan, r"layers\.3\.feed_forward\.experts\.down_proj holds NaN or infinity"),
        (put_infinity, "output head weight holds NaN or infinity"),
        (put_codes, r"layers\.0\.self_attn\.q_proj\.weight is torch\.float8_e4m3fn"),
        (put_elsewhere, r"layers\.1\..* is not in memory"),
    ],
)
def test_models_that_cannot_be_rounded_are_refused_by_name(change, message, monkeypatch):
    monkeypatch.setattr(streams, "run_layer", lambda *args, **kwargs: pytest.fail("something ran"))
    with pytest.raises(QuantizationError, match=message):
        drift(broken(change), random_ids(5))


@pytest.mark.parametrize(
    "texts, options, error, message",
    [
        ([[3, 4]], dict(recipe="fp7"), RecipeError, "no recipe is called 'fp7'"),
        ([[3, 4]], dict(recipe=["meta", "meta"]), QuantizationError, "two recipes are called 'meta'"),
        ([[3, 4]], dict(recipe=Recipe("bf16", (), None)), QuantizationError, "noise floor"),
        ([[3, 4]], dict(recipe=[]), QuantizationError, "no recipe is given"),
        ([], {}, RecordingError, "no text"),
        ([[3, 4], []], {}, QuantizationError, "text 1 has no token"),
        ([[3], [3] * 513], {}, QuantizationError, "text 1 has 513 tokens, but the model was made for 512"),
        ([[3, 160]], {}, RecordingError, "token id 160"),
        (["The cat"], {}, QuantizationError, "bare model has no tokenizer"),
        ([[3, 4]], dict(max_tokens=0), QuantizationError, "max_tokens is 0"),
        ([[3, 4]], dict(domains=["a", "b"]), RecordingError, "domains needs one entry"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(texts, options, error, message, monkeypatch):
    monkeypatch.setattr(streams, "run_layer", lambda *args, **kwargs: pytest.fail("something ran"))
    with pytest.raises(error, match=message):
        drift(small(24), texts, **options)


def test_max_tokens_makes_a_long_text_short_enough():
    study = drift(small(24, num_hidden_layers=1), [[3] * 600], max_tokens=20)
    assert study["fp8_samples"]["n_cut"].item() == 580


def test_other_models_are_refused():
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(NotLlama4Error):
        drift(other, [[3, 4]])
    with pytest.raises(QuantizationError, match="model is a str"):
        drift("tiny-scout", [[3, 4]])


# The DataTree


def test_a_study_goes_to_disk_and_comes_back(tmp_path):
    study = drift(small(25), random_ids(12, 7), domains=["a", "b"])
    probe.save(study, tmp_path / "study.zarr")
    assert probe.open(tmp_path / "study.zarr").load().identical(study)


def test_a_study_may_stand_beside_a_recording(tmp_path):
    model, ids = small(26), random_ids(12, 7)
    trace = probe.record(model, ids, progress=False)
    for name, node in drift(model, ids).children.items():
        trace[name] = node.copy()
    probe.save(trace, tmp_path / "both.zarr")
    assert set(probe.open(tmp_path / "both.zarr").children) == {
        "routing",
        "samples",
        "vocabulary",
        *schema.DRIFT_GROUPS,
    }


def test_every_variable_of_a_study_has_a_name_and_a_unit():
    study = drift(small(27), random_ids(7))
    for group in schema.DRIFT_GROUPS:
        for variable in study[group].to_dataset().variables.values():
            assert variable.attrs["long_name"] and variable.attrs["units"]


def without(study, name):
    return study.filter(lambda node: node.name != name)


def shortened(study, name, **places):
    groups = {f"/{key}": node.to_dataset() for key, node in study.children.items()}
    groups[f"/{name}"] = groups[f"/{name}"].isel(places)
    result = type(study).from_dict(groups)
    result.attrs = study.attrs
    return result


def test_faults_of_a_study_are_named():
    study = drift(small(28), random_ids(9, 6))
    schema.validate(study)
    for name in schema.DRIFT_GROUPS:
        with pytest.raises(SchemaError, match=f"group /{name} is missing"):
            schema.validate(without(study, name))
    with pytest.raises(SchemaError, match="counts 15 tokens but /fp8_flips holds 10"):
        schema.validate(shortened(study, "fp8_flips", token=slice(10)))
    with pytest.raises(SchemaError, match="/fp8_samples and /fp8_drift name different recipes"):
        schema.validate(shortened(study, "fp8_samples", recipe=slice(2)))
    with pytest.raises(SchemaError, match="sample does not agree"):
        schema.validate(shortened(study, "fp8_flips", token=slice(None, None, -1)))
    with pytest.raises(SchemaError, match=r"layers \[3\] that /fp8_drift lacks"):
        schema.validate(shortened(study, "fp8_drift", layer=slice(3)))
    with pytest.raises(SchemaError, match="group /routing is missing"):
        schema.validate(type(study)())
    with pytest.raises(SchemaError, match=r"fp8_error\.sensitivity\(model, texts\) adds it"):
        schema.group(study, "fp8_sensitivity")


def test_errors_are_probe_errors():
    assert issubclass(QuantizationError, ProbeError)
