/* The explorer in the notebook: puts the view that Python sends on the page, and tells Python what is on show.
   It follows probe/assets/report/text_view.js, which brings the view to life. */
const QUIET = 150; // milliseconds without a move before Python hears of a layer: dragging would flood it

function render({ model, el }) {
  const host = document.createElement("div"), overlay = document.createElement("div");
  const [choice, select] = documentChoice(model.get("documents"));
  let view, root, timer;
  for (const part of [el, overlay]) part.classList.add("probe-explorer");
  // Else JupyterLab takes the arrow keys for itself; it looks at the element that has the focus, and no further.
  el.addEventListener("focusin", (event) => { event.target.dataset.lmSuppressShortcuts = "true"; });
  el.append(host);
  document.body.append(overlay);

  function build() {
    const numbered = root?.querySelector(".numbers").checked;
    const focused = document.activeElement === select;
    host.innerHTML = model.get("view");
    root = host.firstElementChild;
    view = probeTextView(root);
    root.querySelector("select.document").closest("label").replaceWith(choice);
    root.querySelector("input.layer").addEventListener("input", tell);
    root.querySelector(".probe-box").addEventListener("keydown", tell);
    overlay.replaceChildren(root.querySelector(".probe-tip")); // a notebook clips what leaves its cell
    if (numbered) root.querySelector(".numbers").click();
    if (focused) select.focus();
    root.removeAttribute("aria-busy");
    follow();
  }

  /* Python set the layer or the sample, or answered. */
  function follow() {
    view.show({ layer: view.layers.indexOf(model.get("layer")) });
    select.value = model.get("sample");
  }

  function tell() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      model.set("layer", view.layers[Number(root.querySelector("input.layer").value)]);
      model.save_changes();
    }, QUIET);
  }

  select.addEventListener("change", () => {
    root.setAttribute("aria-busy", "true");
    model.set("sample", Number(select.value));
    model.save_changes();
  });
  model.on("change:view", build);
  model.on("change:layer change:sample", follow);
  build();
  return () => {
    clearTimeout(timer);
    overlay.remove();
    model.off("change:view", build);
    model.off("change:layer change:sample", follow);
  };
}

/* A labelled <select> of all documents, grouped by domain. */
function documentChoice(documents) {
  const label = document.createElement("label"), select = document.createElement("select");
  const groups = new Map();
  documents.forEach(({ name, domain, tokens }, index) => {
    if (!groups.has(domain)) groups.set(domain, Object.assign(document.createElement("optgroup"), { label: domain }));
    groups.get(domain).append(new Option(`${name} (${tokens.toLocaleString("en")} tokens)`, index));
  });
  select.className = "document";
  select.append(...groups.values());
  label.append("Document ", select);
  return [label, select];
}

export default { render };
