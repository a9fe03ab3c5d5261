"""``activation_range`` against inputs that hooks on a model caught, and values by hand."""

import numpy as np
import pytest
import torch
import xarray as xr
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import probe
from probe import fp8_error, schema
from probe.dispatch import set_expert_dispatch
from probe.float8 import Rounding, Scaling, quantize
from probe.fp8 import streams
from probe.fp8.activations import PERCENTILES, Tally
from probe.fp8.layers import MODULES
from probe.recipes import Recipe, RecipeError, recipes
from tests.random_models import SHAPES, random_ids, random_model

TENSOR = Rounding("e4m3fn", Scaling("tensor"))
STATIC = Recipe("static", (), weight=None, activation=Rounding("e4m3fn", Scaling("tensor", amax=0.5)))


def small(seed=0, shape="every second layer MoE, top-1", **changes):
    return random_model(seed, **(dict(num_hidden_layers=3) | SHAPES[shape] | changes))


def activation_range(model, ids, **options):
    return fp8_error.activation_range(model, ids, progress=False, **options)


def caught(model, ids):
    """What entered each matrix of the BF16 model, text by text: (layer, module, expert) to a list of rows."""
    model = random_copy(model)
    set_expert_dispatch(model, "sparse")
    rows: dict = {}

    def keep(key):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            rows.setdefault(key, []).append(x.detach().reshape(-1, x.shape[-1]))

        return hook

    for index, layer in enumerate(model.model.layers):
        parts = {name: getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        block, prefix = layer.feed_forward, "mlp"
        if isinstance(block, Llama4TextMoe):
            parts["router"], prefix = block.router, "shared_expert"
            mlp = block.shared_expert
        else:
            mlp = block
        parts |= {f"{prefix}.{name}": getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
        for name, part in parts.items():
            part.register_forward_pre_hook(keep((index, name, None)), with_kwargs=True)
        if isinstance(block, Llama4TextMoe):
            block.register_forward_pre_hook(keep((index, "block", None)), with_kwargs=True)
    for text in ids:
        with torch.no_grad():
            model(torch.tensor([text]))
    for index, layer in enumerate(model.model.layers):
        block = layer.feed_forward
        for x in rows.pop((index, "block", None), []):
            with torch.no_grad():
                scores, _ = block.router.forward(x)  # past its hook
                for expert in range(block.num_experts):
                    own = x[scores[:, expert] != 0] * scores[scores[:, expert] != 0, expert][:, None]
                    gate, up = (own @ block.experts.gate_up_proj[expert]).chunk(2, dim=-1)
                    rows.setdefault((index, "experts.gate_up_proj", expert), []).append(own)
                    inner = up * block.experts.act_fn(gate)
                    rows.setdefault((index, "experts.down_proj", expert), []).append(inner)
    return rows


def random_copy(model):
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    for parameter in copy.parameters():
        parameter.data = parameter.data.bfloat16()
    return copy


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_are_those_that_hooks_catch(shape, monkeypatch):
    # In batches of one both sides hand the kernels tensors of the same shape, and BF16 values agree to the bit.
    monkeypatch.setattr(streams, "BATCH_SIZE", 1)
    model, ids = small(1, shape), random_ids(20, 1, 17, 9, seed=1)
    names = ["meta", "tensorwise", "deepseek", "mxfp8", "int4"]
    found = activation_range(model, ids, recipes=[*names, STATIC])
    several = [*(recipes()[name] for name in names), STATIC]
    inputs = caught(model, ids)
    for layer in range(3):
        for module in MODULES:
            for expert in range(6):
                of_text = inputs.get((layer, module, expert if module.startswith("experts.") else None))
                cell = found.sel(layer=layer, module=module, expert=expert)
                if of_text is None or not sum(map(len, of_text)):
                    assert int(cell["n_values"]) == 0
                    for name in ("amax", "outlier_channels", "magnitude", "saturation", "underflow"):
                        assert cell[name].isnull().all()
                else:
                    assert_measured(cell, of_text, several)


def assert_measured(cell, of_text, several):
    values = torch.cat(of_text)
    magnitudes = values.abs().float().numpy()
    assert int(cell["n_values"]) == values.numel()
    assert float(cell["amax"]) == magnitudes.max()
    percentiles = np.percentile(magnitudes, PERCENTILES, method="inverted_cdf")
    np.testing.assert_array_equal(cell["magnitude"], percentiles)
    by_channel = magnitudes.max(axis=0)
    assert float(cell["outlier_channels"]) == (by_channel > 10 * np.median(by_channel)).sum()
    for recipe in several:
        own = cell.sel(recipe=recipe.name)
        if recipe.activation is None:
            assert own["saturation"].isnull() and own["underflow"].isnull()
            continue
        parts = [
            quantize(rows, format=recipe.activation.format, scaling=recipe.activation.scaling)
            for rows in of_text
            if len(rows)
        ]
        n_saturated, n_underflow = (
            sum(int(getattr(part, name)) for part in parts) for name in ("n_saturated", "n_underflow")
        )
        np.testing.assert_allclose(own["saturation"], n_saturated / values.numel(), rtol=1e-6)
        n_nonzero = np.count_nonzero(magnitudes)
        np.testing.assert_allclose(own["underflow"], n_underflow / n_nonzero if n_nonzero else np.nan, rtol=1e-6)


def test_percentiles_outliers_and_ends_by_hand():
    tally = Tally(1, 4, 2)
    # 396 values of 1, one each of 2, 3, 50 and -400 in channels of their own.
    rows = torch.ones(100, 4)
    rows[0] = torch.tensor([2.0, 3.0, 50.0, -400.0])
    static = Rounding("e4m3fn", Scaling("tensor", amax=40.0))
    tally.add(0, rows[:30].bfloat16(), torch.zeros(30, dtype=torch.long), [static, None])
    tally.add(0, rows[30:].bfloat16(), torch.zeros(70, dtype=torch.long), [static, None])
    found = tally.measures()
    assert found["n_values"].tolist() == [400]
    assert found["amax"].tolist() == [400]
    # 50 % and 99 % (396 of 400) do not exceed 1; 99.9 % are 399.6 of them, so the last one, as for 99.99 %.
    assert found["magnitude"].tolist() == [[1, 1, 400, 400]]
    # The channels' largest values are 2, 3, 50 and 400, their median 26.5.
    assert found["outlier_channels"].tolist() == [1]
    assert found["saturation"].tolist() == [[2 / 400], [0]]
    assert found["underflow"].tolist() == [[0], [0]]


def test_zeros_count_as_values_but_cannot_underflow():
    tally = Tally(2, 2, 1)
    rows = torch.tensor([[0.0, 448.0], [2**-12, 1.0]]).bfloat16()
    tally.add(1, rows, torch.zeros(2, dtype=torch.long), [TENSOR])
    found = tally.measures()
    assert found["n_values"].tolist() == [0, 4]
    assert found["magnitude"][1].tolist() == [2**-12, 448, 448, 448]
    # The scale is 1 and 2^-12 is below half of E4M3's smallest number, 2^-9: one of three values that are not 0.
    np.testing.assert_allclose(found["underflow"], [[np.nan, 1 / 3]])
    assert (
        np.isnan(found["amax"][0]) and np.isnan(found["magnitude"][0]).all() and np.isnan(found["outlier_channels"][0])
    )


def test_a_channel_that_was_planted_is_an_outlier():
    model = small(2)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[7] *= 100
    found = activation_range(model, random_ids(30, 25))["outlier_channels"].isel(expert=0)
    assert found.sel(layer=1, module=["q_proj", "k_proj", "v_proj"]).values.tolist() == [1, 1, 1]
    assert found.sel(layer=[0, 2], module="q_proj").values.tolist() == [0, 0]


def test_batches_and_padding_count_tokens_only():
    model, ids = small(3), random_ids(20, 13, 11, seed=3)
    found = activation_range(model, ids, recipes="tensorwise")
    assert found["n_values"].sel(layer=0, module="q_proj", expert=0) == 44 * 32
    assert found["n_values"].sel(layer=1, module="experts.gate_up_proj").sum() == 44 * 32
    assert found["n_values"].sel(layer=1, module="experts.down_proj").sum() == 44 * 16
    assert found["n_values"].sel(layer=1, module="mlp.down_proj").sum() == 0
    apart = [activation_range(model, [text], recipes="tensorwise") for text in ids]
    at = dict(layer=0, module="q_proj", expert=0)
    assert found["amax"].sel(at) == max(float(own["amax"].sel(at)) for own in apart)
    # The first layer's input is the same to the bit, so that shares are means of the texts' own.
    weights = np.array([20, 13, 11]) / 44
    own = [float(one["saturation"].sel(at).item()) for one in apart]
    np.testing.assert_allclose(found["saturation"].sel(at).item(), np.dot(weights, own), atol=1e-7)


def test_a_matrix_without_experts_is_the_same_at_each():
    found = activation_range(small(4), random_ids(15), recipes="meta")
    for name in ("amax", "n_values"):
        values = found[name].sel(module=["q_proj", "o_proj", "router", "shared_expert.down_proj", "mlp.gate_proj"])
        np.testing.assert_array_equal(values, np.repeat(values.values[..., :1], 6, axis=-1))
    for one, others in (("q_proj", ["k_proj", "v_proj"]), ("router", ["shared_expert.gate_proj"])):
        for other in others:
            pair = (found.sel(module=name).drop_vars("module") for name in (one, other))
            xr.testing.assert_identical(*pair)


def test_the_group_is_as_the_schema_says(tmp_path):
    found = activation_range(small(5), random_ids(9))
    assert found["module"].values.tolist() == list(MODULES)
    assert found["recipe"].values.tolist() == ["meta", "tensorwise", "rowwise", "deepseek", "mxfp8"]
    assert found["percentile"].values.tolist() == [50, 99, 99.9, 99.99]
    study = fp8_error.noise_floor(small(5), random_ids(9), progress=False)
    study["fp8_activations"] = xr.DataTree(found)
    schema.validate(study)
    probe.save(study, tmp_path / "study.zarr")
    assert probe.open(tmp_path / "study.zarr")["fp8_activations"].to_dataset().load().identical(found)


def test_the_model_stays_as_it_was():
    model = small(6)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    activation_range(model, random_ids(9))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_an_unknown_recipe_is_refused():
    with pytest.raises(RecipeError, match="no recipe"):
        activation_range(small(7), random_ids(9), recipes="fp7")
