"""What holds for every routing statistic: signature, labels, errors, and recordings with hardly anything in them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from probe import routing_stats, schema, store
from probe.routing import rows
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts
from tests.routing_cases import (
    NEEDS_PROBABILITIES,
    NEEDS_TWO_CHOICES,
    RESAMPLING,
    SPLITTABLE,
    STATISTICS,
    by_name,
    random_recording,
    routing_of,
    small,
    with_phase,
)


def variables_of(result) -> dict[str, xr.DataArray]:
    return {"": result} if isinstance(result, xr.DataArray) else dict(result.data_vars)


def top_k_of(function, top_k: int = 1) -> int:
    return max(top_k, 2) if function.__name__ in NEEDS_TWO_CHOICES else top_k


@pytest.mark.parametrize("name", routing_stats.__all__)
def test_signature(name):
    """Recordings come first, all else by its name."""
    parameters = list(inspect.signature(getattr(routing_stats, name)).parameters.values())
    recordings = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert parameters[: len(recordings)] == recordings
    assert 1 <= len(recordings) <= 2
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[len(recordings) :])
    assert len(parameters) <= 6


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_variables_say_what_they_are(function):
    result = function(random_recording(top_k=top_k_of(function)))
    for variable in (*variables_of(result).values(), *result.coords.values()):
        assert variable.attrs["long_name"] and variable.attrs["units"], variable.name
    if isinstance(result, xr.Dataset):
        assert not {"long_name", "units"} & set(result.attrs)


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_layers_keep_their_numbers_and_kind(function, top_k):
    options = {"min_count": 1} if function.__name__ == "top_tokens" else {}
    result = function(random_recording(top_k=top_k_of(function, top_k)), **options)
    if "layer" not in result.coords:
        assert function.__name__ == "signature", "layers are joined"
        return
    layers = [1, 3] if function.__name__ == "transition" else [1, 3, 5]
    kinds = {1: "rope", 3: "nope", 5: "rope"}
    assert np.unique(result["layer"].values).tolist() == layers
    expected = [kinds[layer] for layer in result["layer"].values.tolist()]
    assert schema.labels(result["attention_kind"]).tolist() == expected


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1]])
def test_hardly_any_tokens(function, lengths):
    n_tokens, top_k = sum(lengths), top_k_of(function)
    chosen = np.broadcast_to(np.arange(top_k), (n_tokens, 2, top_k))
    recording = from_experts(chosen, n_experts=3, lengths=lengths, layers=[1, 3])
    splits = [{}] if function not in SPLITTABLE else [{"by": None}, {"by": "domain"}, {"by": "sample"}]
    for options in splits:
        if function.__name__ == "divergence" and options.get("by") is None:
            continue  # there is nothing to compare with
        result = function(recording, **options)
        if n_tokens == 0:
            for name, variable in variables_of(result).items():
                if name == "uniform" or (name, variable.dims) == ("null", ()) or "categories" in variable.attrs:
                    continue  # holds whatever was recorded
                if variable.dtype.kind == "f":
                    assert np.isnan(variable).all(), name
                else:
                    assert not variable.any(), name


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_a_group_alone_a_recording_and_an_opened_store_give_the_same(function, tmp_path):
    recording = random_recording(top_k=2)
    expected = function(recording)
    if function.__name__ not in NEEDS_PROBABILITIES:
        xr.testing.assert_identical(function(routing_of(recording)), expected)
    opened = store.open(store.save(recording, tmp_path / "run.zarr"))
    assert opened["routing"]["expert_index"].chunks is not None, "the store is read lazily"
    result = function(opened)
    xr.testing.assert_identical(result, expected)
    assert all(variable.chunks is None for variable in (*variables_of(result).values(), *result.coords.values()))


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_blocks_change_nothing(function, monkeypatch):
    """Rows are read in stretches and counted in blocks; neither is to be seen, nor how many documents fit."""
    recording = random_recording(top_k=2, lengths=(9, 1, 0, 14, 6, 7, 5, 8))
    expected = function(recording)
    for rows_at_once, cells_of_block, cells_of_documents in [(7, 12, 40), (1, 1, 1), (1000, 60, 200)]:
        monkeypatch.setattr(rows, "ROWS_AT_ONCE", rows_at_once)
        monkeypatch.setattr(rows, "CELLS_OF_BLOCK", cells_of_block)
        monkeypatch.setattr(rows, "CELLS_OF_DOCUMENTS", cells_of_documents)
        xr.testing.assert_allclose(function(recording), expected, rtol=1e-12)


@pytest.mark.parametrize("function", STATISTICS, ids=by_name)
def test_groups_by_two_coords_are_those_of_one_after_the_other(function):
    if function not in SPLITTABLE or function.__name__ in ("divergence", "signature", *NEEDS_PROBABILITIES):
        return
    n_tokens = 36
    recording = random_recording(top_k=2, lengths=(9, 1, 0, 14, 12))
    routing = with_phase(recording, np.arange(n_tokens) % 3 == 0)
    pair = function(routing, by=("domain", "phase"))
    names = [name for name in variables_of(pair) if not name.endswith(("lower", "upper", "p_value", "status"))]
    for phase in ("prefill", "decode"):
        alone = routing.isel(token=np.flatnonzero(schema.labels(routing["phase"]) == phase))
        of_phase = function(alone, by="domain")
        for name in names:
            of_pair, expected = variables_of(pair)[name], variables_of(of_phase)[name]
            if "phase" not in of_pair.dims or name == "lift" or (name or "margin_histogram") == "margin_histogram":
                continue  # a lift compares with all tokens, and bins reach to the largest margin of all
            np.testing.assert_allclose(of_pair.sel(phase=phase).values, expected.values, err_msg=name)


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
@pytest.mark.parametrize("options", [{"level": 0}, {"level": 1}, {"level": 95}, {"level": np.nan}, {"n_resamples": 1}])
def test_settings_without_meaning_are_refused(function, options):
    with pytest.raises(ProbeError, match=next(iter(options))):
        function(small(), **options)


@pytest.mark.parametrize("n_groups", [255, 256, 257])
def test_as_many_groups_as_a_byte_holds(n_groups):
    recording = from_experts(np.zeros((n_groups, 1), int), n_experts=2, lengths=[n_groups])
    load = routing_stats.expert_load(recording, by="position")
    assert load.sizes["position"] == n_groups and (load[:, 0, 0] == 1).all()
    pair = routing_stats.expert_load(recording, by=("phase", "position"))
    np.testing.assert_array_equal(pair.sel(phase="prefill"), load)


def test_experts_are_selected_in_the_result_not_before():
    routing = routing_of(random_recording())
    for changed in (routing.sel(expert=[0, 1]), routing.sortby("expert", ascending=False)):
        with pytest.raises(SchemaError, match="Select them in the result instead"):
            routing_stats.expert_load(changed)
    broken = routing.assign(expert_index=routing["expert_index"].copy(data=routing["expert_index"].values + 3))
    with pytest.raises(SchemaError, match=r"holds expert \d of only 5"):
        routing_stats.expert_load(broken)


@pytest.mark.parametrize("by", [3, ["domain", 3], xr.DataArray([1])])
def test_by_is_a_name(by):
    with pytest.raises(SchemaError, match="by must be the name"):
        routing_stats.expert_load(small(), by=by)


def test_a_coord_may_not_have_the_name_of_a_dim_of_the_result():
    routing = routing_of(small()).assign_coords(quantile=("token", np.arange(5)))
    with pytest.raises(SchemaError, match="cannot split by 'quantile', a dim of the result"):
        routing_stats.margin(routing, by="quantile")


def test_too_many_groups_are_refused_before_any_work():
    routing = routing_of(from_experts(np.zeros((1100, 1), int), n_experts=2, lengths=[1100]))
    many = routing.assign_coords(other=("token", np.arange(1100)))
    with pytest.raises(ProbeError, match="1,210,000 groups"):
        routing_stats.expert_load(many, by=("position", "other"))


def test_nothing_is_changed_in_the_recording():
    recording = random_recording()
    before = recording.copy(deep=True)
    for function in STATISTICS:
        if top_k_of(function) == 1:
            function(recording)
    assert recording.identical(before)


def test_importing_is_light():
    heavy = ("torch", "plotly", "transformers")
    code = f"import sys; import probe.routing_stats; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
