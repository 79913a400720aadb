// The next token's distribution and the draw from it. A lane is one text with one seed; all its numbers come from
// POST /v1/next_token.

import { postJson } from "./api.js";
import { number, percent, t, translate } from "./i18n.js";
import { Sheet, el, isEnd, nameOf, quoted, shade } from "./text.js";

const BARS = 12;
const SEGMENTS = 200; // candidates on the line; the rest of it is hatched
const FALL_MS = 650;

const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, reducedMotion.matches ? 0 : ms));

export class Lane {
  // page: { knobs(), prompt(), announce(text), showError(error), laneChanged() }
  constructor(page, seed) {
    this.page = page;
    this.root = document.getElementById("lane").content.cloneNode(true).firstElementChild;
    this.find = (name) => this.root.querySelector(name);
    this.seed = this.find(".seed");
    this.seed.value = seed;
    this.path = []; // [{ text, id, p, alternatives, how: "draw" | "choice" }]
    this.at = 0; // the position whose distribution is shown; path.length is the next token's
    this.answer = null; // the server's answer for that position
    this.latest = 0; // number of the latest request
    this.sheet = new Sheet(this.find(".sheet"), (i) => this.goTo(i));
    this.seed.addEventListener("change", () => this.refresh());
    this.find(".dice").addEventListener("click", () => {
      this.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
      this.refresh();
    });
    this.relabel();
  }

  // --- the position

  restart(path = []) {
    this.path = path;
    return this.goTo(path.length);
  }

  back() {
    this.path = this.path.slice(0, Math.min(this.at, Math.max(0, this.path.length - 1)));
    return this.goTo(this.path.length);
  }

  goTo(index) {
    this.at = index;
    this.sheet.show(this.page.prompt(), this.path, index);
    return this.refresh();
  }

  get finished() {
    return isEnd(this.path.at(-1)) && this.at === this.path.length;
  }

  // Ask for the distribution at this position. The answer to an earlier request than the latest is dropped.
  async refresh() {
    const request = ++this.latest;
    this.asking?.abort();
    this.asking = new AbortController();
    this.page.laneChanged();
    if (this.finished) return this.showEnd(t("ended"));
    const body = { prompt: this.page.prompt(), generated: this.path.slice(0, this.at).map((token) => token.id),
      seed: Number(this.seed.value) || 0, limit: SEGMENTS, ...this.page.knobs() };
    try {
      const answer = await postJson("/v1/next_token", body, this.asking.signal);
      if (request !== this.latest) return;
      this.answer = answer;
      this.capacity = answer.context_left + this.at; // tokens that fit after the prompt
      this.show();
    } catch (error) {
      if (error.name === "AbortError" || request !== this.latest) return;
      this.answer = null;
      this.page.showError(error);
    }
    this.page.laneChanged();
  }

  // --- adding tokens

  async flip() {
    if (this.at !== this.path.length) await this.goTo(this.path.length);
    if (!this.answer || this.finished) return false;
    const { draw } = this.answer;
    this.showDraw(draw);
    this.page.announce(t("drawn", { token: quoted(draw.token), p: percent(draw.token.probability) }));
    const flipped = this.latest;
    await pause(FALL_MS);
    if (flipped !== this.latest) return false; // a slider moved or another token was chosen meanwhile
    await this.add(draw.token, "draw");
    return !this.finished;
  }

  choose(candidate) {
    this.path = this.path.slice(0, this.at);
    this.page.announce(t("took", { token: quoted(candidate), p: percent(candidate.probability) }));
    return this.add(candidate, "choice");
  }

  add(candidate, how) {
    const alternatives = this.answer.candidates.map((other) => [other.text, other.raw]);
    this.path = [...this.path, { text: candidate.text, id: candidate.id, p: candidate.raw, alternatives, how }];
    return this.goTo(this.path.length);
  }

  // --- showing

  relabel() {
    translate(this.root);
    if (this.answer) this.show();
    this.sheet.relabel(this.page.prompt(), this.path, this.at);
  }

  show() {
    const { answer } = this;
    this.find(".count").textContent = t("tokens", { n: this.path.length });
    this.showBars(answer);
    this.showLine(answer);
    const written = this.path[this.at];
    this.find(".coin").hidden = true;
    const says = written ? t("takenThere", { token: quoted(written) })
      : answer.context_left < 1 ? t("full", { n: number(answer.tokens.length) }) : t("waiting");
    this.find(".fell").textContent = says;
    if (written?.id === answer.draw.token.id && written.how === "draw") this.showDraw(answer.draw);
  }

  showEnd(text) {
    this.answer = null;
    this.find(".count").textContent = t("tokens", { n: this.path.length });
    this.find(".bars").replaceChildren();
    this.find(".segments").replaceChildren();
    this.find(".rest").textContent = "";
    this.find(".coin").hidden = true;
    this.find(".fell").textContent = text;
    this.page.announce(text);
    this.page.laneChanged();
  }

  showBars(answer) {
    const listed = answer.candidates.slice(0, BARS);
    const widest = this.widest = Math.max(...listed.map((c) => Math.max(c.raw, c.probability)));
    const bars = this.find(".bars");
    const focused = [...bars.children].findIndex((row) => row.contains(document.activeElement));
    bars.replaceChildren(...listed.map((candidate) => el("li", {}, this.bar(candidate, widest))));
    if (focused >= 0) bars.children[Math.min(focused, listed.length - 1)].firstChild.focus({ preventScroll: true });
    const others = answer.vocabulary - listed.length;
    const share = 1 - listed.reduce((sum, c) => sum + c.probability, 0);
    this.find(".rest").textContent = others < 1 ? t("restNone")
      : share > 1e-9 ? t("rest", { n: number(others), p: percent(share) }) : t("restCut", { n: number(others) });
  }

  bar(candidate, widest) {
    const { raw, probability, cut_by: filter } = candidate;
    const before = el("i", { className: "raw" });
    const now = el("i", { className: `now ${shade(raw)}` });
    before.style.width = `${(100 * raw) / widest}%`;
    now.style.width = `${(100 * probability) / widest}%`;
    const cutter = filter === "greedy" ? t("greedy") : filter?.replaceAll("_", "-");
    const button = el("button", { type: "button", className: "bar" },
      el("span", { className: "name", textContent: nameOf(candidate) }),
      el("span", { className: "track" }, before, now),
      el("span", { className: "figure", textContent: percent(raw) }),
      el("span", { className: "figure strong", textContent: filter ? cutter : percent(probability) }));
    if (filter) button.classList.add("out");
    const values = { token: quoted(candidate), raw: percent(raw), now: percent(probability), filter: cutter };
    button.setAttribute("aria-label", t(filter ? "barCut" : "barLabel", values));
    button.dataset.id = candidate.id;
    button.addEventListener("click", () => this.choose(candidate));
    for (const [kind, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      button.addEventListener(kind, () => this.segment(candidate.id)?.classList.toggle("lit", on));
    }
    return button;
  }

  // The bar of a token; a drawn token that is not among the listed ones gets one below them.
  barOf(token) {
    const found = this.root.querySelector(`.bar[data-id="${token.id}"]`);
    if (found) return found;
    const bar = this.bar(token, this.widest);
    this.find(".bars").append(el("li", {}, bar));
    return bar;
  }

  showLine(answer) {
    const kept = answer.candidates.filter((candidate) => candidate.probability > 0);
    this.find(".segments").replaceChildren(...kept.map((candidate) => {
      const share = candidate.end - candidate.start;
      const node = el("span", { className: `segment ${shade(candidate.raw)}` });
      if (share > 0.005) node.classList.add("wide");
      node.style.left = `${100 * candidate.start}%`;
      node.style.width = `${100 * share}%`;
      node.dataset.id = candidate.id;
      if (share > 0.055) node.append(el("span", { textContent: nameOf(candidate) }));
      return node;
    }));
    const list = [...kept].sort((a, b) => b.probability - a.probability).slice(0, 5)
      .map((candidate) => `${quoted(candidate)} ${percent(candidate.probability)}`).join(", ");
    this.find(".line").setAttribute("aria-label", t("lineLabel", { list }));
  }

  segment(id) {
    return this.root.querySelector(`.segment[data-id="${id}"]`);
  }

  // Show the server's draw: the coin on the line, its segment and its bar.
  showDraw(draw) {
    const coin = this.find(".coin");
    const { token, u } = draw;
    for (const node of this.root.querySelectorAll(".hit")) node.classList.remove("hit");
    this.segment(token.id)?.classList.add("hit");
    this.barOf(token).classList.add("hit");
    coin.hidden = u === null;
    const values = { token: quoted(token), p: percent(token.probability), u: u?.toFixed(4) };
    this.find(".fell").textContent = t(u === null ? "fellGreedy" : "fell", values);
    if (u === null) return;
    coin.style.left = `${100 * u}%`;
    coin.classList.remove("falling");
    void coin.offsetWidth; // restart the animation
    coin.classList.add("falling");
  }
}
