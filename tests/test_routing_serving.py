"""What routing costs a server: dropped assignments, devices and distinct experts, by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from probe import routing_stats
from probe.schema import ProbeError
from tests.planted import from_experts
from tests.routing_cases import close, random_recording

# Capacity


def test_capacity_by_hand():
    # Batches of four tokens: experts 0 0 0 1, then 1 1 1 1, then one token alone.
    chosen = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0])[:, None]
    recording = from_experts(chosen, n_experts=2, lengths=[5, 4])
    result = routing_stats.capacity(recording, tokens_per_batch=4, capacity_factors=[1, 1.5, 2])
    # Room for 2, 3 and 4 tokens; the last batch has room for 1 (half a token, rounded up).
    close(result["drop_share"][:, 0], [3 / 9, 1 / 9, 0])
    assert result["n_batches"] == 3
    close(result["batch_drop_share"].sel(capacity_factor=1, quantile=0.5), 1 / 4)


def test_the_room_of_a_whole_number_is_not_rounded_up():
    chosen = np.tile(np.arange(10), 3)[:, None]
    result = routing_stats.capacity(
        from_experts(chosen, n_experts=10, lengths=[30]), tokens_per_batch=10, capacity_factors=[1.1, 1.0]
    )
    close(result["drop_share"], 0)
    one = from_experts(np.zeros((30, 1), int), n_experts=10, lengths=[30])
    dropped = routing_stats.capacity(one, tokens_per_batch=30, capacity_factors=[1.1, 0.1])
    close(dropped["drop_share"][:, 0], [26 / 30, 29 / 30])  # 1.1 · 3 is 3.3, rounded up to 4; 0.3 to 1


def test_nothing_is_dropped_with_room_for_all():
    result = routing_stats.capacity(random_recording(top_k=2), tokens_per_batch=7, capacity_factors=[5.0])
    close(result["drop_share"], 0)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens_per_batch": 0},
        {"tokens_per_batch": 4, "capacity_factors": []},
        {"tokens_per_batch": 4, "capacity_factors": [0.0]},
        {"tokens_per_batch": 4, "capacity_factors": [np.nan]},
    ],
)
def test_capacity_refuses_what_is_no_capacity(options):
    with pytest.raises(ProbeError, match="tokens_per_batch|capacity_factors"):
        routing_stats.capacity(random_recording(), **options)


# Devices


def test_device_load_by_hand():
    chosen = np.array([[[0, 1]], [[0, 2]], [[0, 3]], [[1, 0]]])
    recording = from_experts(chosen, n_experts=4, lengths=[4])
    result = routing_stats.device_load(recording, devices=2, token_bytes=100)
    close(result["device_load"][0], [6 / 8, 2 / 8])
    close(result["imbalance"], 1.5)
    close(result["devices_per_token"], 6 / 4)  # tokens 1 and 2 need both devices
    close(result["sent_bytes"], 2 * 100 * 1.5 / 2)
    placed = routing_stats.device_load(recording, devices=[0, 1, 0, 1])
    close(placed["device_load"][0], [5 / 8, 3 / 8])
    assert "sent_bytes" not in placed


def test_one_device_is_in_balance_and_sends_nothing():
    result = routing_stats.device_load(random_recording(top_k=2), devices=1, token_bytes=10)
    close(result["imbalance"], 1)
    close(result["sent_bytes"], 0)


def test_a_device_for_each_expert_is_the_maximum_violation():
    recording = random_recording(lengths=(9, 1, 0, 14, 6, 7, 8))
    devices = routing_stats.device_load(recording, devices=5)
    imbalance = routing_stats.imbalance(recording)
    close(devices["imbalance"], 1 + imbalance["max_violation"])
    close(devices["lower"], 1 + imbalance["max_violation_lower"])
    close(devices["upper"], 1 + imbalance["max_violation_upper"])


@pytest.mark.parametrize("devices", [0, 3, [0, 1], [0, 1, 2, 3, -1], [0.5] * 5])
def test_device_load_refuses_what_is_no_placement(devices):
    with pytest.raises(ProbeError, match="devices"):
        routing_stats.device_load(random_recording(), devices=devices)


# Distinct experts


def test_distinct_experts_by_hand():
    chosen = np.array([0, 0, 1, 2, 0, 0])[:, None]
    recording = from_experts(chosen, n_experts=4, lengths=[5, 1])
    result = routing_stats.distinct_experts(recording, batch_sizes=[1, 2, 4, 8]).isel(layer=0)
    shares = np.array([4, 1, 1, 0]) / 6
    close(result["distinct"], [sum(1 - (1 - shares) ** size) for size in (1, 2, 4, 8)])
    close(result["uniform"], [4 * (1 - 0.75**size) for size in (1, 2, 4, 8)])
    # Runs of the first sample: 00 12, then 0012; eight tokens in a row are in no sample.
    close(result["consecutive"], [1, 1.5, 3, np.nan])


def test_a_uniform_router_touches_as_many_as_the_formula_says():
    chosen = np.stack([np.tile(np.arange(8), 4), np.tile((np.arange(8) + 3) % 8, 4)], axis=-1)[:, None]
    result = routing_stats.distinct_experts(from_experts(chosen, n_experts=8, lengths=[32]))
    close(result["distinct"][0], result["uniform"])
    close(result["uniform"][0], 2)


def test_distinct_experts_of_drawn_tokens():
    recording = random_recording(top_k=2, lengths=(30, 40))
    chosen = recording["routing"]["expert_index"].values[:, 1]
    random = np.random.default_rng(0)
    drawn = [len(np.unique(chosen[random.integers(70, size=5)])) for _ in range(4000)]
    result = routing_stats.distinct_experts(recording, batch_sizes=[5])
    assert result["distinct"][1, 0] == pytest.approx(np.mean(drawn), rel=0.02)


def test_positions_that_are_missing_end_a_run():
    routing = from_experts(np.array([0, 1, 0, 1])[:, None], n_experts=2, lengths=[4])["routing"].to_dataset()
    gap = routing.isel(token=[0, 1, 3])
    result = routing_stats.distinct_experts(gap, batch_sizes=[2, 3]).isel(layer=0)
    close(result["consecutive"], [2, np.nan])


@pytest.mark.parametrize("batch_sizes", [[], [0], [1.5], [[1, 2]]])
def test_distinct_experts_refuses_what_is_no_size(batch_sizes):
    with pytest.raises(ProbeError, match="batch_sizes"):
        routing_stats.distinct_experts(random_recording(), batch_sizes=batch_sizes)
