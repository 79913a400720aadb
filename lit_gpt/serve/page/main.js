// The page's entry point: language, theme, tabs, sliders, and the panels.

import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { Lane } from "./next_token.js";
import { currentLanguage, percent, switchLanguage, t, translate } from "./i18n.js";
import { Loop } from "./loop.js";
import { Quiz } from "./quiz.js";
import { closeCard, setEnd } from "./text.js";
import { Writer } from "./write.js";

const $ = (id) => document.getElementById(id);
const TOP_K = [1, 2, 3, 5, 10, 20, 50, 100, 200, 500, null]; // null: all
const BETWEEN_FLIPS_MS = 250;
const PANELS = ["next-token", "write", "chat"];

const page = {
  prompt: () => $("prompt").value,
  knobs: () => {
    const knobs = { temperature: Number($("temperature").value), top_p: Number($("top-p").value) };
    const k = TOP_K[$("top-k").value];
    return k === null ? knobs : { ...knobs, top_k: k };
  },
  announce: (text) => {
    $("status").textContent = text;
    $("error").hidden = true;
  },
  showError: (error) => {
    stopRunning();
    $("error").textContent = error.message;
    $("error").hidden = false;
  },
  capacity: () => lanes[0]?.capacity ?? Infinity,
  laneChanged: () => showButtons(),
  hasTrainingText: () => servesTrainingText,
  text: () => lanes[0]?.text ?? { prompt: $("prompt").value, generated: [] },
  seed: () => Number(lanes[0]?.seed.value) || 0,
  tokensOf: (prompt) => (lanes[0]?.read?.prompt === prompt ? lanes[0].read.tokens : []), // none: they are not known
  loop: new Loop($("loop")),
  openInLane: (prompt, path) => {
    $("prompt").value = prompt;
    select("next-token");
    lanes[0].restart(path.map((token) => ({ ...token, how: "draw" })));
    $("flip").focus({ preventScroll: true });
  },
};

const lanes = [];
let running = false;
let flipping = false;
let servesTrainingText = false;
let beginnings = []; // texts to begin with that suit the model: its checkpoint has kept them
let typed = false; // whether the text is the user's

// --- buttons of the next-token panel

async function flipAll() {
  if (flipping) return false;
  flipping = true;
  showButtons();
  try {
    const open = await Promise.all(lanes.map((lane) => lane.flip()));
    return open.some(Boolean);
  } finally {
    flipping = false;
    showButtons();
  }
}

async function keepFlipping() {
  running = true;
  showButtons();
  while (running && (await flipAll())) {
    await new Promise((resolve) => setTimeout(resolve, BETWEEN_FLIPS_MS));
  }
  stopRunning();
}

function stopRunning() {
  running = false;
  showButtons();
}

function showButtons() {
  const ready = lanes.some((lane) => lane.answer && lane.answer.context_left > 0);
  $("flip").disabled = flipping || running || !ready;
  $("run").disabled = !running && !ready;
  $("run").textContent = t(running ? "pause" : "run");
  $("run").setAttribute("aria-pressed", running);
  $("back").disabled = lanes.every((lane) => lane.path.length === 0);
  $("restart").disabled = $("back").disabled;
  $("compare").textContent = t(lanes.length > 1 ? "single" : "compare");
  $("compare").setAttribute("aria-pressed", lanes.length > 1);
}

function addLane(seed, path = []) {
  const lane = new Lane(page, seed, lanes.length ? null : page.loop);
  lanes.push(lane);
  $("lanes").append(lane.root);
  $("lanes").classList.toggle("two", lanes.length > 1);
  return lane.restart(path);
}

function toggleCompare() {
  if (lanes.length > 1) {
    lanes.pop().root.remove();
    $("lanes").classList.remove("two");
    showButtons();
  } else {
    addLane(Number(lanes[0].seed.value) + 1, [...lanes[0].path]); // both lanes continue the same text
  }
}

// --- sliders and prompt

function showKnobs() {
  const { temperature, top_p: topP, top_k: topK } = page.knobs();
  $("temperature-value").textContent = temperature.toFixed(2);
  $("top-k-value").textContent = topK ?? t("all");
  $("top-p-value").textContent = percent(topP);
  $("top-k").setAttribute("aria-valuetext", topK ?? t("all"));
}

function debounced(ms, action) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, ms);
  };
}

const refreshAll = debounced(30, () => lanes.forEach((lane) => lane.refresh()));
const restartAll = debounced(250, () => lanes.forEach((lane) => lane.restart()));

// --- tabs, language, theme

function select(name) {
  for (const each of PANELS) {
    const on = each === name;
    $(each).hidden = !on;
    $(`tab-${each}`).setAttribute("aria-selected", on);
    $(`tab-${each}`).tabIndex = on ? 0 : -1;
  }
  $("start").hidden = name === "chat"; // it continues no text
  if (name !== "next-token") stopRunning();
  closeCard();
}

function applyLanguage() {
  document.documentElement.lang = currentLanguage() === "zh" ? "zh-CN" : "en";
  translate(document);
  $("language").textContent = t("otherLanguage");
  $("language").lang = currentLanguage() === "zh" ? "en" : "zh-CN";
  $("theme").textContent = t(`theme${theme()}`);
  showKnobs();
  lanes.forEach((lane) => lane.relabel());
  writer?.count();
  chat?.relabel();
  quiz?.relabel();
  showButtons();
}

const theme = () => localStorage.getItem("lit_gpt.theme") ?? "auto";

function applyTheme() {
  if (theme() === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme();
  $("theme").textContent = t(`theme${theme()}`);
}

const showsIds = () => localStorage.getItem("lit_gpt.ids") === "shown";

function applyIds() {
  document.documentElement.classList.toggle("ids", showsIds());
  $("ids").setAttribute("aria-pressed", showsIds());
}

// --- start

let writer = null;
let chat = null;
let quiz = null;

function addListeners() {
  $("flip").addEventListener("click", flipAll);
  $("run").addEventListener("click", () => (running ? stopRunning() : keepFlipping()));
  $("back").addEventListener("click", () => { stopRunning(); lanes.forEach((lane) => lane.back()); });
  $("restart").addEventListener("click", () => { stopRunning(); lanes.forEach((lane) => lane.restart()); });
  $("compare").addEventListener("click", toggleCompare);
  $("prompt").addEventListener("input", () => { typed = true; stopRunning(); restartAll(); });
  $("beginning").addEventListener("click", nextBeginning);
  $("ids").addEventListener("click", () => {
    localStorage.setItem("lit_gpt.ids", showsIds() ? "" : "shown");
    applyIds();
  });
  for (const id of ["temperature", "top-k", "top-p"]) {
    $(id).addEventListener("input", () => { showKnobs(); refreshAll(); });
  }
  PANELS.forEach((name, i) => {
    $(`tab-${name}`).addEventListener("click", () => select(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const other = PANELS.at((i + step) % PANELS.length);
      select(other);
      $(`tab-${other}`).focus();
    });
  });
  $("language").addEventListener("click", () => {
    const untouched = $("prompt").value === t("defaultPrompt");
    switchLanguage();
    if (untouched) $("prompt").value = t("defaultPrompt");
    applyLanguage();
    if (untouched) restartAll();
  });
  $("theme").addEventListener("click", () => {
    const next = { auto: "light", light: "dark", dark: "auto" }[theme()];
    localStorage.setItem("lit_gpt.theme", next);
    applyTheme();
  });
}

// The text that the page opens with: a beginning that the checkpoint has kept, or else one that suits any model.
function begin(card) {
  beginnings = card.sample_prompts ?? [];
  servesTrainingText = Boolean(card.training_text);
  $("beginning").hidden = beginnings.length < 2;
  if (!typed) $("prompt").value = beginnings[0] ?? t("defaultPrompt");
  writer.reset();
}

function nextBeginning() {
  $("prompt").value = beginnings[(beginnings.indexOf($("prompt").value) + 1) % beginnings.length];
  stopRunning();
  lanes.forEach((lane) => lane.restart());
}

async function start() {
  $("prompt").value = "";
  applyTheme();
  applyIds();
  applyLanguage();
  addListeners();
  writer = new Writer(page);
  chat = new Chat(page);
  quiz = new Quiz(page);
  try {
    const { data } = await getJson("/v1/models");
    $("model").textContent = data[0].id;
    const { eos_token_id: end, chat_template: template } = await getJson("/tokenizer_info");
    setEnd(end);
    begin(data[0]);
    chat.start(data, template !== null);
    $("length").max = data[0].max_model_len - 1;
    await addLane(1);
  } catch (error) {
    page.showError(error);
  }
}

start();
