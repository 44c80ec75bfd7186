// The questions of this tab and their answers. They are kept in the tab's session storage, which goes with the tab.

import * as api from "./api.js";
import { make } from "./element.js";

const KEY = "photon.answers";
const STAGES = [["read", "reading"], ["prepare", "preparing"], ["encode", "encoding"], ["answer", "answering"]];

export class Answers {
  // `onShow` gets the answers whose regions are wanted: at most two; `onDone` one that has ended, to be told to listeners.
  constructor(list, onShow, onDone) {
    Object.assign(this, { list, onShow, onDone, shown: [] });
    this.all = JSON.parse(sessionStorage.getItem(KEY) ?? "[]");
  }

  save() {
    const ended = this.all.filter((answer) => answer.photon || answer.problem);
    try {
      sessionStorage.setItem(KEY, JSON.stringify(ended.slice(-200), (key, value) => (key === "element" ? undefined : value)));
    } catch {
      // a full storage costs the reload, not the answers
    }
  }

  // List those about one volume, the newest first.
  open(volume) {
    this.volume = volume;
    this.show([]);
    this.list.replaceChildren(...this.all.filter((answer) => answer.volume === volume).reverse().map((one) => this.card(one)));
  }

  forget(volume) {
    this.all = this.all.filter((answer) => answer.volume !== volume);
    this.save();
  }

  async ask(model, volume, question, signal) {
    const answer = { volume, question, body: api.bodyOf(model, volume, question), text: "" };
    this.all.push(answer);
    this.list.prepend(this.card(answer));
    const started = performance.now();
    try {
      for await (const chunk of api.ask(answer.body, signal)) {
        answer.text += chunk.choices[0]?.delta.content ?? "";
        answer.photon = chunk.choices[0] && chunk.photon ? chunk.photon : answer.photon;
        answer.usage = chunk.usage ?? answer.usage;
        answer.element.querySelector(".text").textContent = answer.text;
      }
      answer.seconds = (performance.now() - started) / 1000;
    } catch (error) {
      answer.problem = error.name === "AbortError" ? "stopped" : error.message;
    }
    this.save();
    const old = answer.element;
    if (old.isConnected) old.replaceWith(this.card(answer));
    this.onDone(answer);
    if (answer.photon && this.volume === volume) this.show([answer]);
  }

  show(answers) {
    this.shown = answers;
    this.all.forEach((answer) => answer.element && this.mark(answer));
    this.onShow(answers);
  }

  mark({ element }) {
    const number = this.shown.findIndex((one) => one.element === element);
    element.classList.toggle("is-first", number === 0);
    element.classList.toggle("is-second", number === 1);
    element.querySelector(".show")?.setAttribute("aria-pressed", String(number === 0));
    element.querySelector(".beside")?.setAttribute("aria-pressed", String(number === 1));
  }

  card(answer) {
    const text = make("p", { className: "text", textContent: answer.text });
    const element = make("li", { className: "answer" }, make("h2", { textContent: answer.question }), text);
    answer.element = element;
    element.classList.toggle("waits", !answer.photon && !answer.problem);
    if (answer.problem) element.append(make("p", { className: "text failed", textContent: answer.problem }));
    if (answer.photon) {
      element.append(this.figures(answer), this.actions(answer));
      element.addEventListener("click", (event) => event.target.closest("button, a, summary, details") || this.toggle(answer, 0));
    }
    return element;
  }

  figures({ photon, usage, seconds }) {
    const share = Math.round((100 * photon.kept_tokens) / Math.max(1, photon.visual_tokens));
    const stages = STAGES.filter(([name]) => photon.seconds[name] >= 0.005).map(([name, word]) => `${word} ${photon.seconds[name].toFixed(2)} s`);
    const hit = (usage?.prompt_tokens_details.cached_tokens ?? 0) > 0;
    const rows = [
      ["Tokens kept", `${photon.kept_tokens} of ${photon.visual_tokens} (${share} %)`],
      ["Encoding", hit ? "cache hit" : "computed for this question"],
      ["Time", `${[`${(seconds ?? 0).toFixed(2)} s`, ...stages].join(", ")}`],
    ];
    return make("dl", {}, ...rows.flatMap(([term, value]) => [make("dt", { textContent: term }), make("dd", { textContent: value })]));
  }

  actions(answer) {
    const button = (text, className, action) => {
      const made = make("button", { type: "button", textContent: text, className });
      made.addEventListener("click", () => action(made));
      return made;
    };
    const copy = (text) => async (made) => {
      await navigator.clipboard.writeText(text).catch(() => window.prompt("Copy", text));
      const name = made.textContent;
      made.textContent = "Copied";
      setTimeout(() => (made.textContent = name), 1200);
    };
    const [place] = answer.photon.kept;
    const files = [["nifti", "kept.nii.gz"], ["saliency", "saliency.nii.gz"], ["png", "planes.png"]].map(([format, name]) =>
      make("a", { href: `${place}?format=${format}`, download: name, textContent: name }));
    return make("div", { className: "bar" },
      button("Regions", "show", () => this.toggle(answer, 0)),
      button("Compare", "beside", () => this.toggle(answer, 1)),
      make("details", {}, make("summary", { textContent: "Copy, download" }), make("div", { className: "bar" },
        button("Copy curl", "", copy(curlOf(answer.body))), button("Copy Python", "", copy(pythonOf(answer.body))), ...files)));
  }

  // Show an answer's regions as the first or beside those of the first; hide them where they are shown so.
  toggle(answer, number) {
    const [first, second] = this.shown;
    const others = [first, second].map((one) => (one === answer ? undefined : one));
    if (this.shown[number] === answer) this.show(others.filter(Boolean));
    else if (number === 1 && others[0]) this.show([others[0], answer]);
    else this.show(number === 0 && others[1] ? [answer, others[1]] : [answer]);
  }
}

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curlOf(body) {
  return `curl ${location.origin}/v1/chat/completions -H 'content-type: application/json' \\
  -H "Authorization: Bearer \${PHOTON_KEY:-none}" \\
  -d ${shell(JSON.stringify(body))}\n`;
}

export function pythonOf({ model, messages }) {
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=os.environ.get("PHOTON_KEY", "none"))
messages = ${JSON.stringify(messages, null, 1)}
answer = client.chat.completions.create(model=${JSON.stringify(model)}, messages=messages)
print(answer.choices[0].message.content, answer.photon["kept"])
`;
}
