// The margin problem by plain bisection, and the plain logistic loss closest to it. For pages and for Node.
"use strict";

function sigmoid(z) {
  return z < 0 ? Math.exp(z) / (1 + Math.exp(z)) : 1 / (1 + Math.exp(-z));
}

// Return where a rising function is zero, between two bounds.
function bisect(f, low, high) {
  for (let i = 0; i < 64; i++) {
    const middle = (low + high) / 2;
    if (f(middle) < 0) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

// Return the margin of a gap at a multiplier ν: log x + a σ(γ0 x - g) = ν, with u = log x.
function marginAt(gap, gamma0, tau, multiplier) {
  const a = gamma0 / tau;
  const excess = (u) => u + a * sigmoid(gamma0 * Math.exp(u) - gap) - multiplier;
  return gamma0 * Math.exp(bisect(excess, multiplier - a, multiplier));
}

// Return the margins of a pool of gaps, whose mean is gamma0, and the multiplier.
function solveMargins(gaps, gamma0, tau) {
  const at = (multiplier) => gaps.map((gap) => marginAt(gap, gamma0, tau, multiplier));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const multiplier = bisect((each) => mean(at(each)) - gamma0, 0, gamma0 / tau);
  return { margins: at(multiplier), multiplier };
}

// Return c, d, b of the logistic weights c σ(d - b g) closest to the given ones, in least squares.
function matchLogistic(gaps, weights, start) {
  let at = [0, start, 1]; // log c, d, b
  let damping = 1e-3;
  const weight = ([logC, d, b], g) => Math.exp(logC) * sigmoid(d - b * g);
  const cost = (p) => gaps.reduce((sum, g, i) => sum + (weight(p, g) - weights[i]) ** 2, 0);
  for (let step = 0; step < 300 && damping < 1e9; step++) {
    const m = [0, 1, 2].map(() => [0, 0, 0, 0]); // Levenberg and Marquardt's equations
    gaps.forEach((g, i) => {
      const w = weight(at, g);
      const slope = w * sigmoid(at[2] * g - at[1]);
      const row = [w, slope, -g * slope, weights[i] - w];
      for (let j = 0; j < 3; j++) for (let k = 0; k < 4; k++) m[j][k] += row[j] * row[k];
    });
    for (let j = 0; j < 3; j++) m[j][j] *= 1 + damping;
    const det = ([a, b, c]) =>
      a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]);
    const swapped = (k) => det(m.map((row) => row.slice(0, 3).map((value, j) => (j === k ? row[3] : value))));
    const next = at.map((value, k) => value + swapped(k) / det(m));
    const better = cost(next) < cost(at);
    if (better) at = next;
    damping = better ? damping / 4 : damping * 4;
  }
  return { scale: Math.exp(at[0]), margin: at[1], betaFactor: at[2], cost: cost(at) };
}

if (typeof module !== "undefined") module.exports = { sigmoid, marginAt, solveMargins, matchLogistic };
