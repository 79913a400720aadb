// "Flip the coin": one lane is one text growing under one seed. All numbers come from POST /v1/next_token.

import { postJson } from "./api.js";
import { number, percent, t, translate } from "./i18n.js";
import { Sheet, el, isEnd, nameOf, quoted, shade } from "./text.js";

const BARS = 12;
const STRETCHES = 200; // of the line; what is not listed stays hatched
const FALL_MS = 650;

const calm = matchMedia("(prefers-reduced-motion: reduce)");
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, calm.matches ? 0 : ms));

export class Lane {
  // page: { knobs(), prompt(), say(text), fail(error), moved() }
  constructor(page, seed) {
    this.page = page;
    this.root = document.getElementById("lane").content.cloneNode(true).firstElementChild;
    this.find = (name) => this.root.querySelector(name);
    this.seed = this.find(".seed");
    this.seed.value = seed;
    this.path = []; // [{ text, id, p, alternatives, how: "draw" | "choice" }]
    this.at = 0; // the place whose distribution is shown; path.length is the next token's
    this.news = null; // the server's answer for that place
    this.latest = 0;
    this.sheet = new Sheet(this.find(".sheet"), (i) => this.look(i));
    this.seed.addEventListener("change", () => this.refresh());
    this.find(".dice").addEventListener("click", () => {
      this.seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
      this.refresh();
    });
    this.relabel();
  }

  // --- where we are

  restart(path = []) {
    this.path = path;
    return this.look(path.length);
  }

  back() {
    this.path = this.path.slice(0, Math.min(this.at, Math.max(0, this.path.length - 1)));
    return this.look(this.path.length);
  }

  look(index) {
    this.at = index;
    this.sheet.show(this.page.prompt(), this.path, index);
    return this.refresh();
  }

  get finished() {
    return isEnd(this.path.at(-1)) && this.at === this.path.length;
  }

  // Ask for the distribution at this place. Answers that are overtaken by a later question are dropped.
  async refresh() {
    const question = ++this.latest;
    this.asking?.abort();
    this.asking = new AbortController();
    this.page.moved();
    if (this.finished) return this.showEnd(t("ended"));
    const body = { prompt: this.page.prompt(), generated: this.path.slice(0, this.at).map((token) => token.id),
      seed: Number(this.seed.value) || 0, limit: STRETCHES, ...this.page.knobs() };
    try {
      const news = await postJson("/v1/next_token", body, this.asking.signal);
      if (question !== this.latest) return;
      this.news = news;
      this.room = news.context_left + this.at; // tokens that fit after the prompt
      this.show();
    } catch (error) {
      if (error.name === "AbortError" || question !== this.latest) return;
      this.news = null;
      this.page.fail(error);
    }
    this.page.moved();
  }

  // --- moving on

  async flip() {
    if (this.at !== this.path.length) await this.look(this.path.length);
    if (!this.news || this.finished) return false;
    const { draw } = this.news;
    this.land(draw);
    this.page.say(t("drawn", { token: quoted(draw.token), p: percent(draw.token.probability) }));
    const flipped = this.latest;
    await pause(FALL_MS);
    if (flipped !== this.latest) return false; // a slider, another road: the coin was called back
    await this.add(draw.token, "draw");
    return !this.finished;
  }

  take(candidate) {
    this.path = this.path.slice(0, this.at);
    this.page.say(t("took", { token: quoted(candidate), p: percent(candidate.probability) }));
    return this.add(candidate, "choice");
  }

  add(candidate, how) {
    const alternatives = this.news.candidates.map((other) => [other.text, other.raw]);
    this.path = [...this.path, { text: candidate.text, id: candidate.id, p: candidate.raw, alternatives, how }];
    return this.look(this.path.length);
  }

  // --- showing

  relabel() {
    translate(this.root);
    if (this.news) this.show();
    this.sheet.tokens = []; // the labels of its buttons are sentences too
    this.sheet.buttons().forEach((button) => button.parentNode.remove());
    this.sheet.show(this.page.prompt(), this.path, this.at);
  }

  show() {
    const { news } = this;
    this.find(".count").textContent = t("tokens", { n: this.path.length });
    this.showBars(news);
    this.showLine(news);
    const written = this.path[this.at];
    this.find(".coin").hidden = true;
    const says = written ? t("takenThere", { token: quoted(written) })
      : news.context_left < 1 ? t("full", { n: number(news.tokens.length) }) : t("waiting");
    this.find(".fell").textContent = says;
    if (written?.id === news.draw.token.id && written.how === "draw") this.land(news.draw);
  }

  showEnd(text) {
    this.news = null;
    this.find(".count").textContent = t("tokens", { n: this.path.length });
    this.find(".bars").replaceChildren();
    this.find(".segments").replaceChildren();
    this.find(".rest").textContent = "";
    this.find(".coin").hidden = true;
    this.find(".fell").textContent = text;
    this.page.say(text);
    this.page.moved();
  }

  showBars(news) {
    const listed = news.candidates.slice(0, BARS);
    const widest = this.widest = Math.max(...listed.map((c) => Math.max(c.raw, c.probability)));
    const bars = this.find(".bars");
    const focused = [...bars.children].findIndex((row) => row.contains(document.activeElement));
    bars.replaceChildren(...listed.map((candidate) => el("li", {}, this.bar(candidate, widest))));
    if (focused >= 0) bars.children[Math.min(focused, listed.length - 1)].firstChild.focus({ preventScroll: true });
    const others = news.vocabulary - listed.length;
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
    button.addEventListener("click", () => this.take(candidate));
    for (const [kind, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      button.addEventListener(kind, () => this.segment(candidate.id)?.classList.toggle("lit", on));
    }
    return button;
  }

  // The bar of a token; an outsider that was drawn gets one below the others.
  barOf(token) {
    const found = this.root.querySelector(`.bar[data-id="${token.id}"]`);
    if (found) return found;
    const bar = this.bar(token, this.widest);
    this.find(".bars").append(el("li", {}, bar));
    return bar;
  }

  showLine(news) {
    const kept = news.candidates.filter((candidate) => candidate.probability > 0);
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

  // Let the coin come down where the server's draw is.
  land(draw) {
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
