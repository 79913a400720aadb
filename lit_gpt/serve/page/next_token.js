// The next token's distribution and the draw from it. A lane is one text with one seed; all its numbers come from
// POST /v1/next_token.

import { postJson } from "./api.js";
import { number, percent, t, translate } from "./i18n.js";
import { TallyView, othersRow } from "./tally.js";
import { Sheet, el, isEnd, nameOf, pieces, quoted, shade } from "./text.js";
import { TrainingText } from "./training_text.js";

const BARS = 12;
const SEGMENTS = 200; // candidates on the line; the rest of it is hatched
const FALL_MS = 650;

const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, reducedMotion.matches ? 0 : ms));

export class Lane {
  // page: { knobs(), prompt(), announce(text), showError(error), laneChanged(), hasTrainingText() }; loop: the drawing of
  // the loop that this lane lights, or null
  constructor(page, seed, loop) {
    this.page = page;
    this.loop = loop;
    this.root = document.getElementById("lane").content.cloneNode(true).firstElementChild;
    this.find = (name) => this.root.querySelector(name);
    this.seed = this.find(".seed");
    this.seed.value = seed;
    this.path = []; // [{ text, id, p, alternatives, how: "draw" | "choice" }]
    this.at = 0; // the position whose distribution is shown; path.length is the next token's
    this.answer = null; // the server's answer for that position
    this.read = null; // { prompt, tokens } of the latest answer
    this.latest = 0; // number of the latest request
    this.sheet = new Sheet(this.find(".sheet"), (i) => this.goTo(i));
    this.tally = new TallyView(this);
    this.training = new TrainingText(this.find(".training"), page);
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

  // The text whose next token is shown, as the server takes it.
  get text() {
    return { prompt: this.page.prompt(), generated: this.path.slice(0, this.at).map((token) => token.id) };
  }

  // Ask for the distribution at this position. The answer to an earlier request than the latest is dropped.
  async refresh() {
    const request = ++this.latest;
    this.asking?.abort();
    this.asking = new AbortController();
    this.page.laneChanged();
    if (this.finished) return this.showEnd(t("ended"));
    const body = { ...this.text, seed: Number(this.seed.value) || 0, limit: SEGMENTS, ...this.page.knobs() };
    const read = this.page.tokensOf(body.prompt).length;
    const written = pieces(this.path.slice(0, this.at).map((token) => token.text)).join("");
    this.loop?.sent(body.prompt + written, read && read + this.at);
    try {
      const answer = await postJson("/v1/next_token", body, this.asking.signal);
      if (request !== this.latest) return;
      this.read = { prompt: body.prompt, tokens: answer.tokens };
      this.receive(answer);
    } catch (error) {
      if (error.name === "AbortError" || request !== this.latest) return;
      this.receive(null);
      this.page.showError(error);
    }
    this.page.laneChanged();
  }

  // The server's answer for this position, or none.
  receive(answer) {
    this.answer = answer;
    this.tally.reset(answer);
    this.training.follow(answer, this.text);
    if (!answer) return this.loop?.rest();
    this.capacity = answer.context_left + this.at; // tokens that fit after the prompt
    this.loop?.read(answer.tokens.length + this.at);
    this.loop?.at("distribution", `${nameOf(answer.candidates[0])} ${percent(answer.candidates[0].raw)}`);
    this.show();
  }

  // --- adding tokens

  async flip() {
    if (this.at !== this.path.length) await this.goTo(this.path.length);
    if (!this.answer || this.finished) return false;
    const { draw } = this.answer;
    this.showDraw(draw);
    this.loop?.at("draw", draw.u === null ? nameOf(draw.token) : draw.u.toFixed(4));
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
    this.loop?.pass("append", nameOf(candidate));
    return this.goTo(this.path.length);
  }

  // --- showing

  relabel() {
    translate(this.root);
    if (this.answer) this.show();
    this.tally.show();
    this.training.show();
    this.sheet.relabel(this.page.prompt(), this.path, this.at);
  }

  show() {
    const { answer } = this;
    this.sheet.give(this.read.prompt, this.read.tokens);
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
    this.receive(null);
    this.find(".count").textContent = t("tokens", { n: this.path.length });
    this.find(".bars").replaceChildren();
    this.find(".segments").replaceChildren();
    this.find(".rest").textContent = "";
    this.find(".coin").hidden = true;
    this.find(".fell").textContent = text;
    this.page.announce(text);
    this.page.laneChanged();
  }

  // The same bars, after draws were added to the tally or it was cleared.
  showTally() {
    if (!this.answer) return;
    const hit = this.find(".bar.hit")?.dataset.id;
    this.showBars(this.answer);
    const candidate = this.answer.candidates.find((one) => String(one.id) === hit);
    if (candidate) this.barOf(candidate).classList.add("hit");
  }

  showBars(answer) {
    const listed = answer.candidates.slice(0, BARS);
    const { draws } = this.tally;
    const shares = draws ? listed.map((candidate) => this.tally.count(candidate.id) / draws) : [];
    const widest = this.widest = Math.max(...listed.map((c) => Math.max(c.raw, c.probability)), ...shares);
    const bars = this.find(".bars");
    const focused = [...bars.children].findIndex((row) => row.contains(document.activeElement));
    bars.classList.toggle("tallied", draws > 0);
    bars.replaceChildren(...listed.map((candidate) => el("li", {}, this.bar(candidate, widest))));
    if (focused >= 0) bars.children[Math.min(focused, listed.length - 1)].firstChild.focus({ preventScroll: true });
    const others = answer.vocabulary - listed.length;
    const share = Math.max(0, 1 - listed.reduce((sum, c) => sum + c.probability, 0));
    if (draws && others > 0) {
      const count = draws - listed.reduce((sum, candidate) => sum + this.tally.count(candidate.id), 0);
      bars.append(othersRow(t("others", { n: listed.length }), { count, share: count / draws }, share));
    }
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
    const name = el("span", { className: "name", textContent: nameOf(candidate) });
    name.dataset.id = candidate.id;
    const track = el("span", { className: "track" }, before, now);
    const button = el("button", { type: "button", className: "bar" }, name, track,
      el("span", { className: "figure", textContent: percent(raw) }),
      el("span", { className: "figure strong", textContent: filter ? cutter : percent(probability) }));
    if (filter) button.classList.add("out");
    const values = { token: quoted(candidate), raw: percent(raw), now: percent(probability), filter: cutter };
    const says = [t(filter ? "barCut" : "barLabel", values), t("tokenId", { id: candidate.id })];
    if (this.tally.draws) says.push(this.addDrawn(button, track, candidate, widest));
    button.setAttribute("aria-label", says.join(", "));
    button.dataset.id = candidate.id;
    button.addEventListener("click", () => this.choose(candidate));
    for (const [kind, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      button.addEventListener(kind, () => this.segment(candidate.id)?.classList.toggle("lit", on));
    }
    return button;
  }

  // How often a token was drawn, over its bar and as a figure; what this says in words.
  addDrawn(button, track, candidate, widest) {
    const { draws } = this.tally;
    const count = this.tally.count(candidate.id);
    const times = el("i", { className: "times" });
    times.style.width = `${(100 * count) / draws / widest}%`;
    if (count) track.append(times);
    button.append(el("span", { className: "figure count-drawn", textContent: `${number(count)}×` }));
    return t("barDrawn", { count: number(count), share: percent(count / draws) });
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
