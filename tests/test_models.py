"""Loading: what is shipped, what is on disk, and everything that must not pass in silence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import probe
from probe.models import ModelError, shipped_models
from probe.sites import NotLlama4Error
from tests.random_models import random_model

SHIPPED = ["tiny-scout", "tiny-maverick", "tiny-scout-collapsed", "tiny-copier"] + [
    f"tiny-scout@{p}" for p in (1, 5, 20, 50)
]


@pytest.fixture
def folder(tmp_path):
    """A saved model with the tokenizer of a shipped one."""
    random_model(vocab_size=4096, num_hidden_layers=2).save_pretrained(tmp_path)
    probe.load("tiny-scout").tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_load_in_float32_and_run(name):
    lm = probe.load(name)
    assert (lm.name, lm.processor) == (name, None)
    assert lm.model.dtype == torch.float32
    assert len(lm.weights_sha256) == 64
    trace = probe.record(lm, ["The installation of a Debian system"], progress=False)
    assert trace.attrs["model"] == name
    assert trace.attrs["weights_sha256"] == lm.weights_sha256
    pieces = probe.schema.pieces(trace["vocabulary"].to_dataset())
    text = b"".join(pieces[int(i)] for i in trace["routing"]["token_id"].values)
    assert text == b"<|begin_of_text|>The installation of a Debian system"


def test_the_list_of_shipped_models_is_complete():
    assert sorted(shipped_models()) == sorted(SHIPPED)


def test_the_shipped_models_are_what_the_readme_says():
    scout, maverick = probe.load("tiny-scout").config, probe.load("tiny-maverick").config
    assert (scout.num_local_experts, scout.num_experts_per_tok, scout.num_hidden_layers) == (16, 1, 8)
    assert scout.moe_layers == list(range(8))
    assert [i for i, has_rope in enumerate(scout.no_rope_layers) if not has_rope] == [3, 7]
    assert scout.use_qk_norm
    assert scout.attention_chunk_size == scout.floor_scale == 128
    assert maverick.num_local_experts >= 32
    assert maverick.moe_layers == [1, 3, 5, 7]
    assert not maverick.use_qk_norm


def test_a_local_folder_loads_in_its_own_dtype(folder):
    random_model(vocab_size=4096, num_hidden_layers=2).bfloat16().save_pretrained(folder)
    assert probe.load(folder).model.dtype == torch.bfloat16
    assert probe.load(str(folder), dtype=torch.float32).model.dtype == torch.float32
    assert probe.load(folder, expert_dispatch="reference").model.dtype == torch.bfloat16


def test_sparse_dispatch_unless_told_otherwise(folder):
    from probe.dispatch import expert_dispatch_of

    assert expert_dispatch_of(probe.load(folder).model) == "sparse"
    assert expert_dispatch_of(probe.load(folder, expert_dispatch="reference").model) == "reference"


def test_no_such_model_lists_the_shipped_ones():
    with pytest.raises(ModelError, match="no model 'tiny-scott'.*tiny-scout, tiny-maverick"):
        probe.load("tiny-scott")


def test_a_hub_id_without_network_is_a_clear_error():
    with pytest.raises(ModelError, match="no model 'nobody/nothing'"):
        probe.load("nobody/nothing")


def test_another_kind_of_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(NotLlama4Error, match="is not a Llama 4: its model_type is 'llama'"):
        probe.load(folder)


def test_a_folder_without_config_or_weights_says_which(folder, tmp_path_factory):
    with pytest.raises(ModelError, match="config"):
        probe.load(tmp_path_factory.mktemp("empty"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no \\*.safetensors"):
        probe.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.feed_forward.experts.down_proj"
    tensors[key][2, 3, 4] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 weight tensors hold NaN or infinity, among them {key}"):
        probe.load(folder)
    assert probe.load(folder, check_weights=False).weights_sha256 == ""


def test_missing_tensors_are_not_filled_with_noise(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.feed_forward.router.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 tensors, among them model.layers.0.feed_forward.router.weight"):
        probe.load(folder)


def test_truncated_weights_and_a_missing_tokenizer_are_clear(folder, tmp_path_factory):
    without = tmp_path_factory.mktemp("without") / "model"
    shutil.copytree(folder, without)
    (without / "tokenizer.json").unlink()
    (without / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        probe.load(without)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError):
        probe.load(folder)


def test_an_integer_for_temperature_tuning_is_mended(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_temperature_tuning": 4}))
    assert probe.load(folder).config.attn_temperature_tuning is True
