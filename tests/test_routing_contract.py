"""What holds for every routing statistic: signature, labels, errors, and recordings with hardly anything in them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from probe import routing_stats, schema, store
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts
from tests.routing_cases import RESAMPLING, SPLITTABLE, STATISTICS, by_name, random_recording, routing_of, small


def variables_of(result) -> dict[str, xr.DataArray]:
    return {"": result} if isinstance(result, xr.DataArray) else dict(result.data_vars)


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_signature(function):
    first, *others = inspect.signature(function).parameters.values()
    assert first.name == "routing"
    assert len(others) <= 5
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in others)


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_variables_say_what_they_are(function):
    result = function(random_recording())
    for variable in (*variables_of(result).values(), *result.coords.values()):
        assert variable.attrs["long_name"] and variable.attrs["units"], variable.name
    if isinstance(result, xr.Dataset):
        assert not {"long_name", "units"} & set(result.attrs)


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_layers_keep_their_numbers_and_kind(function, top_k):
    options = {"min_count": 1} if function is routing_stats.top_tokens else {}
    result = function(random_recording(top_k=top_k), **options)
    layers = [1, 3] if function is routing_stats.transition else [1, 3, 5]
    kinds = {1: "rope", 3: "nope", 5: "rope"}
    assert np.unique(result["layer"].values).tolist() == layers
    expected = [kinds[layer] for layer in result["layer"].values.tolist()]
    assert schema.labels(result["attention_kind"]).tolist() == expected


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1]])
def test_hardly_any_tokens(function, lengths):
    n_tokens = sum(lengths)
    recording = from_experts(np.zeros((n_tokens, 2), int), n_experts=3, lengths=lengths, layers=[1, 3])
    splits = [{}] if function not in SPLITTABLE else [{"by": None}, {"by": "domain"}, {"by": "sample"}]
    for options in splits:
        result = function(recording, **options)
        if n_tokens == 0:
            for name, variable in variables_of(result).items():
                if variable.dtype.kind == "f":
                    assert np.isnan(variable).all(), name
                else:
                    assert not variable.any(), name


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_a_group_alone_a_recording_and_an_opened_store_give_the_same(function, tmp_path):
    recording = random_recording(top_k=2)
    expected = function(recording)
    xr.testing.assert_identical(function(routing_of(recording)), expected)
    opened = store.open(store.save(recording, tmp_path / "run.zarr"))
    assert opened["routing"]["expert_index"].chunks is not None, "the store is read lazily"
    result = function(opened)
    xr.testing.assert_allclose(result, expected)
    assert all(variable.chunks is None for variable in (*variables_of(result).values(), *result.coords.values()))


@pytest.mark.parametrize("function", SPLITTABLE, ids=by_name)
def test_by_names_what_there_is(function):
    with pytest.raises(SchemaError, match="'tile'.*sample, position, token_id, modality, phase, domain"):
        function(small(), by="tile")
    with pytest.raises(SchemaError, match="'layer'"):
        function(small(), by="layer")


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_missing_parts_are_named(function):
    routing = routing_of(small())
    with pytest.raises(SchemaError, match="'expert_index' is missing"):
        function(routing.drop_vars("expert_index"))
    with pytest.raises(SchemaError, match=r"lost the dim 'layer'.*sel\(layer=\[3\]\)"):
        function(routing.sel(layer=3))
    with pytest.raises(SchemaError, match="expected a recording"):
        function(routing["expert_index"])


@pytest.mark.parametrize("name", ["router_margin", "token_id", "position"])
def test_a_missing_variable_is_named(name):
    function = {
        "router_margin": routing_stats.margin,
        "token_id": routing_stats.top_tokens,
        "position": routing_stats.repetition,
    }[name]
    with pytest.raises(SchemaError, match=f"{name!r} is missing"):
        function(routing_of(small()).drop_vars(name))


@pytest.mark.parametrize("function", RESAMPLING, ids=by_name)
@pytest.mark.parametrize("options", [{"level": 0}, {"level": 1}, {"level": 95}, {"level": np.nan}, {"n_resamples": 0}])
def test_settings_without_meaning_are_refused(function, options):
    with pytest.raises(ProbeError, match=next(iter(options))):
        function(small(), **options)


def test_nothing_is_changed_in_the_recording():
    recording = random_recording()
    before = recording.copy(deep=True)
    for function in STATISTICS:
        function(recording)
    assert recording.identical(before)


def test_importing_is_light():
    heavy = ("torch", "plotly", "transformers")
    code = f"import sys; import probe.routing_stats; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
