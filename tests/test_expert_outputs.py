"""Recorded expert outputs against loops over tokens and weights, and the two statistics made of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import xarray as xr

import probe
from probe import schema
from probe.dispatch import SparseLlama4TextMoe, set_expert_dispatch
from probe.hooks import RoutingSpec
from probe.recording import RecordingError
from probe.reduction import expert_totals, reduce_experts
from probe.routing_stats import saliency, super_experts
from probe.schema import ProbeError, SchemaError
from tests.plain_llama4 import gated_mlp
from tests.planted import from_experts
from tests.random_models import SHAPES, random_ids, random_model

OUTPUTS = RoutingSpec(expert_outputs=True)
DISPATCHES = ("sparse", "reference")

PADDING_MOVES_NOTHING = dict(attention_chunk_size=64, attn_temperature_tuning=False)
"""Chunks and temperature count positions from the first column: without them a text padded on the left is as alone."""


def experts_of(trace, sample: int | None = None) -> xr.Dataset:
    experts = trace["experts"].to_dataset()
    return experts if sample is None else experts.isel(sample=sample, drop=True)


def recorded(model, ids, **options) -> xr.DataTree:
    trace = probe.record(model, ids, routing=OUTPUTS, progress=False, **options)
    schema.validate(trace)
    return trace


def plain_outputs(model, ids: list[int]) -> dict[str, np.ndarray]:
    """The variables of one sample, (layer, expert): one token and one expert at a time, in float32.

    A hook takes only what enters each block; choice, gate and expert are computed here from the weights.
    """
    entered = {}
    blocks = {
        layer: decoder_layer.feed_forward
        for layer, decoder_layer in enumerate(model.model.layers)
        if layer in model.config.moe_layers
    }
    handles = [
        block.register_forward_pre_hook(lambda module, args, layer=layer: entered.update({layer: args[0][0].float()}))
        for layer, block in blocks.items()
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    n_experts = model.config.num_local_experts
    norm_sum = np.zeros((len(blocks), n_experts))
    output_max = np.full((len(blocks), n_experts), np.nan)
    for index, (layer, block) in enumerate(blocks.items()):
        own = {name: tensor.detach().float() for name, tensor in block.state_dict().items()}
        gate_up, down = own["experts.gate_up_proj"], own["experts.down_proj"]
        half = gate_up.shape[-1] // 2
        for x in entered[layer]:
            logits = own["router.weight"] @ x
            ranked = sorted(range(n_experts), key=lambda expert: -float(logits[expert]))
            for expert in ranked[: model.config.num_experts_per_tok]:
                gated = torch.sigmoid(logits[expert]) * x
                output = gated_mlp(gated[None], gate_up[expert, :, :half], gate_up[expert, :, half:], down[expert])[0]
                norm_sum[index, expert] += float(output.double().square().sum().sqrt())
                output_max[index, expert] = np.fmax(output_max[index, expert], float(output.abs().max()))
    return {"saliency_sum": norm_sum, "output_norm_sum": norm_sum, "output_max": output_max}


def assert_agrees(experts: xr.Dataset, expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(experts[name].values, values, rtol=1e-4, err_msg=name)


def dispatched(dispatch: str, **changes):
    model = random_model(**changes)
    set_expert_dispatch(model, dispatch)
    return model


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_one_token_and_one_expert_at_a_time(shape, dispatch):
    model = dispatched(dispatch, **SHAPES[shape])
    ids = random_ids(27, 1, 40)
    trace = recorded(model, ids, batch_size=3)
    assert trace["experts"]["layer"].values.tolist() == list(model.config.moe_layers)
    for sample, text in enumerate(ids):
        assert_agrees(experts_of(trace, sample), plain_outputs(model, text))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_agrees_with_many_experts(dispatch):
    model = dispatched(dispatch, num_local_experts=128, num_hidden_layers=2)
    ids = random_ids(30)
    assert_agrees(experts_of(recorded(model, ids), 0), plain_outputs(model, ids[0]))


def test_all_experts_chosen_and_a_dispatch_that_nobody_set():
    model = random_model(num_local_experts=3, num_experts_per_tok=3)
    ids = random_ids(9)
    untouched = recorded(model, ids)
    assert untouched.attrs["expert_dispatch"] == "reference"
    assert_agrees(experts_of(untouched, 0), plain_outputs(model, ids[0]))
    assert (untouched["experts"]["output_max"] > 0).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_sparse_and_reference_agree(top_k):
    ids = random_ids(33, 12, 50)
    sparse, reference = (recorded(dispatched(name, num_experts_per_tok=top_k), ids) for name in DISPATCHES)
    assert_agrees(experts_of(sparse), {name: values.values for name, values in experts_of(reference).items()})


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batching_and_padding_on_the_right_change_nothing(dispatch, batch_size):
    model = dispatched(dispatch, num_experts_per_tok=2)
    ids = random_ids(5, 9, 1, 7, 8, 0, 9)
    together = recorded(model, ids, batch_size=batch_size)
    for sample, text in enumerate(ids):
        if text:
            alone = experts_of(recorded(model, [text]), 0)
            assert_agrees(experts_of(together, sample), {name: values.values for name, values in alone.items()})
    empty = experts_of(together, ids.index([]))
    assert (empty["saliency_sum"] == 0).all() and empty["output_max"].isnull().all()


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_padding_on_the_left_is_left_out(dispatch):
    model = dispatched(dispatch, **PADDING_MOVES_NOTHING)
    texts = random_ids(12, 8)
    padded = torch.tensor([texts[0], [0] * 4 + texts[1]])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    with torch.no_grad(), probe.Recorder(model, routing=OUTPUTS) as recorder:
        model(padded, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0))
    trace = recorder.trace()
    schema.validate(trace)
    for sample, text in enumerate(texts):
        assert_agrees(experts_of(trace, sample), plain_outputs(model, text))


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_adds_up_prefill_and_decode_of_real_tokens(dispatch, cache):
    model = dispatched(dispatch, num_experts_per_tok=2, **PADDING_MOVES_NOTHING)
    prompt = torch.tensor(random_ids(10, 10))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    with probe.Recorder(model, routing=OUTPUTS) as recorder:
        out = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            cache_implementation=cache,
        )
    trace = recorder.trace()
    schema.validate(trace)
    for sample, text in enumerate([out[0, 4:-1].tolist(), out[1, :-1].tolist()]):
        assert_agrees(experts_of(trace, sample), plain_outputs(model, text))


def test_a_sequence_that_finished_first_is_not_counted_on():
    model = random_model()
    prompt = torch.tensor(random_ids(6, 6, seed=3))
    free = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    end = int(free[0, 8])
    with probe.Recorder(model, routing=OUTPUTS) as recorder:
        out = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)
    length = out[0].tolist().index(end, 6) + 1
    assert length < out.shape[1]
    assert_agrees(experts_of(recorder.trace(), 0), plain_outputs(model, out[0, :length].tolist()))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_bfloat16_has_norms_of_float32(dispatch):
    model = random_model(seed=3, hidden_size=64, num_local_experts=4).bfloat16()
    set_expert_dispatch(model, dispatch)
    ids = random_ids(64)
    trace = recorded(model, ids)
    # The same values in float32 weights: a near tie may go the other way, so that only what no tie touches is compared.
    expected = plain_outputs(model, ids[0])
    norms = experts_of(trace, 0)["output_norm_sum"].values
    assert norms.sum(axis=1) == pytest.approx(expected["output_norm_sum"].sum(axis=1), rel=0.02)
    rows = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert float(reduce_experts(rows, torch.ones(1, 1))["norm"]) == 64
    rows[0, 0] = 16  # sqrt(4095 + 256) = 65.962: bf16 would have said 66
    assert float(reduce_experts(rows, torch.ones(1, 1))["norm"]) == pytest.approx(4351**0.5, rel=1e-6)
    halves = torch.full((1, 4), 60000.0, dtype=torch.float16)
    assert float(reduce_experts(halves, torch.ones(1, 1))["norm"]) == pytest.approx(120_000)


@pytest.mark.parametrize("dense", [True, False])
def test_reduction_by_hand(dense):
    """Two rows of two positions, experts 0 to 2; position 3 is padding. Each output is (3, -4) times a factor."""
    scores = torch.tensor([[0.5, 0, 0.1], [0, 0.5, 0], [0, 0.5, 0.9], [0.3, 0, 0]])
    factor = {(0, 0): 1, (0, 3): 100, (1, 1): 2, (1, 2): 3, (2, 0): 4, (2, 2): 0.5}
    direction = torch.tensor([3.0, -4.0])
    outputs = torch.stack([value * direction for value in factor.values()])
    if dense:  # what stands in the rows of experts that were not chosen must not matter
        outputs = torch.stack([factor.get((e, t), 7.0) * direction for e in range(3) for t in range(4)])
    reduced = reduce_experts(outputs, scores)
    assert list(zip(reduced["expert"].tolist(), reduced["token"].tolist(), strict=True)) == list(factor)
    assert reduced["norm"].tolist() == [5 * value for value in factor.values()]
    is_real = torch.tensor([[True, True], [True, False]])
    norm_sum, largest = expert_totals([reduced, reduced], is_real, 4)
    assert norm_sum.dtype == torch.float64
    expected = [[5, 10, 20, 0], [0, 15, 2.5, 0]]
    assert norm_sum.tolist() == [[row, row] for row in expected]
    assert largest.tolist() == [[[4, 8, 16, 0]] * 2, [[0, 12, 2, 0]] * 2]


def test_the_shared_expert_does_not_count():
    model = random_model()
    ids = random_ids(20)
    before = recorded(model, ids)
    last = model.model.layers[-1].feed_forward  # what it returns reaches no router
    last.shared_expert.down_proj.weight.data *= 1e3
    assert experts_of(recorded(model, ids)).identical(experts_of(before))
    last.experts.down_proj.data *= 2
    after = experts_of(recorded(model, ids))
    np.testing.assert_allclose(after["output_norm_sum"][:, -1], 2 * before["experts"]["output_norm_sum"][:, -1])


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_chosen_expert_whose_gate_underflows_returned_zeros(dispatch):
    model = dispatched(dispatch, num_hidden_layers=1)
    router = model.model.layers[0].feed_forward.router
    # Raw logits of -1000 to -2000: the sigmoid of all of them is exactly 0.
    router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
    router.weight.data[:] = -torch.linspace(1000, 2000, 6)[:, None] / 32
    trace = recorded(model, random_ids(5))
    assert trace["samples"]["expert_count"].values.tolist() == [[[5, 0, 0, 0, 0, 0]]]
    assert (trace["experts"]["output_norm_sum"] == 0).all()
    np.testing.assert_array_equal(trace["experts"]["output_max"].values, [[[0] + [np.nan] * 5]])


def test_an_output_that_is_not_a_number_shows():
    model = random_model()
    ids = random_ids(20)
    used = int(recorded(model, ids)["routing"]["expert_index"][0, -1, 0])
    model.model.layers[-1].feed_forward.experts.down_proj.data[used] = torch.nan
    experts = experts_of(recorded(model, ids), 0).isel(layer=-1)
    assert experts["output_norm_sum"].isnull().values.nonzero()[0].tolist() == [used]
    assert bool(experts["output_max"][used].isnull())


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_bit_identical_while_recording(dispatch, dtype):
    model = dispatched(dispatch, num_experts_per_tok=2).to(dtype)
    ids = torch.tensor(random_ids(33, 33))
    with torch.no_grad():
        before = model(ids, output_hidden_states=True)
        with probe.Recorder(model, routing=OUTPUTS):
            during = model(ids, output_hidden_states=True)
        after = model(ids, output_hidden_states=True)
    for outputs in (during, after):
        assert torch.equal(outputs.logits, before.logits)
        assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states, before.hidden_states, strict=True))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_recording_in_training_leaves_the_gradients_alone(dispatch):
    model = dispatched(dispatch).train()
    ids = torch.tensor(random_ids(16))
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with probe.Recorder(model, routing=OUTPUTS):
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_recording_works_under_autocast():
    for dispatch in DISPATCHES:
        model = dispatched(dispatch)
        ids = torch.tensor(random_ids(8))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = model(ids).logits
            with probe.Recorder(model, routing=OUTPUTS) as recorder:
                assert torch.equal(model(ids).logits, before)
        schema.validate(recorder.trace())


def test_the_rest_of_a_recording_is_the_same_with_and_without():
    model = random_model(num_experts_per_tok=2)
    ids = random_ids(9, 20)
    without, with_outputs = probe.record(model, ids, progress=False), recorded(model, ids)
    assert "experts" not in without.children
    for name in ("routing", "samples", "vocabulary"):
        assert with_outputs[name].to_dataset().identical(without[name].to_dataset())


def traces_left_on(model) -> list:
    modules = list(model.modules())
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return hooks + [module for module in modules if "expert_observers" in vars(module)]


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_on_the_model_after_an_exception(dispatch, stop):
    model = dispatched(dispatch)
    with pytest.raises(stop), probe.Recorder(model, routing=OUTPUTS):
        assert len([left for left in traces_left_on(model) if isinstance(left, torch.nn.Module)]) == 6
        model(torch.tensor(random_ids(4)))
        raise stop
    assert traces_left_on(model) == []


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_forward_that_fails_halfway_is_not_counted(dispatch):
    model = dispatched(dispatch)
    ids = torch.tensor(random_ids(7))

    def fail(module, args, output):
        raise ValueError("stop here")

    with torch.no_grad(), probe.Recorder(model, routing=OUTPUTS) as recorder:
        handle = model.model.layers[3].register_forward_hook(fail)
        with pytest.raises(ValueError, match="stop here"):
            model(ids)
        handle.remove()
        model(ids)
    assert_agrees(experts_of(recorder.trace(), 0), plain_outputs(model, ids[0].tolist()))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_recorders_may_be_nested_and_end_in_any_order(dispatch):
    model = dispatched(dispatch)
    first, second, third = random_ids(6, 9, 4)
    outer, inner = probe.Recorder(model, routing=OUTPUTS), probe.Recorder(model, routing=OUTPUTS)
    with torch.no_grad():
        outer.__enter__()
        model(torch.tensor([first]))
        with inner:
            model(torch.tensor([second]))
        model(torch.tensor([third]))
        outer.__exit__(None, None, None)
    assert traces_left_on(model) == []
    for recorder, texts in ((outer, (first, second, third)), (inner, (second,))):
        for sample, text in enumerate(texts):
            assert_agrees(experts_of(recorder.trace(), sample), plain_outputs(model, text))


def test_the_dispatch_may_change_between_forwards():
    model = dispatched("sparse")
    ids = random_ids(11)
    with torch.no_grad(), probe.Recorder(model, routing=OUTPUTS) as recorder:
        model(torch.tensor(ids))
        set_expert_dispatch(model, "reference")
        model(torch.tensor(ids))
    for sample in (0, 1):
        assert_agrees(experts_of(recorder.trace(), sample), plain_outputs(model, ids[0]))


@pytest.mark.parametrize("part", ["block", "experts"])
def test_experts_of_another_class_are_refused_before_anything_runs(part):
    model = random_model()
    block = model.model.layers[4].feed_forward
    target = block if part == "block" else block.experts
    target.__class__ = type("Quantised", (type(target),), {})
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    with pytest.raises(RecordingError, match=r"layer 4 computes its experts with Quantised.*expert_outputs=True"):
        probe.record(model, random_ids(3), routing=OUTPUTS, progress=False)
    model.model._forward_pre_hooks.clear()
    assert "experts" not in probe.record(model, random_ids(3), progress=False).children


def test_experts_that_are_never_heard_are_named():
    model = random_model()
    block = model.model.layers[2].feed_forward
    block.forward = lambda x: (block.shared_expert(x), block.router(x.reshape(-1, x.shape[-1]))[1])
    with pytest.raises(RecordingError, match="experts recorded nothing at layers 2"):
        probe.record(model, random_ids(5), routing=OUTPUTS, progress=False)
    assert traces_left_on(model) == []


def test_no_activation_is_kept():
    """What is held until the forward ends is one number or two for each assignment, however wide the model is."""
    model = dispatched("sparse", hidden_size=64)
    recorder = probe.Recorder(model, routing=OUTPUTS)
    held = []
    model.model.norm.register_forward_hook(
        lambda *_: held.extend(t for layer in recorder._forward.expert_outputs.values() for t in layer.values())
    )
    with recorder:  # with gradients on: a graph would hold on to what was reduced
        model(torch.tensor(random_ids(20)))
    assert len(held) == 6 * 4
    assert not any(tensor.requires_grad for tensor in held)
    assert {tuple(tensor.shape) for tensor in held} == {(20,)}
    assert all(tensor.untyped_storage().nbytes() <= 2 * 20 * 8 for tensor in held)


def test_the_observer_is_no_part_of_a_block_that_is_not_recorded():
    block = random_model().model.layers[0].feed_forward
    block.__class__ = SparseLlama4TextMoe
    x = torch.ones(0, 32)
    assert block(x)[0].shape == (0, 32)
    assert "expert_observers" not in vars(copy.deepcopy(block))


def planted() -> xr.DataTree:
    """Six documents through layers 1 and 3 with three experts; expert 2 of layer 3 is never used."""
    chosen = np.array([[0, 0], [0, 1], [1, 0], [0, 0], [2, 0], [0, 1], [0, 0], [0, 1]])
    trace = from_experts(chosen, n_experts=3, lengths=[2, 1, 0, 1, 1, 1, 2], layers=[1, 3])
    counts = trace["samples"]["expert_count"].values
    scale = np.array([[1, 2, 3], [4, 5, 6]])
    document = np.arange(1, 8)[:, None, None]
    norm_sum = counts * scale * document
    output_max = np.where(counts > 0, scale * document, np.nan)
    experts = {"saliency_sum": norm_sum, "output_norm_sum": 2 * norm_sum, "output_max": output_max}
    group = schema.dataset("experts", experts).assign_coords(trace["samples"].to_dataset().coords)
    trace = trace.assign({"experts": xr.DataTree(group)})
    schema.validate(trace)
    return trace


def test_saliency_by_hand():
    trace = planted()
    result = saliency(trace)
    # Tokens of layer 1: expert 0 in documents 1 (twice), 4, 6, 7 (twice); expert 1 in 2; expert 2 in 5.
    # Layer 3: expert 0 in documents 1, 2, 4, 5, 7; expert 1, five times as salient as the document, in 1, 6, 7.
    expected = [[(2 + 4 + 6 + 14) / 6, 2 * 2, 3 * 5], [4 * (1 + 2 + 4 + 5 + 7) / 5, 5 * (1 + 6 + 7) / 3, np.nan]]
    np.testing.assert_allclose(result["saliency"].values, expected)
    assert result["n_documents"].values.tolist() == [[4, 1, 1], [5, 3, 0]]
    given = [[False, False, False], [True, False, False]]
    assert result["lower"].notnull().values.tolist() == given
    assert result["upper"].notnull().values.tolist() == given
    assert float(result["lower"][1, 0]) < expected[1][0] < float(result["upper"][1, 0])
    assert result["saliency"].dims == ("layer", "expert")
    assert schema.labels(result["attention_kind"]).tolist() == ["rope", "nope"]
    assert result.attrs == {"level": 0.95, "n_resamples": 1000, "seed": 0}


def test_saliency_covers_the_truth():
    """Documents with levels of their own: 95 % intervals hold the level that they were drawn around 9 times in 10."""
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        counts = np.full((30, 1, 1), 20)
        level = random.lognormal(-0.125, 0.5, size=(30, 1, 1))  # mean 1
        trace = from_experts(np.zeros((600, 1), int), n_experts=1, lengths=[20] * 30)
        sums = counts * level
        group = schema.dataset(
            "experts", {"saliency_sum": sums, "output_norm_sum": sums, "output_max": level}
        ).assign_coords(trace["samples"].to_dataset().coords)
        result = saliency(trace.assign({"experts": xr.DataTree(group)}), n_resamples=200, seed=trial)
        inside += float(result["lower"][0, 0]) <= 1 <= float(result["upper"][0, 0])
    assert 88 <= inside <= 100


def test_saliency_needs_the_whole_recording():
    trace = planted()
    for part in (trace["experts"].to_dataset(), trace["experts"], trace["samples"].to_dataset()):
        with pytest.raises(SchemaError, match="pass the whole recording"):
            saliency(part)
    with pytest.raises(SchemaError, match=r"no /experts group.*RoutingSpec\(expert_outputs=True\)"):
        saliency(trace.drop_nodes("experts"))
    with pytest.raises(SchemaError, match="'saliency_sum' is missing"):
        saliency(trace.assign({"experts": xr.DataTree(trace["experts"].to_dataset().drop_vars("saliency_sum"))}))
    with pytest.raises(ProbeError, match="level"):
        saliency(trace, level=95)


def bare_experts(output_max) -> xr.Dataset:
    values = np.asarray(output_max, np.float32)
    n_samples, n_layers, n_experts = values.shape
    return schema.dataset(
        "experts",
        {
            "output_max": values,
            "sample": np.arange(n_samples),
            "layer": np.arange(n_layers),
            "attention_kind": np.zeros(n_layers, np.uint8),
            "expert": np.arange(n_experts),
        },
    )


def test_super_experts_by_hand():
    values = np.ones((2, 2, 200))
    values[0, 0, 7], values[1, 0, 7] = 5.0, 300.0  # super, but in one of its two samples only
    values[0, 1, 3], values[1, 1, 3] = 200.0, np.nan  # super in its only sample
    values[:, 1, 4] = 20.0
    values[:, 0, 9] = np.nan  # never used
    result = super_experts(bare_experts(values))
    assert np.argwhere(result["is_super"].values).tolist() == [[0, 7], [1, 3]]
    assert result["is_super"].dtype == bool
    assert float(result["share_threshold"]) == pytest.approx(30)
    # 399 maxima are used: the 99.5th percentile lies at place 398 · 0.995 = 396.01, a hundredth from 20 to 200.
    assert float(result["percentile_threshold"]) == pytest.approx(20 + 0.01 * 180)
    assert result["output_max"].values[0, 7] == 300
    assert result["sample_share"].values[0, 7] == 0.5
    assert result["sample_share"].values[1, 3] == 1
    assert result["sample_share"].values[1, 4] == 0
    assert np.isnan(result["sample_share"].values[0, 9]) and np.isnan(result["output_max"].values[0, 9])
    for variable in result.variables.values():
        assert variable.attrs["long_name"] and variable.attrs["units"]


@pytest.mark.parametrize("others, second", [(1.0, 20.0), (100.0, 100.0)], ids=["percentile", "tenth of the largest"])
def test_one_threshold_alone_makes_no_super_expert(others, second):
    values = np.full((1, 2, 200), others)
    values[0, 0, 7], values[0, 1, 4] = 300.0, second
    result = super_experts(bare_experts(values))
    thresholds = {float(result["percentile_threshold"]), float(result["share_threshold"])}
    assert min(thresholds) < second <= max(thresholds)
    assert np.argwhere(result["is_super"].values).tolist() == [[0, 7]]


@pytest.mark.parametrize("shape", [(0, 1, 3), (2, 1, 3), (1, 0, 3)])
def test_no_token_gives_no_super_expert(shape):
    result = super_experts(bare_experts(np.full(shape, np.nan)))
    assert not result["is_super"].any()
    assert result["output_max"].isnull().all() and result["sample_share"].isnull().all()
    assert result["percentile_threshold"].isnull() and result["share_threshold"].isnull()


def test_super_experts_name_what_is_missing():
    experts = bare_experts(np.ones((1, 2, 3)))
    with pytest.raises(SchemaError, match="'output_max' is missing"):
        super_experts(experts.drop_vars("output_max"))
    with pytest.raises(SchemaError, match=r"lost the dim 'layer'.*sel\(layer=\[3\]\)"):
        super_experts(experts.sel(layer=1))


def test_statistics_of_a_store_are_those_of_the_recording(tmp_path):
    trace = recorded(random_model(num_experts_per_tok=2), random_ids(9, 0, 14, 5, 8, 30, 7))
    opened = probe.open(probe.save(trace, tmp_path / "run.zarr"))
    assert opened["experts"]["saliency_sum"].chunks is not None, "the store is read lazily"
    for statistic in (saliency, super_experts):
        result = statistic(opened)
        xr.testing.assert_allclose(result, statistic(trace))
        assert all(variable.chunks is None for variable in result.variables.values())


def test_a_planted_super_expert_is_found():
    model = random_model(num_local_experts=64, num_hidden_layers=4)
    ids = random_ids(60, 60, 60)
    used = int(recorded(model, ids)["routing"]["expert_index"][0, 1, 0])
    model.model.layers[1].feed_forward.experts.down_proj.data[used] *= 1e3
    result = super_experts(recorded(model, ids))
    assert [1, used] in np.argwhere(result["is_super"].values).tolist()
    assert float(result["output_max"][1, used]) == float(result["output_max"].max())
