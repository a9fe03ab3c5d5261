"""Running only the chosen experts gives the numbers of running all of them, forward and backward."""

from __future__ import annotations

import pytest
import torch

import probe
from probe.dispatch import SparseLlama4TextMoe, expert_dispatch_of, set_expert_dispatch
from tests.random_models import SHAPES, random_ids, random_model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 33])
def test_forward_and_backward_agree_with_transformers(shape, length):
    model = random_model(**SHAPES[shape])
    ids = torch.tensor(random_ids(length, length))
    results = {}
    for dispatch in ("reference", "sparse"):
        set_expert_dispatch(model, dispatch)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        results[dispatch] = logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    logits, gradients = results["sparse"]
    expected_logits, expected_gradients = results["reference"]
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5 * float(expected_logits.abs().max()))
    assert len(gradients) == len(expected_gradients)
    # Measured against the largest gradient of all: a single token attends to itself alone, so what its queries and keys
    # get is rounding around zero, and not the same on every processor.
    largest = max(float(expected.abs().max()) for expected in expected_gradients)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        atol = max(1e-4 * float(expected.abs().max()), 1e-6 * largest)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol)


def test_both_choose_the_same_experts():
    model = random_model(num_experts_per_tok=2)
    ids = random_ids(64, 31)
    chosen = {}
    for dispatch in ("reference", "sparse"):
        set_expert_dispatch(model, dispatch)
        trace = probe.record(model, ids, progress=False)
        assert trace.attrs["expert_dispatch"] == dispatch
        chosen[dispatch] = trace["routing"]["expert_index"].values
    assert (chosen["sparse"] == chosen["reference"]).all()


def test_an_expert_without_tokens_and_a_batch_without_tokens():
    block = random_model().model.layers[0].feed_forward
    block.__class__ = SparseLlama4TextMoe
    block.router.weight.data[0] = 0
    block.router.weight.data[1:] = -1e3
    out, logits = block(torch.ones(3, 32))
    assert logits.argmax(dim=-1).tolist() == [0, 0, 0]
    assert out.shape == (3, 32)
    assert block(torch.ones(0, 32))[0].shape == (0, 32)


def test_not_a_number_reaches_the_output():
    block = random_model().model.layers[0].feed_forward
    block.__class__ = SparseLlama4TextMoe
    x = torch.ones(2, 32)
    x[1] = torch.nan
    out, _ = block(x)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_only_the_chosen_experts_are_read():
    block = random_model().model.layers[0].feed_forward
    block.__class__ = SparseLlama4TextMoe
    x = torch.randn(1, 32)
    chosen = int(block.router(x)[1].argmax())
    expected, _ = block(x)
    for expert in range(block.num_experts):
        if expert != chosen:
            block.experts.down_proj.data[expert] = torch.nan
    out, _ = block(x)
    assert torch.equal(out, expected)


def test_an_unknown_name_and_an_unknown_block_are_refused_and_nothing_is_changed():
    model = random_model()
    with pytest.raises(probe.ProbeError, match="'fast': choose one of sparse, reference"):
        set_expert_dispatch(model, "fast")

    class Patched(type(model.model.layers[3].feed_forward)):
        pass

    model.model.layers[3].feed_forward.__class__ = Patched
    with pytest.raises(probe.ProbeError, match="layer 3 computes its experts with Patched"):
        set_expert_dispatch(model, "sparse")
    assert expert_dispatch_of(model) == "Patched+reference"
