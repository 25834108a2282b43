// Metrics by round, drawn with uPlot; a dashed line marks where another term went on.

import { make, number } from "./dom.js";

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Return which metrics to draw: accuracies and losses, or what else there is; two charts at most. */
function groups(commits) {
  const names = new Set();
  for (const commit of commits) {
    for (const [name, value] of Object.entries(commit.metrics)) if (typeof value === "number") names.add(name);
  }
  const like = (pattern) => [...names].filter((name) => pattern.test(name)).sort();
  const found = [["Accuracy", like(/acc/i)], ["Loss", like(/loss/i)]].filter(([, list]) => list.length);
  return found.length ? found : [...names].sort().slice(0, 2).map((name) => [name, [name]]);
}

/** Draw the charts of one run into its card. */
export class Charts {
  constructor(box) {
    this.box = box;
    this.plots = [];
    this.drawn = "";
  }

  draw(commits, rounds) {
    const wanted = groups(commits);
    const state = JSON.stringify([wanted, commits.length, commits.at(-1)?.server_round, rounds, this.#theme(), this.box.clientWidth]);
    if (state === this.drawn) return;
    this.drawn = state;
    for (const plot of this.plots) plot.destroy();
    this.box.replaceChildren();
    this.box.className = wanted.length === 1 ? "charts single" : "charts";
    this.plots = wanted.map(([title, names]) => this.#chart(title, names, commits, rounds));
  }

  #theme() {
    return matchMedia("(prefers-color-scheme: dark)").matches;
  }

  #chart(title, names, commits, rounds) {
    const latest = commits.at(-1);
    const values = names.filter((name) => name in latest.metrics).map((name) => [name, number(latest.metrics[name])]);
    const caption = make("figcaption", {}, `${title} `);
    for (const [name, value] of values) caption.append(names.length > 1 ? ` ${name} ` : " ", make("b", {}, value));
    const told = values.map(([name, value]) => `${name} ${value}`).join(", ");
    const plot = make("div", { class: "plot", role: "img", "aria-label": `${title} by round; after round ${latest.server_round}: ${told}` });
    this.box.append(make("figure", { class: "chart" }, caption, plot));
    const data = [commits.map((commit) => commit.server_round)];
    for (const name of names) data.push(commits.map((commit) => commit.metrics[name] ?? null));
    return new uPlot(this.#options(names, commits, rounds, plot), data, plot);
  }

  #options(names, commits, rounds, plot) {
    const axis = {
      stroke: color("--muted"), font: "12px system-ui, sans-serif",
      grid: { stroke: color("--line"), width: 1 }, ticks: { show: false },
    };
    const strokes = ["--accent", "--second", "--good", "--takeover"].map(color);
    const first = commits[0].server_round;
    return {
      width: plot.clientWidth, height: plot.clientHeight, legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 8 } },
      scales: { x: { time: false, range: [first - 0.3, Math.max(rounds, first + 1) + 0.3] } },
      axes: [
        { ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], size: 28, gap: 4 },
        { ...axis, size: 58, values: (_, ticks) => ticks.map(number) },
      ],
      series: [{}, ...names.map((name, index) => ({
        label: name, stroke: strokes[index % strokes.length], width: 2.5,
        points: { show: commits.length < 60, size: 7, fill: color("--card"), width: 2 },
      }))],
      hooks: { draw: [(chart) => drawTakeovers(chart, commits)] },
    };
  }
}

function drawTakeovers(chart, commits) {
  const { ctx, bbox } = chart;
  ctx.save();
  ctx.strokeStyle = color("--takeover");
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
  commits.forEach((commit, index) => {
    if (index === 0 || commit.term === commits[index - 1].term) return;
    const x = chart.valToPos(commit.server_round - 0.5, "x", true);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  });
  ctx.restore();
}

/** Fill the table that says the same as the charts. */
export function fillValues(body, commits) {
  const rows = commits.map((commit) => {
    const told = Object.entries(commit.metrics).filter(([, value]) => typeof value === "number");
    const cells = [commit.server_round, commit.term, told.map(([name, value]) => `${name} ${number(value)}`).join(", ")];
    return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
  });
  if (body.childElementCount !== rows.length) body.replaceChildren(...rows);
}

