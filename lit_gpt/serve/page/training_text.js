// What came next in the training text: where the end of the text occurs there, how often each token followed, beside the
// model's own probabilities. All of it comes from POST /v1/continuations, which is asked while this part is open.

import { postJson } from "./api.js";
import { number, percent, t } from "./i18n.js";
import { el, nameOf, shade } from "./text.js";

const FOLLOWED = 8; // of the tokens that followed: the most frequent
const LIKELY = 4; // and of the model's own: the likeliest
const LISTED = 200; // tokens that are counted one by one
const EXCERPTS = 3;
const SHOWN_SUFFIX = 60; // characters

export class TrainingText {
  // page: { hasTrainingText(), announce(text), showError(error) }
  constructor(root, page) {
    this.root = root;
    this.page = page;
    this.find = (name) => root.querySelector(name);
    this.answer = null; // of POST /v1/next_token, for the text whose end is looked up
    this.found = null; // of POST /v1/continuations
    this.latest = 0;
    root.addEventListener("toggle", () => this.ask());
  }

  // The text is another: { prompt, generated }, with the model's answer for it, or none.
  follow(answer, text) {
    this.answer = answer;
    this.text = text;
    this.found = null;
    this.show();
    return this.ask();
  }

  // The answer to an earlier request than the latest is dropped.
  async ask() {
    const request = ++this.latest;
    this.asking?.abort();
    if (!this.root.open || !this.answer || this.found || !this.page.hasTrainingText()) return;
    this.asking = new AbortController();
    try {
      const body = { ...this.text, limit: LISTED, excerpts: EXCERPTS };
      const found = await postJson("/v1/continuations", body, this.asking.signal);
      if (request !== this.latest) return;
      this.found = found;
      this.show();
      this.page.announce(this.find(".found").textContent);
    } catch (error) {
      if (error.name !== "AbortError" && request === this.latest) this.page.showError(error);
    }
  }

  // --- showing

  show() {
    this.root.hidden = !this.page.hasTrainingText();
    const { found, answer } = this;
    this.find(".followed").hidden = !found?.occurrences;
    this.find(".excerpts").replaceChildren(...(found?.excerpts ?? []).map((one) => excerpt(one, found.suffix)));
    if (!found || !answer) {
      this.find(".found").textContent = "";
      return;
    }
    const values = { suffix: shown(found.suffix), tokens: number(found.suffix_tokens), n: number(found.occurrences),
      searched: number(found.tokens_searched) };
    this.find(".found").textContent = t(found.occurrences ? "trainingFound" : "trainingNone", values);
    this.find(".followed tbody").replaceChildren(...rows(found, answer).map(row));
  }
}

function shown(suffix) {
  const visible = suffix.replaceAll("\n", "⏎");
  return `“${visible.length > SHOWN_SUFFIX ? `…${visible.slice(-SHOWN_SUFFIX)}` : visible}”`;
}

// The most frequent tokens and the likeliest, each once: [{ token, count, share, p }]. A count that is not known is at
// most `under`, since the server lists the most frequent ones; likewise a probability.
function rows(found, answer) {
  const counted = new Map(found.next.map((one) => [one.id, one]));
  const likely = new Map(answer.candidates.map((one) => [one.id, one]));
  const fewest = found.rest ? found.next.at(-1).count : 0;
  const least = Math.min(...answer.candidates.map((one) => one.raw));
  const ids = [...found.next.slice(0, FOLLOWED), ...answer.candidates.slice(0, LIKELY)].map((one) => one.id);
  return [...new Set(ids)].map((id) => {
    const count = counted.get(id)?.count ?? fewest;
    return {
      token: counted.get(id) ?? likely.get(id),
      count, share: count / found.occurrences, countIsMost: !counted.has(id) && fewest > 0,
      p: likely.get(id)?.raw ?? least, pIsMost: !likely.has(id) && answer.candidates.length < answer.vocabulary,
    };
  });
}

function row({ token, count, share, countIsMost, p, pIsMost }) {
  const name = el("th", { scope: "row", textContent: nameOf(token) });
  name.dataset.id = token.id;
  const times = `${countIsMost ? "≤ " : ""}${number(count)}×`;
  return el("tr", {}, name,
    el("td", {}, el("span", { className: "figure", textContent: `${times} ${percent(share)}` }), bar(share, "read")),
    el("td", {}, el("span", { className: "figure", textContent: `${pIsMost ? "≤ " : ""}${percent(p)}` }), bar(p, shade(p))));
}

function bar(share, name) {
  const filled = el("i", { className: name });
  filled.style.width = `${100 * Math.min(1, share)}%`;
  return el("span", { className: "followed-bar", ariaHidden: "true" }, filled);
}

function excerpt({ before, next, after, shard, position }, suffix) {
  const found = suffix && before.endsWith(suffix) ? suffix : "";
  return el("li", {},
    el("q", {}, before.slice(0, before.length - found.length), el("b", { textContent: found }),
      el("mark", { textContent: next || t("end") }), after),
    el("cite", { textContent: t("trainingWhere", { shard, position: number(position) }) }));
}
