// One card for each run: state, progress, why it waits, its newest checkpoint, its metrics.

import { Charts, fillValues } from "./charts.js";
import { ago, make, setClass, setText, size } from "./dom.js";

const TONES = { training: "busy", evaluating: "busy", waiting: "warn", finished: "good", failed: "bad", stopped: "" };
export const isOver = (run) => ["finished", "failed", "stopped"].includes(run.state);
export const tone = (state) => TONES[state] ?? "";

export class RunCard {
  constructor(run) {
    const part = (name, tag = "span", attributes = {}) => (this[name] = make(tag, attributes));
    this.box = make("article", { class: "card run", "data-run": run.run_id, "aria-label": `Run ${run.run_id}` });
    const title = make("h3", {}, part("app"), " ", make("span", { class: "muted mono" }, run.run_id));
    const bar = part("bar", "div", { class: "bar", role: "progressbar", "aria-valuemin": "0" });
    bar.append(part("fill", "div", { class: "fill" }));
    const facts = make("p", { class: "facts" }, part("rounds"), part("nodes"), part("checkpoint"), part("copies"));
    const values = make("table", {}, make("thead", {}, make("tr", {}, ...["Round", "Term", "Metrics"].map((name) => make("th", {}, name)))));
    values.append(part("values", "tbody"));
    this.details = make("details", {}, make("summary", {}, "Values by round"), make("div", { class: "scroll short" }, values));
    this.box.append(
      make("div", { class: "row" }, title, part("chip", "span", { class: "chip" })),
      part("reason", "p", { class: "reason", role: "status" }), bar, facts, part("charts", "div", { class: "charts" }), this.details,
    );
    this.plots = new Charts(this.charts);
  }

  show(run, commits) {
    setText(this.app, run.app || "app");
    setText(this.chip, run.state);
    setClass(this.chip, "chip", tone(run.state));
    setText(this.reason, run.reason ? (run.state === "waiting" ? `Waits: ${run.reason}` : run.reason) : "");
    setClass(this.reason, "reason", run.state === "waiting" ? "warn" : "muted");
    const share = run.num_rounds ? Math.min(1, run.server_round / run.num_rounds) : 0;
    this.fill.style.width = `${100 * share}%`;
    setClass(this.fill, "fill", run.state === "training" || run.state === "evaluating" ? "" : tone(run.state));
    this.bar.setAttribute("aria-valuemax", run.num_rounds);
    this.bar.setAttribute("aria-valuenow", run.server_round);
    this.bar.setAttribute("aria-label", `${run.server_round} of ${run.num_rounds} rounds committed`);
    this.#facts(run);
    this.details.hidden = commits.length === 0;
    if (commits.length) {
      this.plots.draw(commits, run.num_rounds);
      fillValues(this.values, commits);
    }
  }

  #facts(run) {
    fact(this.rounds, `${run.server_round} of ${run.num_rounds || "?"}`, "rounds committed");
    if (!isOver(run)) fact(this.nodes, run.min_nodes ? `${run.nodes_online} of ${run.min_nodes}` : run.nodes_online, "needed nodes online");
    this.nodes.hidden = isOver(run);
    const checkpoint = run.checkpoint;
    if (checkpoint === null) return;
    fact(this.checkpoint, size(checkpoint.bytes), `checkpoint, ${ago(checkpoint.committed_at)}`);
    fact(this.copies, checkpoint.copies.join(", "), "", checkpoint.copies.length === 1 ? "held by replica" : "held by replicas");
  }
}

function fact(element, value, after, before = "") {
  if (element.textContent === `${before} ${value} ${after}`) return;
  element.replaceChildren(`${before} `, make("b", {}, value), ` ${after}`);
}
