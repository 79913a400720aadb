// Every sentence of the page, in both languages. `{x}` is filled in by `t`.

import { LEARNING } from "./words_learning.js";

const WORDS = {
  en: {
    skip: "Skip to the coin",
    title: "It writes by flipping a coin.",
    lead: "A language model does one thing: it reads a text and gives every possible next piece, called a token, " +
      "a probability. Then a coin with thousands of sides is flipped, the token it falls on is added to the text, " +
      "and everything starts over. Flip it yourself.",
    prompt: "Your text so far",
    tabs: "What to do with it",
    tabCoin: "Flip the coin",
    tabWrite: "Let it write",
    tabChat: "Chat",
    flip: "Flip",
    run: "Keep flipping",
    pause: "Pause",
    back: "Step back",
    restart: "Start over",
    compare: "Compare two seeds",
    single: "One seed only",
    go: "Write",
    stop: "Stop",
    length: "At most this many tokens",
    writeHint: "Point at a token to see what else it could have been; click it to take it to the coin.",
    chatModel: "Model",
    chatSystem: "What the model is told first",
    chatTurns: "The conversation",
    chatAnswer: "The answer, token by token",
    chatMessage: "Your message",
    chatSend: "Send",
    chatRetry: "Answer again",
    chatClear: "New conversation",
    chatHint: "Enter sends, Shift+Enter begins a new line. Point at a token of an answer to see what else it could have been.",
    chatNoTemplate: "This model only continues text: it has no chat template. Fine-tune it on conversations, as " +
      "configs/chat.yaml does, and it can answer here.",
    chatLeftOut: "The context is full: the oldest {n} messages are not sent any more.",
    chatCutOff: "The answer was cut off there.",
    chatEmpty: "The answer is empty.",
    knobs: "Load the coin",
    temperature: "Temperature",
    temperatureSays: "Below 1 the favourites grow, above 1 the outsiders do. At 0 there is no coin: the likeliest token is taken.",
    topK: "Top-k",
    topKSays: "Only this many of the likeliest tokens may be drawn.",
    topP: "Top-p",
    topPSays: "Only the likeliest tokens that together reach this share may be drawn.",
    all: "all",
    unlikely: "unlikely",
    likely: "likely",
    colours: "Colours say how likely the model held a token to be.",
    foot: "Every bar and every draw on this page comes from the model behind it.",
    seed: "Seed",
    newSeed: "New seed",
    sheetLabel: "The text, token by token",
    tokens: "{n} tokens drawn",
    stepBars: "The same stretches, longest first. Click one to take that road yourself.",
    stepLine: "Every possible next token owns a stretch of this line: the likelier, the longer. The coin falls on one.",
    legendRaw: "the model's own",
    legendNow: "after the sliders",
    legendCut: "cut away",
    rest: "{n} more tokens share {p} of the line.",
    restCut: "{n} more tokens were cut away.",
    restNone: "That is the whole vocabulary.",
    waiting: "The coin is in the air: press Flip.",
    fell: "The coin fell at {u}, on {token} ({p}).",
    fellGreedy: "Temperature 0: no coin is flipped, {token} is the likeliest.",
    took: "You took {token}; its share was {p}.",
    takenThere: "This is where {token} was written. Click another token to take another road from here.",
    barLabel: "{token}: the model's probability {raw}, after the sliders {now}",
    barCut: "{token}: the model's probability {raw}, cut away by {filter}",
    greedy: "greedy",
    lineLabel: "A line from 0 to 1. The widest stretches: {list}",
    drawn: "{token} was drawn, {p}",
    end: "end of text",
    ended: "The model has ended its text. Step back, or start over.",
    full: "The context is full: the model cannot read more than {n} tokens.",
    partial: "part of a character",
    writing: "Writing …",
    wrote: "{n} tokens, {rate} tokens/s, first after {first} s. Mean probability of a token: {p}.",
    stopped: "Stopped.",
    alternatives: "It could also have been",
    chosen: "chosen with {p}",
    keyTitle: "This server asks for a key",
    keySays: "Whoever started it has the API key. It stays in this tab.",
    key: "API key",
    keyGo: "Use it",
    themeauto: "Theme: system",
    themelight: "Theme: light",
    themedark: "Theme: dark",
    unreachable: "The server does not answer.",
    otherLanguage: "中文",
    defaultPrompt: "The",
  },
  zh: {
    skip: "跳到抛硬币",
    title: "它靠抛硬币写作。",
    lead: "语言模型只做一件事：读一段文字，给每一个可能的下一个片段（叫作 token）一个概率。" +
      "然后抛一枚有成千上万个面的硬币，落在哪个 token 上，就把它接到文字后面，再从头来过。你来抛抛看。",
    prompt: "开头的文字",
    tabs: "接下来做什么",
    tabCoin: "抛硬币",
    tabWrite: "让它写",
    tabChat: "聊天",
    flip: "抛一次",
    run: "一直抛",
    pause: "暂停",
    back: "退一步",
    restart: "重新开始",
    compare: "对比两个种子",
    single: "只看一个种子",
    go: "开始写",
    stop: "停止",
    length: "最多写多少个 token",
    writeHint: "把鼠标移到一个 token 上，看它本来还可能是什么；点一下，就从那里开始抛硬币。",
    chatModel: "模型",
    chatSystem: "事先告诉模型的话",
    chatTurns: "对话",
    chatAnswer: "回答，一个一个 token",
    chatMessage: "你的消息",
    chatSend: "发送",
    chatRetry: "重新回答",
    chatClear: "新的对话",
    chatHint: "回车发送，Shift+回车换行。把鼠标移到回答里的一个 token 上，看它本来还可能是什么。",
    chatNoTemplate: "这个模型只会续写文字，没有对话模板。像 configs/chat.yaml 那样用对话微调之后，就能在这里回答了。",
    chatLeftOut: "上下文满了：最早的 {n} 条消息不再发给模型。",
    chatCutOff: "回答在这里被截断了。",
    chatEmpty: "回答是空的。",
    knobs: "给硬币做手脚",
    temperature: "温度",
    temperatureSays: "小于 1，热门的更热门；大于 1，冷门的机会变大。等于 0 就不抛硬币了，直接取最可能的。",
    topK: "Top-k",
    topKSays: "只有最可能的这么多个 token 可以被抽到。",
    topP: "Top-p",
    topPSays: "从最可能的开始数，加起来够这么大份额的 token 才可以被抽到。",
    all: "全部",
    unlikely: "不太可能",
    likely: "很可能",
    colours: "颜色表示模型认为这个 token 有多可能出现。",
    foot: "这一页上的每一根柱子、每一次抛掷，都来自背后的模型。",
    seed: "种子",
    newSeed: "换个种子",
    sheetLabel: "文字，一个一个 token",
    tokens: "已抽出 {n} 个 token",
    stepBars: "同样的这些段，从长到短排。点一个，就走那条路。",
    stepLine: "每个可能的下一个 token 在这条线上都有一段：越可能，越长。硬币会落在其中一段上。",
    legendRaw: "模型给的概率",
    legendNow: "滑块调整之后",
    legendCut: "被剪掉的",
    rest: "其余 {n} 个 token 一共占这条线的 {p}。",
    restCut: "其余 {n} 个 token 都被剪掉了。",
    restNone: "词表里的全部 token 都在这里了。",
    waiting: "硬币还在空中：请按“抛一次”。",
    fell: "硬币落在 {u}，是 {token}（{p}）。",
    fellGreedy: "温度为 0：不抛硬币，直接取最可能的 {token}。",
    took: "你选了 {token}，它占 {p}。",
    takenThere: "{token} 就是在这里写下的。点另一个 token，就从这里走另一条路。",
    barLabel: "{token}：模型给的概率 {raw}，滑块调整之后 {now}",
    barCut: "{token}：模型给的概率 {raw}，被 {filter} 剪掉了",
    greedy: "贪心",
    lineLabel: "一条从 0 到 1 的线。最宽的几段：{list}",
    drawn: "抽到了 {token}，{p}",
    end: "文本结束",
    ended: "模型认为文字到此结束。可以退一步，或者重新开始。",
    full: "上下文满了：这个模型最多读 {n} 个 token。",
    partial: "一个字符的一部分",
    writing: "正在写……",
    wrote: "{n} 个 token，每秒 {rate} 个，第一个用了 {first} 秒。每个 token 的平均概率：{p}。",
    stopped: "已停止。",
    alternatives: "它本来还可能是",
    chosen: "被选中时的概率是 {p}",
    keyTitle: "这个服务器需要密钥",
    keySays: "启动服务器的人有 API 密钥。密钥只保存在这个标签页里。",
    key: "API 密钥",
    keyGo: "使用",
    themeauto: "外观：跟随系统",
    themelight: "外观：浅色",
    themedark: "外观：深色",
    unreachable: "服务器没有回应。",
    otherLanguage: "English",
    defaultPrompt: "今天",
  },
};

for (const each of Object.keys(WORDS)) Object.assign(WORDS[each], LEARNING[each]);

let language = pick();

function pick() {
  const kept = localStorage.getItem("lit_gpt.language");
  if (kept in WORDS) return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export function t(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

export function currentLanguage() {
  return language;
}

export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  localStorage.setItem("lit_gpt.language", language);
}

// Fill `data-t` (text) and `data-t-label` (aria-label) below `root`.
export function translate(root) {
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", t(node.dataset.tLabel));
}

export function percent(p) {
  const digits = p >= 0.1 || p === 0 ? 0 : p >= 0.01 ? 1 : p >= 0.001 ? 2 : 3;
  return new Intl.NumberFormat(language, {
    style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits,
  }).format(p);
}

export function number(n) {
  if (Number.isInteger(n)) return new Intl.NumberFormat(language).format(n);
  return new Intl.NumberFormat(language, { maximumSignificantDigits: 3 }).format(n);
}
