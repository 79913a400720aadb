// Draws in the browser: generators of random numbers, the line that they fall on, and a tally. Knows nothing of the page.

const rotated = (x, by) => (x << by) | (x >>> (32 - by));

// Numbers in [0, 1) with 53 random bits each, from a function that gives 32.
const uniform = (bits) => () => ((bits() >>> 5) * 67108864 + (bits() >>> 6)) / 9007199254740992;

// The same numbers for the same seed: xoshiro128** 1.1 (Blackman and Vigna, https://prng.di.unimi.it), whose state is
// four numbers of a counter, mixed as MurmurHash3 ends.
export function seeded(seed) {
  let counter = (seed ^ Math.floor(seed / 4294967296)) | 0;
  const mixed = () => {
    counter = (counter + 0x9e3779b9) | 0;
    let z = counter;
    z = Math.imul(z ^ (z >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    return z ^ (z >>> 16);
  };
  let [a, b, c, d] = [mixed(), mixed(), mixed(), mixed()];
  return uniform(() => {
    const bits = Math.imul(rotated(Math.imul(b, 5), 7), 9) >>> 0;
    const shifted = b << 9;
    c ^= a;
    d ^= b;
    b ^= c;
    a ^= d;
    c ^= shifted;
    d = rotated(d, 11);
    return bits;
  });
}

// Other numbers each time, from the operating system.
export function unseeded() {
  const kept = new Uint32Array(4096);
  let used = kept.length;
  return uniform(() => {
    if (used === kept.length) {
      crypto.getRandomValues(kept);
      used = 0;
    }
    return kept[used++];
  });
}

// The line from 0 to 1 of an answer of POST /v1/next_token: an interval for each listed token that can be drawn. What
// lies between the intervals belongs to the tokens that are not listed, which count as one outcome, the rest.
export class Line {
  constructor({ candidates, kept }) {
    this.outcomes = candidates.filter((one) => one.probability > 0).sort((one, other) => one.start - other.start);
    const listed = candidates.reduce((sum, one) => sum + one.probability, 0);
    this.unlisted = kept - this.outcomes.length; // how many tokens the rest is
    this.rest = this.unlisted > 0 ? Math.max(0, 1 - listed) : 0;
  }

  probability(index) {
    return index < this.outcomes.length ? this.outcomes[index].probability : this.rest;
  }

  // The number of the outcome that `u` falls on; the last one is the rest.
  at(u) {
    let [low, high] = [0, this.outcomes.length]; // at the end both are the first interval that begins after u
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.outcomes[middle].start <= u) low = middle + 1;
      else high = middle;
    }
    const inside = low > 0 && u < this.outcomes[low - 1].end;
    if (inside || this.unlisted <= 0) return Math.max(0, low - 1); // without a rest, gaps are rounding
    return this.outcomes.length;
  }
}

const BETWEEN_POINTS = 1.15; // the numbers of draws at which the largest difference is noted grow by this factor

// How often each outcome was drawn.
export class Tally {
  constructor(line, random) {
    this.line = line;
    this.random = random;
    this.counts = new Uint32Array(line.outcomes.length + 1);
    this.draws = 0;
    this.curve = []; // [draws, largest difference], …
    this.next = 1;
  }

  draw(times) {
    for (let i = 0; i < times; i += 1) {
      this.counts[this.line.at(this.random())] += 1;
      this.draws += 1;
      if (this.draws >= this.next) this.note();
    }
    if (this.curve.at(-1)[0] !== this.draws) this.note();
  }

  note() {
    this.curve.push([this.draws, this.largest().difference]);
    this.next = Math.ceil(this.draws * BETWEEN_POINTS + 1e-9);
  }

  share(index) {
    return this.counts[index] / this.draws;
  }

  // The outcome whose share of the draws differs most from its probability.
  largest() {
    let found = { index: 0, difference: -1 };
    for (let index = 0; index < this.counts.length; index += 1) {
      const difference = Math.abs(this.share(index) - this.line.probability(index));
      if (difference > found.difference) found = { index, difference };
    }
    return found;
  }
}
