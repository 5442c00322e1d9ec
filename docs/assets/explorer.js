// The interactive figure: margins and pair weights of one pool, drawn into <div id="explorer">.
"use strict";

(() => {
  const root = document.getElementById("explorer");
  if (!root) return;

  const PAIRS = 200;
  const DEFAULTS = { gamma0: 2, tau: 1, mean: 1, deviation: 3, flips: 0.2, loss: "dpo" };
  const PRESETS = {
    "Mistral 7B": { gamma0: 0.375, tau: 10, loss: "simpo" },
    "Llama 3 8B": { gamma0: 4, tau: 10, loss: "simpo" },
    "Gemma 2 9B": { gamma0: 5, tau: 20, loss: "simpo" },
    "Qwen 2.5 7B": { gamma0: 3, tau: 3, loss: "simpo" },
  };
  const SLIDERS = {
    gamma0: { label: "Mean margin γ0", unit: "reward units", min: 0.125, max: 10, step: 0.125 },
    tau: { label: "KL weight τ", unit: "nats", min: 0.05, max: 100, step: 0.01, log: true },
    mean: { label: "Mean of clean gaps", unit: "reward units", min: -2, max: 8, step: 0.25 },
    deviation: { label: "Deviation of gaps", unit: "reward units", min: 0.25, max: 8, step: 0.25 },
    flips: { label: "Share of flipped pairs", unit: "of 200 pairs", min: 0, max: 0.5, step: 0.05 },
  };
  const LINES = { own: "γ-PO", equal: "", matched: "matched logistic loss" }; // equal: by the loss
  const state = { ...DEFAULTS };
  const inputs = {};

  // --- numbers ---

  const rounded = (value) => Number(Number(value).toPrecision(3));
  const round = (value) => String(rounded(value)).replace("-", "−");
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const std = (values) => Math.sqrt(mean(values.map((value) => (value - mean(values)) ** 2)));

  // The normal distribution function (Abramowitz and Stegun 26.2.17, within 1e-7).
  function normal(z) {
    const t = 1 / (1 + 0.2316419 * Math.abs(z));
    const tail = [1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.31938153, 0].reduce((sum, k) => sum * t + k);
    const p = (tail * Math.exp((-z * z) / 2)) / Math.sqrt(2 * Math.PI);
    return z > 0 ? 1 - p : p;
  }

  // Return evenly spaced quantiles of the normal distribution: a pool without luck.
  const quantiles = (size) =>
    Array.from({ length: size }, (_, i) => bisect((z) => normal(z) - (i + 0.5) / size, -6, 6));

  // Return what the figure shows of a setting.
  function compute({ gamma0, tau, mean: centre, deviation, flips, loss }) {
    const flipped = Math.round(PAIRS * flips);
    const clean = quantiles(PAIRS - flipped).map((z) => centre + deviation * z);
    const gaps = [...clean, ...quantiles(flipped).map((z) => deviation * z - centre)];
    const { margins, multiplier } = solveMargins(gaps, gamma0, tau);
    const shift = loss === "dpo" ? gamma0 : 0; // what the loss takes off a margin
    const weights = gaps.map((gap, i) => sigmoid(margins[i] - shift - gap));
    const equal = gaps.map((gap) => sigmoid(gamma0 - shift - gap));
    const match = matchLogistic(gaps, weights, gamma0 - shift);
    const fitted = (gap) => match.scale * sigmoid(match.margin - match.betaFactor * gap);
    const ratio = (values) => mean(values.slice(clean.length)) / mean(values.slice(0, clean.length));
    const limit = Math.abs(centre) + 2.6 * deviation;
    const grid = Array.from({ length: 121 }, (_, i) => -limit + (limit * i) / 60);
    const own = grid.map((gap) => marginAt(gap, gamma0, tau, multiplier));
    const heights = (group, at) => {
      const bump = (g) => Math.exp(-(((g - at) / deviation) ** 2) / 2);
      return grid.map((g) => (group / PAIRS) * bump(g));
    };
    return {
      grid,
      pools: { clean: heights(clean.length, centre), flipped: heights(flipped, -centre) },
      margins: {
        own,
        equal: grid.map(() => gamma0),
        matched: grid.map((gap) => match.margin + (1 - match.betaFactor) * gap + shift),
      },
      weights: {
        own: grid.map((gap, i) => sigmoid(own[i] - shift - gap)),
        equal: grid.map((gap) => sigmoid(gamma0 - shift - gap)),
        matched: grid.map(fitted),
      },
      kappa: gamma0 ** 2 / tau,
      spread: std(margins),
      range: [Math.min(...margins), Math.max(...margins)],
      betaFactor: match.betaFactor,
      unexplained: match.cost / PAIRS / std(weights) ** 2,
      ratios: { own: ratio(weights), equal: ratio(equal), matched: ratio(gaps.map(fitted)) },
    };
  }

  // --- the address ---

  function address() {
    return "#explorer?" + new URLSearchParams(Object.entries(state).map(([k, v]) => [k, String(v)]));
  }

  function readAddress() {
    const [name, query] = location.hash.split("?");
    if (name !== "#explorer" || !query) return false;
    for (const [key, text] of new URLSearchParams(query)) {
      const { min, max } = SLIDERS[key] || {};
      if (key === "loss" && ["dpo", "simpo"].includes(text)) state.loss = text;
      else if (Number(text) >= min && Number(text) <= max) state[key] = Number(text);
    }
    return true;
  }

  // --- elements ---

  function element(parent, name, attributes = {}, text = "") {
    const svg = ["svg", "path", "line", "text"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return parent.appendChild(node);
  }

  const controls = element(root, "form", { class: "gp-controls", "aria-label": "Settings of the figure" });
  const presets = element(controls, "div", { class: "gp-presets", role: "group", "aria-label": "Published settings" });
  element(presets, "span", {}, "Published:");
  for (const [name, preset] of Object.entries(PRESETS)) {
    element(presets, "button", { type: "button" }, name).addEventListener("click", () => set(preset));
  }
  element(presets, "button", { type: "button" }, "Reset").addEventListener("click", () => set(DEFAULTS));
  const choice = element(element(controls, "label", {}, "Loss"), "select", { name: "loss" });
  element(choice, "option", { value: "dpo" }, "γ-DPO (centred)");
  element(choice, "option", { value: "simpo" }, "γ-SimPO");
  choice.addEventListener("change", () => set({ loss: choice.value }));
  for (const [name, { label, min, max, step, log }] of Object.entries(SLIDERS)) {
    const box = element(controls, "label");
    const output = element(element(box, "span", {}, label + " "), "b");
    const scale = log ? Math.log10 : (value) => value;
    const input = element(box, "input", { type: "range", name, min: scale(min), max: scale(max), step });
    input.addEventListener("input", () => set({ [name]: rounded(log ? 10 ** input.value : input.value) }));
    inputs[name] = { input, output, scale };
  }
  const figure = element(root, "div", { class: "gp-plots" });
  const legend = element(root, "p", { class: "gp-legend" });
  const readouts = element(root, "dl", { class: "gp-readouts", role: "status" });
  const link = element(element(root, "p"), "a", { class: "gp-link" }, "Link to this picture");

  // --- drawing ---

  // Draw curves over the gap, in pixels of the page, so that text keeps its size.
  function plot(title, label, curves, { grid, pools }, bottom, top) {
    const half = Math.floor(figure.clientWidth / 2) - 8;
    const width = half < 300 ? figure.clientWidth : half;
    const height = 250;
    const box = { left: 40, right: width - 8, top: 26, bottom: height - 36 };
    const svg = element(figure, "svg", { width, height, role: "img", "aria-label": label });
    const at = (value, [a, b], [c, d]) => c + ((value - a) / (b - a)) * (d - c);
    const ends = [grid[0], grid[grid.length - 1]];
    const x = (gap) => at(gap, ends, [box.left, box.right]);
    const y = (value) => at(value, [bottom, top], [box.bottom, box.top]);
    const path = (values, height) => {
      const inside = values.map((v, i) => [x(grid[i]), height(v)]).filter(([, v]) => v >= box.top - 1 && v <= box.bottom + 1);
      return inside.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
    };
    for (const [name, values] of Object.entries(pools)) {
      const line = path(values, (v) => box.bottom - 50 * v);
      element(svg, "path", { class: `gp-pool gp-${name}`, d: `${line}L${box.right} ${box.bottom}L${box.left} ${box.bottom}Z` });
    }
    const ticks = (low, high) => {
      const raw = 10 ** Math.floor(Math.log10((high - low) / 2));
      const step = [1, 2, 5, 10].map((k) => k * raw).find((each) => (high - low) / each <= 5.5) || raw;
      return Array.from({ length: 12 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((each) => each <= high + 1e-9);
    };
    for (const tick of ticks(bottom, top)) {
      element(svg, "line", { class: "gp-grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) });
      element(svg, "text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, round(tick));
    }
    for (const tick of ticks(...ends)) {
      element(svg, "line", { class: "gp-grid", x1: x(tick), x2: x(tick), y1: box.top, y2: box.bottom });
      element(svg, "text", { x: x(tick), y: box.bottom + 15, "text-anchor": "middle" }, round(tick));
    }
    for (const name of ["equal", "matched", "own"]) element(svg, "path", { class: `gp-line gp-${name}`, d: path(curves[name], y) });
    element(svg, "text", { class: "gp-title", x: box.left, y: 14 }, title);
    element(svg, "text", { x: box.right, y: height - 4, "text-anchor": "end" }, "reward gap (reward units)");
  }

  function draw() {
    const shown = compute(state);
    LINES.equal = state.loss === "dpo" ? "DPO" : "SimPO, margin γ0";
    LINES.own = state.loss === "dpo" ? "γ-DPO" : "γ-SimPO";
    figure.textContent = legend.textContent = readouts.textContent = "";
    const last = shown.grid.length - 1;
    const words = (name, curve) =>
      `${name} over the reward gap. ${LINES.own}: ${round(curve.own[0])} at gap ${round(shown.grid[0])}, ` +
      `${round(curve.own[last])} at gap ${round(shown.grid[last])}. ${LINES.equal}: ${round(curve.equal[0])} and ${round(curve.equal[last])}.`;
    const most = Math.max(...shown.margins.own, state.gamma0 * 1.5);
    plot("Margin (reward units)", words("Margin", shown.margins), shown.margins, shown, 0, most * 1.05);
    plot("Pair weight", words("Pair weight", shown.weights), shown.weights, shown, 0, 1);
    for (const [name, text] of [...Object.entries(LINES), ["clean", "clean gaps"], ["flipped", "flipped gaps"]]) {
      element(element(legend, "span"), "i", { class: `gp-key gp-${name}` }).after(" " + text);
    }
    const { own, equal, matched } = shown.ratios;
    const unexplained = shown.unexplained > 0.02 ? `, but ${rounded(100 * shown.unexplained).toFixed(1)} % of their variance` : "";
    for (const [name, value, note] of [
      ["Strength κ = γ0²/τ", round(shown.kappa), ""],
      ["Margins", `${round(shown.range[0])} to ${round(shown.range[1])}`, `standard deviation ${round(shown.spread)}`],
      ["Beta factor", round(shown.betaFactor), `weights are those of ${LINES.equal.slice(0, 5)} with this times the β${unexplained}`],
      ["Flipped over clean weight", state.flips ? round(own) : "no flips", state.flips ? `${LINES.equal}: ${round(equal)}, matched: ${round(matched)}` : ""],
    ]) {
      const box = element(readouts, "div");
      element(box, "dt", {}, name);
      element(element(box, "dd", {}, value), "small", {}, note);
    }
    link.href = address();
  }

  // Change the state; the controls, the address and the figure follow.
  let waiting = 0;
  function set(changes, remember = true) {
    Object.assign(state, changes);
    choice.value = state.loss;
    for (const [name, { input, output, scale }] of Object.entries(inputs)) {
      input.value = scale(state[name]);
      output.textContent = round(state[name]);
      input.setAttribute("aria-valuetext", `${round(state[name])} ${SLIDERS[name].unit}`);
    }
    clearTimeout(waiting); // browsers limit how often an address may change
    if (remember) waiting = setTimeout(() => history.replaceState(null, "", address()), 200);
    cancelAnimationFrame(draw.frame);
    draw.frame = requestAnimationFrame(draw);
  }

  const follow = () => {
    if (!readAddress()) return;
    set({}, false);
    root.scrollIntoView();
  };
  set({}, false);
  follow();
  addEventListener("hashchange", follow);
  addEventListener("resize", () => set({}, false));
})();
