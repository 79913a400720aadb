// Printable tokens: bytes joined into characters, white space made visible, colour by probability.

import { percent, t } from "./i18n.js";

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const BYTES = /^bytes:(\\x[0-9a-f]{2})+$/;
const ENCODER = new TextEncoder();

// The API writes a token that is no whole character as `bytes:\xe4\xb8`.
function bytesOf(text) {
  if (!BYTES.test(text)) return ENCODER.encode(text);
  return Uint8Array.from(text.slice(6).split("\\x").slice(1), (pair) => parseInt(pair, 16));
}

// What each of a run of tokens adds to the text; a token that ends inside a character adds "".
export function pieces(texts) {
  const decoder = new TextDecoder();
  return texts.map((text) => decoder.decode(bytesOf(text), { stream: true }));
}

// A token by itself, for labels: white space as signs, bytes as hexadecimal.
export function visible(text) {
  if (BYTES.test(text)) return text.slice(6).replaceAll("\\x", " ").trim().toUpperCase();
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍")
    .replace(/[\u0000-\u001f\u007f-\u009f]/g, (sign) => `\\x${sign.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

let endId = null; // the token that ends a text

export function setEnd(id) {
  endId = id;
}

export function isEnd(token) {
  return Boolean(token?.endsTurn) || (token?.id === endId && endId !== null);
}

export function nameOf(token) {
  return isEnd(token) ? t("end") : visible(token.text);
}

export function quoted(token) {
  return `“${nameOf(token)}”`;
}

// The class of one of five steps of probability; style.css has a colour for each.
export function shade(p) {
  return `p${[0.01, 0.05, 0.2, 0.5].filter((edge) => p >= edge).length}`;
}

const MOST_PIECES = 4096; // of a prompt that is shown token by token

// The text with one button for each token. Arrow keys move between tokens, so that the whole text is one tab stop.
export class Sheet {
  constructor(root, onPick) {
    this.root = root;
    this.onPick = onPick;
    this.tokens = [];
    this.given = null; // the text in `prompt`, and its tokens where they are known
    this.givenTokens = [];
    this.prompt = el("span", { className: "given" });
    this.caret = el("span", { className: "caret", ariaHidden: "true" });
    root.addEventListener("keydown", (event) => this.move(event));
    this.prompt.addEventListener("mouseover", ({ target }) => {
      const token = this.givenTokens[target.dataset.index];
      if (token) openCard(target, token);
      else closeCard();
    });
    this.prompt.addEventListener("mouseleave", closeCard);
    root.replaceChildren(this.prompt, this.caret);
  }

  // tokens: [{ text, p, alternatives: [[text, p], …] }], with `id`, or in a chat with `endsTurn` for the last one; `at`
  // is the one whose distribution is shown.
  show(prompt, tokens, at = -1) {
    if (this.given !== prompt) this.give(prompt, []);
    const texts = pieces(tokens.map((token) => (isEnd(token) ? "" : token.text)));
    const same = this.tokens.findIndex((token, i) => token !== tokens[i]);
    const keep = same < 0 ? Math.min(this.tokens.length, tokens.length) : same;
    for (const old of this.buttons().slice(keep)) old.parentNode.remove();
    tokens.slice(keep).forEach((token, i) => {
      const breaks = "\n".repeat(texts[keep + i].split("\n").length - 1); // a button cannot break a line itself
      this.caret.before(el("span", {}, this.button(token, texts[keep + i], keep + i), breaks));
    });
    this.tokens = [...tokens];
    this.buttons().forEach((button, i) => {
      button.classList.toggle("here", i === at);
      button.tabIndex = i === tokens.length - 1 ? 0 : -1;
    });
    if (this.root.scrollHeight > this.root.clientHeight) this.root.scrollTop = this.root.scrollHeight;
  }

  // The prompt, as one piece for each of its `tokens` where the server has said which these are: [{ text, id }].
  give(prompt, tokens) {
    const known = tokens.length > MOST_PIECES ? [] : tokens;
    if (this.given === prompt && this.givenTokens.length === known.length) return;
    this.given = prompt;
    this.givenTokens = known;
    const texts = pieces(known.map((token) => token.text));
    const leading = texts.slice(1).join("") === prompt; // the first is what stands before every text, and no part of it
    const nodes = texts.map((text, i) => {
      const piece = el("span", { className: "piece", textContent: leading && i === 0 ? "" : text });
      Object.assign(piece.dataset, { index: i, id: known[i].id });
      return piece;
    });
    this.prompt.replaceChildren(...(nodes.length ? nodes : [prompt]));
  }

  // Show the same tokens again, with labels in the present language.
  relabel(prompt, tokens, at = -1) {
    this.tokens = [];
    this.buttons().forEach((button) => button.parentNode.remove());
    this.show(prompt, tokens, at);
  }

  buttons() {
    return [...this.root.querySelectorAll("button")];
  }

  button(token, piece, index) {
    const ending = isEnd(token);
    const label = ending ? `⏹ ${t("end")}` : piece === "" ? "·" : piece.replaceAll("\n", "⏎");
    const button = el("button", { type: "button", className: `token ${shade(token.p)}`, textContent: label });
    if (token.id !== undefined) button.dataset.id = token.id;
    if (ending || piece === "") button.classList.add("sign");
    const id = token.id === undefined ? "" : `, ${t("tokenId", { id: token.id })}`;
    button.setAttribute("aria-label", `${quoted(token)} ${percent(token.p)}${id}`);
    button.addEventListener("click", () => this.onPick(index));
    for (const kind of ["mouseenter", "focus"]) button.addEventListener(kind, () => openCard(button, token));
    for (const kind of ["mouseleave", "blur"]) button.addEventListener(kind, closeCard);
    return button;
  }

  move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const buttons = this.buttons();
    const at = buttons.indexOf(document.activeElement);
    if (!step || at < 0) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(buttons.length - 1, at + step))].focus();
  }
}

// The card beside a token: its id, and where the model has written it what else it could have been.
function openCard(anchor, token) {
  const card = document.getElementById("card");
  const title = el("p", { className: "card-title" }, el("b", { textContent: nameOf(token) }));
  const id = token.id === undefined ? [] : [el("p", { className: "card-id", textContent: t("tokenId", { id: token.id }) })];
  if (token.alternatives) {
    title.append(` ${t("chosen", { p: percent(token.p) })}`);
    const most = Math.max(token.p, ...token.alternatives.map(([, p]) => p));
    const others = token.alternatives.filter(([text]) => text !== token.text).slice(0, 6);
    const note = el("p", { className: "card-note", textContent: t("alternatives") });
    card.replaceChildren(title, ...id, note, ...others.map(([text, p]) => cardRow(text, p, most)));
  } else {
    card.replaceChildren(title, ...id);
  }
  card.hidden = false;
  anchor.setAttribute("aria-describedby", "card");
  const box = anchor.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - card.offsetWidth - 8);
  const below = box.bottom + card.offsetHeight + 10 < innerHeight;
  card.style.left = `${Math.max(8, left)}px`;
  card.style.top = `${below ? box.bottom + 6 : box.top - card.offsetHeight - 6}px`;
}

function cardRow(text, p, most) {
  const bar = el("i", { className: shade(p) });
  bar.style.width = `${(100 * p) / most}%`;
  return el("p", { className: "card-row" },
    el("span", { textContent: visible(text) }), el("span", { className: "card-bar" }, bar), el("span", { textContent: percent(p) }));
}

export function closeCard() {
  document.getElementById("card").hidden = true;
}

addEventListener("scroll", closeCard, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && closeCard());
