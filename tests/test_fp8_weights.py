"""Errors of rounded weights: from a model and from its files, against the tensors themselves."""

from __future__ import annotations

import json
import math
import shutil
from importlib.resources import files

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from safetensors.torch import load_file, save_file

import probe
from probe.float8 import Rounding, Scaling, matrix_error, quantize
from probe.fp8 import weights
from probe.fp8.layers import MODULES, QuantizationError
from probe.fp8.weights import weight_error
from probe.models import ModelError
from probe.recipes import Recipe, RecipeError, recipes
from probe.sites import NotLlama4Error
from tests.random_models import random_model, text_config

MODELS = files("probe") / "assets" / "models"


def write(folder, tensors, n_files=1):
    """Write tensors as a checkpoint, in one file or in several with an index."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if n_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number in range(n_files):
        name = f"model-{number + 1:05}-of-{n_files:05}.safetensors"
        part = dict(list(tensors.items())[number::n_files])
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def edit(folder, **values):
    """Change values of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two layers, dense and MoE, with six experts."""
    random_model(num_hidden_layers=2, interleave_moe_layer_step=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def tensors(folder):
    return load_file(folder / "model.safetensors")


# Numbers


def test_every_number_is_that_of_its_matrix(folder, tensors):
    """Against ml_dtypes and plain sums, for row scales; the shape (output, input) decides what a row is."""
    result = weight_error(folder, "rowwise").isel(recipe=0)
    prefix = "model.layers.1.feed_forward."
    matrices = {
        ("experts.gate_up_proj", 4): tensors[prefix + "experts.gate_up_proj"][4].T,
        ("experts.down_proj", 0): tensors[prefix + "experts.down_proj"][0].T,
        ("shared_expert.up_proj", 3): tensors[prefix + "shared_expert.up_proj.weight"],
        ("router", 5): tensors[prefix + "router.weight"],
        ("o_proj", 0): tensors["model.layers.1.self_attn.o_proj.weight"],
    }
    for (module, expert), tensor in matrices.items():
        w = tensor.numpy()
        scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(448)
        codes = np.clip(w / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        rounded = (codes * scale).astype(np.float64)
        own = result.sel(layer=1, module=module, expert=expert)
        sqnr = 20 * np.log10(np.linalg.norm(w.astype(np.float64)) / np.linalg.norm(w - rounded))
        assert own["sqnr"].item() == pytest.approx(sqnr, abs=1e-4)
        assert own["underflow"].item() == pytest.approx(((codes == 0) & (w != 0)).sum() / (w != 0).sum())
        assert own["amax"].item() == np.abs(w).max()
        smallest = np.abs(w[w != 0]).min()
        assert own["dynamic_range"].item() == pytest.approx(np.log2(np.abs(w).max() / smallest), abs=1e-5)
        assert own["saturation"].item() == 0
    head = tensors["lm_head.weight"]
    expected = matrix_error(head, quantize(head, scaling=Scaling("row")).dequantize()).sqnr
    assert result["head_sqnr"].item() == pytest.approx(expected, abs=1e-4)


def test_by_hand(folder, tensors):
    """Under a scale of 1, 448, 224 and 1 are codes, 2^-11 is lost, and 500 is cut to 448."""
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key].zero_()
    tensors[key][0, :4] = torch.tensor([448.0, -224.0, 1.0, 2**-11])
    write(folder, tensors)
    result = weight_error(folder, ["tensorwise", "mxfp8"]).sel(layer=0, module="q_proj", expert=2)
    noise = 20 * math.log10(math.sqrt(448**2 + 224**2 + 1 + 2**-22) / 2**-11)
    np.testing.assert_allclose(result["sqnr"], noise, rtol=1e-6)
    np.testing.assert_array_equal(result["underflow"], 0.25)
    np.testing.assert_array_equal(result["saturation"], 0)
    np.testing.assert_array_equal(result["amax"], 448)
    np.testing.assert_allclose(result["dynamic_range"], math.log2(448) + 11, rtol=1e-6)
    tensors[key][0, :4] = torch.tensor([500.0, 448.0, 0.0, 0.0])
    write(folder, tensors)
    result = weight_error(folder, "mxfp8").sel(layer=0, module="q_proj", expert=0)
    assert result["saturation"].item() == pytest.approx(1 / tensors[key].numel())
    assert result["sqnr"].item() == pytest.approx(20 * math.log10(math.hypot(500, 448) / 52), abs=1e-4)


def test_a_matrix_of_zeros(folder, tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"].zero_()
    write(folder, tensors)
    own = weight_error(folder, list(recipes())).sel(layer=0, module="k_proj")
    assert np.isposinf(own["sqnr"]).all()
    assert (own["amax"] == 0).all() and (own["saturation"] == 0).all()
    assert own["underflow"].isnull().all() and own["dynamic_range"].isnull().all()


@pytest.mark.parametrize("name", ["tiny-scout", "tiny-maverick"])
def test_a_model_and_its_files_give_the_same_numbers(name, tmp_path):
    from_name = weight_error(name, list(recipes()))
    lm = probe.load(name)
    for model in (lm, lm.model, str(MODELS / name)):
        xr.testing.assert_identical(weight_error(model, list(recipes())), from_name)
    shutil.copy(str(MODELS / name / "config.json"), tmp_path)
    stored = load_file(str(MODELS / name / "model.safetensors"))
    write(tmp_path, stored, n_files=5)
    xr.testing.assert_identical(weight_error(tmp_path, list(recipes())), from_name)
    # A file that the index does not list, such as another format of the same weights, is not looked at.
    save_file({"layers.0.self_attn.q_proj.weight": torch.ones(1, 1)}, tmp_path / "consolidated.safetensors")
    xr.testing.assert_identical(weight_error(tmp_path, list(recipes())), from_name)


def test_recipes_do_not_change_each_others_numbers():
    both = weight_error("tiny-scout", ["int4", "meta", "rowwise"])
    for name in ("int4", "meta", "rowwise"):
        xr.testing.assert_equal(weight_error("tiny-scout", name), both.sel(recipe=[name]))
    np.testing.assert_array_equal(both["sqnr"].sel(recipe="meta"), both["sqnr"].sel(recipe="rowwise"))


@pytest.mark.parametrize("slab", [1, 40, 300])
@pytest.mark.parametrize(
    "scaling",
    [
        Scaling(),
        Scaling("row"),
        Scaling("column"),
        Scaling("block", (3, 5)),
        Scaling(power_of_two="floor"),
        Scaling(cap=0.3),
        Scaling(amax=0.25),
        Scaling("block", (4, 8), cap=0.3),
    ],
    ids=str,
)
def test_slabs_change_nothing(folder, scaling, slab, monkeypatch):
    own = Recipe("own", ("attention",), weight=Rounding("e4m3fn", scaling))
    whole = weight_error(folder, own)
    monkeypatch.setattr(weights, "SLAB", slab)
    xr.testing.assert_allclose(weight_error(folder, own), whole, rtol=1e-6)
    np.testing.assert_array_equal(weight_error(folder, own)["underflow"], whole["underflow"])
    np.testing.assert_array_equal(weight_error(folder, own)["saturation"], whole["saturation"])
    q = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    quantized = quantize(q, scaling=scaling)
    found = whole.sel(layer=0, module="q_proj").isel(recipe=0, expert=0)
    assert found["sqnr"].item() == pytest.approx(matrix_error(q, quantized.dequantize()).sqnr, rel=1e-6)
    assert found["saturation"].item() == pytest.approx(quantized.saturation)


def test_the_dtype_that_weights_are_kept_in_does_not_matter():
    in_bf16 = weight_error(probe.load("tiny-scout", dtype="bfloat16"), ["meta", "mxfp8", "int4"])
    xr.testing.assert_identical(in_bf16, weight_error(probe.load("tiny-scout"), ["meta", "mxfp8", "int4"]))


# Shape of the result


def test_what_a_layer_lacks_is_nan_and_what_experts_share_is_the_same_at_each():
    result = weight_error("tiny-maverick", ["meta", "tensorwise"])
    assert list(result["module"].values) == list(MODULES)
    assert dict(result.sizes) == {"recipe": 2, "layer": 8, "module": 13, "expert": 32}
    moe = result["layer"].isin([1, 3, 5, 7])
    kind = np.array([MODULES[name] for name in result["module"].values])
    for variable in ("sqnr", "underflow", "saturation", "amax", "dynamic_range"):
        there = result[variable].notnull().all(("recipe", "expert"))
        np.testing.assert_array_equal(there.sel(layer=moe), np.broadcast_to(kind != "dense_mlp", (4, 13)))
        dense = np.isin(kind, ["attention", "dense_mlp"])
        np.testing.assert_array_equal(there.sel(layer=~moe), np.broadcast_to(dense, (4, 13)))
        assert (result[variable].isnull().all(("recipe", "expert")) == ~there).all()
    spread = result["sqnr"].max("expert") - result["sqnr"].min("expert")
    assert (spread.sel(layer=moe)[..., kind == "routed_experts"] > 0).all()
    assert float(spread[..., kind != "routed_experts"].max()) == 0
    assert list(probe.schema.labels(result["attention_kind"])) == (["rope"] * 3 + ["nope"]) * 2


def test_covered_says_what_the_recipe_quantises():
    result = weight_error("tiny-maverick", ["meta", "tensorwise"])
    covered = result["covered"]
    meta = covered.sel(recipe="meta").to_series()
    assert set(meta[meta].index) == {
        (layer, f"experts.{name}") for layer in (1, 3, 5) for name in ("gate_up_proj", "down_proj")
    }
    tensorwise = covered.sel(recipe="tensorwise")
    assert not tensorwise.sel(module="router").any()
    assert tensorwise.sel(module=["q_proj", "k_proj", "v_proj", "o_proj"]).all()
    # Only what is there is covered.
    np.testing.assert_array_equal(tensorwise.sel(module="mlp.up_proj"), [True, False] * 4)
    np.testing.assert_array_equal(tensorwise.sel(module="shared_expert.up_proj"), [False, True] * 4)


def test_a_module_that_no_layer_has_is_left_out():
    assert not {"mlp.gate_proj"} & set(weight_error("tiny-scout")["module"].values)


def test_a_decoder_alone_has_no_head(folder):
    model = transformers.Llama4ForCausalLM.from_pretrained(folder)
    whole = weight_error(folder)
    decoder = weight_error(model.model)
    assert not {"head_sqnr", "head_underflow", "head_saturation"} & set(decoder)
    xr.testing.assert_identical(decoder, whole.drop_vars(["head_sqnr", "head_underflow", "head_saturation"]))
    model.model.save_pretrained(folder / "decoder")
    xr.testing.assert_identical(weight_error(folder / "decoder"), decoder)


def test_a_tied_head_is_the_embeddings(folder, tensors):
    head = tensors.pop("lm_head.weight")
    tensors["model.embed_tokens.weight"] = head
    expected = weight_error(folder, "int4")["head_sqnr"]
    write(folder, tensors)
    edit(folder, tie_word_embeddings=True)
    assert weight_error(folder, "int4")["head_sqnr"] == expected


def test_a_checkpoint_for_images_and_text(folder, tensors):
    """Its decoder has a prefix, and the vision tower holds layers of the same names."""
    expected = weight_error(folder, ["meta", "int4"])
    config = transformers.Llama4Config(text_config=text_config(num_hidden_layers=2, interleave_moe_layer_step=2))
    config.save_pretrained(folder)
    renamed = {f"language_model.{key}": tensor for key, tensor in tensors.items()}
    renamed["vision_model.model.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4)
    write(folder, renamed, n_files=3)
    xr.testing.assert_identical(weight_error(folder, ["meta", "int4"]), expected)


def test_a_whole_stack_of_experts_is_never_read(folder, monkeypatch):
    read = []
    monkeypatch.setattr(weights, "_magnitudes", lambda weight: read.append(weight) or (1.0, 1.0))
    weight_error(folder)
    assert {weight.ndim for weight in read} == {2}
    stacked = [weight for weight in read if weight.shape == (32, 32)]
    assert len(stacked) >= 6
    assert all(weight.is_contiguous() for weight in read)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown_in_a_terminal_unless_told_otherwise(folder, monkeypatch, is_terminal):
    shown = []

    class Recorded(weights.Progress):
        def __init__(self, *columns, disable, transient):
            shown.append(not disable)
            super().__init__(*columns, disable=True, transient=transient)

    monkeypatch.setattr(weights, "Progress", Recorded)
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))
    for progress in (None, True, False):
        weight_error(folder, progress=progress)
    assert shown == [is_terminal, True, False]


# Errors, before any rounding


@pytest.fixture
def no_rounding(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("rounded before it was checked")

    monkeypatch.setattr(weights, "quantize", refuse)


@pytest.mark.usefixtures("no_rounding")
class TestRefused:
    @pytest.mark.parametrize(
        "recipe, message",
        [
            ("fp4", "no recipe is called 'fp4'"),
            ([], "no recipe is given"),
            (["meta", "meta"], "same name"),
            (Recipe("inputs", ("router",), weight=None), "inputs leaves the weights as they are"),
        ],
    )
    def test_recipes(self, folder, recipe, message):
        with pytest.raises(RecipeError, match=message):
            weight_error(folder, recipe)

    def test_what_is_no_checkpoint(self, tmp_path):
        with pytest.raises(ModelError, match="not a folder.*tiny-scout"):
            weight_error("meta-llama/Llama-4-Scout-17B-16E")
        with pytest.raises(ModelError, match="config.json"):
            weight_error(tmp_path)
        text_config().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"no \*.safetensors; probe reads no other kind of weights$"):
            weight_error(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
        with pytest.raises(ModelError, match="pytorch_model.bin once more"):
            weight_error(tmp_path)

    def test_other_models(self, folder):
        edit(folder, model_type="llama", architectures=["LlamaForCausalLM"])
        with pytest.raises(NotLlama4Error, match="not a Llama 4"):
            weight_error(folder)
        with pytest.raises(NotLlama4Error):
            weight_error(torch.nn.Linear(2, 2))

    def test_a_model_without_experts(self, folder):
        edit(folder, moe_layers=[])
        with pytest.raises(NotLlama4Error, match="no mixture-of-experts layer"):
            weight_error(folder)

    def test_quantised_checkpoints(self, folder, tensors):
        key = "model.layers.1.feed_forward.experts.down_proj"
        for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
            write(folder, tensors | {key: tensors[key].to(dtype)})
            with pytest.raises(ModelError, match=f"{key} is {name}, so it is quantised already"):
                weight_error(folder)
        edit(folder, quantization_config={"quant_method": "compressed-tensors"})
        with pytest.raises(ModelError, match="quantised already.*compressed-tensors"):
            weight_error(folder)

    def test_quantised_models(self, folder):
        model = transformers.Llama4ForCausalLM.from_pretrained(folder)
        model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(
            model.model.layers[0].self_attn.q_proj.weight.to(torch.float8_e4m3fn), requires_grad=False
        )
        with pytest.raises(QuantizationError, match="q_proj"):
            weight_error(model)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_weights_that_are_not_finite(self, folder, tensors, bad):
        key = "model.layers.1.feed_forward.experts.gate_up_proj"
        tensors[key][3, 1, 2] = bad
        write(folder, tensors)
        with pytest.raises(ModelError, match=f"{key}, expert 3, holds NaN or infinity"):
            weight_error(folder)
        with pytest.raises(QuantizationError, match="layers.1.feed_forward.experts.gate_up_proj"):
            weight_error(transformers.Llama4ForCausalLM.from_pretrained(folder))
        tensors[key][3, 1, 2] = 0
        tensors["lm_head.weight"][0, 0] = bad
        write(folder, tensors)
        with pytest.raises(ModelError, match="lm_head.weight holds NaN"):
            weight_error(folder)

    def test_missing_tensors(self, folder, tensors):
        lacking = dict(tensors)
        del lacking["model.layers.1.feed_forward.router.weight"], lacking["lm_head.weight"]
        write(folder, lacking)
        with pytest.raises(ModelError, match="lack 2 tensors, among them model.layers.1.feed_forward.router.weight"):
            weight_error(folder)
        write(folder, {key.replace("model.", "transformer."): tensor for key, tensor in tensors.items()})
        with pytest.raises(ModelError, match="not named as transformers names them"):
            weight_error(folder)

    def test_tensors_of_another_shape(self, folder):
        edit(folder, num_local_experts=4)
        with pytest.raises(ModelError, match=r"gate_up_proj has shape \(6, 32, 32\), expected 4 stacked matrices"):
            weight_error(folder)

    def test_incomplete_downloads(self, folder, tensors):
        write(folder, tensors, n_files=3)
        last = folder / "model-00003-of-00003.safetensors"
        whole = last.read_bytes()
        last.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError, match="model-00003-of-00003.safetensors cannot be read"):
            weight_error(folder)
        last.unlink()
        with pytest.raises(ModelError, match="lacks 1 weight files, among them model-00003-of-00003.safetensors"):
            weight_error(folder)
        for text in ("{", "[]", '{"weight_map": 3}', "{}"):
            (folder / "model.safetensors.index.json").write_text(text)
            with pytest.raises(ModelError, match="does not say which tensor is in which file"):
                weight_error(folder)

    def test_weights_that_are_not_in_memory(self, folder):
        with torch.device("meta"):
            model = random_model(num_hidden_layers=2)
        with pytest.raises(QuantizationError, match="not in memory"):
            weight_error(model)
