// Five questions at the end of the page. A question is answered by trying it: the experiment runs on the model behind the
// page and on the text that stands there, and what comes of it, not a table of answers, says whether a guess was right.

import { postJson } from "./api.js";
import { number, percent, t, translate } from "./i18n.js";
import { el, pieces, quoted } from "./text.js";

const LIMIT = 200; // candidates of an answer
const WRITTEN = 12; // tokens of a text that is written to compare
const K = 3;
const P = 0.5;
const TEMPERATURES = [0.2, 1, 2];
const SAME = 1e-6; // differences of probabilities up to here are rounding

// The distribution after the text of the page, { prompt, generated }, whatever the sliders say.
const distribution = (text, changes = {}) => postJson("/v1/next_token", { ...text, limit: LIMIT, ...changes });

const readIds = (answer, text) => [...answer.tokens.map((token) => token.id), ...text.generated];

async function written(ids, answer, seed) {
  const { choices } = await postJson("/v1/completions", { prompt: ids, seed, temperature: 1, logprobs: 0,
    max_tokens: Math.max(1, Math.min(WRITTEN, answer.context_left)), return_token_ids: true });
  return { seed, ids: choices[0].token_ids, text: pieces(choices[0].logprobs.tokens).join("") };
}

const likeliest = (answer) => answer.candidates.reduce((one, other) => (other.probability > one.probability ? other : one));

// Each: the options, and an experiment that says which of them came (null: none of them), with what was seen in lines.
const QUESTIONS = {
  temperature: {
    options: ["cold", "warm", "hot"],
    async tried(text) {
      const answers = await Promise.all(TEMPERATURES.map((temperature) => distribution(text, { temperature })));
      const shares = answers.map((answer) => likeliest(answer).probability);
      const most = Math.max(...shares);
      const winners = ["cold", "warm", "hot"].filter((_, i) => most - shares[i] < SAME);
      const lines = () => answers.map((answer, i) => t("quizTemperatureLine", {
        temperature: number(TEMPERATURES[i]), token: quoted(likeliest(answer)), p: percent(shares[i]),
      }));
      return { came: winners.length === 1 ? winners[0] : null, lines };
    },
  },
  seed: {
    options: ["same", "other"],
    async tried(text, seed) {
      const answer = await distribution(text);
      const ids = readIds(answer, text);
      const texts = [];
      for (const each of [seed, seed, seed + 1]) texts.push(await written(ids, answer, each));
      const same = texts[0].ids.join() === texts[1].ids.join();
      const lines = () => texts.map((one) => t("quizSeedLine", { seed: one.seed, text: `“${one.text.replaceAll("\n", "⏎")}”` }));
      return { came: same ? "same" : "other", lines };
    },
  },
  topK: {
    options: ["one", "three", "every"],
    async tried(text) {
      const { kept, vocabulary } = await distribution(text, { top_k: K });
      const came = kept === 1 ? "one" : kept === K ? "three" : kept === vocabulary ? "every" : null;
      return { came, lines: () => [t("quizKeptLine", { n: number(kept), vocabulary: number(vocabulary) })] };
    },
  },
  topP: {
    options: ["upTo1", "upTo5", "upTo20", "more"],
    async tried(text) {
      const answer = await distribution(text, { top_p: P });
      const { kept, vocabulary } = answer;
      const came = kept <= 1 ? "upTo1" : kept <= 5 ? "upTo5" : kept <= 20 ? "upTo20" : "more";
      const shares = answer.candidates.filter((one) => one.probability > 0).map((one) => one.raw);
      const sum = shares.reduce((total, share) => total + share, 0);
      const lines = () => [
        t("quizKeptLine", { n: number(kept), vocabulary: number(vocabulary) }),
        ...(shares.length === kept ? [t("quizTopPLine", { sum: (100 * sum).toFixed(2), less: (100 * (sum - Math.min(...shares))).toFixed(2) })] : []),
      ];
      return { came, lines };
    },
  },
  memory: {
    options: ["changes", "stays"],
    async tried(text, seed) {
      let answer = await distribution(text);
      let ids = readIds(answer, text);
      if (ids.length < 2) ids = [...ids, ...(await written(ids, answer, seed)).ids];
      const first = [1, 2].map((step) => (ids[0] + step) % answer.vocabulary).find((id) => id !== answer.eot_id);
      const changed = [first ?? 0, ...ids.slice(1)];
      const [before, after] = await Promise.all([ids, changed].map((prompt) => distribution({ prompt, generated: [] })));
      const difference = largestDifference(before, after);
      const lines = () => [
        t("quizMemoryBefore", { token: quoted(before.candidates[0]), p: percent(before.candidates[0].raw) }),
        t("quizMemoryAfter", { token: quoted(after.candidates[0]), p: percent(after.candidates[0].raw),
          first: quoted(after.tokens[0]) }),
        t("quizMemoryLine", { points: number(100 * difference), n: number(ids.length + before.context_left) }),
      ];
      return { came: difference > SAME ? "changes" : "stays", lines };
    },
  },
};

// Of the probabilities that the model gives the tokens that both answers list.
function largestDifference(one, other) {
  const raw = new Map(other.candidates.map((candidate) => [candidate.id, candidate.raw]));
  const differences = one.candidates.filter(({ id }) => raw.has(id)).map((candidate) => Math.abs(candidate.raw - raw.get(candidate.id)));
  return differences.length ? Math.max(...differences) : one.candidates[0].raw; // nothing in common: all of it
}

export class Quiz {
  // page: { text(), seed(), announce(text), showError(error) }
  constructor(page) {
    this.page = page;
    this.root = document.getElementById("quiz");
    this.questions = Object.keys(QUESTIONS).map((name) => this.question(name));
    this.root.querySelector(".questions").replaceChildren(...this.questions.map(({ root }) => root));
    this.relabel();
  }

  question(name) {
    const { options } = QUESTIONS[name];
    const radios = options.map((option) => el("input", { type: "radio", name: `quiz-${name}`, value: option }));
    const labels = radios.map((radio, i) => el("label", { className: "option" }, radio, said(`quiz_${name}_${options[i]}`)));
    const go = el("button", { type: "button", className: "try", disabled: true });
    go.dataset.t = "quizTry";
    const result = el("div", { className: "quiz-result" });
    const legend = el("legend", {}, said(`quiz_${name}`));
    const root = el("li", {}, el("fieldset", {}, legend, ...labels), go, result);
    root.dataset.question = name;
    const question = { name, root, radios, go, result, outcome: null };
    for (const radio of radios) {
      radio.addEventListener("change", () => {
        go.disabled = false;
        question.outcome = null; // another guess wants another try
        this.show();
      });
    }
    go.addEventListener("click", () => this.try(question));
    return question;
  }

  async try(question) {
    const { go, radios, name } = question;
    const guess = radios.find((radio) => radio.checked).value;
    go.disabled = true;
    try {
      const { came, lines } = await QUESTIONS[name].tried(this.page.text(), this.page.seed());
      const stillGuessed = radios.find((radio) => radio.checked).value === guess;
      if (stillGuessed) question.outcome = { guess, came, lines };
      this.show();
      this.page.announce(question.result.textContent);
    } catch (error) {
      this.page.showError(error);
    } finally {
      go.disabled = false;
      go.focus({ preventScroll: true });
    }
  }

  // --- showing

  relabel() {
    translate(this.root);
    this.show();
  }

  show() {
    for (const { name, result, outcome } of this.questions) result.replaceChildren(...(outcome ? feedback(name, outcome) : []));
    const tried = this.questions.filter(({ outcome }) => outcome?.came);
    const right = tried.filter(({ outcome }) => outcome.guess === outcome.came).length;
    this.root.querySelector(".score").textContent = tried.length ? t("quizScore", { right, tried: tried.length }) : "";
  }
}

function said(key) {
  const node = el("span");
  node.dataset.t = key;
  return node;
}

function feedback(name, { guess, came, lines }) {
  const verdict = came === null ? "quizNeither" : guess === came ? "quizRight" : "quizWrong";
  return [
    el("p", { className: `verdict ${verdict}`, textContent: t(verdict, { came: came && t(`quiz_${name}_${came}`) }) }),
    el("ul", {}, ...lines().map((line) => el("li", { textContent: line }))),
    el("p", { className: "why", textContent: t(`quiz_${name}_why`) }),
  ];
}
