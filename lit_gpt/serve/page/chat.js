// The chat panel: a conversation by way of /v1/chat/completions, each token coloured by the probability that it had.

import { postStream } from "./api.js";
import { number, percent, t, translate } from "./i18n.js";
import { Sheet, closeCard, el } from "./text.js";

const ALTERNATIVES = 6;
const PARTS = ["models", "model", "system", "turns", "leftout", "stats", "message", "send", "stop", "retry", "clear",
  "length", "reason"]; // of the panel: the element chat-NAME is the property NAME
const LONGEST_ANSWER = 512; // tokens, unless the user asks for more or half of the context is less

export class Chat {
  // page: { knobs(), announce(text), showError(error), loop }
  constructor(page) {
    this.page = page;
    for (const name of PARTS) {
      this[name] = document.getElementById(`chat-${name}`);
    }
    this.exchanges = []; // [{ question, content, tokens, finish, root, sheet }]
    this.leftOut = 0; // of the first exchanges: those that no longer fit into the context
    this.running = null;
    this.ready = false;
    this.send.addEventListener("click", () => this.ask());
    this.stop.addEventListener("click", () => this.running?.abort());
    this.retry.addEventListener("click", () => this.answerAgain());
    this.clear.addEventListener("click", () => this.restart());
    this.turns.addEventListener("scroll", closeCard, { passive: true });
    this.message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: Enter ends a Chinese word
      event.preventDefault();
      this.ask();
    });
  }

  // models: those of the API, of which the first is the one without a name in requests; hasTemplate: whether that can
  // chat. Others share its weights and may have a template where it has none: the server says so where one has not.
  start(models, hasTemplate) {
    const context = models[0].max_model_len;
    this.ready = hasTemplate || models.length > 1;
    this.models.hidden = models.length < 2;
    this.model.replaceChildren(...models.map(({ id }) => el("option", { value: id, textContent: id })));
    if (!hasTemplate && models.length > 1) this.model.value = models[1].id;
    this.length.max = context - 1;
    this.length.value = Math.max(1, Math.min(LONGEST_ANSWER, Math.floor(context / 2)));
    for (const field of [this.system, this.message, this.length]) field.disabled = !this.ready;
    this.reason.hidden = this.ready;
    this.relabel();
  }

  // --- answers

  ask() {
    const question = this.message.value.trim();
    if (!question || this.running || !this.ready) return;
    this.message.value = "";
    return this.answer(question, this.exchanges);
  }

  answerAgain() {
    return this.answer(this.exchanges.at(-1).question, this.exchanges.slice(0, -1));
  }

  async answer(question, before) {
    if (this.running) return;
    this.running = new AbortController();
    const old = { exchanges: this.exchanges, leftOut: this.leftOut };
    const exchange = this.newExchange(question);
    this.exchanges = [...before, exchange];
    this.show();
    this.page.announce(t("writing"));
    try {
      await this.read(exchange, before);
      this.page.announce(exchange.content || t("chatEmpty"));
    } catch (error) {
      if (error.name === "AbortError") this.page.announce(t("stopped"));
      else this.page.showError(error);
    } finally {
      this.running = null;
      this.page.loop.rest();
      if (!exchange.tokens.length) this.takeBack(old, before, question);
      this.show();
      if (document.activeElement === document.body) this.message.focus({ preventScroll: true }); // its button is disabled
    }
  }

  // Nothing was written: the conversation is what it was, and a new message is in the field again.
  takeBack(old, before, question) {
    Object.assign(this, old);
    if (old.exchanges === before && !this.message.value) this.message.value = question;
  }

  // Where the context is full, the oldest exchanges are left out until the answer fits.
  async read(exchange, before) {
    for (this.leftOut = Math.min(this.leftOut, before.length); ; this.leftOut += 1) {
      try {
        return await this.stream(exchange, before.slice(this.leftOut));
      } catch (error) {
        if (error.code !== "context_length_exceeded" || this.leftOut === before.length) throw error;
      }
    }
  }

  async stream(exchange, before) {
    exchange.began = performance.now();
    this.page.loop.sent(exchange.question, 0);
    const system = this.system.value.trim();
    const messages = [
      ...(system ? [{ role: "system", content: system }] : []),
      ...before.flatMap(({ question, content }) => [{ role: "user", content: question }, { role: "assistant", content }]),
      { role: "user", content: exchange.question },
    ];
    const body = { ...this.page.knobs(), model: this.model.value, messages, logprobs: true, top_logprobs: ALTERNATIVES,
      return_token_ids: true, max_tokens: Math.max(1, Math.floor(Number(this.length.value) || 1)) };
    for await (const { choices } of postStream("/v1/chat/completions", body, this.running.signal)) {
      if (choices.length) this.add(exchange, choices[0]);
    }
  }

  add(exchange, { delta, logprobs, token_ids: ids, finish_reason: finish }) {
    const entries = logprobs?.content ?? [];
    if (entries.length) exchange.firstAfter ??= performance.now() - exchange.began;
    exchange.content += delta.content ?? "";
    exchange.finish = finish;
    entries.forEach(({ token, logprob, bytes, top_logprobs: top }, i) => {
      exchange.tokens.push({
        text: token, id: ids[i], p: Math.exp(logprob),
        endsTurn: finish === "stop" && i === entries.length - 1 && bytes.length === 0,
        alternatives: top.map((other) => [other.token, Math.exp(other.logprob)]),
      });
      this.page.loop.came(exchange.tokens.at(-1), exchange.content, 0, finish === null || i < entries.length - 1);
    });
    const atEnd = this.turns.scrollHeight - this.turns.scrollTop - this.turns.clientHeight < 40;
    exchange.sheet.show("", exchange.tokens);
    this.count();
    if (atEnd) this.turns.scrollTop = this.turns.scrollHeight;
  }

  restart() {
    this.exchanges = [];
    this.leftOut = 0;
    this.show();
    this.message.focus({ preventScroll: true });
  }

  // --- showing

  newExchange(question) {
    const sheet = el("div", { className: "sheet answer", role: "group" });
    sheet.setAttribute("data-t-label", "chatAnswer");
    const root = el("div", { className: "exchange" }, el("p", { className: "question", textContent: question }), sheet);
    translate(root);
    return { question, content: "", tokens: [], finish: null, root, sheet: new Sheet(sheet, () => {}) };
  }

  show() {
    const busy = this.running !== null;
    this.turns.replaceChildren(...this.exchanges.map((exchange) => exchange.root));
    this.turns.hidden = this.exchanges.length === 0;
    this.exchanges.forEach((exchange, i) => {
      exchange.root.classList.toggle("left-out", i < this.leftOut);
      exchange.sheet.root.classList.toggle("writing", busy && i === this.exchanges.length - 1);
    });
    this.leftout.textContent = this.leftOut ? t("chatLeftOut", { n: 2 * this.leftOut }) : "";
    this.send.disabled = busy || !this.ready;
    this.stop.disabled = !busy;
    this.retry.disabled = this.clear.disabled = busy || this.exchanges.length === 0;
    this.turns.scrollTop = this.turns.scrollHeight;
    this.count();
  }

  count() {
    const last = this.exchanges.at(-1);
    const n = last?.tokens.length;
    if (!n) {
      this.stats.textContent = "";
      return;
    }
    if (this.running) last.seconds = (performance.now() - last.began) / 1000;
    const mean = last.tokens.reduce((sum, token) => sum + token.p, 0) / n;
    const wrote = t("wrote", {
      n, rate: number(n / last.seconds), first: (last.firstAfter / 1000).toFixed(2), p: percent(mean),
    });
    this.stats.textContent = last.finish === "length" ? `${wrote} ${t("chatCutOff")}` : wrote;
  }

  relabel() {
    const tab = document.getElementById("tab-chat");
    tab.title = this.ready ? "" : t("chatNoTemplate");
    tab.classList.toggle("off", !this.ready);
    this.exchanges.forEach(({ root, sheet, tokens }) => {
      translate(root);
      sheet.relabel("", tokens);
    });
    this.show();
  }
}
