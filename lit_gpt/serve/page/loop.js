// The drawing of the loop: text → tokens → model → distribution → draw → append. A part is lit by what happened: a
// request was sent, an answer or a part of a stream came, a token was drawn. No clock drives it.

import { number, percent, t } from "./i18n.js";
import { nameOf } from "./text.js";

const SHOWN_CHARACTERS = 14;

export class Loop {
  constructor(root) {
    this.root = root;
    this.parts = new Map([...root.querySelectorAll("[data-part]")].map((node) => [node.dataset.part, node]));
  }

  // This part is at work from now on, until another is.
  at(part, says) {
    this.say(part, says);
    for (const [name, node] of this.parts) node.classList.toggle("lit", name === part);
    this.root.dataset.at = part;
  }

  // This part has done its work within one event: it is lit and goes out (style.css says how fast that is seen).
  pass(part, says) {
    this.at(part, says);
    void this.parts.get(part).offsetWidth; // or a part that is lit and unlit in one frame would never be seen
  }

  say(part, says) {
    if (says !== undefined) this.parts.get(part).querySelector("span").textContent = says;
  }

  // Nothing is at work.
  rest() {
    for (const node of this.parts.values()) node.classList.remove("lit");
    this.root.dataset.at = "";
  }

  // --- what happens, by name

  // A text was sent: the server makes tokens of it, `n` where that is known, else 0, and the model reads them.
  sent(text, n) {
    this.pass("text", ending(text));
    this.read(n);
    this.pass("tokens");
    this.at("model");
  }

  read(n) {
    this.say("tokens", n ? t("loopTokens", { n: number(n) }) : "");
  }

  // A token came in a stream: { text, id, p, alternatives: [[text, p], …] }; `text` is the whole with it and `n` how many
  // tokens that is, `more` whether another one follows.
  came(token, text, n, more) {
    const [name, p] = token.alternatives[0] ?? [token.text, token.p];
    this.pass("distribution", `${nameOf({ text: name })} ${percent(p)}`);
    this.pass("draw", nameOf(token));
    this.pass("append", `+ ${nameOf(token)}`);
    if (more) this.sent(text, n);
    else this.rest();
  }
}

// The end of a text, on one line.
function ending(text) {
  const characters = [...text.slice(-4 * SHOWN_CHARACTERS)];
  const end = characters.slice(-SHOWN_CHARACTERS).join("").replaceAll("\n", "⏎");
  return characters.length > SHOWN_CHARACTERS ? `…${end}` : end;
}
