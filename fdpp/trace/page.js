"use strict";

const trace = JSON.parse(document.getElementById("trace").textContent);
const { steps, pieces, commit } = trace;
const $ = (id) => document.getElementById(id);
const PAUSE = 900;

/* Per position the steps that saw it, oldest first: [step, rank in that step's profile], or where the step took its
   token back [step, -1, token]. */
const past = trace.response.map(() => []);
steps.forEach((s, number) => {
  if (!s.settled) s.positions.forEach((p, rank) => past[p].push([number, rank]));
  for (const [p, piece] of s.taken || []) past[p].push([number, -1, piece]);
});

/* Per step the edited positions and their old tokens, and how many positions it changed in which way. */
const edits = steps.map((s) => new Map((s.edited || []).map(([p, old]) => [p, old])));
const counts = steps.map((s, number) => ({
  committed: s.positions.filter((p, rank) => s.committed[rank] && !edits[number].has(p)).length,
  taken: (s.taken || []).length,
  edited: edits[number].size,
}));
const total = (kind) => counts.reduce((sum, count) => sum + count[kind], 0);
const revised = steps.some((s) => s.taken || s.edited || s.decided);
const told = [...new Set(steps.flatMap((s) => Object.keys({ ...s.shown, ...s.verdicts })))];

const shown = (() => {
  const [, stop] = trace.blocks.find(([start, end]) => !past.slice(end).some((h) => h.length)) || [0, 0];
  return stop;
})();

let step = 0, chosen = null, timer = null;

/* ---- words and numbers ---- */

const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f-\u009f]/g, "�");
const word = (piece) => visible(pieces[piece][1].replace(/^ (?=\S)/, "")).replace(/^\s+$/, "␣") || "∅";
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

function percent(missing) {
  if (missing >= 0.001) return (1 - missing).toFixed(3);
  return missing === 0 ? "1" : `1 − ${missing.toExponential(0)}`;
}

const figure = (value) => (value === null || value === undefined ? "–" : String(value));

/* From dark violet to light yellow. The lightness skips the shades on which neither white nor black text has enough
   contrast. */
function shade(number) {
  const share = steps.length > 1 ? number / (steps.length - 1) : 0;
  const dark = share < 0.4;
  const light = dark ? 0.36 + 0.45 * share : 0.42 + 0.46 * share;
  return [`oklch(${light.toFixed(3)} 0.12 ${(295 - 190 * share).toFixed(0)})`, dark ? "#fff" : "#000"];
}

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "line", "path", "text", "circle", "clipPath", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/* ---- the response ---- */

const gaps = [], chips = [], breaks = [];
for (let p = 0; p < shown; p++) {
  gaps.push(document.createTextNode(""));
  breaks.push(document.createTextNode(""));
  chips.push(element("button", { type: "button", class: "tok", tabindex: p ? -1 : 0, "data-position": p }));
  $("response").append(gaps[p], chips[p], breaks[p]);
}

function dress(p) {
  const now = past[p].findLast(([number]) => number <= step);
  const current = now && now[0] === step;
  const lost = current && now[1] < 0;
  const done = now && now[1] >= 0 && steps[now[0]].committed[now[1]];
  const over = p >= trace.length || (step === steps.length - 1 && trace.end !== null && p > trace.end);
  const classes = ["tok"], chip = chips[p];
  let piece = null, text = null;
  if (done) {
    piece = steps[now[0]].proposals[now[1]];
    const [back, front] = shade(now[0]);
    chip.style.setProperty("--shade", back);
    chip.style.setProperty("--on-shade", front);
    classes.push("done");
    if (current) classes.push("new");
    if (current && edits[step].has(p)) text = `${word(edits[step].get(p))} → ${word(piece)}`;
  } else if (lost) {
    text = `·↶${word(now[2])}`;
    classes.push("mask", "lost");
  } else if (current) {
    piece = steps[step].proposals[now[1]];
    chip.style.setProperty("--c", `${(100 * (1 - steps[step].missing[now[1]])).toFixed(1)}%`);
    classes.push("open");
  } else {
    classes.push("mask");
  }
  if (over) classes.push("void");
  if (piece !== null && pieces[piece][2]) classes.push("special");
  if (p === chosen) classes.push("chosen");
  chip.className = classes.join(" ");
  chip.textContent = text ?? (piece === null ? "·" : word(piece));
  chip.setAttribute("aria-label", `Position ${p + 1}: ${describe(p)}`);
  gaps[p].data = p && (piece === null || /^ /.test(pieces[piece][1])) ? " " : "";
  breaks[p].data = piece !== null && done && pieces[piece][1].includes("\n") ? "\n" : "";
}

/* The position's last proposal: what was committed there, if anything was. */
function last(p) {
  const [number, rank] = past[p].findLast((seen) => seen[1] >= 0);
  return steps[number].proposals[rank];
}

/* What the rule shows of a decided position at a step. */
function verdicts(number, p) {
  const { decided = [], verdicts: values = {} } = steps[number];
  const at = decided.indexOf(p);
  return at < 0 ? {} : Object.fromEntries(Object.entries(values).map(([name, all]) => [name, all[at]]));
}

function blockOf(p) {
  return trace.blocks.findIndex(([start, stop]) => start <= p && p < stop);
}

function describe(p) {
  const now = past[p].findLast(([number]) => number <= step);
  if (!now) return commit[p] < 0 ? "never decoded, the text has ended" : "masked, its block has not begun";
  const said = Object.entries(verdicts(step, p)).map(([name, value]) => `, ${name} ${figure(value)}`).join("");
  const [number, rank, gone] = now, s = steps[number];
  if (rank < 0) return `masked again, “${word(gone)}” taken back at step ${number + 1}${said}`;
  const cut = p < trace.length ? "" : ", behind the response's end";
  const what = `“${word(s.proposals[rank])}”, confidence ${percent(s.missing[rank])}${cut}`;
  if (edits[number].has(p)) {
    return `${what}, edited at step ${number + 1} from “${word(edits[number].get(p))}”${said}`;
  }
  if (s.committed[rank]) return `${what}, committed at step ${number + 1}${said}`;
  return `masked, proposes ${what}`;
}

/* ---- charts: one coordinate system, x is the length n of the prefix of the sorted profile ---- */

/* "3 committed, 2 taken back": the second and third only where there are any. */
function changes(number) {
  const { committed, taken, edited } = counts[number];
  return `${committed} committed${taken ? `, ${taken} taken back` : ""}${edited ? `, ${edited} edited` : ""}`;
}

function line(x1, y1, x2, y2, kind) {
  return element("line", { x1, y1, x2, y2, class: kind });
}

function label(x, y, text, kind = "", anchor = "start") {
  return element("text", { x, y, class: kind, "text-anchor": anchor }, text);
}

function drawProfile() {
  const s = steps[step], count = s.positions.length, box = $("profile");
  const width = box.clientWidth, left = 34, right = width - 8;
  /* The scale stays while a block's last positions fill in, unless the block is very long. */
  const [start, stop] = trace.blocks[blockOf(s.positions[0])];
  const slot = (right - left) / Math.max(count, Math.min(stop - start, 32));
  const x = (n) => left + n * slot;
  const taken = s.committed.reduce((sum, one) => sum + one, 0);
  const rules = [[trace.rule, taken], ...trace.others.map((name, i) => [name, s.would[i]])];
  const tracks = rules.length * 30, top = tracks + 22, bars = 120, under = top + bars + 34, deep = 140;
  const bottom = under + deep;
  const high = (c) => top + bars * (1 - c);
  const score = (g) => under + (deep * (1 - g)) / 2;
  const svg = element("svg", { height: bottom + 34, role: "img",
    "aria-label": `Confidence profile of ${plural(count, "masked position")} and the Fréchet bound of its prefixes` });
  const clip = element("clipPath", { id: "plot" }, element("rect", { x: left - 4, y: under - 4, width: right - left + 8,
    height: deep + 8 }));
  svg.append(clip);

  rules.forEach(([name, n], i) => {
    const y = i * 30 + 20;
    svg.append(label(left, y - 7, `${name}: ${i ? n : changes(step)}`, `t${i}`),
      line(left + 3, y, x(count) - 3, y, "base"), line(left + 3, y, Math.max(x(n) - 3, left + 3), y, `reach c${i}`));
  });

  for (const c of [0, 0.5, 1]) {
    svg.append(line(left, high(c), right, high(c), "axis"), label(left - 6, high(c) + 4, c, "", "end"));
  }
  for (const g of [-1, 0, 1]) {
    svg.append(line(left, score(g), right, score(g), "axis"),
      label(left - 6, score(g) + 4, String(g).replace("-", "−"), "", "end"));
  }
  s.positions.forEach((p, rank) => {
    const c = 1 - s.missing[rank];
    const kind = `bar${s.committed[rank] ? " taken" : ""}${p === chosen ? " chosen" : ""}`;
    svg.append(element("rect", { x: x(rank) + slot * 0.1, y: high(c), width: slot * 0.8, height: bars * c, class: kind }));
  });
  for (const [name, c] of trace.lines) {
    svg.append(line(left, high(c), right, high(c), "limit"), label(right, high(c) - 3, `${name} ${c}`, "", "end"));
  }

  trace.curves.forEach(({ limit }, i) => {
    const values = s.curves[i], kind = i ? " second" : "";
    const at = values.map((g, n) => `${n ? "L" : "M"}${x(n + 0.5).toFixed(1)} ${score(Math.max(g, -1e3)).toFixed(1)}`);
    const drawn = element("g", { "clip-path": "url(#plot)" }, element("path", { d: at.join(""), class: `curve${kind}` }));
    if (slot > 5) {
      values.forEach((g, n) => g >= -1 && drawn.append(element("circle",
        { cx: x(n + 0.5), cy: score(g), r: 2.5, class: `dot${kind}` })));
    }
    if (limit <= 1) svg.append(line(left, score(limit), right, score(limit), "limit"));
    svg.append(drawn);
  });
  /* Where each rule stops, through both plots; lines at one place are drawn side by side. */
  rules.slice().reverse().forEach(([, n], j) => {
    const i = rules.length - 1 - j, same = rules.slice(0, i).filter((other) => other[1] === n).length;
    const at = x(n) - 2 * same;
    svg.append(line(at, top - 4, at, top + bars, `stop c${i}`), line(at, under - 4, at, bottom, `stop c${i}`));
  });
  const [bound, second] = trace.curves;
  svg.append(label(left, top - 10, "confidence, sorted"),
    label(left, under - 10, `${bound.name} Gₙ, margin ${bound.limit}`));
  if (second) svg.append(label(left, bottom + 32, `dashed: ${second.name}, limit ${+second.limit.toFixed(4)}`));
  for (const n of new Set([1, Math.ceil(count / 2), count])) {
    svg.append(label(x(n - 0.5), bottom + 18, n, "", "middle"));
  }
  svg.append(label(right, bottom + 32, "prefix length n", "", "end"));

  svg.append(element("rect", { x: left, y: top, width: x(count) - left, height: bottom - top, class: "hit",
    onclick: (event) => {
      const rank = Math.floor((event.clientX - svg.getBoundingClientRect().left - left) / slot);
      choose(s.positions[Math.min(Math.max(rank, 0), count - 1)]);
    },
    onpointermove: (event) => {
      const rank = Math.floor((event.clientX - svg.getBoundingClientRect().left - left) / slot);
      const n = Math.min(Math.max(rank, 0), count - 1);
      if (event.pointerType === "mouse") {
        tip(event, `n = ${n + 1}: position ${s.positions[n] + 1}, “${word(s.proposals[n])}”, confidence ` +
          `${percent(s.missing[n])}, G = ${s.curves[0][n].toFixed(3)}`);
      }
    },
    onpointerleave: () => { $("tip").hidden = true; } }));
  box.replaceChildren(svg);
}

function drawEntropy() {
  const s = steps[step], box = $("entropy"), width = box.clientWidth, left = 34, right = width - 8, tall = 110;
  const order = s.entropies.map((_, rank) => rank).sort((a, b) => s.entropies[a] - s.entropies[b]
    || s.positions[a] - s.positions[b]);
  const slot = (right - left) / Math.max(order.length, 32), most = 2 * trace.gamma || 1;
  const y = (h) => 14 + tall * (1 - Math.min(h / most, 1));
  const svg = element("svg", { height: tall + 36, role: "img", "aria-label": "Entropies before each position, summed" });
  for (const h of [0, trace.gamma]) {
    svg.append(line(left, y(h), right, y(h), h ? "limit" : "axis"),
      label(left - 6, y(h) + 4, h, "", "end"));
  }
  let before = 0;
  order.forEach((rank, n) => {
    svg.append(element("rect", { x: left + slot * (n + 0.1), y: Math.min(y(before), y(0) - 2), width: slot * 0.8,
      height: Math.max(y(0) - y(before), 2), class: s.committed[rank] ? "bar taken" : "bar" }));
    before += s.entropies[rank];
  });
  svg.append(label(left, tall + 32, `sum of the entropies before, nats; gamma ${trace.gamma}`));
  box.replaceChildren(svg);
}

function drawAll() {
  const box = $("all"), width = box.clientWidth, left = 34, slot = Math.min((width - left - 8) / steps.length, 64);
  const most = Math.max(...counts.map((n) => n.committed + n.edited), ...steps.flatMap((s) => s.would));
  /* Below zero is what was taken back. */
  const least = Math.max(...counts.map((n) => n.taken)), unit = 110 / Math.max(most, least), top = 12;
  const tall = unit * (most + least);
  const y = (n) => top + unit * (most - n), x = (number) => left + number * slot;
  const svg = element("svg", { height: top + tall + 24, role: "img",
    "aria-label": `Positions committed by each step${least ? ", and below zero those taken back" : ""}` });
  svg.append(element("rect", { x: x(step), y: top - 6, width: slot, height: tall + 12, class: "now" }));
  for (const n of new Set([0, Math.round(most / 2), most, ...(unit * least > 14 ? [-least] : [])])) {
    svg.append(line(left, y(n), x(steps.length), y(n), "axis"),
      label(left - 6, y(n) + 4, String(n).replace("-", "−"), "", "end"));
  }
  steps.forEach((s, number) => {
    const { committed, taken, edited } = counts[number];
    const all = committed + edited;
    for (const [from, n, kind] of [[committed, committed, "taken"], [all, edited, "edit"], [0, taken, "lost"]]) {
      if (n || kind === "taken") {
        svg.append(element("rect", { x: x(number) + slot * 0.2, y: y(from), width: slot * 0.6, height: unit * n,
          class: `bar ${kind}` }));
      }
    }
    /* Side by side, for they often agree. */
    const share = (slot * 0.84) / s.would.length;
    s.would.forEach((n, i) => {
      const from = x(number) + slot * 0.08 + i * share;
      svg.append(line(from, y(n), from + share, y(n), `c${i + 1} stop-mark`));
    });
  });
  svg.append(label(left + slot / 2, top + tall + 18, 1, "", "middle"));
  if (steps.length > 1) svg.append(label(x(steps.length - 0.5), top + tall + 18, steps.length, "", "middle"));
  svg.append(element("rect", { x: left, y: 0, width: slot * steps.length, height: top + tall + 24, class: "hit",
    onclick: (event) => go(Math.floor((event.clientX - svg.getBoundingClientRect().left - left) / slot)) }));
  box.replaceChildren(svg);
}

/* ---- one position ---- */

function drawPosition() {
  const box = $("position");
  if (chosen === null) {
    box.replaceChildren(element("p", {}, "Choose a word of the response, or a bar of the profile."));
    return;
  }
  const head = element("p", {}, `Position ${chosen + 1}, block ${blockOf(chosen) + 1}: ${describe(chosen)}. `);
  const back = past[chosen].filter(([, rank]) => rank < 0).map(([number]) => number + 1);
  if (back.length) head.append(`Taken back at step ${back.join(", ")}. `);
  if (commit[chosen] > step) {
    head.append(`Step ${commit[chosen] + 1} commits “${word(last(chosen))}”${back.length ? " for good" : ""}. `);
  }
  if (commit[chosen] >= 0) head.append(`Token id ${pieces[last(chosen)][0]}.`);
  const names = ["step", "forward", "proposal", "confidence", "rank", ...told, ...(revised ? ["what came of it"] : [])];
  const kind = (i) => (i === 2 || (revised && i === names.length - 1) ? {} : { class: "number" });
  const rows = story(chosen).map(([number, cells]) => element("tr", number === step ? { class: "current" } : {},
    ...cells.slice(0, names.length).map((cell, i) => element("td", kind(i), String(cell)))));
  const table = element("table", {}, element("thead", {}, element("tr", {},
    ...names.map((name, i) => element("th", { scope: "col", ...kind(i) }, name)))), element("tbody", {}, ...rows));
  box.replaceChildren(head, ...(rows.length ? [element("div", { class: "scroll", tabindex: 0, role: "region",
    "aria-label": "What the position proposed" }, table)] : []));
}

/* Of each step that saw the position its number and the cells of its row; decided ones are seen where the rule shows
   something of them. */
function story(p) {
  const rows = [];
  let held = null;
  steps.forEach((s, number) => {
    const [, rank = -1, gone] = past[p].find(([seen]) => seen === number) || [];
    const start = [number + 1, s.forward + 1];
    if (rank >= 0) {
      const old = edits[number].get(p), piece = s.proposals[rank];
      const came = old !== undefined ? `edited, “${word(old)}” → “${word(piece)}”`
        : s.committed[rank] ? "committed" : "masked";
      const about = told.map((name) => figure(s.shown?.[name]?.[rank]));
      if (s.committed[rank]) held = piece;
      rows.push([number, [...start, word(piece), percent(s.missing[rank]), rank + 1, ...about, came]]);
    } else if (gone !== undefined || s.decided?.includes(p)) {
      const about = verdicts(number, p), came = gone === undefined ? "kept" : "taken back";
      rows.push([number, [...start, word(gone ?? held), "–", "–", ...told.map((name) => figure(about[name])), came]]);
    }
  });
  return rows;
}

function tip(event, text) {
  const box = $("tip");
  box.textContent = text;
  box.hidden = false;
  const room = document.documentElement.clientWidth - box.offsetWidth - 8;
  box.style.left = `${Math.max(8, Math.min(event.pageX + 12, room + window.scrollX))}px`;
  box.style.top = `${event.pageY + 18}px`;
}

/* ---- moving ---- */

function render() {
  const s = steps[step], count = s.positions.length;
  const { committed, taken, edited } = counts[step];
  for (let p = 0; p < shown; p++) dress(p);
  const instead = trace.others.map((name, i) => `${name} would commit ${s.would[i]}`).join(", ");
  const again = `${taken ? ` Taken back: ${taken}.` : ""}${edited ? ` Edited: ${edited}.` : ""}`;
  const does = s.settled ? `looks at ${plural(count, "decided position")} again${taken ? "" : " and changes none"}.${again}`
    : edited === count ? `looks at the decided positions again.${again}`
    : `commits ${committed} of ${plural(count - edited, "position")}.${again} On the same profile ${instead}.`;
  $("sentence").textContent = `Step ${step + 1} (forward ${s.forward + 1}, block ${blockOf(s.positions[0]) + 1}): ` +
    `${trace.rule} ${does}`;
  $("counter").textContent = `${step + 1} / ${steps.length}`;
  $("slider").value = step + 1;
  $("slider").setAttribute("aria-valuetext", `Step ${step + 1} of ${steps.length}`);
  $("back").disabled = step === 0;
  $("on").disabled = step === steps.length - 1;
  draw();
  drawPosition();
}

function draw() {
  drawProfile();
  if (trace.gamma !== null) drawEntropy();
  drawAll();
}

function go(number) {
  step = Math.min(Math.max(number, 0), steps.length - 1);
  $("tip").hidden = true;
  render();
}

function choose(p) {
  if (chosen !== null) chips[chosen].tabIndex = -1;
  else chips[0].tabIndex = -1;
  chosen = p;
  chips[p].tabIndex = 0;
  render();
}

function play(on) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (step === steps.length - 1) go(0);
    timer = setInterval(() => {
      go(step + 1);
      if (step === steps.length - 1) play(false);
    }, PAUSE);
  }
  $("sentence").setAttribute("aria-live", on ? "off" : "polite");
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
}

const KEYS = {
  ArrowLeft: () => go(step - 1),
  ArrowRight: () => go(step + 1),
  Home: () => go(0),
  End: () => go(steps.length - 1),
  ArrowUp: () => move(-1),
  ArrowDown: () => move(1),
  " ": () => play(timer === null),
};

function move(by) {
  choose(chosen === null ? 0 : Math.min(Math.max(chosen + by, 0), shown - 1));
  chips[chosen].focus({ preventScroll: false });
}

document.addEventListener("keydown", (event) => {
  const on = event.target;
  const chip = on.classList.contains("tok");
  if (event.altKey || event.ctrlKey || event.metaKey || !KEYS[event.key]) return;
  if (on.tagName === "INPUT" && event.key !== " ") return;
  if (event.key === " " && !chip && /BUTTON|SUMMARY/.test(on.tagName)) return;
  if (/Up|Down/.test(event.key) && !chip && on !== document.body) return;
  event.preventDefault();
  if (event.key !== " ") play(false);
  KEYS[event.key]();
});
$("slider").max = steps.length;
$("slider").addEventListener("input", () => { play(false); go($("slider").value - 1); });
$("play").addEventListener("click", () => play(timer === null));
$("back").addEventListener("click", () => { play(false); go(step - 1); });
$("on").addEventListener("click", () => { play(false); go(step + 1); });
$("response").addEventListener("click", (event) => {
  if (event.target.dataset.position) choose(Number(event.target.dataset.position));
});
$("response").addEventListener("pointerover", (event) => {
  const p = event.target.dataset.position;
  if (event.pointerType !== "mouse" || p === undefined) $("tip").hidden = true;
  else tip(event, `Position ${Number(p) + 1}: ${describe(Number(p))}`);
});
$("response").addEventListener("pointerleave", () => { $("tip").hidden = true; });
new ResizeObserver(draw).observe($("profile"));

/* ---- the head ---- */

$("summary").textContent = `${trace.rule}, cache ${trace.settings.cache}: ${plural(trace.tokens, "token")} in ` +
  `${plural(trace.nfe, "forward")}, ${(trace.tokens / trace.nfe).toFixed(1)} tokens per forward` +
  (total("taken") || total("edited") ? `; in all committed ${total("committed")}` : "") +
  (total("taken") ? `, taken back ${total("taken")}` : "") + (total("edited") ? `, edited ${total("edited")}` : "");
$("prompt").textContent = trace.prompt;
for (const [name, value] of Object.entries(trace.settings)) {
  $("settings").append(element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));
}
$("last").textContent = steps.length;
[trace.rule, ...trace.others].forEach((name, i) =>
  $("legend").append(element("li", {}, element("i", { class: `l${i}` }), i ? `${name} would commit` : `${name} commits`)));
for (const [kind, name, text] of [["lost", "taken", "taken back, below zero"], ["edit", "edited", "edited"]]) {
  if (total(name)) $("legend").append(element("li", {}, element("i", { class: kind }), text));
}
$("key-lost").hidden = !total("taken");
$("key-edited").hidden = !total("edited");
$("ramp").style.background = `linear-gradient(to right, ${[0, 1, 2, 3, 4].map((i) =>
  shade(((steps.length - 1) * i) / 4)[0]).join(", ")})`;
$("about").open = trace.prompt.length < 400;
$("entropy-section").hidden = trace.gamma === null;

const asked = /^#step=(\d+)(?:&position=(\d+))?$/.exec(location.hash);
play(false);
go(asked ? Number(asked[1]) - 1 : 0);
if (asked && asked[2]) choose(Math.min(Math.max(Number(asked[2]), 1), shown) - 1);
