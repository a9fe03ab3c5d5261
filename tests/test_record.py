"""Recordings against transformers' own outputs, a recomputed router, and a plain second implementation of the model."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import probe
from probe import schema
from probe.dispatch import set_expert_dispatch
from probe.hooks import RoutingSpec, batches
from probe.recording import RecordingError
from probe.reduction import reduce_router
from tests.plain_llama4 import forward as plain_forward
from tests.random_models import SHAPES, random_ids, random_model

EVERYTHING = RoutingSpec(all_logits=True, next_token_loss=True)


def routing_of(trace, sample: int):
    routing = trace["routing"].to_dataset()
    return routing.isel(token=routing["sample"].values == sample)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_a_plain_second_implementation(shape):
    model = random_model(**SHAPES[shape])
    ids = random_ids(27)[0]
    plain = plain_forward(model.state_dict(), model.config, ids)
    trace = probe.record(model, [ids], routing=EVERYTHING, progress=False)
    routing = routing_of(trace, 0)
    assert routing["layer"].values.tolist() == list(plain.chosen) == list(model.config.moe_layers)
    for layer, chosen in plain.chosen.items():
        at_layer = routing.sel(layer=layer)
        assert at_layer["expert_index"].values.tolist() == chosen
        np.testing.assert_allclose(at_layer["all_logits"].values, plain.router_logits[layer], atol=2e-3)
    loss = torch.nn.functional.cross_entropy(plain.logits[:-1], torch.tensor(ids[1:]), reduction="none")
    np.testing.assert_allclose(routing["next_token_loss"].values[:-1], loss, rtol=1e-4)
    assert np.isnan(routing["next_token_loss"].values[-1])
    assert routing["predicted_id"].values.tolist() == plain.logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_transformers_router_logits(shape):
    model = random_model(**SHAPES[shape])
    k, n_experts = model.config.num_experts_per_tok, model.config.num_local_experts
    ids = random_ids(5, 40, 1, 17, 23)
    trace = probe.record(model, ids, routing=EVERYTHING, batch_size=2, progress=False)
    for sample, text in enumerate(ids):
        with torch.no_grad():
            outputs = model(torch.tensor([text]), labels=torch.tensor([text]), output_router_logits=True)
        logits = torch.stack(outputs.router_logits, dim=1).numpy()
        order = np.argsort(-logits, axis=-1)
        ranked = np.take_along_axis(logits, order, axis=-1)
        routing = routing_of(trace, sample)
        np.testing.assert_array_equal(routing["expert_index"].values, order[..., :k])
        np.testing.assert_array_equal(routing["runner_up_index"].values, order[..., k])
        np.testing.assert_allclose(routing["router_logit"].values, ranked[..., :k], atol=5e-3)
        np.testing.assert_allclose(routing["router_margin"].values, ranked[..., k - 1] - ranked[..., k], atol=5e-3)
        logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
        np.testing.assert_allclose(routing["logit_logsumexp"].values, logsumexp, rtol=1e-5)
        if len(text) > 1:
            assert np.nanmean(routing["next_token_loss"].values) == pytest.approx(outputs.loss.item(), rel=1e-5)
        probability = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        samples = trace["samples"].to_dataset().isel(sample=sample)
        np.testing.assert_allclose(samples["probability_sum"].values, probability.sum(axis=0), rtol=1e-4)
        counts = np.stack(
            [np.bincount(order[:, layer, :k].ravel(), minlength=n_experts) for layer in range(len(logits[0]))]
        )
        np.testing.assert_array_equal(samples["expert_count"].values, counts)


def test_agrees_with_the_router_recomputed_from_its_own_input():
    model = random_model()
    ids = random_ids(30)
    inputs = {}
    handles = [
        layer.feed_forward.register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0]}))
        for i, layer in enumerate(model.model.layers)
    ]
    trace = probe.record(model, ids, routing=EVERYTHING, progress=False)
    for handle in handles:
        handle.remove()
    for layer, x in inputs.items():
        weight = model.model.layers[layer].feed_forward.router.weight
        expected = (x.reshape(-1, x.shape[-1]).double() @ weight.double().T).detach().numpy()
        recorded = trace["routing"]["all_logits"].sel(layer=layer).values
        np.testing.assert_allclose(recorded, expected, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_batching_and_padding_change_no_expert(shape, batch_size):
    model = random_model(**SHAPES[shape])
    ids = random_ids(5, 40, 1, 17, 23, 8, 9)
    trace = probe.record(model, ids, batch_size=batch_size, progress=False)
    assert trace["samples"]["n_tokens"].values.tolist() == [5, 40, 1, 17, 23, 8, 9]
    for sample, text in enumerate(ids):
        alone = probe.record(model, [text], progress=False)["routing"].to_dataset()
        together = routing_of(trace, sample)
        np.testing.assert_array_equal(together["expert_index"].values, alone["expert_index"].values)
        np.testing.assert_array_equal(together["token_id"].values, text)
        np.testing.assert_array_equal(together["position"].values, np.arange(len(text)))


def test_bfloat16_records_what_the_unrecorded_model_chooses():
    model = random_model(seed=3, hidden_size=64, num_local_experts=16).bfloat16()
    ids = torch.tensor(random_ids(64, 64, 64, 64))
    chosen = []
    handles = [
        layer.feed_forward.router.register_forward_hook(lambda module, args, output: chosen.append(output[0] != 0))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    trace = probe.record(model, ids, batch_size=4, progress=False)
    expected = torch.stack([is_chosen.float().argmax(dim=-1) for is_chosen in chosen], dim=1)
    np.testing.assert_array_equal(trace["routing"]["expert_index"].values[..., 0], expected)


def test_ties_are_read_from_the_scores_not_from_a_second_top_k():
    logits = torch.zeros(2, 4, dtype=torch.bfloat16)
    scores = torch.tensor([[0, 0, 0.5, 0], [0, 0.5, 0, 0]], dtype=torch.bfloat16)
    reduced = reduce_router(scores, logits, top_k=1)
    assert reduced["expert_index"].tolist() == [[2], [1]]
    assert reduced["router_margin"].tolist() == [0, 0]
    assert all(
        r != c[0] for r, c in zip(reduced["runner_up_index"].tolist(), reduced["expert_index"].tolist(), strict=True)
    )


def test_a_chosen_expert_whose_gate_underflows_is_still_recorded():
    logits = torch.tensor([[-300.0, -200.0, -250.0]])
    reduced = reduce_router(torch.zeros(1, 3), logits, top_k=1)
    assert reduced["expert_index"].tolist() == [[1]]
    assert reduced["runner_up_index"].tolist() == [2]


def test_top_k_of_all_experts_has_no_runner_up():
    trace = probe.record(random_model(num_local_experts=3, num_experts_per_tok=3), random_ids(6), progress=False)
    assert "runner_up_index" not in trace["routing"]
    assert np.isnan(trace["routing"]["router_margin"].values).all()


def test_batches_hold_texts_of_like_length():
    lengths = [20_000, 9_000, 8_000, 7_000, 100, 90, 40, 5, 1]
    found = list(batches(list(range(9)), lengths, batch_size=2))
    assert found == [[0], [1], [2, 3], [4, 5], [6], [7], [8]]
    assert list(batches([], [], batch_size=8)) == []


def test_two_hundred_and_fifty_six_experts_need_sixteen_bits():
    trace = probe.record(random_model(num_local_experts=256, num_hidden_layers=2), random_ids(40), progress=False)
    assert trace["routing"]["expert_index"].dtype == np.uint16


def test_samples_keep_their_order_names_domains_and_cuts():
    trace = probe.record(
        random_model(),
        random_ids(3, 12, 0, 6),
        domains=["a", None, "b", "a"],
        names=list("wxyz"),
        max_tokens=5,
        progress=False,
    )
    samples = trace["samples"].to_dataset()
    assert samples["name"].values.tolist() == list("wxyz")
    assert samples["domain"].values.tolist() == ["a", schema.NO_DOMAIN, "b", "a"]
    assert samples["n_tokens"].values.tolist() == [3, 5, 0, 5]
    assert samples["n_cut"].values.tolist() == [0, 7, 0, 1]
    assert samples["row_offset"].values.tolist() == [0, 3, 8, 8]
    domain = schema.labels(trace["routing"]["domain"])
    assert domain.tolist() == ["a"] * 3 + [schema.NO_DOMAIN] * 5 + ["a"] * 5
    schema.validate(trace)


@pytest.mark.parametrize("dispatch", ["sparse", "reference"])
def test_outputs_are_bit_identical_while_recording(dispatch):
    model = random_model(num_experts_per_tok=2)
    set_expert_dispatch(model, dispatch)
    ids = torch.tensor(random_ids(33, 33))
    with torch.no_grad():
        before = model(ids, output_hidden_states=True)
        with probe.Recorder(model, routing=EVERYTHING):
            during = model(ids, output_hidden_states=True)
        after = model(ids, output_hidden_states=True)
    for outputs in (during, after):
        assert torch.equal(outputs.logits, before.logits)
        assert all(torch.equal(a, b) for a, b in zip(outputs.hidden_states, before.hidden_states, strict=True))


def test_no_path_of_this_machine_is_recorded(tmp_path):
    random_model().save_pretrained(tmp_path)
    model = type(random_model()).from_pretrained(tmp_path)
    trace = probe.record(model, random_ids(4), progress=False)
    assert str(tmp_path) not in trace.attrs["config"]


def hooks_on(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception(stop):
    model = random_model()
    with pytest.raises(stop), probe.Recorder(model):
        assert hooks_on(model) > 0
        raise stop
    assert hooks_on(model) == 0


def test_a_forward_that_fails_halfway_leaves_nothing_behind():
    model = random_model()
    ids = torch.tensor(random_ids(7))

    def fail(module, args, output):
        raise ValueError("stop here")

    with torch.no_grad(), probe.Recorder(model) as recorder:
        handle = model.model.layers[3].register_forward_hook(fail)
        with pytest.raises(ValueError, match="stop here"):
            model(ids)
        handle.remove()
        model(ids)
    trace = recorder.trace()
    assert trace["samples"]["n_tokens"].values.tolist() == [7]
    assert trace["routing"]["position"].values.tolist() == list(range(7))


def test_a_router_that_never_fires_is_named():
    model = random_model()
    model.model.layers[2].feed_forward.forward = lambda x: (x.reshape(-1, x.shape[-1]), None)
    with pytest.raises(RecordingError, match="layers 2: .* MoE layers are 0, 1, 2, 3, 4, 5"):
        probe.record(model, random_ids(5), progress=False)
    assert hooks_on(model) == 0


def test_two_recorders_may_be_nested():
    model = random_model()
    first, second = (torch.tensor(random_ids(n, seed=n)) for n in (6, 9))
    with torch.no_grad(), probe.Recorder(model) as outer:
        model(first)
        with probe.Recorder(model) as inner:
            model(second)
    assert outer.trace()["samples"]["n_tokens"].values.tolist() == [6, 9]
    assert inner.trace()["samples"]["n_tokens"].values.tolist() == [9]
    expected = outer.trace()["routing"].to_dataset().isel(token=slice(6, None))["expert_index"]
    np.testing.assert_array_equal(inner.trace()["routing"]["expert_index"].values, expected.values)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_is_recorded_without_padding_prefill_and_decode_apart(cache):
    model = random_model()
    prompt = torch.tensor(random_ids(10, 10))
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    with probe.Recorder(model, routing=EVERYTHING) as recorder:
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
    routing = trace["routing"].to_dataset()
    # the last generated token is never fed back to the model
    assert trace["samples"]["n_tokens"].values.tolist() == [6 + 5, 10 + 5]
    assert schema.labels(routing["phase"]).tolist() == (
        ["prefill"] * 6 + ["decode"] * 5 + ["prefill"] * 10 + ["decode"] * 5
    )
    assert routing["token_id"].values.tolist() == out[0, 4:-1].tolist() + out[1, :-1].tolist()
    assert routing["position"].values.tolist() == [*range(11), *range(15)]
    assert "next_token_loss" not in routing
    whole = probe.record(model, [out[1, :-1]], progress=False)["routing"].to_dataset()
    np.testing.assert_array_equal(routing["expert_index"].values[11:], whole["expert_index"].values)


def test_a_cache_made_by_the_forward_itself_is_known_again():
    model = random_model()
    ids = torch.tensor(random_ids(12))
    with torch.no_grad(), probe.Recorder(model) as recorder:
        outputs = model(ids[:, :8], use_cache=True)
        model(ids[:, 8:], past_key_values=outputs.past_key_values)
    trace = recorder.trace()
    assert trace["samples"]["n_tokens"].values.tolist() == [12]
    assert schema.labels(trace["routing"]["phase"]).tolist() == ["prefill"] * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=2), "num_beams=1"),
        (dict(prompt_lookup_num_tokens=3), "without an assistant"),
        (dict(use_cache=False), "use_cache=True"),
        (dict(generation_config=GenerationConfig(num_beams=3)), "num_beams=1"),
    ],
)
def test_generation_that_cannot_be_told_apart_is_refused_and_then_runs_again(options, message):
    model = random_model()
    prompt = torch.tensor(random_ids(5))
    with pytest.raises(probe.ProbeError, match=message), probe.Recorder(model):
        model.generate(prompt, max_new_tokens=3, **options)
    assert "generate" not in vars(model)
    model.generate(prompt, max_new_tokens=3, **options)


def test_nested_recorders_leave_generate_as_it_was():
    model = random_model()
    prompt = torch.tensor(random_ids(5))
    with probe.Recorder(model) as outer:
        with probe.Recorder(model) as inner:
            model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
        model.generate(prompt, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert "generate" not in vars(model)
    assert inner.trace()["samples"]["n_tokens"].values.tolist() == [8]
    assert outer.trace()["samples"]["n_tokens"].values.tolist() == [8, 6]


def test_a_sequence_that_finished_first_is_not_padded_on():
    model = random_model()
    prompt = torch.tensor(random_ids(6, 6, seed=3))
    free = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    end = int(free[0, 8])
    assert end not in free[1, 6:-1], "the other row must go on for this test to mean anything"
    with probe.Recorder(model) as recorder:
        out = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)
    first, second = (routing_of(recorder.trace(), sample)["token_id"].values.tolist() for sample in (0, 1))
    length = out[0].tolist().index(end, 6) + 1
    assert out[0, length:].tolist() == [0] * (out.shape[1] - length)
    assert first == out[0, :length].tolist()
    assert second == out[1, :-1].tolist()


def test_a_prompt_in_chunks_is_prefill_to_its_last_token():
    model = random_model()
    with probe.Recorder(model) as recorder:
        model.generate(
            torch.tensor(random_ids(10)), max_new_tokens=4, do_sample=False, eos_token_id=None, prefill_chunk_size=3
        )
    phase = schema.labels(recorder.trace()["routing"]["phase"]).tolist()
    assert phase == ["prefill"] * 10 + ["decode"] * 3


def test_a_cache_that_was_cropped_is_refused():
    model = random_model(attention_chunk_size=64)
    ids = torch.tensor(random_ids(12))
    with torch.no_grad(), pytest.raises(RecordingError, match="cropped or used outside"), probe.Recorder(model):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        cache.crop(-3)
        model(ids[:, 3:], past_key_values=cache)


def test_a_cache_filled_before_with_padding_starts_at_the_tokens_it_holds():
    model = random_model()
    ids = torch.tensor(random_ids(7, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        with probe.Recorder(model) as recorder:
            model(ids[:, 6:], attention_mask=mask, past_key_values=cache)
    assert recorder.trace()["routing"]["position"].values.tolist() == [3, 6]


def test_tuple_outputs_of_the_decoder_keep_a_sequence_together():
    model = random_model()
    ids = torch.tensor(random_ids(12))
    with torch.no_grad(), probe.Recorder(model.model) as recorder:
        outputs = model.model(ids[:, :8], use_cache=True, return_dict=False)
        model.model(ids[:, 8:], past_key_values=outputs[1], return_dict=False)
    assert recorder.trace()["samples"]["n_tokens"].values.tolist() == [12]


def test_a_wrappers_own_arguments_are_not_taken_for_token_ids():
    inner = random_model()

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, labels, batch):
            return self.inner(**batch)

    wrapper, ids = Wrapper(), torch.tensor(random_ids(8))
    with torch.no_grad(), probe.Recorder(wrapper) as recorder:
        wrapper(torch.full((1, 8), 7), {"input_ids": ids})
    assert recorder.trace()["routing"]["token_id"].values.tolist() == ids[0].tolist()


def test_a_mask_of_four_dims_is_refused():
    model = random_model()
    mask = torch.tril(torch.ones(1, 1, 8, 8)).bool()
    with pytest.raises(RecordingError, match="4 dims"), probe.Recorder(model):
        model(torch.tensor(random_ids(8)), attention_mask=mask)


def test_recording_works_under_autocast():
    model = random_model()
    ids = torch.tensor(random_ids(8))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(ids).logits
        with probe.Recorder(model, routing=EVERYTHING) as recorder:
            assert torch.equal(model(ids).logits, before)
    assert recorder.trace()["samples"]["n_tokens"].values.tolist() == [8]


def test_no_cache_is_kept_alive():
    model = random_model()
    with torch.no_grad(), probe.Recorder(model):
        cache = weakref.ref(model(torch.tensor(random_ids(12)), use_cache=True).past_key_values)
        gc.collect()
        assert cache() is None


def test_works_on_the_decoder_alone_and_on_the_image_and_text_model():
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

    model = random_model()
    ids = random_ids(9)
    expected = probe.record(model, ids, progress=False)["routing"]["expert_index"].values
    alone = probe.record(model.model, ids, routing=EVERYTHING, progress=False)
    np.testing.assert_array_equal(alone["routing"]["expert_index"].values, expected)
    assert "next_token_loss" not in alone["routing"]

    vision = Llama4VisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projector_input_dim=16, projector_output_dim=16, vision_output_dim=16,
    )  # fmt: skip
    both = Llama4ForConditionalGeneration(Llama4Config(text_config=model.config, vision_config=vision)).eval()
    both.language_model.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(probe.record(both, ids, progress=False)["routing"]["expert_index"].values, expected)
    with torch.no_grad(), probe.Recorder(both) as recorder:
        both(input_ids=torch.tensor(ids))
    np.testing.assert_array_equal(recorder.trace()["routing"]["expert_index"].values, expected)
    assert recorder.trace()["routing"]["token_id"].values.tolist() == ids[0]
    with pytest.raises(RecordingError, match="images are not recorded"), probe.Recorder(both):
        both(input_ids=torch.tensor(ids), pixel_values=torch.zeros(1, 3, 28, 28))
    assert hooks_on(both) == 0


def test_recording_in_training_leaves_the_gradients_alone():
    model = random_model().train()
    ids = torch.tensor(random_ids(16))
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with probe.Recorder(model):
        model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(texts=[]), "texts is empty"),
        (dict(texts=[[]]), "none of the 1 texts has a token"),
        (dict(texts=["hello"]), "need a tokenizer"),
        (dict(texts=[[3, 4]], domains=["a", "b"]), "domains needs one entry for each of the 1 texts, got 2"),
        (dict(texts=[[3, 4]], domains="a"), "domains needs one entry for each of the 1 texts, got the string 'a'"),
        (dict(texts=[[3, 4]], names=[]), "names needs one entry"),
        (dict(texts=[[3, 4]], batch_size=0), "at least 1"),
        (dict(texts=[[3, 4]], max_tokens=0), "at least 1"),
        (dict(texts=[[3, 4.5]]), "whole numbers"),
        (dict(texts=[3, 4]), "one sequence of token ids for each text"),
        (dict(texts=torch.tensor([3, 4])), "one sequence of token ids for each text"),
        (dict(texts={"input_ids": [[3, 4]]}), "input_ids"),
        (dict(texts=[[3, 4]], domains=[7]), "domains .* 7"),
        (dict(texts=[[3, 4]], names=["\ud800"]), "names cannot be written as UTF-8"),
        (dict(texts=[[3, 4]], routing="all"), "'all'"),
        (dict(texts=[[3, 160]]), "160"),
        (dict(texts=[[3, -1]]), "-1"),
        (dict(texts=[[3, 4]], routing=False), "nothing to record"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments, message):
    model = random_model()
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    with pytest.raises(RecordingError, match=message):
        probe.record(model, progress=False, **arguments)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([[3, 4, 5]]),
        [np.array([3, 4, 5])],
        [[np.int64(3), np.uint8(4), 5]],
        [[torch.tensor(3), 4, 5]],
        ((3, 4, 5),),
    ],
)
def test_token_ids_may_come_in_any_container(ids):
    trace = probe.record(random_model(), ids, progress=False)
    assert trace["routing"]["token_id"].values.tolist() == [3, 4, 5]


def test_texts_may_come_from_a_generator_and_odd_ones_are_named():
    lm = probe.load("tiny-scout")
    assert probe.record(lm, (text for text in ("a", "b")), progress=False)["samples"].sizes["sample"] == 2
    with pytest.raises(RecordingError, match="text 1 cannot be written as UTF-8"):
        probe.record(lm, ["fine", "\ud800"], progress=False)


def test_a_tokenizer_that_is_not_byte_level_still_shows_its_tokens():
    class Words:
        added_tokens_decoder = {}

        def convert_ids_to_tokens(self, ids):
            return ["▁word" for _ in ids]

    trace = probe.record(random_model(), [[3, 4]], tokenizer=Words(), progress=False)
    assert schema.pieces(trace["vocabulary"].to_dataset())[3] == "▁word".encode()


def test_nothing_recorded_and_embeddings_alone_say_so():
    model = random_model()
    with probe.Recorder(model) as recorder:
        pass
    with pytest.raises(RecordingError, match="no forward"):
        recorder.trace()
    with pytest.raises(RecordingError, match="input_ids"), probe.Recorder(model):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(probe.ProbeError, match="Linear holds 0 Llama 4 text models"):
        probe.record(torch.nn.Linear(2, 2), [[1]])
