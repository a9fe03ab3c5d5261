"""FP8 training rounds what it says and nothing else, and the committed numbers are those in the README."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from statistics import mean, stdev

import ml_dtypes
import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

import probe
from probe.dispatch import set_expert_dispatch
from probe.recipes import recipes
from probe.schema import ProbeError
from tests.random_models import SHAPES, random_ids, random_model
from training import fp8, plan

FLOAT8 = {"e4m3fn": (ml_dtypes.float8_e4m3fn, 448), "e5m2": (ml_dtypes.float8_e5m2, 57344)}


# Rounding by hand, in numpy: the contracted axis comes last.


def by_tensor(x, number_format):
    dtype, maximum = FLOAT8[number_format]
    scale = np.float32(np.abs(x).max()) / np.float32(maximum)
    return (x / scale).clip(-maximum, maximum).astype(dtype).astype(np.float32) * scale


def by_row(x, number_format, *, cap=None):
    dtype, maximum = FLOAT8[number_format]
    amax = np.abs(x).max(axis=1, keepdims=True)
    scale = (amax if cap is None else amax.clip(1 / 512, cap)).astype(np.float32) / np.float32(maximum)
    return (x / scale).clip(-maximum, maximum).astype(dtype).astype(np.float32) * scale


def by_bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


ROUND = {
    "bf16": (by_bf16, by_bf16, by_bf16),
    "hybrid": (
        lambda w: by_tensor(w, "e4m3fn"),
        lambda x: by_tensor(x, "e4m3fn"),
        lambda g: by_tensor(g, "e5m2"),
    ),
    "meta-like": (
        lambda w: by_row(w, "e4m3fn"),
        lambda x: by_row(x, "e4m3fn", cap=1200),
        lambda g: by_row(g, "e5m2"),
    ),
}


def operands_of(name):
    arm = fp8.arms()[name]
    return arm.elsewhere if arm.recipe is None else fp8.recipe_operands(arm.recipe)


@pytest.mark.parametrize("name", ROUND)
def test_the_three_products_are_those_of_operands_rounded_by_hand(name):
    random = np.random.default_rng(0)
    x = random.standard_normal((24, 16)).astype(np.float32)
    x[3] *= 3000  # above Meta's cap: saturates
    x[:, 5] *= 0.01  # one scale per row, per column and per tensor round these differently
    weight = (random.standard_normal((12, 16)) * np.logspace(-3, 0, 12)[:, None]).astype(np.float32)
    gradient = (random.standard_normal((24, 12)) * np.logspace(-6, -2, 24)[:, None]).astype(np.float32)
    round_weight, round_x, round_gradient = ROUND[name]

    tensor_x, tensor_weight = (torch.tensor(array, requires_grad=True) for array in (x, weight))
    y = fp8.RoundedProduct.apply(tensor_x, tensor_weight, operands_of(name))
    y.backward(torch.tensor(gradient))

    expected_y = round_x(x) @ round_weight(weight).T
    expected_x = round_gradient(gradient) @ round_weight(weight.T).T
    expected_weight = round_gradient(gradient.T) @ round_x(x.T).T
    for found, expected in (
        (y.detach(), expected_y),
        (tensor_x.grad, expected_x),
        (tensor_weight.grad, expected_weight),
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_scales_by_row_follow_the_contracted_axis():
    # Columns that differ by 2^20 leave nothing of the smaller one in a row's scale, and everything in a column's.
    weight = torch.tensor([[1.0, 2.0**-20], [1.0, 2.0**-20]], requires_grad=True)
    x = torch.ones(1, 2, requires_grad=True)
    y = fp8.RoundedProduct.apply(x, weight, operands_of("meta-like"))
    assert y.tolist() == [[1.0, 1.0]]
    y.backward(torch.ones_like(y))
    assert x.grad.tolist() == [[2.0, 2.0**-19]]


def test_one_scale_per_tensor_need_not_be_rounded_twice():
    torch.manual_seed(0)
    once = operands_of("hybrid")
    twice = fp8.Operands(once.weight, once.activation, once.gradient, any_layout=False)
    gradients = []
    for operands in (once, twice):
        torch.manual_seed(1)
        x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
        fp8.RoundedProduct.apply(x, weight, operands).backward(torch.randn(20, 6))
        gradients.append((x.grad, weight.grad))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    assert once.any_layout and not operands_of("meta-like").any_layout


def sparse_model(**changes):
    model = random_model(**changes)
    set_expert_dispatch(model, "sparse")
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["bf16", "hybrid+router"])
def test_modules_of_a_live_model_round_the_operands_of_every_product(name):
    model = sparse_model(num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=1)
    fp8.set_arithmetic(model, fp8.arms()[name])
    round_weight, round_x, _ = ROUND[name.removesuffix("+router")]
    layer = model.model.layers[0]
    block = layer.feed_forward
    x = np.random.default_rng(0).standard_normal((2, 7, 32)).astype(np.float32)
    rows = x.reshape(14, 32)

    for linear, found in (
        (layer.self_attn.k_proj, layer.self_attn.k_proj(torch.tensor(x)).flatten(0, 1)),
        (block.router, block.router(torch.tensor(rows))[1]),
    ):
        expected = round_x(rows) @ round_weight(linear.weight.numpy()).T
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)

    found = block._run_experts(torch.tensor(rows[:5]), torch.tensor([0, 0, 2, 2, 2]))
    for expert, tokens in ((0, slice(0, 2)), (2, slice(2, 5))):
        gate_up, down = (stack[expert].numpy().T for stack in (block.experts.gate_up_proj, block.experts.down_proj))
        gate, up = np.split(round_x(rows[tokens]) @ round_weight(gate_up).T, 2, axis=1)
        expected = round_x(up * gate / (1 + np.exp(-gate))) @ round_weight(down).T
        np.testing.assert_allclose(found[tokens].numpy(), expected, rtol=1e-4, atol=1e-5)


def loss_of(model):
    ids = torch.tensor(random_ids(24, 24))
    outputs = model(input_ids=ids, output_router_logits=True, use_cache=False)
    return outputs.logits.logsumexp(-1).mean() + outputs.router_logits[0].square().mean()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_rounding_loss_and_gradients_are_those_of_plain_autograd(shape):
    model = sparse_model(**shape)
    plain = copy.deepcopy(model)
    fp8.set_arithmetic(model, fp8.arms()["float32"])
    loss, expected = loss_of(model), loss_of(plain)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-6, msg=name)


def rounded_names(model, arm):
    """Names of the modules whose products are not those of bf16."""
    fp8.set_arithmetic(model, arm)
    names = {module: name for name, module in model.named_modules()}
    return {
        names[module].removeprefix("model.layers.")
        for _, _, module in fp8.matrix_modules(model)
        if module.operands != fp8.BF16
    }


PROJECTIONS = [
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")),
    "feed_forward",
]


def test_arms_round_exactly_the_modules_that_they_say():
    model = sparse_model(num_hidden_layers=4, interleave_moe_layer_step=1, num_experts_per_tok=1)
    arms = fp8.arms()
    everywhere = {f"{layer}.{part}" for layer in range(4) for part in PROJECTIONS}
    routers = {f"{layer}.feed_forward.router" for layer in range(4)}
    assert rounded_names(model, arms["bf16"]) == set()
    assert rounded_names(model, arms["hybrid"]) == everywhere
    assert rounded_names(model, arms["hybrid+router"]) == everywhere | routers
    assert rounded_names(model, arms["meta-like"]) == {"1.feed_forward", "2.feed_forward"}
    assert rounded_names(model, arms["float32"]) == everywhere | routers | {"lm_head"}


def test_every_matrix_of_a_layer_belongs_to_a_module_that_is_listed():
    for shape in SHAPES.values():
        model = sparse_model(**shape)
        listed = set()
        for kind, _, module in fp8.matrix_modules(model):
            inside = module.experts if kind == "routed_experts" else module
            listed |= {id(parameter) for parameter in inside.parameters()}
        matrices = {
            id(parameter)
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and "embed_tokens" not in name
        }
        assert listed == matrices


def test_arms_round_in_the_formats_that_they_say():
    hybrid, meta = operands_of("hybrid"), operands_of("meta-like")
    for operands, recipe in ((hybrid, recipes()["hybrid"]), (meta, recipes()["meta"])):
        assert operands.weight.keywords["rounding"] == recipe.weight
        assert operands.activation.keywords["rounding"] == recipe.activation
        assert operands.gradient.keywords["rounding"].format == "e5m2"
    assert meta.activation.keywords["rounding"].scaling.cap == 1200


def test_what_a_recipe_does_not_round_is_bf16():
    operands = fp8.recipe_operands(recipes()["int4"])
    assert operands.activation is fp8.bf16_round_trip and operands.gradient is fp8.bf16_round_trip


def test_experts_have_scales_of_their_own():
    # Two experts whose weights differ by 2^20: a scale for both would round those of the second to zero.
    model = sparse_model(num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1)
    fp8.set_arithmetic(model, fp8.arms()["hybrid"])
    block = model.model.layers[0].feed_forward
    with torch.no_grad():
        block.experts.gate_up_proj[1] *= 2.0**-20
    x = torch.randn(6, block.hidden_dim)
    alone = block._run_experts(x[3:], torch.ones(3, dtype=torch.long))
    together = block._run_experts(x, torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(together[3:], alone)
    assert alone.abs().max() > 0


def test_weights_stay_as_they_are_and_float32():
    for arm in fp8.arms().values():
        model = sparse_model(**SHAPES["every layer MoE, top-1"])
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fp8.set_arithmetic(model, arm)
        loss_of(model).backward()
        after = model.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype is torch.float32
            assert torch.equal(after[name], tensor)
        assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())


def test_a_model_that_cannot_be_replaced_is_refused_before_anything_changes():
    model = random_model(**SHAPES["every layer MoE, top-1"])
    with pytest.raises(ProbeError, match="routed_experts of layer 0 is a Llama4TextMoe.*set_expert_dispatch"):
        fp8.set_arithmetic(model, fp8.arms()["hybrid"])
    assert type(model.lm_head) is torch.nn.Linear


def test_extremes_by_hand():
    model = sparse_model(num_hidden_layers=1, num_experts_per_tok=1)
    fp8.set_arithmetic(model, fp8.arms()["bf16"])
    extremes = fp8.Extremes()
    extremes.watch(model)
    router = model.model.layers[0].feed_forward.router
    x = torch.zeros(2, 32)
    x[1, 7] = -4.0
    logits = router(x)[1]
    (2 * logits.sum() - 5 * logits[0, 0]).backward()
    fp8.unwatch(model)
    router(100 * x)
    record = extremes.record()
    assert record["input"]["router"] == {"amax": [4.0], "rms": [pytest.approx(0.5)]}
    # 12 gradients: one of 2 - 5, eleven of 2
    assert record["gradient"]["router"] == {"amax": [3.0], "rms": [pytest.approx(((9 + 11 * 4) / 12) ** 0.5)]}


def test_extremes_keep_what_is_not_finite():
    extremes = fp8.Extremes()
    for value in (1.0, torch.nan, 2.0):
        extremes.add(("input", "router", 0), torch.tensor([[value]]))
    assert np.isnan(extremes.record()["input"]["router"]["amax"])


def test_a_step_that_is_not_finite_leaves_the_weights():
    model = sparse_model(num_hidden_layers=1, num_experts_per_tok=1)
    fp8.set_arithmetic(model, fp8.arms()["bf16"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch = torch.tensor(random_ids(16))
    before = model.lm_head.weight.clone()
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * torch.inf)
    loss, _ = fp8.train_step(model, optimizer, batch)
    assert not np.isfinite(loss) and torch.equal(model.lm_head.weight, before)
    handle.remove()
    loss, norm = fp8.train_step(model, optimizer, batch)
    assert np.isfinite(loss) and norm > 0 and not torch.equal(model.lm_head.weight, before)


def test_evaluation_compares_arithmetics_on_the_same_weights():
    rows = torch.tensor(random_ids(33, 33, 33))
    model = sparse_model(num_hidden_layers=3, num_experts_per_tok=1)
    arms = fp8.arms()
    records = {}
    for name in ("bf16", "hybrid+router"):
        fp8.set_arithmetic(model, arms[name])
        expected_loss, chosen = fp8.predict(model, rows)
        records[name] = record = fp8.evaluate(model, arms[name], rows)
        assert record["heldout_loss"] == expected_loss
        assert record["load"] == [np.bincount(layer, minlength=6).tolist() for layer in chosen.numpy()]
        assert fp8.predict(model, rows)[0] == expected_loss, "the arm's own arithmetic is back in place"
    assert records["bf16"]["flips"] == [0.0, 0.0, 0.0]
    assert records["bf16"]["heldout_loss"] == records["bf16"]["heldout_loss_bf16"]
    assert records["bf16"]["flips_floor"] == records["hybrid+router"]["flips_floor"]
    assert records["bf16"]["heldout_loss_float32"] == records["hybrid+router"]["heldout_loss_float32"]
    chosen = {}
    for name in ("bf16", "hybrid+router"):
        fp8.set_arithmetic(model, arms[name])
        chosen[name] = fp8.predict(model, rows)[1].numpy()
    expected = (chosen["bf16"] != chosen["hybrid+router"]).mean(axis=1)
    assert records["hybrid+router"]["flips"] == expected.tolist() and expected.max() > 0


def test_flips_by_hand(monkeypatch):
    model = sparse_model(num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=1)
    own, bf16, float32 = ([0, 1, 2, 3, 3], [0, 1, 2, 2, 3], [0, 0, 0, 2, 3])
    planted = iter([(loss, torch.tensor([chosen])) for loss, chosen in ((3.0, own), (2.0, bf16), (1.0, float32))])
    monkeypatch.setattr(fp8, "predict", lambda model, rows: next(planted))
    record = fp8.evaluate(model, fp8.arms()["hybrid"], torch.tensor(random_ids(8)))
    assert record == {
        "heldout_loss": 3.0,
        "heldout_loss_bf16": 2.0,
        "heldout_loss_float32": 1.0,
        "flips": [0.2],
        "flips_floor": [0.4],
        "load": [[1, 1, 1, 2]],
    }


def test_loss_of_a_prediction_is_the_mean_over_tokens():
    model = sparse_model(num_hidden_layers=1, num_experts_per_tok=1)
    fp8.set_arithmetic(model, fp8.arms()["float32"])
    rows = torch.tensor(random_ids(*[17] * 11))  # one batch of 8 and one of 3
    log_probability = model(rows[:, :-1]).logits.log_softmax(-1).gather(-1, rows[:, 1:, None])
    assert fp8.predict(model, rows)[0] == pytest.approx(-log_probability.mean().item(), rel=1e-5)


@pytest.fixture()
def small_runs(tmp_path, monkeypatch):
    """Runs of three steps on a corpus of a few lines; returns where a folder of runs may lie."""
    tokenizer = probe.load("tiny-scout").tokenizer
    for split in ("train", "heldout"):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        lines = [json.dumps({"text": f"document {n} says {n * n} " * 20}) for n in range(20)]
        (tmp_path / "corpus" / split / "numbers.jsonl").write_text("\n".join(lines))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(plan, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(plan, "TOKENIZER", tmp_path / "tokenizer")
    sizes = dict(N_LAYERS=3, CONTEXT=128, BATCH_ROWS=2, N_STEPS=3, HELDOUT_ROWS=2)
    for name, value in (sizes | dict(LOG_EVERY=1, EVALUATE_EVERY=2, SAVE_EVERY=1)).items():
        monkeypatch.setattr(fp8, name, value)
    monkeypatch.setattr(fp8, "RESULTS", tmp_path / "results.json")
    return tmp_path


@pytest.mark.parametrize("name", ["hybrid+router-1", "meta-like-0"])
def test_a_run_that_was_stopped_ends_in_the_same_state_bit_by_bit(small_runs, monkeypatch, name):
    run = fp8.runs()[name]
    real_step = fp8.train_step

    def train(folder):
        monkeypatch.setattr(plan, "RUNS", folder)
        fp8.train_run(run, device="cpu", progress=Progress(disable=True))
        log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        return load_file(run.folder / "weights.safetensors"), [{**record, "seconds": 0} for record in log]

    weights, log = train(small_runs / "whole")
    assert [record["step"] for record in log] == [1, 2, 3]
    assert ["load" in record for record in log] == [False, True, True]

    steps = []

    def step_until_killed(*args):
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real_step(*args)

    monkeypatch.setattr(fp8, "train_step", step_until_killed)
    with pytest.raises(KeyboardInterrupt):
        train(small_runs / "killed")
    # A stop between log and state: the step that comes again must not stand in the log twice.
    with (run.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({**log[-1], "loss": -1.0}) + "\n")
    monkeypatch.setattr(fp8, "train_step", real_step)
    resumed_weights, resumed_log = train(small_runs / "killed")
    assert resumed_log == log
    for key, tensor in weights.items():
        assert torch.equal(resumed_weights[key], tensor), key
    assert not (run.folder / "state.safetensors").exists()


def test_the_command_trains_what_is_named_and_writes_numbers(small_runs, monkeypatch, capsys):
    monkeypatch.setattr(plan, "RUNS", small_runs / "runs")
    monkeypatch.setattr("sys.argv", ["fp8", "--collect"])
    with pytest.raises(SystemExit):
        fp8.main()
    assert "no seed is finished in every arm" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["fp8", "bf16-0", "hybrid-1", "--device", "cpu"])
    fp8.main()
    assert not fp8.RESULTS.exists(), "seeds that are finished in part are not compared"
    monkeypatch.setattr("sys.argv", ["fp8", *(f"{arm}-0" for arm in fp8.arms()), "--device", "cpu"])
    fp8.main()
    results = json.loads(fp8.RESULTS.read_text())
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [(arm, 0) for arm in fp8.arms()]
    assert results["runs"][0]["evaluation"]["step"] == [2, 3]
    assert "| `hybrid` |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["fp8", "fp4-0"])
    with pytest.raises(SystemExit):
        fp8.main()
    assert "no such run: fp4-0" in capsys.readouterr().err


def test_arms_of_a_seed_start_alike_and_see_the_same_rows(small_runs, monkeypatch):
    monkeypatch.setattr(plan, "RUNS", small_runs / "runs")
    first, again, other = (fp8.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    rows, heldout = fp8.load_rows(0)
    kept_rows, kept_heldout = fp8.load_rows(0)
    assert torch.equal(rows, kept_rows) and torch.equal(heldout, kept_heldout)
    other_rows, other_heldout = fp8.load_rows(1)
    assert not torch.equal(rows, other_rows) and torch.equal(heldout, other_heldout)


def test_measures_by_hand():
    run = {"evaluation": {"load": [[[9, 9]], [[8, 0, 0, 0], [2, 2, 3, 1]]], "flips": [[1.0, 1.0], [0.1, 0.3]]}}
    assert fp8.max_violation(run) == pytest.approx((3 + 0.5) / 2)
    assert fp8.n_unused(run) == 3
    assert fp8.evaluated("flips")(run) == pytest.approx(0.2)
    assert fp8.evaluated("flips", 0)(run) == 1.0


# The committed numbers.


@pytest.fixture(scope="module")
def results():
    return json.loads(fp8.RESULTS.read_text())


def rows_of_readme(heading):
    """Cells by arm of the README's table whose heading begins so."""
    text = Path("training/README.md").read_text()
    table = text[text.index(heading) :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in rows}


def numbers(cell):
    return [float(number) for number in re.findall(r"[+-]?\d+\.?\d*", cell)]


def spread(values, n_digits):
    return [round(mean(values), n_digits), round(stdev(values), n_digits)]


def test_the_committed_results_hold_every_arm_and_seed(results):
    expected = {(arm, seed) for arm in fp8.arms() for seed in fp8.SEEDS}
    assert len(results["runs"]) == len(expected)
    assert {(run["arm"], run["seed"]) for run in results["runs"]} == expected
    assert results["n_steps"] == fp8.N_STEPS and results["n_layers"] == fp8.N_LAYERS
    for run in results["runs"]:
        assert run["training"]["step"] == list(range(fp8.LOG_EVERY, fp8.N_STEPS + 1, fp8.LOG_EVERY))
        assert len(run["training"]["loss"]) == len(run["training"]["step"])
        evaluation = run["evaluation"]
        assert evaluation["step"][-1] == fp8.N_STEPS and len(evaluation["step"]) >= 3
        load = np.array(evaluation["load"])
        assert load.shape == (len(evaluation["step"]), fp8.N_LAYERS, results["n_experts"])
        assert (load.sum(axis=-1) == results["n_heldout_tokens"]).all()
        if run["arm"] == "bf16":
            assert evaluation["heldout_loss"] == evaluation["heldout_loss_bf16"]
            assert not np.any(evaluation["flips"])
        if run["arm"] == "float32":
            assert evaluation["heldout_loss"] == evaluation["heldout_loss_float32"]
            assert evaluation["flips"] == evaluation["flips_floor"]


def test_the_losses_in_the_readme_are_those_of_the_results(results):
    table = rows_of_readme("| arm | held-out loss | minus")
    at_the_end = {(run["arm"], run["seed"]): run["evaluation"] for run in results["runs"]}
    assert list(table) == list(fp8.arms())
    for arm, (loss, difference, by_seed, of_weights, non_finite) in table.items():
        own = [at_the_end[arm, seed]["heldout_loss"][-1] for seed in fp8.SEEDS]
        in_bf16 = [at_the_end[arm, seed]["heldout_loss_bf16"][-1] for seed in fp8.SEEDS]
        base = [at_the_end["bf16", seed]["heldout_loss"][-1] for seed in fp8.SEEDS]
        differences = [a - b for a, b in zip(own, base, strict=True)]
        assert numbers(loss) == pytest.approx(spread(own, 3), abs=1.1e-3)
        assert numbers(difference) == pytest.approx(spread(differences, 4), abs=1.1e-4)
        assert numbers(by_seed) == pytest.approx(differences, abs=1.1e-4)
        weights = [a - b for a, b in zip(in_bf16, base, strict=True)]
        assert numbers(of_weights) == pytest.approx(spread(weights, 4), abs=1.1e-4)
        assert numbers(non_finite) == [sum(run["n_non_finite"] for run in results["runs"] if run["arm"] == arm)]


def test_the_routing_in_the_readme_is_that_of_the_results(results):
    table = rows_of_readme("| arm | imbalance | minus")

    def violation(run):
        load = run["evaluation"]["load"][-1]
        return mean(max(layer) / (sum(layer) / len(layer)) - 1 for layer in load)

    by_arm = {arm: [run for run in results["runs"] if run["arm"] == arm] for arm in fp8.arms()}
    assert list(table) == list(by_arm)
    base = [violation(run) for run in by_arm["bf16"]]
    for arm, (imbalance, difference, unused, flips, floor) in table.items():
        values = [violation(run) for run in by_arm[arm]]
        assert numbers(imbalance) == pytest.approx(spread(values, 2), abs=0.011)
        differences = [a - b for a, b in zip(values, base, strict=True)]
        assert numbers(difference) == pytest.approx(spread(differences, 2), abs=0.011)
        zeros = [sum(layer.count(0) for layer in run["evaluation"]["load"][-1]) for run in by_arm[arm]]
        assert numbers(unused) == pytest.approx(spread(zeros, 1), abs=0.11)
        first, middle, *at_the_end = numbers(flips)
        flipped = [[100 * mean(layers) for layers in run["evaluation"]["flips"]] for run in by_arm[arm]]
        assert first == pytest.approx(mean(run[0] for run in flipped), abs=0.011)
        assert middle == pytest.approx(mean(run[len(run) // 2] for run in flipped), abs=0.011)
        assert at_the_end == pytest.approx(spread([run[-1] for run in flipped], 2), abs=0.011)
        floors = [100 * mean(run["evaluation"]["flips_floor"][-1]) for run in by_arm[arm]]
        assert numbers(floor) == pytest.approx(spread(floors, 2), abs=0.011)


def test_the_tables_in_the_readme_are_those_that_the_command_prints(results):
    readme = Path("training/README.md").read_text()
    tables = fp8.tables(results).split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert table in readme
