"""The training code does what its cards say: fair rows, the right loss, and a stop that costs nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

import probe
from tests.random_models import random_model
from training import copier, plan, train
from training.evaluate import zlib_bits_per_byte
from training.rows import pieces, training_rows


@pytest.fixture(scope="module")
def tokenizer():
    return probe.load("tiny-scout").tokenizer


def test_pieces_keep_every_token_and_start_with_bos(tokenizer):
    text = "one two three four five six seven eight nine ten " * 5
    runs = pieces([text, "short"], tokenizer, 16)
    assert all(run[0] == tokenizer.bos_token_id and len(run) <= 16 for run in runs)
    ids = np.concatenate([run[1:] for run in runs]).tolist()
    expected = tokenizer([text, "short"], add_special_tokens=False)["input_ids"]
    assert ids == [*expected[0], tokenizer.eos_token_id, *expected[1], tokenizer.eos_token_id]


def test_rows_give_every_domain_the_same_share_and_start_with_a_piece():
    runs = {
        "long": [np.array([7, *[1] * 29])] * 3,
        "short": [np.array([7, *[2] * n]) for n in (3, 5, 8)],
        "other": [np.array([7, *[3] * 11])],
    }
    rows = training_rows(runs, n_rows=200, length=32, seed=0)
    assert (rows[:, 0] == 7).all()
    shares = np.bincount(rows.ravel(), minlength=4)[1:4] / (rows != 7).sum()
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    np.testing.assert_array_equal(rows, training_rows(runs, n_rows=200, length=32, seed=0))


def test_balance_loss_is_one_at_uniform_and_the_number_of_experts_at_collapse():
    uniform = torch.eye(4).repeat(5, 1) * 1e-4
    collapsed = torch.zeros(20, 4)
    collapsed[:, 2] = 50
    losses = train.balance_losses((uniform, collapsed), top_k=1)
    torch.testing.assert_close(losses, torch.tensor([1.0, 4.0]))


def test_balance_loss_by_hand():
    # Two of three tokens choose expert 0: f = (2/3, 1/3); P is the mean softmax.
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    first = [float(torch.sigmoid(torch.tensor(x))) for x in (1.0, 2.0, -3.0)]
    p = sum(first) / 3
    expected = 2 * (2 / 3 * p + 1 / 3 * (1 - p))
    assert train.balance_losses((logits,), top_k=1).item() == pytest.approx(expected, rel=1e-6)


def test_chunked_attention_is_the_chunked_mask(tokenizer):
    torch.manual_seed(0)
    model = train.Llama4ForCausalLM(train.build_config(plan.ARMS["tiny-scout"], tokenizer)).eval()
    ids = torch.randint(0, 4000, (2, 512))
    with torch.no_grad():
        expected = model(ids).logits
        train.use_chunked_attention(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_learning_rate_warms_up_and_falls():
    rates = [train.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(plan.PEAK_LEARNING_RATE / 20)
    assert max(rates) == pytest.approx(plan.PEAK_LEARNING_RATE)
    assert rates[-1] == pytest.approx(plan.FINAL_LEARNING_RATE, rel=0.01)


def test_zlib_bits_per_byte_by_hand():
    assert zlib_bits_per_byte(["a" * 10_000]) < 0.05
    random = np.random.default_rng(0).integers(0, 128, 5000, dtype=np.uint8).tobytes().decode("ascii")
    assert zlib_bits_per_byte([random]) == pytest.approx(7, abs=0.2)


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch, tokenizer):
    """A run that is killed and started again ends with the weights of one that was not."""
    corpus = tmp_path / "corpus"
    for split in ("train", "heldout"):
        (corpus / split).mkdir(parents=True)
        lines = [json.dumps({"text": f"document {n} says {n * n} " * 20}) for n in range(20)]
        (corpus / split / "numbers.jsonl").write_text("\n".join(lines))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(plan, "CORPUS", corpus)
    monkeypatch.setattr(plan, "TOKENIZER", tmp_path / "tokenizer")
    monkeypatch.setattr(plan, "CONTEXT", 128)
    monkeypatch.setattr(plan, "BATCH_ROWS", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "HELDOUT_ROWS", 2)
    config = plan.SCOUT_CONFIG | {"num_hidden_layers": 2}
    arm = replace(plan.ARMS["tiny-scout"], config=config, n_tokens=5 * 2 * 128, save_at=(50,))

    def run(folder):
        monkeypatch.setattr(plan, "RUNS", folder)
        train.train(arm, device="cpu", progress=Progress(disable=True))

    run(tmp_path / "whole")

    real_step = torch.optim.AdamW.step
    steps = []

    def step_until_killed(self, *args, **kwargs):
        steps.append(None)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real_step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(torch.optim.AdamW, "step", real_step)
    run(tmp_path / "killed")

    expected = load_file(tmp_path / "whole" / arm.name / "weights.safetensors")
    weights = load_file(tmp_path / "killed" / arm.name / "weights.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "killed" / arm.name / "weights-50.safetensors").exists()
    assert not (tmp_path / "killed" / arm.name / "state.safetensors").exists()


def test_a_row_that_repeats_is_known_from_the_second_time_on():
    random = np.random.default_rng(0)
    for _ in range(20):
        row, is_known = copier.repeated_row(random, np.arange(100, 132), 128)
        period = int(is_known.argmax()) - 1
        assert copier.SHORTEST_PERIOD <= period <= 60
        np.testing.assert_array_equal(row[period:], row[:-period])
        # The first token of the second time follows one that nothing had followed yet.
        assert not is_known[: period + 1].any() and is_known[period + 1 :].all()


def test_the_copy_of_a_needle_is_known_after_its_cue():
    random = np.random.default_rng(1)
    for _ in range(50):
        row, is_known = copier.planted_row(random, np.arange(1000), 256)
        copied = np.flatnonzero(is_known)
        n_needle = len(copied) + copier.CUE
        copy = int(copied[0]) - copier.CUE
        assert len(row) == 256 and copier.NEEDLE[0] <= n_needle <= copier.NEEDLE[1]
        np.testing.assert_array_equal(copied, np.arange(copy + copier.CUE, copy + n_needle))
        starts = [
            start
            for start in range(copy - n_needle + 1)
            if np.array_equal(row[start : start + n_needle], row[copy : copy + n_needle])
        ]
        assert starts, "what is called a copy stands nowhere before"


def test_ids_grow_from_few_to_all():
    counts = [copier.n_known_ids(step, 4000) for step in range(copier.N_STEPS)]
    assert counts[0] == copier.FIRST_IDS and counts[-1] == 4000
    assert counts == sorted(counts)


def test_a_batch_of_the_copier_is_the_same_again_and_scored_among_its_own_ids():
    ids = np.arange(50, 4000)
    for step in (0, copier.N_STEPS - 1):
        batch = copier.batch_at(step, ids, bos=7)
        np.testing.assert_array_equal(batch.tokens, copier.batch_at(step, ids, bos=7).tokens)
        assert (batch.tokens[:, 0] == 7).all() and not batch.is_known[:, 0].any()
        assert np.isin(batch.tokens[:, 1:], batch.ids).all()
        assert batch.tokens[:, 1:].size == copier.BATCH_TOKENS


def test_the_loss_of_the_copier_is_that_among_the_ids_of_the_batch():
    model = random_model(vocab_size=64, num_hidden_layers=2)
    tokens = np.array([[1, 9, 5, 9, 5]])
    batch = copier.Batch(tokens, np.array([[False, False, False, True, True]]), np.array([5, 9]))
    hidden = torch.randn(1, 4, 32)
    logits = hidden[0] @ model.lm_head.weight.T
    expected = [logits[2, [5, 9]].log_softmax(-1)[1], logits[3, [5, 9]].log_softmax(-1)[0]]
    assert copier.loss_of(model, hidden, batch).item() == pytest.approx(-float(sum(expected).detach()) / 2, rel=1e-5)
