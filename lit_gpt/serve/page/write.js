// The writing panel: a streamed completion, each token coloured by the probability that the model gave it.

import { postStream } from "./api.js";
import { number, percent, t } from "./i18n.js";
import { Sheet, isEnd, pieces } from "./text.js";

const ALTERNATIVES = 6;
const LATEST = 24; // tokens whose end is shown in the drawing of the loop

export class Writer {
  // page: { knobs(), prompt(), capacity(), announce(text), showError(error), openInLane(prompt, tokens),
  //   tokensOf(prompt), loop }
  constructor(page) {
    this.page = page;
    this.sheet = new Sheet(document.getElementById("sheet"), (i) => this.pick(i));
    this.stats = document.getElementById("stats");
    this.go = document.getElementById("go");
    this.stop = document.getElementById("stop");
    this.running = null;
    this.tokens = [];
    this.go.addEventListener("click", () => this.write());
    this.stop.addEventListener("click", () => this.running?.abort());
    this.reset();
  }

  async write() {
    if (this.running) return;
    this.running = new AbortController();
    this.began = performance.now();
    this.firstAfter = null;
    this.tokens = [];
    this.written = this.page.prompt(); // what these tokens continue, whatever is typed meanwhile
    this.busy(true);
    this.sheet.show(this.written, []);
    this.sheet.give(this.written, this.page.tokensOf(this.written));
    this.page.announce(t("writing"));
    this.page.loop.sent(this.written, this.page.tokensOf(this.written).length);
    try {
      await this.read();
      this.page.announce(this.stats.textContent);
    } catch (error) {
      if (error.name === "AbortError") this.page.announce(t("stopped"));
      else this.page.showError(error);
    } finally {
      this.busy(false);
      this.running = null;
      this.page.loop.rest();
    }
  }

  async read() {
    const { seed, ...knobs } = this.page.knobs();
    const body = { ...knobs, prompt: this.written, logprobs: ALTERNATIVES, return_token_ids: true,
      max_tokens: Math.min(Number(document.getElementById("length").value), this.page.capacity()) };
    for await (const { choices } of postStream("/v1/completions", body, this.running.signal)) {
      if (choices.length) this.add(choices[0]);
    }
  }

  // The text, as nothing is written yet.
  reset() {
    if (!this.tokens.length) this.sheet.show(this.page.prompt(), []);
  }

  add({ logprobs, token_ids: ids, finish_reason: finish }) {
    const { tokens, token_logprobs: chosen, top_logprobs: tops } = logprobs;
    if (tokens.length) this.firstAfter ??= performance.now() - this.began;
    tokens.forEach((text, i) => {
      this.tokens.push({
        text, id: ids[i], p: Math.exp(chosen[i]),
        alternatives: Object.entries(tops[i]).map(([other, p]) => [other, Math.exp(p)]).sort((a, b) => b[1] - a[1]),
      });
      this.light(finish === null || i < tokens.length - 1);
    });
    this.sheet.show(this.written, this.tokens);
    this.count();
  }

  // The latest token in the drawing of the loop; `more` says whether another one follows.
  light(more) {
    const latest = this.tokens.slice(-LATEST).filter((token) => !isEnd(token)).map((token) => token.text);
    const before = this.tokens.length > LATEST ? "" : this.written;
    const read = this.page.tokensOf(this.written).length;
    this.page.loop.came(this.tokens.at(-1), before + pieces(latest).join(""), read && read + this.tokens.length, more);
  }

  count() {
    const n = this.tokens.length;
    if (!n) return;
    const seconds = (performance.now() - this.began) / 1000;
    const mean = this.tokens.reduce((sum, token) => sum + token.p, 0) / n;
    this.stats.textContent = t("wrote", {
      n, rate: number(n / seconds), first: (this.firstAfter / 1000).toFixed(2), p: percent(mean),
    });
  }

  pick(index) {
    this.running?.abort();
    this.page.openInLane(this.written, this.tokens.slice(0, index));
  }

  busy(on) {
    this.go.disabled = on;
    this.stop.disabled = !on;
    this.sheet.root.classList.toggle("busy", on);
    (on ? this.stop : this.go).focus({ preventScroll: true });
  }
}
