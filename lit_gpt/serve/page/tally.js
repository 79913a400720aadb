// The tally below the bars of a lane: a hundred or ten thousand draws from the line, how often each token came, and how
// the largest difference from its probability shrinks.

import { Line, Tally, seeded, unseeded } from "./draws.js";
import { number, percent, t } from "./i18n.js";
import { el, quoted } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM] = [420, 150, 46, 26, 22]; // of the curve, in units of its viewBox
const SMALLEST = 1e-4; // difference on the curve

export class TallyView {
  // lane: { root, seed, page, showTally() }
  constructor(lane) {
    this.lane = lane;
    this.root = lane.root.querySelector(".tally");
    this.find = (name) => this.root.querySelector(name);
    this.answer = null;
    this.tally = null;
    for (const [name, times] of [[".draw-few", 100], [".draw-many", 10_000]]) {
      this.find(name).addEventListener("click", () => this.draw(times));
    }
    this.find(".clear").addEventListener("click", () => this.clear());
    this.find(".unseeded").addEventListener("change", () => this.clear());
  }

  // Another distribution, or none: what was drawn from the one before does not count.
  reset(answer) {
    this.answer = answer;
    this.line = answer && new Line(answer);
    this.tally = null;
    this.show();
  }

  clear() {
    this.reset(this.answer);
    this.lane.showTally();
  }

  draw(times) {
    const random = () => (this.find(".unseeded").checked ? unseeded() : seeded(Number(this.lane.seed.value) || 0));
    this.tally ??= new Tally(this.line, random());
    this.tally.draw(times);
    this.show();
    this.lane.showTally();
    this.lane.page.announce(this.find(".largest").textContent);
  }

  // --- what the bars show

  get draws() {
    return this.tally?.draws ?? 0;
  }

  // How often a token was drawn.
  count(id) {
    const index = this.line.outcomes.findIndex((one) => one.id === id);
    return index < 0 ? 0 : this.tally.counts[index];
  }

  // --- showing

  show() {
    const { tally } = this;
    this.find(".draw-few").disabled = this.find(".draw-many").disabled = !this.answer;
    this.find(".clear").disabled = !tally;
    this.find(".drawn").hidden = !tally;
    if (!tally) return;
    const { index, difference } = tally.largest();
    const outcome = this.line.outcomes[index];
    this.find(".largest").textContent = t("tallyLargest", {
      n: number(tally.draws), token: outcome ? quoted(outcome) : t("tallyRest", { n: number(this.line.unlisted) }),
      share: percent(tally.share(index)), p: percent(this.line.probability(index)), points: number(100 * difference),
    });
    this.showCurve(tally.curve);
  }

  // Draws to the right and the largest difference upwards, both logarithmic, so that 1/√n is a straight line.
  showCurve(curve) {
    const most = Math.max(100, curve.at(-1)[0]);
    const x = (n) => LEFT + ((WIDTH - LEFT - RIGHT) * Math.log10(n)) / Math.log10(most);
    const y = (d) => 8 + ((HEIGHT - BOTTOM - 8) * Math.log10(Math.max(d, SMALLEST))) / Math.log10(SMALLEST);
    const path = (points) => points.map(([n, d]) => `${x(n).toFixed(1)},${y(d).toFixed(1)}`).join(" ");
    const expected = [[1, 0.5], [most, 0.5 / Math.sqrt(most)]];
    const svg = this.find(".curve");
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.replaceChildren(
      shape("polyline", { class: "expected", points: path(expected) }),
      shape("polyline", { class: "difference", points: path(curve) }),
      shape("circle", { class: "latest", cx: x(curve.at(-1)[0]), cy: y(curve.at(-1)[1]), r: 3.5 }),
      ...[1, 0.1, 0.01, 0.001].map((d) => label(LEFT - 6, y(d) + 4, "end", percent(d))),
      ...powersOfTen(most).map((n) => label(x(n), HEIGHT - 6, "middle", number(n))),
    );
    const [n, last] = curve.at(-1);
    svg.setAttribute("aria-label", t("curveLabel", {
      n: number(n), last: percent(last), first: percent(curve[0][1]), expected: percent(0.5 / Math.sqrt(n)),
    }));
  }
}

function powersOfTen(most) {
  return Array.from({ length: Math.floor(Math.log10(most) + 1e-9) + 1 }, (_, i) => 10 ** i);
}

function shape(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function label(x, y, anchor, text) {
  return shape("text", { x, y, "text-anchor": anchor }, text);
}

// The row below the bars for all tokens that have none of their own.
export function othersRow(name, drawn, probability) {
  return el("li", { className: "bar-others" },
    el("span", { className: "name", textContent: name }),
    el("span", { className: "figure", textContent: percent(drawn.share) }),
    el("span", { className: "figure strong", textContent: percent(probability) }),
    el("span", { className: "figure count-drawn", textContent: `${number(drawn.count)}×` }));
}
