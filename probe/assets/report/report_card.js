/* The card of one expert: load, domains, tokens, gates, neighbours and places in the text.
   The numbers come from probe/report_card.py; text is only ever inserted as text. Nothing runs until it is called. */
function probeExpertCard(root, options) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const { heading, view, selected } = options;
  const state = { layer: 0, expert: 0, domain: null };
  const CONTEXTS = 5, BINS = 20;

  /* --- small things --- */

  function make(tag, properties, ...children) {
    const element = document.createElement(tag);
    Object.assign(element, properties || {});
    element.append(...children);
    return element;
  }

  function draw(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    element.append(...children);
    return element;
  }

  /* Two digits that count, all of a whole number: as in the sentences above. */
  function digits(value) {
    if (value === null || value === undefined) return "?";
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 9.95) return Math.round(value).toLocaleString("en");
    return size >= 0.995 ? value.toFixed(1) : size >= 0.0995 ? value.toFixed(2) : String(Number(value.toPrecision(2)));
  }
  const percent = (value) => digits(value) + "\u00a0%", times = (value) => digits(value) + "\u00a0×";
  const interval = (lower, upper) => (lower === null || upper === null ? "" : " [" + digits(lower) + ",\u00a0" + digits(upper) + "]");
  const cell = () => state.layer * data.nExperts + state.expert;

  /* A token with its white space visible, as in the text below. */
  function visible(text) {
    const element = make("span", { className: "token" });
    text.split(/( +|\t|\n|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069])/).forEach((part) => {
      if (part === "") return;
      const code = part.codePointAt(0);
      if (part[0] === " ") element.append(make("u", {}, part));
      else if (part === "\n") element.append(make("b"), part);
      else if (part === "\t") element.append(make("u", { className: "tab" }, part));
      else if (code < 32) element.append(String.fromCodePoint(0x2400 + code));
      else if (part.length === 1 && ((code > 0x7e && code < 0xa0) || (code > 0x2029 && code < 0x202f) || (code > 0x2065 && code < 0x206a)))
        element.append("⟨U+" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩");
      else element.append(part);
    });
    return element;
  }

  function block(name, note, ...content) {
    const head = make("h3", {}, name);
    if (note) head.append(" ", make("small", {}, note));
    return make("div", { className: "block" }, head, ...content);
  }

  const nothing = (why) => make("p", { className: "none" }, why);

  /* --- parts of the card --- */

  function summary() {
    const at = cell(), status = data.statuses[data.status[at]];
    const load = data.load[at], bounds = interval(data.lower[at], data.upper[at]);
    const text = load === null ? "no token at this layer" : load === 0
      ? "no token was seen" + (data.upper[at] === null ? "" : "; its load is at most " + percent(data.upper[at]) + " (rule of three)")
      : percent(load) + bounds + " of the " + data.unit + "; an even share is " + percent(100 / data.nExperts);
    const line = make("p", { className: "load" }, make("b", {}, "Load "), text);
    if (load !== null && data.lower[at] === null) line.append(make("span", { className: "muted" }, " · interval " + status));
    return line;
  }

  /* A bar from 1 to the lift on a log axis with its interval, for each domain. */
  function domains() {
    const at = cell();
    const logs = data.domains.flatMap((domain) => [domain.lift[at], domain.upper[at]]).filter((value) => value > 0).map((value) => Math.abs(Math.log2(value)));
    const end = Math.min(Math.max(1, Math.ceil(Math.max(...logs, 0))), 4);
    const place = (value) => 50 + 50 * Math.max(-1, Math.min(1, Math.log2(Math.max(value, 1e-9)) / end));
    const rows = data.domains.flatMap((domain) => {
      const lift = domain.lift[at], share = domain.share[at], lower = domain.lower[at], upper = domain.upper[at];
      const track = make("div", { className: "track" });
      if (lift > 0) {
        const x = place(lift), bar = make("i", { className: lift > 1 ? "bar above" : "bar below" });
        bar.style.left = Math.min(50, x) + "%";
        bar.style.width = Math.abs(x - 50) + "%";
        bar.classList.toggle("unsure", domain.settled[at] === "0");
        track.append(bar);
      }
      if (upper !== null && upper !== undefined && lower !== null) {
        const whisker = make("i", { className: "whisker" });
        whisker.style.left = place(lower) + "%";
        whisker.style.width = place(upper) - place(lower) + "%";
        track.append(whisker);
      }
      const words = lift === null ? "–" : share === 0 ? (upper === null ? "no token" : "no token, ≤ " + times(upper)) : times(lift) + interval(lower, upper);
      const numbers = make("span", { className: "numbers" }, words, make("small", {}, share === null ? "" : " " + percent(share)));
      const status = Number(domain.status[at]);
      const row = [make("span", { className: "name", title: domain.name }, domain.name), track, numbers];
      const hover = domain.name + ": " + percent(share) + " of its " + data.unit + ", lift " + words + (status ? "; interval " + data.statuses[status] : "") +
        (domain.settled[at] === "1" ? "; surely differs" : "; may be chance");
      row.forEach((part) => { part.title = hover; });
      return row;
    });
    const axis = make("div", { className: "track axis" }, make("span", {}, "1/" + 2 ** end + " ×"), make("span", {}, "1 ×"), make("span", {}, 2 ** end + " ×"));
    return make("div", { className: "bars" }, ...rows, make("span"), axis, make("span"));
  }

  function tokens() {
    const row = data.tokens.rows[cell()], chips = make("div", { className: "chips" });
    for (let at = 0; at < row.length; at += 5) {
      const [text, share, lift, lower, documents] = row.slice(at, at + 5);
      const chip = visible(data.tokens.texts[text]);
      chip.title = percent(share) + " of its occurrences go here, " + times(lift) + " the expert's share of all tokens" +
        (lower === null ? "" : " (at least " + times(lower) + ")") + "; in " + documents + (documents === 1 ? " document" : " documents");
      chips.append(chip);
    }
    return row.length ? chips : nothing("No token occurs 20 times and goes here at least twice.");
  }

  function gates() {
    const own = data.gates.share[cell()], total = data.gates.count[cell()];
    const others = new Array(BINS).fill(0);
    let n = 0;
    for (let expert = 0; expert < data.nExperts; expert++) {
      const at = state.layer * data.nExperts + expert;
      if (expert === state.expert) continue;
      n += data.gates.count[at];
      data.gates.share[at].forEach((share, bin) => { others[bin] += share * data.gates.count[at]; });
    }
    others.forEach((sum, bin) => { others[bin] = n ? sum / n : 0; });
    if (!total) return nothing("No token, so no gate.");
    const width = 320, height = 92, left = 40, base = height - 26, top = 8;
    const highest = Math.max(...own, ...others), x = (bin) => left + ((width - left - 6) * bin) / BINS, y = (share) => base - ((base - top) * share) / highest;
    const svg = draw("svg", { viewBox: "0 0 " + width + " " + height, class: "gates", role: "img" });
    svg.setAttribute("aria-label", "distribution of the gate");
    own.forEach((share, bin) => svg.append(draw("rect", { class: "own", x: x(bin) + 0.5, width: x(1) - x(0) - 1, y: y(share), height: base - y(share) })));
    let line = "M" + x(0) + " " + base;
    others.forEach((share, bin) => { line += "V" + y(share) + "H" + x(bin + 1); });
    svg.append(draw("path", { class: "other", d: line + "V" + base }), draw("path", { class: "axis", d: "M" + left + " " + base + "H" + (width - 6) }));
    [[0, "0"], [BINS / 2, "0.5"], [BINS, "1"]].forEach(([bin, text]) => svg.append(draw("text", { x: x(bin), y: base + 12, "text-anchor": "middle" }, text)));
    svg.append(draw("text", { x: (left + width) / 2, y: height - 2, "text-anchor": "middle" }, "gate (bins of 0.05)"));
    svg.append(draw("text", { x: left - 4, y: top + 6, "text-anchor": "end" }, percent(highest / 10)), draw("text", { x: left - 4, y: base, "text-anchor": "end" }, "0 %"));
    own.forEach((share, bin) => {
      const area = draw("rect", { class: "hover", x: x(bin), width: x(1) - x(0), y: top, height: base - top });
      const range = (bin / BINS).toFixed(2) + " to " + ((bin + 1) / BINS).toFixed(2);
      area.append(draw("title", {}, "gate " + range + ": " + percent(share / 10) + " of this expert's " + data.unit + ", " + percent(others[bin] / 10) + " of the others'"));
      svg.append(area);
    });
    return svg;
  }

  function neighbours(rows, step) {
    const layer = state.layer + step, row = rows[cell()];
    if (layer < 0 || layer >= data.layers.length) return nothing(step < 0 ? "This is the first MoE layer." : "This is the last MoE layer.");
    const list = make("ul", { className: "neighbours" });
    for (let at = 0; at < row.length; at += 3) {
      const [expert, probability, lift] = row.slice(at, at + 3);
      if (lift <= 1) continue;
      const button = make("button", { type: "button", title: "show expert " + expert + " of layer " + data.labels[layer] }, "expert " + expert);
      button.addEventListener("click", () => show(layer, expert));
      list.append(make("li", {}, button, " " + percent(probability) + " ", make("small", {}, times(lift))));
    }
    if (!row.length) return nothing("Too few tokens to tell.");
    return list.children.length ? list : nothing("None of the experts with 5 tokens to expect comes more often than by chance.");
  }

  function contexts() {
    if (!view) return nothing("There is no text on this page.");
    const row = data.tokens.rows[cell()], texts = [];
    for (let at = 0; at < row.length; at += 5) texts.push(data.tokens.texts[row[at]]);
    if (!texts.length) return nothing("There is no token to look for.");
    const found = view.occurrences({ layer: state.layer, expert: state.expert, texts, limit: CONTEXTS, domain: state.domain });
    if (!found.length) return nothing("None of its tokens goes to it in the documents shown below.");
    const list = make("ul", { className: "contexts" });
    found.forEach((place) => {
      const button = make("button", { type: "button", title: "show it in the text" }, make("span", { className: "before" }, place.before), visible(place.token), place.after);
      button.addEventListener("click", () => view.reveal({ document: place.document, token: place.index, layer: state.layer, focus: state.expert }));
      list.append(make("li", {}, make("bdi", {}, button), make("small", {}, place.name)));
    });
    return list;
  }

  /* --- the card --- */

  const layerSelect = make("select", { ariaLabel: "layer" }), expertSelect = make("select", { ariaLabel: "expert" });
  data.labels.forEach((label, at) => layerSelect.append(make("option", { value: at }, label)));
  for (let expert = 0; expert < data.nExperts; expert++) expertSelect.append(make("option", { value: expert }, String(expert)));
  const toText = make("button", { type: "button", className: "to-text" }, "its tokens in the text ↓");
  const controls = make("div", { className: "card-controls" }, make("label", {}, "Layer ", layerSelect), make("label", {}, "Expert ", expertSelect), toText);
  const body = make("div", { className: "card-body" });
  root.append(controls, body);
  [layerSelect, expertSelect].forEach((select) => select.addEventListener("change", () => show(Number(layerSelect.value), Number(expertSelect.value))));
  toText.addEventListener("click", () => { if (view) view.reveal({ layer: state.layer, focus: state.expert }); });
  toText.hidden = !view;

  /* Show an expert; ``layer`` is a position among the recorded layers, ``domain`` where to look for text first. */
  function show(layer, expert, domain) {
    Object.assign(state, { layer, expert, domain: domain === undefined ? null : domain });
    layerSelect.value = layer;
    expertSelect.value = expert;
    const load = data.load[cell()];
    heading.textContent = "Expert " + expert + " of layer " + data.labels[layer] + " takes " + percent(load) + " of the " + data.unit + ", " + times((load * data.nExperts) / 100) + " an even share";
    const before = layer > 0 ? "layer " + data.labels[layer - 1] : "", after = layer + 1 < data.layers.length ? "layer " + data.labels[layer + 1] : "";
    const left = [
      block("Tokens that it attracts", "the surest first; hover for numbers", tokens()),
      block("In the text", "in the documents shown below; click to go there", contexts()),
    ];
    const pair = make("div", { className: "pair" },
      block("Its tokens come from", before && before + ": share of them, lift", neighbours(data.before, -1)),
      block("and go on to", after && after + ": share of them, lift", neighbours(data.after, 1)));
    const right = [block("Its gates", "bars; the line is all other experts of the layer", gates())];
    (data.domains.length ? left : right).push(pair);
    if (data.domains.length) right.unshift(block("By domain", "lift with interval, log axis; pale: may be chance; small: share of its " + data.unit, domains()));
    body.replaceChildren(summary(), make("div", {}, ...left), make("div", {}, ...right));
    if (selected) selected(data.layers[layer], expert);
  }

  show(data.layers.indexOf(data.layer), data.expert);
  return { show, layers: data.layers, current: () => ({ layer: data.layers[state.layer], expert: state.expert }) };
}
