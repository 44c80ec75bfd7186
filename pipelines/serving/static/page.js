// What the page does: the chosen scan, its planes and its 3D view, uploads, and whose regions are shown.

import * as api from "./api.js";
import { Answers } from "./answers.js";
import { make } from "./element.js";
import { Plane } from "./planes.js";
import { Regions, Scan } from "./scan.js";
import { Space } from "./space.js";

const of = (selector) => document.querySelector(selector);
const view = { scan: null, at: [0, 0, 0], regions: [] }; // and level, width, style: the buttons that are pressed say them
const names = new Map(); // of the files that this page sent; the server keeps none
const planes = [...document.querySelectorAll("[data-plane]")].map((pane) => new Plane(pane, view, moveTo));
const space = new Space(of("#space"), view);
const answers = new Answers(of("#answers"), showRegions, (answer) => {
  of("#news").textContent = answer.problem ?? `Answer: ${answer.text}`;
});
let model = "";
let loading = new AbortController(); // of the scan
let shownNow = 0; // counts what was wanted, so that what comes late is left aside

// What is said

function say(problem = "", canNameSeries = false) {
  of("#problem").hidden = !problem;
  of("#problem p").textContent = problem;
  of("#series").hidden = !canNameSeries;
}

async function orSay(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
    return undefined;
  }
}

function progress(words = "", share = null) {
  of("#progress").hidden = !words;
  if (of("#progress [role=status]").textContent !== words) of("#progress [role=status]").textContent = words;
  if (share === null) of("progress").removeAttribute("value");
  else of("progress").value = share;
}

// The scan

async function listVolumes(chosen) {
  const { data, has_more: hasMore } = await api.volumes();
  const options = data.map(({ id }) => make("option", { value: id, textContent: names.has(id) ? `${names.get(id)} (${id.slice(0, 12)})` : id }));
  if (hasMore) options.push(make("option", { disabled: true, textContent: "more: the address takes ?volume=ID" }));
  if (chosen && !data.some(({ id }) => id === chosen)) options.unshift(make("option", { value: chosen, textContent: chosen }));
  if (!options.length) options.push(make("option", { value: "", textContent: "none yet: open one" }));
  of("#volume").replaceChildren(...options);
  of("#volume").value = chosen || data[0]?.id || "";
  return of("#volume").value;
}

async function choose(id) {
  loading.abort();
  loading = new AbortController();
  history.replaceState(null, "", id ? `/?volume=${encodeURIComponent(id)}` : "/");
  view.scan = null;
  of("#viewer").classList.remove("has-scan");
  of("#empty").hidden = Boolean(id);
  of("#remove").hidden = true;
  of("#send").disabled = !id;
  answers.open(id);
  if (!id) return;
  const { signal } = loading;
  const facts = await api.facts(id);
  const bytes = await api.nifti(id, of("#fine").checked, signal);
  if (signal.aborted) return;
  const isSame = view.id === id;
  view.id = id;
  view.scan = new Scan(facts, bytes);
  if (!isSame) view.at = view.scan.middle;
  of("#remove").hidden = !facts.uploaded;
  of("#viewer").classList.add("has-scan");
  moveTo(view.at);
}

function moveTo(world) {
  view.at = world;
  draw();
}

function draw() {
  planes.forEach((plane) => plane.draw());
  space.draw();
  const { scan, at } = view;
  if (!scan) return;
  of("#place [name=lps]").value = at.map((mm) => mm.toFixed(1)).join(", ");
  const box = scan.index(at, scan.cells);
  const region = view.regions[0];
  const kept = region ? `   ${region.has(box) ? "shown" : "not shown"}, saliency ${region.saliency[region.number(box)].toFixed(3)}` : "";
  of("#here").textContent = `${Scan.words(at)} mm   ${scan.hu(at)} HU${kept}`;
}

function setWindow(level, width) {
  Object.assign(view, { level, width: Math.max(1, width) });
  [of("#level").value, of("#width").value] = [level, view.width];
  for (const button of of("#windows").children)
    button.ariaPressed = String(button.dataset.window === `${level} ${view.width}`);
  draw();
}

// Kept regions

async function showRegions(shown) {
  const turn = ++shownNow;
  const { scan } = view;
  const found = await orSay(() => Promise.all(shown.map(({ photon }) => api.kept(photon.kept[0]))));
  if (turn !== shownNow) return;
  view.regions = scan && found ? found.map((kept) => new Regions(scan.cells, kept)) : [];
  of("#regions").hidden = !view.regions.length;
  const slider = of("#most");
  slider.max = Math.max(1, ...view.regions.map((region) => region.count)); // before the value, which it bounds
  slider.value = slider.max;
  const [first, second] = view.regions;
  of("#legend").replaceChildren(...(first ? legend(first, second, shown) : []));
  if (first?.peak && !second) view.at = scan.world(first.peak);
  limitRegions();
}

function legend(first, second, shown) {
  const part = (className, text) => make("span", { className, textContent: text });
  if (!second) return [part("first", `${first.count} regions`), ` were kept for “${shown[0].question}”`];
  return [part("first", `${first.count} regions`), ` for “${shown[0].question}”, `, part("second", `${second.count}`),
    ` for “${shown[1].question}”; ${first.common(second)} of them for both`];
}

function limitRegions() {
  const most = Number(of("#most").value);
  view.regions.forEach((region) => region.show(most));
  of("#shown").textContent = `${most} of ${of("#most").max}`;
  draw();
}

function setStyle(style) {
  view.style = style;
  for (const button of of("#styles").children) button.ariaPressed = String(button.dataset.style === style);
  draw();
}

// Uploads

let sending = null;
let sent = []; // the files of the last upload, for the case that a series has to be named

async function upload(files, series = "") {
  if (!files.length || sending) return;
  sent = files;
  sending = new AbortController();
  say();
  const started = performance.now();
  let share = 0;
  const tell = () => {
    const seconds = Math.round((performance.now() - started) / 1000);
    if (share < 1) progress(`Sending ${files.length === 1 ? "a file" : `${files.length} files`}`, share);
    else progress(seconds > 3 ? `Preparing the scan, ${seconds} s` : "Preparing the scan");
  };
  const ticking = setInterval(tell, 1000);
  try {
    const onProgress = (part) => { share = part; tell(); };
    tell();
    const { id } = await api.upload(files, series, onProgress, sending.signal);
    names.set(id, files.length === 1 ? files[0].name : `${files.length} files`);
    await choose(await listVolumes(id));
    of("#news").textContent = "The scan is ready.";
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, error.code === "several-scans");
  } finally {
    clearInterval(ticking);
    sending = null;
    progress();
  }
}

// The files of what was dropped, those in folders too.
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const found = [];
  while (entries.length) {
    const entry = entries.shift();
    if (entry.isFile) found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    if (!entry.isDirectory) continue;
    const reader = entry.createReader();
    for (let some; (some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length; ) entries.push(...some);
  }
  return found;
}

// Questions

let asking = null;

async function ask() {
  const question = of("#question").value.trim();
  if (!question || !view.id || !of("#volume").value || asking) return;
  asking = new AbortController();
  of("#stop").hidden = false;
  of("#send").disabled = true;
  of("#question").value = "";
  await answers.ask(model, of("#volume").value, question, asking.signal);
  asking = null;
  of("#stop").hidden = true;
  of("#send").disabled = !of("#volume").value;
}

// What people do

const on = (selector, type, action) => of(selector).addEventListener(type, action);
on("#volume", "change", () => orSay(() => choose(of("#volume").value)));
on("#open-files", "click", () => of("#files").click());
on("#open-folder", "click", () => of("#folder").click());
for (const input of ["#files", "#folder"])
  on(input, "change", (event) => {
    upload([...event.target.files]);
    event.target.value = "";
  });
on("#remove", "click", () => orSay(async () => {
  const id = of("#volume").value;
  if (!window.confirm("Remove this scan and its answers from the server?")) return;
  await api.remove(id);
  answers.forget(id);
  await choose(await listVolumes());
}));
on("#problem button.quiet", "click", () => say());
on("#progress button", "click", () => sending?.abort());
on("#series", "submit", (event) => {
  event.preventDefault();
  upload(sent, event.target.elements.series.value.trim());
});
on("#windows", "click", ({ target }) => target.dataset.window && setWindow(...target.dataset.window.split(" ").map(Number)));
for (const input of ["#level", "#width"]) on(input, "change", () => setWindow(Number(of("#level").value), Number(of("#width").value)));
on("#fine", "change", () => orSay(async () => {
  const { shown } = answers;
  await choose(of("#volume").value); // the one that was chosen last, which may not be there yet
  answers.show(shown.filter(({ volume }) => volume === answers.volume));
}));
on("#place", "submit", (event) => {
  event.preventDefault();
  const point = event.target.elements.lps.value.split(/[\s,;]+/).filter(Boolean).map(Number);
  if (point.length !== 3 || !point.every(Number.isFinite)) say("Position: expected three numbers, x, y, z in LPS mm, found another text");
  else if (view.scan) moveTo(point);
});
on("#styles", "click", ({ target }) => target.dataset.style && setStyle(target.dataset.style));
on("#most", "input", limitRegions);
on("#ask", "submit", (event) => {
  event.preventDefault();
  ask();
});
on("#question", "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
on("#stop", "click", () => asking?.abort());
on("#panes", "dblclick", ({ target }) => enlarge(target.closest(".pane")));

function enlarge(pane) {
  if (!pane) return;
  const isLarge = pane.classList.contains("large");
  document.querySelectorAll(".pane.large").forEach((one) => one.classList.remove("large"));
  pane.classList.toggle("large", !isLarge);
  of("#panes").classList.toggle("one", !isLarge);
}

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const [lung, soft, bone] = of("#windows").children;
  const keys = { 1: () => lung.click(), 2: () => soft.click(), 3: () => bone.click(), "/": () => of("#question").focus(),
    o: () => setStyle("outline"), d: () => setStyle("dim"), h: () => setStyle("none"),
    f: () => enlarge(document.activeElement.closest(".pane")) };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});

for (const type of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(type, (event) => {
    event.preventDefault();
    of("#drop").hidden = type === "drop" || (type === "dragleave" && !event.relatedTarget);
    if (type === "drop") filesOf(event.dataTransfer).then(upload, (error) => say(error.message));
  });

of("#windows [aria-pressed=true]").click();
of("#styles [aria-pressed=true]").click();
orSay(async () => {
  model = await api.modelName();
  of("#model").textContent = model;
  await choose(await listVolumes(new URLSearchParams(location.search).get("volume") ?? ""));
});
space.ready.then(() => (of("#licences").hidden = !space.viewer));
