/* Brings one text view to life: choice of document and layer, hover, focus on an expert.
   The markup and the numbers come from probe/text_view.py; nothing runs until it is called. */
function probeTextView(root) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const find = (selector) => root.querySelector(selector);
  const [slider, select, label, legend, tip] = ["input.layer", "select.document", "output", ".probe-legend", ".probe-tip"].map(find);
  const bodies = [...root.querySelectorAll(".probe-document")];
  const decoded = new Map();
  const state = { document: 0, layer: Number(slider.value), focus: null, found: null };

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;
  const ids = (text) => (text === null ? null : data.nExperts > 256 ? new Uint16Array(bytes(text)) : new Uint8Array(bytes(text)));
  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  };

  function decode(index) {
    if (!decoded.has(index)) {
      const packed = data.documents[index];
      decoded.set(index, {
        n: packed.n,
        tokens: [...bodies[index].querySelectorAll(".probe-tokens > i")],
        expert: ids(packed.expert),
        runnerUp: ids(packed.runnerUp),
        logit: new Uint16Array(bytes(packed.logit)),
        margin: new Uint16Array(bytes(packed.margin)),
      });
    }
    return decoded.get(index);
  }

  const current = () => decode(state.document);
  const row = (shown, index) => state.layer * shown.n + index;

  function counts(shown) {
    const total = new Array(data.nExperts).fill(0);
    for (let index = 0; index < shown.n; index++) total[shown.expert[row(shown, index) * data.slots]]++;
    return total;
  }

  function colourSlots(total) {
    if (data.nExperts <= data.colours) return total.map((_, expert) => expert);
    const slots = new Array(data.nExperts).fill(-1);
    const order = total.map((_, expert) => expert).sort((a, b) => total[b] - total[a] || a - b);
    order.slice(0, data.colours).forEach((expert, slot) => { slots[expert] = slot; });
    return slots;
  }

  const colourClass = (slot) => (slot < 0 ? "cn" : "c" + slot);

  function paint() {
    const shown = current(), total = counts(shown), slots = colourSlots(total);
    shown.tokens.forEach((token, index) => {
      const at = row(shown, index) * data.slots, expert = shown.expert[at];
      const chosen = state.focus !== null && shown.expert.subarray(at, at + data.slots).includes(state.focus);
      token.className = colourClass(slots[expert]) + (chosen ? " on" : "") + (index === state.found ? " found" : "");
      token.dataset.e = expert;
    });
    root.classList.toggle("focused", state.focus !== null);
    slider.value = state.layer;
    label.textContent = data.labels[state.layer];
    slider.setAttribute("aria-valuetext", "layer " + data.labels[state.layer]);
    paintLegend(total, slots, Math.max(shown.n, 1));
  }

  function paintLegend(total, slots, n) {
    const percent = (count) => Math.round((100 * count) / n) + "%";
    const coloured = slots.map((_, expert) => expert).filter((expert) => slots[expert] >= 0 || expert === state.focus);
    coloured.sort((a, b) => slots[a] - slots[b]);
    const chips = coloured.map((expert) => {
      const chip = document.createElement("button"), number = document.createElement("span");
      chip.type = "button";
      chip.className = "chip " + colourClass(slots[expert]);
      chip.title = total[expert] + " of " + n + " tokens; click to mark them";
      chip.setAttribute("aria-pressed", state.focus === expert);
      number.textContent = expert;
      chip.append(number, " " + percent(total[expert]));
      chip.addEventListener("click", () => { state.focus = state.focus === expert ? null : expert; paint(); });
      return chip;
    });
    const others = slots.filter((slot) => slot < 0).length;
    if (others) {
      const rest = document.createElement("span"), note = document.createElement("small");
      rest.className = "chip cn";
      rest.textContent = "the other " + others + ": " + percent(total.reduce((sum, count, expert) => sum + (slots[expert] < 0 ? count : 0), 0));
      note.textContent = "colours: the " + data.colours + " experts most used in this document at this layer";
      chips.push(rest, note);
    }
    legend.replaceChildren(...chips);
  }

  function describe(token, index) {
    const shown = current(), at = row(shown, index), lines = [];
    if (token.dataset.note) lines.push(token.dataset.note);
    for (let slot = 0; slot < data.slots; slot++) {
      const logit = half(shown.logit[at * data.slots + slot]);
      lines.push("expert " + shown.expert[at * data.slots + slot] + " · gate " + (1 / (1 + Math.exp(-logit))).toFixed(3));
    }
    if (shown.runnerUp) lines.push("runner-up " + shown.runnerUp[at] + " · margin " + Number(half(shown.margin[at]).toPrecision(3)) + " logits");
    lines.push("layer " + data.labels[state.layer] + " · token " + index);
    const name = document.createElement("b");
    name.textContent = token.textContent ? JSON.stringify(token.textContent) : "part of a character";
    tip.replaceChildren(name, "\n" + lines.join("\n"));
  }

  function place(event) {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18) + "px";
  }

  find(".probe-box").addEventListener("mouseover", (event) => {
    const token = event.target.closest(".probe-tokens > i");
    tip.hidden = !token;
    if (!token) return;
    describe(token, current().tokens.indexOf(token));
    place(event);
  });
  find(".probe-box").addEventListener("mouseleave", () => { tip.hidden = true; });
  find(".probe-box").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { show({ layer: state.layer + step }); event.preventDefault(); }
  });
  find(".numbers").addEventListener("change", (event) => root.classList.toggle("show-numbers", event.target.checked));
  slider.addEventListener("input", () => show({ layer: Number(slider.value) }));
  select.addEventListener("change", () => show({ document: Number(select.value) }));

  /* Change what is shown; layer is a position among the recorded layers, focus an expert or null. */
  function show(change) {
    Object.assign(state, { found: null }, change);
    state.layer = Math.max(0, Math.min(data.layers.length - 1, state.layer));
    bodies.forEach((body, index) => { body.hidden = index !== state.document; });
    select.value = state.document;
    paint();
  }

  /* Places where an expert took one of these texts: first one of each document, those of ``domain`` before others. */
  function occurrences({ layer, expert, texts, limit, domain }) {
    const ranks = new Map(texts.map((text, rank) => [text, rank]));
    const found = [];
    data.documents.forEach((packed, index) => {
      const shown = decode(index), seen = new Set();
      let nth = 0;
      for (let token = 0; token < shown.n && seen.size < texts.length && nth < limit; token++) {
        const at = (layer * shown.n + token) * data.slots;
        if (!shown.expert.subarray(at, at + data.slots).includes(expert)) continue;
        const text = shown.tokens[token].textContent;
        if (!ranks.has(text) || seen.has(text)) continue;
        seen.add(text);
        found.push({ document: index, index: token, token: text, rank: ranks.get(text), nth: nth++, other: domain !== null && packed.domain !== domain });
      }
    });
    found.sort((a, b) => a.other - b.other || a.nth - b.nth || a.rank - b.rank);
    return found.slice(0, limit).map((place) => ({ ...place, ...around(place), name: select.querySelector('option[value="' + place.document + '"]').textContent }));
  }

  /* What stands on both sides of a token, on one line. */
  function around({ document: index, index: token }) {
    const tokens = decode(index).tokens;
    const plain = (first, last) => tokens.slice(Math.max(first, 0), last).map((part) => part.textContent).join("").replace(/\s+/g, " ");
    return { before: plain(token - 10, token).slice(-36), after: plain(token + 1, token + 11).slice(0, 36) };
  }

  /* Go to the text: at a layer with an expert marked, and to one token if ``token`` is given. */
  function reveal({ layer, focus, document: index, token }) {
    show({ layer, focus, document: index === undefined ? state.document : index, found: token === undefined ? null : token });
    root.scrollIntoView({ block: "start" });
    const box = find(".probe-box"), marked = token === undefined ? null : current().tokens[token];
    if (marked) box.scrollTop += marked.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
    box.focus({ preventScroll: true });
  }

  show({});
  return { show, occurrences, reveal, layers: data.layers, documents: data.documents };
}
