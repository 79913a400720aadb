// The writing panel: a streamed completion, each token coloured by the probability that the model gave it.

import { postStream } from "./api.js";
import { number, percent, t } from "./i18n.js";
import { Sheet } from "./text.js";

const ALTERNATIVES = 6;

export class Writer {
  // page: { knobs(), prompt(), capacity(), announce(text), showError(error), openInLane(prompt, tokens) }
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
    this.sheet.show(page.prompt(), []);
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
    this.page.announce(t("writing"));
    try {
      await this.read();
      this.page.announce(this.stats.textContent);
    } catch (error) {
      if (error.name === "AbortError") this.page.announce(t("stopped"));
      else this.page.showError(error);
    } finally {
      this.busy(false);
      this.running = null;
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

  add(choice) {
    const { tokens, token_logprobs: logprobs, top_logprobs: tops } = choice.logprobs;
    if (tokens.length) this.firstAfter ??= performance.now() - this.began;
    tokens.forEach((text, i) => this.tokens.push({
      text, id: choice.token_ids[i], p: Math.exp(logprobs[i]),
      alternatives: Object.entries(tops[i]).map(([other, logprob]) => [other, Math.exp(logprob)]).sort((a, b) => b[1] - a[1]),
    }));
    this.sheet.show(this.written, this.tokens);
    this.count();
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
