"""Figures show the numbers that they were given, at the right place."""

import inspect

import numpy as np
import pytest

from probe import figure_parts, figures, findings, report, routing_stats
from tests import planted


def recorded(*, n_experts=8, layers=range(4), n_documents=8, seed=0, **options):
    rng = np.random.default_rng(seed)
    n_tokens = 50 * n_documents
    logits = rng.normal(size=(n_tokens, len(layers), n_experts)) + 0.4 * rng.normal(size=n_experts)
    domains = ["a", "b"] * (n_documents // 2)
    return planted.from_logits(logits, lengths=[50] * n_documents, layers=list(layers), domains=domains, **options)


def test_load_is_drawn_as_a_log_ratio_to_an_even_share():
    result = routing_stats.load_interval(recorded())
    figure = figures.expert_load(result)
    np.testing.assert_allclose(figure.data[0].z, np.log2(result["load"].values * 8))
    assert list(figure.data[0].x) == list(range(8))
    scale = figure.layout.coloraxis
    assert scale.cmin == -scale.cmax


def test_sorted_load_falls_from_left_to_right_and_keeps_the_experts_number():
    result = routing_stats.load_interval(recorded())
    by_load = figures.expert_load(result).data[1]
    assert by_load.visible is False
    assert (np.diff(by_load.z, axis=1) <= 0).all()
    load = result["load"].values
    assert [int(cell[1]) for cell in by_load.customdata[2]] == np.argsort(-load[2], kind="stable").tolist()


def test_dense_layers_are_gaps_and_nope_layers_carry_their_sign():
    result = routing_stats.load_interval(recorded(layers=[1, 3, 5, 7]))
    figure = figures.expert_load(result)
    z = np.asarray(figure.data[0].z)
    assert list(figure.data[0].y) == list(range(8))
    assert np.isnan(z[[0, 2, 4, 6]]).all() and np.isfinite(z[[1, 3, 5, 7]]).all()
    np.testing.assert_allclose(z[[1, 3, 5, 7]], np.log2(result["load"].values * 8))
    assert figure.layout.yaxis.ticktext == ("1", "3 ◇", "5", "7 ◇")
    assert list(figure.layout.yaxis.tickvals) == [1, 3, 5, 7]
    assert figure.layout.yaxis.range == (-0.5, 7.5)  # layer 0 at the bottom
    assert figure.layout.yaxis.title.text == "layer (◇ NoPE, gap: dense)"


@pytest.mark.parametrize(
    ("layers", "has_routers", "gap"),
    [
        ([1, 3, 5, 7], True, "dense"),
        ([3, 7, 11], True, "dense"),
        ([0, 1, 2], True, None),
        ([0, 2, 4], True, "not recorded"),  # every second layer of Llama 4 would begin at 1
        ([1, 3, 7], True, "not recorded"),
        ([5], True, "not recorded"),
        ([1, 3, 5, 7], False, "not recorded"),  # attention is in dense layers too
    ],
)
def test_a_gap_is_called_dense_only_between_layers_with_routers_that_stand_as_in_llama_4(layers, has_routers, gap):
    result = routing_stats.imbalance(recorded(layers=layers))
    title = figure_parts.layer_title(result, has_routers=has_routers)
    assert title.endswith(f"gap: {gap})") if gap else "gap" not in title
    assert ("◇ NoPE" in title) == any(layer % 4 == 3 for layer in layers)


def ticks(n_layers, nope, **options):
    kinds = np.array(["nope" if layer in nope else "rope" for layer in range(n_layers)])
    return figure_parts.layer_ticks(np.arange(n_layers), kinds, **options)


def test_labels_of_layers_thin_out_but_every_nope_layer_keeps_its_sign():
    assert ticks(3, [2]) == ([0, 1, 2], ["0", "1", "2 ◇"])
    shown, labels = ticks(48, range(3, 48, 4))
    assert shown == [0, *range(3, 48, 4)] and labels == ["0", *(f"{layer} ◇" for layer in range(3, 48, 4))]
    assert ticks(30, [])[0] == list(range(0, 30, 2))
    assert ticks(9, [4], most=5) == ([0, 2, 4, 6, 8], ["0", "2", "4 ◇", "6", "8"])
    assert ticks(9, [3], most=5) == ([0, 3, 6, 8], ["0", "3 ◇", "6", "8"])  # 2 and 4 would touch it
    assert ticks(6, range(6), most=3) == (list(range(6)), ["0 ◇", "◇", "2 ◇", "◇", "4 ◇", "◇"])
    assert ticks(1, [0]) == ([0], ["0 ◇"])


def test_a_deep_models_axis_names_its_nope_layers():
    figure = figures.imbalance(routing_stats.imbalance(recorded(layers=range(48))))
    assert figure.layout.yaxis.ticktext == ("0", *(f"{layer} ◇" for layer in range(3, 48, 4)))
    assert list(figure.layout.yaxis.tickvals) == [0, *range(3, 48, 4)]


def test_hover_gives_the_value_with_its_interval_and_bounds_an_unused_expert():
    chosen = np.array([[0], [0], [0], [1]] * 15)
    tree = planted.from_experts(chosen, n_experts=3, lengths=[10] * 6)
    result = routing_stats.load_interval(tree)
    figure = figures.expert_load(result)
    first, unused = figure.data[0].customdata[0][0][0], figure.data[0].customdata[0][2][0]
    lower, upper = (100 * float(result[name][0, 0]) for name in ("lower", "upper"))
    assert first == f"expert 0<br>load 75.00 % [{lower:.2f}, {upper:.2f}]"
    assert unused == f"expert 2<br>no token seen<br>load ≤ {100 * float(result['upper'][0, 2]):.2g} % (rule of three)"
    assert figure.data[0].text[0][2] == "×"
    assert np.isfinite(figure.data[0].z[0][2])  # clipped to the lowest colour, which a gap has not


def test_hover_says_why_an_interval_is_withheld():
    few = planted.from_experts(np.array([[0], [0], [1]] * 4), n_experts=2, lengths=[3] * 4, domains=["a", "b"] * 2)
    cells = figures.expert_load(routing_stats.load_interval(few)).data[0].customdata
    assert cells[0][0][0] == "expert 0<br>load 66.67 %<br>interval withheld: fewer than 5 documents, or 3 in effect"
    lone = planted.from_experts(np.array([[0]] * 190 + [[1]] * 10), n_experts=2, lengths=[10] * 20)
    cells = figures.expert_load(routing_stats.load_interval(lone)).data[0].customdata
    assert cells[0][1][0] == "expert 1<br>load 5.00 %<br>interval withheld: rests on too few documents"
    cells = figures.specialization(routing_stats.specialization(few)).data[0].customdata
    assert "<br>lift 1.00 ×<br>interval withheld: fewer than 5 documents, or 3 in effect<br>a" in cells[0][0][0]


def test_a_cell_that_may_be_even_has_a_dot_or_no_colour():
    result = routing_stats.load_interval(recorded())
    settled = ((result["lower"] * 8 > 1) | (result["upper"] * 8 < 1)).values
    text = np.asarray(figures.expert_load(result).data[0].text)
    assert ((text == "·") == ~settled).all()
    wide = routing_stats.load_interval(recorded(n_experts=64))
    settled = ((wide["lower"] * 64 > 1) | (wide["upper"] * 64 < 1)).values
    z = np.asarray(figures.expert_load(wide).data[0].z)
    assert (z[~settled] == 0).all() and (z[settled] != 0).all()


def test_imbalance_stands_beside_its_null():
    result = routing_stats.imbalance(recorded())
    null, rope, nope = figures.imbalance(result).data
    np.testing.assert_array_equal(null.x, result["max_violation_null_upper"].values)
    np.testing.assert_array_equal(rope.y, [0, 1, 2])
    np.testing.assert_array_equal(nope.y, [3])
    np.testing.assert_allclose(rope.x, result["max_violation"].values[:3])
    np.testing.assert_allclose(rope.x + rope.error_x.array, result["max_violation_upper"].values[:3])
    np.testing.assert_allclose(rope.x - rope.error_x.arrayminus, result["max_violation_lower"].values[:3])
    assert rope.marker.color != nope.marker.color and rope.marker.symbol != nope.marker.symbol


def test_repetition_is_in_per_cent_beside_independent_tokens():
    result = routing_stats.repetition(recorded(layers=[0]))
    null, points = figures.repetition(result).data
    np.testing.assert_allclose(null.x, 100 * result["null"].values)
    np.testing.assert_allclose(points.x, 100 * result["repetition"].values)
    assert "%" in figures.repetition(result).layout.xaxis.title.text


def test_margins_are_drawn_as_their_quantiles():
    result = routing_stats.margin(recorded(layers=[0, 1]))
    thin, thick, median = figures.margin(result).data
    quantiles = result["margin"].values
    np.testing.assert_allclose(np.reshape(thin.x, (2, 3))[:, :2], quantiles[:, [0, 4]])
    np.testing.assert_allclose(np.reshape(thick.x, (2, 3))[:, :2], quantiles[:, [1, 3]])
    np.testing.assert_allclose(median.x, quantiles[:, 2])
    np.testing.assert_allclose(median.x + median.error_x.array, result["margin_upper"].values[:, 2])
    np.testing.assert_allclose(median.x - median.error_x.arrayminus, result["margin_lower"].values[:, 2])
    assert "logits" in figures.margin(result).layout.xaxis.title.text


def test_domains_are_panels_of_lift_on_shared_axes():
    result = routing_stats.specialization(recorded(n_documents=12))
    cells = findings.specialized_cells(result)
    figure = figures.specialization(result, settled=cells["settled"])
    assert [panel.meta for panel in figure.data] == ["a", "b"]
    for panel, name in zip(figure.data, ("a", "b"), strict=True):
        lift = result["lift"].sel(domain=name).transpose("layer", "expert").values
        np.testing.assert_allclose(panel.z, np.log2(lift))
        dots = np.asarray(panel.text) == "·"
        assert not (dots & cells["settled"].sel(domain=name).values).any()
    assert figure.layout.xaxis2.matches is not None and figure.layout.yaxis2.matches is not None


def test_a_domains_name_is_no_markup():
    tree = planted.from_experts(np.zeros((8, 1), int), n_experts=2, lengths=[4, 4], domains=["<b>x</b>", "y & z" * 9])
    figure = figures.specialization(routing_stats.specialization(tree))
    heads = [annotation.text for annotation in figure.layout.annotations]
    assert heads[0] == "<b>&lt;b&gt;x&lt;/b&gt;</b>"
    assert heads[1].endswith("…</b>") and "& " not in heads[1].replace("&amp;", "")
    assert figure.data[0].customdata[0][0][0].endswith("<br>&lt;b&gt;x&lt;/b&gt;")


def test_transitions_are_panels_of_lift_and_rare_ones_are_missing():
    result = routing_stats.transition(recorded(n_experts=4, layers=[1, 3, 5]))
    enough = findings.enough_expected(result, least=20)
    figure = figures.transition(result, drawn=enough)
    assert [annotation.text for annotation in figure.layout.annotations] == ["<b>1 → 3 ◇</b>", "<b>3 ◇ → 5</b>"]
    for at, panel in enumerate(figure.data):
        drawn = enough.isel(layer=at).values
        np.testing.assert_allclose(np.asarray(panel.z)[drawn], np.log2(result["lift"].values[at][drawn]), rtol=1e-5)
        assert np.isnan(np.asarray(panel.z)[~drawn]).all()


def test_many_steps_and_domains_are_thinned():
    result = routing_stats.transition(recorded(n_experts=2, layers=range(30)))
    heads = [annotation.text for annotation in figures.transition(result).layout.annotations]
    assert len(heads) == figures.MAX_PANELS
    assert heads[0] == "<b>0 → 1</b>" and heads[-1].startswith("<b>28")


def information(tree):
    return report.compute(tree)["mutual_information"]


def test_information_stands_beside_its_null_and_what_may_be_chance_is_hollow():
    result = information(recorded(token_id=np.arange(400) % 7))
    told = findings.tells(result)
    told[0, 0], told[0, 1] = True, False
    figure = figures.information(result, told=told)
    assert [head.text for head in figure.layout.annotations] == ["<b>the token</b>", "<b>the document's domain</b>"]
    for column, label in enumerate(("token_id", "domain")):
        null, mean, rope, nope = figure.data[4 * column : 4 * column + 4]
        own = result.sel(label=label)
        np.testing.assert_allclose(null.x, 100 * own["null_upper"])
        np.testing.assert_allclose(mean.x, 100 * own["null"])
        np.testing.assert_allclose(rope.x, 100 * own["normalized"][:3])
        np.testing.assert_allclose(nope.x, 100 * own["normalized"][3:])
    assert figure.data[2].marker.symbol[:2] == ("circle", "circle-open")


def test_paths_are_written_beside_their_shares():
    experts = np.array([[0, 1, 2]] * 30 + [[2, 1, 0]] * 20 + [[1, 0, 0]] * 10)
    tree = planted.from_experts(experts, n_experts=3, lengths=[10] * 6, layers=[1, 3, 5])
    result = routing_stats.paths(tree, n=15)
    written, expected, recorded_ = figures.paths(result).data
    assert "".join(written.text) == "012210100"
    assert list(written.y) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    np.testing.assert_allclose(recorded_.x, [50, 100 / 3, 50 / 3])
    np.testing.assert_allclose(expected.x, [100 * 0.5 * 50 / 60 * 0.5, 100 / 3 * 50 / 60 * 0.5, 100 / 6 / 6 * 0.5])
    assert figures.paths(result).layout.xaxis2.type == "log"
    assert "path 1: 0 → 1 → 2<br>50 % of tokens" in recorded_.customdata[0]


def test_a_long_path_is_in_its_hover():
    result = routing_stats.paths(recorded(layers=range(20)), n=15)
    expected, recorded_ = figures.paths(result).data
    words = recorded_.customdata[0].split("<br>")
    assert words[0].startswith("path 1: ") and words[0].count("→") == 12 and words[1].count("→") == 7
    np.testing.assert_allclose(expected.x, 100 * result["expected"])


def test_batches_are_layers_their_median_and_a_uniform_router():
    result = routing_stats.distinct_experts(recorded())
    band, lines, median, uniform, consecutive, _, _ = figures.batches(result).data
    sizes = result.sizes["batch_size"]
    np.testing.assert_allclose(np.reshape(lines.y, (4, sizes + 1))[:, :-1], result["distinct"])
    np.testing.assert_allclose(np.reshape(consecutive.y, (4, sizes + 1))[:, :-1], result["consecutive"])
    np.testing.assert_allclose(median.y, np.median(result["distinct"], axis=0))
    np.testing.assert_allclose(uniform.y, result["uniform"])
    np.testing.assert_allclose(band.y[:sizes], result["upper"].max("layer"))
    np.testing.assert_allclose(band.y[sizes:][::-1], result["lower"].min("layer"))


def test_every_figure_shares_template_and_takes_a_title():
    tree = recorded()
    drawn = {
        figures.expert_load: routing_stats.load_interval,
        figures.imbalance: routing_stats.imbalance,
        figures.margin: routing_stats.margin,
        figures.repetition: routing_stats.repetition,
        figures.specialization: routing_stats.specialization,
        figures.transition: routing_stats.transition,
        figures.paths: routing_stats.paths,
        figures.batches: routing_stats.distinct_experts,
    }
    for draw, statistic in drawn.items():
        assert len(inspect.signature(draw).parameters) <= 6
        figure = draw(statistic(tree), title="What one sees")
        assert figure.layout.title.text == "What one sees"
        assert figure.layout.template.layout.font == figures.TEMPLATE.layout.font
        untitled = draw(statistic(tree), title="")
        assert untitled.layout.title.text is None
        assert (untitled.layout.legend.y, untitled.layout.legend.yref) == (1, "container")
        height = figure.layout.height
        assert height - untitled.layout.height == figure_parts.TITLE_ROOM
        below, middle = (height - part.y * height for part in (figure.layout.legend, figure.layout.title))
        assert (below, middle) == pytest.approx((figure_parts.TITLE_ROOM, figure_parts.TITLE_ROOM / 2))


@pytest.mark.parametrize(
    ("above", "end"),
    [([0.2], 1), ([1.5, 1.2], 2), ([9.0], figure_parts.LARGEST_LIMIT), ([], 1), ([0.5] * 200 + [6], 1)],
)
def test_colours_hold_all_but_a_few_ratios(above, end):
    assert figure_parts.limit(np.array([*above, -3.0, np.nan])) == end


def test_nothing_seen_lies_below_every_ratio():
    logs = figure_parts.log2(np.array([0, 1, 4, 2.0**-9, np.nan]))
    np.testing.assert_array_equal(logs, [-10, 0, 2, -9, np.nan])
    assert figure_parts.log2(np.array([0.0, 1.0]))[0] == -figure_parts.LARGEST_LIMIT - 1
