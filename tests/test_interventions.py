"""Interventions: that they act, by exactly as much as they say, and leave nothing behind."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Llama4Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import probe
from probe.interventions import InterventionError, nope_layers, temperature, temperature_factor
from probe.sites import NotLlama4Error
from tests.random_models import random_ids, random_model, text_config

PUBLISHED = text_config(floor_scale=8192, attn_scale=0.1)
IDS = torch.tensor(random_ids(40))


@contextmanager
def captured_queries(model):
    """The queries that each layer hands to the attention function in the last forward, [B, heads, n, head_dim]."""
    queries = {}

    def capture(module, query, *args, **kwargs):
        queries[module.layer_idx] = query.clone()
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("capturing", capture)
    AttentionMaskInterface.register("capturing", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("capturing")
    try:
        yield queries
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def test_factor_has_the_values_of_the_published_configuration():
    position = [0, 8190, 8191, 32767, 131_071, 1_048_575]
    factor = temperature_factor(PUBLISHED, position)
    np.testing.assert_allclose(factor, [1, 1, 1.06931, 1.16094, 1.28332, 1.48598], atol=5e-6)
    assert (factor[:2] == 1).all()


def test_factor_scales_its_growth_and_not_itself():
    position = np.arange(100_000).reshape(100, 1000)
    growth = temperature_factor(PUBLISHED, position) - 1
    np.testing.assert_allclose(temperature_factor(PUBLISHED, position, scale=2) - 1, 2 * growth, rtol=1e-12)
    assert (temperature_factor(PUBLISHED, position, scale=0) == 1).all()
    assert temperature_factor(PUBLISHED, 8191).shape == ()


def test_factor_of_an_image_model_is_that_of_its_text_part():
    config = Llama4Config(text_config=PUBLISHED.to_dict())
    assert temperature_factor(config, 8191) == temperature_factor(PUBLISHED, 8191) > 1


def test_factor_of_a_model_without_tuning_is_1():
    assert temperature_factor(text_config(attn_temperature_tuning=False), [0, 10_000]).tolist() == [1, 1]


@pytest.mark.parametrize("scale", [0, 0.5, 1, 2, 7.25, -1])
def test_queries_are_scaled_by_exactly_the_factor(scale):
    model = random_model(num_hidden_layers=4)  # NoPE in the last only, whose input no temperature changes
    with captured_queries(model) as queries:
        with temperature(model, scale=0):
            logits(model)
            bare = dict(queries)
        with temperature(model, scale=scale):
            logits(model)
    factor = temperature_factor(model.config, np.arange(40), scale=scale)
    assert scale == 0 or len(np.unique(factor)) == 6  # floor_scale 8: a step at 7, 15, 23, 31, 39
    expected = bare[3].numpy() * factor[:, None]
    np.testing.assert_allclose(queries[3].numpy(), expected, rtol=3e-7, atol=0)
    for layer in (0, 1, 2):
        assert torch.equal(queries[layer], bare[layer])


def test_scale_0_is_a_model_built_without_tuning():
    model, without = random_model(), random_model(attn_temperature_tuning=False)
    with temperature(model, scale=0):
        assert torch.equal(logits(model), logits(without))
    assert not torch.equal(logits(model), logits(without))


def test_scale_2_is_a_model_built_with_twice_the_scale():
    with temperature(model := random_model(), scale=2):
        assert torch.equal(logits(model), logits(random_model(attn_scale=0.2)))


def test_acts_on_decoding_too():
    model, without = random_model(), random_model(attn_temperature_tuning=False)
    options = dict(max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
    options |= dict(attention_mask=torch.ones_like(IDS), eos_token_id=None, pad_token_id=0)
    with temperature(model, scale=0):
        changed = model.generate(IDS, **options)
    expected = without.generate(IDS, **options)
    untouched = model.generate(IDS, **options)
    assert torch.equal(torch.stack(changed.logits), torch.stack(expected.logits))
    assert not torch.equal(torch.stack(untouched.logits), torch.stack(expected.logits))


def test_only_the_chosen_layers_change():
    model = random_model(num_hidden_layers=8)
    assert nope_layers(model) == [3, 7]
    with captured_queries(model) as queries:
        logits(model)
        before = dict(queries)
        with temperature(model, scale=3, layers=[7]):
            logits(model)
    changed = [layer for layer in range(8) if not torch.equal(queries[layer], before[layer])]
    assert changed == [7]


def test_outputs_are_the_same_to_the_bit_afterwards():
    model = random_model()
    before = logits(model)
    with temperature(model, scale=2):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert model.model.layers[3].self_attn.attn_scale == model.config.attn_scale == 0.1


def test_scale_1_changes_nothing_to_the_bit():
    model = random_model()
    before = logits(model)
    with temperature(model):
        assert torch.equal(logits(model), before)


def test_undone_after_an_exception():
    model = random_model()
    before = logits(model)
    with pytest.raises(KeyboardInterrupt), temperature(model, scale=0):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)


def test_nested_scales_multiply_and_each_puts_back_what_it_found():
    model = random_model()
    with temperature(model, scale=2):
        twice = logits(model)
        with temperature(model, scale=1.5):
            assert torch.equal(logits(model), logits(random_model(attn_scale=0.1 * 2 * 1.5)))
            with temperature(model, scale=0):
                with temperature(model, scale=5):
                    assert torch.equal(logits(model), logits(random_model(attn_temperature_tuning=False)))
        assert torch.equal(logits(model), twice)


def test_takes_a_loaded_model_and_a_module_around_one():
    lm = probe.load("tiny-scout")
    attention = lm.model.model.layers[7].self_attn
    with temperature(lm, scale=2):
        assert attention.attn_scale == 2 * lm.config.attn_scale
        with temperature(nn.ModuleDict({"wrapped": lm.model}), scale=2):
            assert attention.attn_scale == 4 * lm.config.attn_scale
    assert attention.attn_scale == lm.config.attn_scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(no_rope_layers=[1] * 6), "none of this model's 6 layers is NoPE"),
        (dict(attn_temperature_tuning=False), "no temperature tuning to scale: its attn_temperature_tuning is False"),
        (dict(attn_scale=0.0), "no temperature tuning to scale: .* its attn_scale 0.0"),
    ],
)
def test_a_model_that_it_cannot_act_on_is_refused(changes, message):
    with pytest.raises(InterventionError, match=message), temperature(random_model(**changes), scale=2):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers=[2, 3]), "layer 2 is not a NoPE layer.*NoPE layers are 3"),
        (dict(layers=[17]), "layer 17 is not a NoPE layer"),
        (dict(layers=[-1]), "layer -1 is not a NoPE layer"),
        (dict(layers=[]), "layers is empty"),
        (dict(scale=float("nan")), "scale is nan"),
        (dict(scale=float("inf")), "scale is inf"),
        (dict(scale="2"), "scale is '2'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_and_change_nothing(options, message):
    model = random_model()
    with pytest.raises(InterventionError, match=message), temperature(model, **options):
        pass
    assert model.model.layers[3].self_attn.attn_scale == 0.1


def test_a_position_below_0_is_refused():
    with pytest.raises(InterventionError, match="position is -1"):
        temperature_factor(PUBLISHED, [3, -1])


def test_another_model_is_refused():
    with pytest.raises(NotLlama4Error), temperature(nn.Linear(2, 2), scale=2):
        pass
