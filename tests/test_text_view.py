"""The text with its tokens: whole characters, escaped, in colours that stay apart."""

import base64
import json
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe import text_view
from probe.schema import ProbeError
from tests import planted


class Elements(HTMLParser):
    """Text and attributes of every element of one tag."""

    def __init__(self, tag: str, html: str) -> None:
        super().__init__()
        self.tag, self.found, self.text = tag, [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == self.tag:
            self.found.append(dict(attributes))
            self.text.append("")

    def handle_data(self, data):
        if self.text:
            self.text[-1] += data


def recorded(pieces, experts, *, n_experts=4, **options):
    """One sample whose tokens are the given pieces."""
    token_id = np.arange(len(pieces))
    return planted.from_experts(
        np.asarray(experts).reshape(len(pieces), -1),
        n_experts=n_experts,
        lengths=[len(pieces)],
        token_id=token_id,
        pieces=dict(enumerate(pieces)),
        **options,
    )


# --- characters -------------------------------------------------------------------------------------------------------


def test_a_character_stands_on_the_token_that_completes_it():
    shown = text_view.join(
        [b"caf", b"\xc3", b"\xa9 ", "日".encode()[:2], "日".encode()[2:] + "本".encode()[:1], b"\x9c\xac"]
    )
    assert [token.text for token in shown] == ["caf", "", "é ", "", "日", "本"]
    assert shown[1].note == "bytes C3, part of é"
    assert shown[2].note == "bytes A9 20: completes é"
    assert shown[3].note == "bytes E6 97, part of 日"
    assert shown[4].note == "bytes A5 E6: completes 日 and begins 本"
    assert shown[0].note == ""


def test_bytes_of_no_character_are_shown_as_bytes_on_their_own_token():
    shown = text_view.join([b"a\xff", b"b", b"\xe6\x97"])
    assert [token.text for token in shown] == ["a\\xff", "b", "\\xe6\\x97"]
    assert [token.broken for token in shown] == [True, False, True]


@given(st.text(max_size=40), st.lists(st.integers(0, 160), max_size=30))
def test_shown_text_is_the_text_wherever_tokens_end(text, cuts):
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    shown = text_view.join([data[start:stop] for start, stop in zip(edges[:-1], edges[1:], strict=True)])
    assert "".join(token.text for token in shown) == text
    assert not any(token.broken for token in shown)


def test_label_of_a_lone_token_is_its_text_or_its_bytes():
    assert text_view.piece_label(b" the") == " the"
    assert text_view.piece_label("日".encode()[:2]) == "⟨E6 97⟩"


# --- HTML -------------------------------------------------------------------------------------------------------------


def test_text_of_the_html_is_the_text():
    text = "def f(x):\n\treturn 'x & <y>'\n\nمرحبا ‏שלום 日本"
    data = text.encode()
    pieces = [data[start : start + 2] for start in range(0, len(data), 2)]
    html = text_view.tokens_html(text_view.document(recorded(pieces, [[0]] * len(pieces)), 0), layer=0, titles=False)
    tokens = Elements("i", html)
    assert "".join(tokens.text) == text
    assert len(tokens.found) == len(pieces)
    assert 'dir="auto"' in html
    assert sum("data-part" in found for found in tokens.found) > 0


def test_markup_in_a_document_is_text():
    pieces = [b"<script>", b"alert(1)", b'</script><i onmouseover="x">', b"&lt;"]
    html = text_view.view_html([text_view.document(recorded(pieces, [[0], [1], [2], [3]]), 0)])
    assert "<script>alert" not in html
    assert "onmouseover=" not in html.replace("onmouseover=&quot;", "")
    assert "".join(Elements("i", html.split('class="probe-tip"')[0]).text).startswith("<script>alert(1)</script>")
    assert html.count("<script") == html.count("</script>") == 1


def test_names_are_escaped():
    tree = recorded([b"a"], [[0]], domains=['"><b>d'])
    html = text_view.view_html([text_view.document(tree, 0)])
    assert '<optgroup label="&quot;&gt;&lt;b&gt;d">' in html


def test_control_characters_are_visible_and_cannot_turn_the_text():
    html = text_view.text_html("a\u202eb\x00\r")
    assert "\u202e" not in html
    assert "⟨U+202E⟩" in html
    assert "␀" in html and "␍" in html
    assert "\x00" not in html and "\r" not in html


def test_tokens_carry_expert_and_colour_of_the_layer():
    shown = text_view.document(recorded([b"a", b"b"], [[0, 3], [2, 1]], layers=[1, 3]), 0)
    for layer, experts in ((1, ["0", "2"]), (3, ["3", "1"])):
        tokens = Elements("i", text_view.tokens_html(shown, layer=layer))
        assert [found["data-e"] for found in tokens.found] == experts
        assert [found["class"] for found in tokens.found] == [f"c{expert}" for expert in experts]


def test_hover_says_expert_gate_margin_and_runner_up():
    logits = np.array([[[2.0, 0.5, -1.0]]])
    shown = text_view.document(planted.from_logits(logits, lengths=[1], pieces={0: b"hi"}), 0)
    assert text_view.hover_text(shown, 0, 0).split("\n") == [
        '"hi"',
        "expert 0 · gate 0.881",  # 1 / (1 + e^-2)
        "runner-up 1 · margin 1.5 logits",
    ]


def test_hover_names_every_chosen_expert_and_no_runner_up_where_all_are_chosen():
    shown = text_view.document(planted.from_logits(np.array([[[0.0, 1.0]]]), lengths=[1], top_k=2), 0)
    assert text_view.hover_text(shown, 0, 0).split("\n")[1:] == ["expert 1 · gate 0.731", "expert 0 · gate 0.500"]


def test_legend_counts_the_document_at_the_layer():
    shown = text_view.document(recorded([b"a", b"b", b"c", b"d"], [[1], [1], [1], [0]]), 0)
    chips = Elements("span", text_view.legend_html(shown, layer=0))
    assert "".join(chips.text) == "0 25%1 75%2 0%3 0%"


def test_numbers_for_the_script_are_the_recorded_ones():
    rng = np.random.default_rng(0)
    tree = planted.from_logits(rng.normal(size=(5, 3, 300)), lengths=[5], top_k=2, layers=[1, 3, 5])
    shown = text_view.document(tree, 0)
    packed = text_view.numbers(shown)
    routing = tree["routing"]
    for name, variable, dtype in (("expert", "expert_index", "<u2"), ("logit", "router_logit", "<f2")):
        values = np.frombuffer(base64.b64decode(packed[name]), dtype).reshape(3, 5, 2)
        np.testing.assert_array_equal(values, routing[variable].transpose("layer", "token", "slot").values)
    margin = np.frombuffer(base64.b64decode(packed["margin"]), "<f2").reshape(3, 5)
    np.testing.assert_array_equal(margin, routing["router_margin"].transpose("layer", "token").values)


def test_json_in_a_script_holds_no_markup():
    value = {"a": "</script><!--", "b": "&\u2028"}
    text = text_view.script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


def test_a_document_can_be_cut():
    tree = planted.from_experts(np.zeros((7, 1), int), n_experts=2, lengths=[3, 4])
    shown = text_view.document(tree, 1, max_tokens=2)
    assert (shown.n_shown, shown.n_tokens) == (2, 4)
    assert "first 2 of 4 tokens" in text_view.view_html([shown]).replace("The ", "").lower()


def test_errors_name_the_thing_and_the_choice():
    tree = planted.from_experts(np.zeros((2, 2), int), n_experts=2, lengths=[2], layers=[1, 3])
    with pytest.raises(ProbeError, match=r"no sample 1: this recording holds 0 to 0"):
        text_view.document(tree, 1)
    with pytest.raises(ProbeError, match=r"layer 2 .*holds layers 1, 3"):
        text_view.tokens_html(text_view.document(tree, 0), layer=2)
    with pytest.raises(ProbeError, match="no document"):
        text_view.view_html([])


# --- colours ----------------------------------------------------------------------------------------------------------


def test_beyond_the_palette_the_most_used_experts_get_it():
    share = np.arange(40.0)
    slots = text_view.colour_slots(share)
    assert slots[39] == 0 and slots[24] == 15
    assert (slots[:24] == -1).all()
    np.testing.assert_array_equal(text_view.colour_slots(np.zeros(16)), np.arange(16))


def test_the_legend_says_who_got_the_palette():
    shown = text_view.document(recorded([b"a", b"b"], [[20], [21]], n_experts=32), 0)
    html = text_view.legend_html(shown, layer=0)
    assert "the 16 experts most used in this document at this layer" in html
    assert "the other 16: 0%" in html


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB under D65 of linear RGB."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.clip(rgb, 0, 1) @ np.transpose(to_xyz) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(one: np.ndarray, two: np.ndarray) -> float:
    """Sharma, Wu and Dalal 2005."""
    mean_chroma = (np.hypot(*one[1:]) + np.hypot(*two[1:])) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean_chroma**7 / (mean_chroma**7 + 25.0**7))
    (l1, a1, b1), (l2, a2, b2) = (colour * [1, stretch, 1] for colour in (one, two))
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    turn = (h2 - h1 + 180) % 360 - 180
    lightness, chroma, hue = (l1 + l2) / 2, (c1 + c2) / 2, (h1 + turn / 2) % 360
    angle = np.radians(hue)
    t = (
        1
        - 0.17 * np.cos(angle - np.radians(30))
        + 0.24 * np.cos(2 * angle)
        + 0.32 * np.cos(3 * angle + np.radians(6))
        - 0.20 * np.cos(4 * angle - np.radians(63))
    )
    dl = (l2 - l1) / (1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    twist = -np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    return float(np.sqrt(dl**2 + dc**2 + dh**2 + 2 * twist * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * dc * dh))


def test_the_colour_distance_agrees_with_published_pairs():
    pairs = [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ]
    for one, two, expected in pairs:
        assert ciede2000(np.array(one), np.array(two)) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("sight", "least"), [("all cones", 19), ("protanopia", 12), ("deuteranopia", 12), ("tritanopia", 12)]
)
def test_palette_stays_apart_for_colour_blind_readers(sight, least):
    seen = [lab(linear(colour) @ np.transpose(SIGHT[sight])) for colour in text_view.PALETTE]
    assert len(set(text_view.PALETTE)) == 16
    assert min(ciede2000(one, two) for one, two in combinations(seen, 2)) > least


def mixed(colour: str, page: str, share: float) -> str:
    channels = [(int(colour[at : at + 2], 16), int(page[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(share * front + (1 - share) * back):02x}" for front, back in channels)


def contrast(one: str, two: str) -> float:
    """WCAG 2."""
    light, dark = sorted((float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("page", "ink", "tint"), [("#ffffff", "#1d2129", 0.28), ("#14171c", "#e4e7ec", 0.38)])
def test_text_is_readable_on_every_tint_and_every_bar_shows(page, ink, tint):
    assert f"{tint:.0%}" in text_view.style()
    for colour in (*text_view.PALETTE, text_view.NEUTRAL):
        assert contrast(ink, mixed(colour, page, tint)) > 4.5
        assert contrast(colour, page) > 1.4
