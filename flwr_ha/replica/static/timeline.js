// Who led when, what was committed, when a run waited: one lane for each replica and each shown run.

import { clock } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const LONGEST_MS = 60 * 60 * 1000;
const SHORTEST_MS = 60 * 1000;
const [LANE, TOP, BOTTOM, LEFT, RIGHT] = [30, 26, 24, 92, 14];

function shape(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Return the intervals [from, to, text] between two kinds of events; one that is open goes on until now. */
export function intervals(events, isStart, isEnd, now) {
  const found = [];
  let start = null;
  for (const event of events) {
    if (isStart(event)) start ??= event;
    else if (start !== null && isEnd(event)) {
      found.push([Date.parse(start.at), Date.parse(event.at), start.message]);
      start = null;
    }
  }
  if (start !== null) found.push([Date.parse(start.at), now, start.message]);
  return found;
}

/** Return who led from when to when: until the next takeover, or until it was last seen or stood down. */
export function leaderships(history, events, lastSeen, cluster, now) {
  return history.map((change, index) => {
    const from = Date.parse(change.at);
    const next = index + 1 < history.length ? Date.parse(history[index + 1].at) : now;
    const down = events.find((event) => event.kind === "stand-down" && event.term === change.term);
    const isOver = index + 1 < history.length || cluster.leader !== change.leader;
    const seen = lastSeen.get(change.term);
    const end = down ? Date.parse(down.at) : isOver && seen ? seen : next;
    return { ...change, from, to: Math.max(from, Math.min(end, next)) };
  });
}

/** Draw the time line; `events` are oldest first, `runs` have their commits. */
export function drawTimeline(box, { cluster, history, events, runs, lastSeen }) {
  const now = Date.now();
  const moments = [...history.map((change) => change.at), ...runs.flatMap((run) => run.commits.map((c) => c.committed_at))];
  const recent = moments.map((at) => Date.parse(at)).filter((at) => at > now - LONGEST_MS);
  const start = Math.min(now - SHORTEST_MS, ...recent.map((at) => at - 2000));
  const width = Math.max(box.clientWidth, 280);
  const lanes = [...cluster.replicas.map((replica) => `Replica ${replica.id}`), ...runs.map((run) => `Run …${run.run_id.slice(-5)}`)];
  const height = TOP + lanes.length * LANE + BOTTOM;
  const x = (at) => LEFT + ((Math.max(at, start) - start) / (now - start)) * (width - LEFT - RIGHT);
  const middle = (lane) => TOP + lane * LANE + LANE / 2;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const bar = (name, lane, from, to, title, half = 7) => {
    if (to < start) return;
    const rect = shape("rect", { class: name, x: x(from), y: middle(lane) - half, width: Math.max(x(to) - x(from), 2), height: 2 * half, rx: 4 });
    rect.append(shape("title", {}, title));
    svg.append(rect);
  };

  drawGrid(svg, { start, now, x, width, height });
  for (const [from, to] of intervals(events, (e) => e.kind === "pause", (e) => e.kind === "resume", now)) {
    if (to > start) svg.append(shape("rect", { class: "paused", x: x(from), y: TOP, width: x(to) - x(from), height: lanes.length * LANE }));
  }
  lanes.forEach((name, lane) => {
    svg.append(shape("line", { class: "lane", x1: LEFT, x2: width - RIGHT, y1: middle(lane), y2: middle(lane) }));
    svg.append(shape("text", { class: "name", x: 0, y: middle(lane) + 4 }, name));
  });
  for (const led of leaderships(history, events, lastSeen, cluster, now)) {
    const lane = cluster.replicas.findIndex((replica) => replica.id === led.leader);
    if (lane >= 0) bar("lead", lane, led.from, led.to, `replica ${led.leader} leads in term ${led.term} since ${clock(led.at)}`);
  }
  const takeovers = history.filter((change, index) => index > 0 && Date.parse(change.at) >= start);
  let free = -Infinity;
  for (const change of takeovers) {
    const at = x(Date.parse(change.at));
    const line = shape("line", { class: "takeover", x1: at, x2: at, y1: TOP - 6, y2: TOP + lanes.length * LANE });
    line.append(shape("title", {}, `term ${change.term}: replica ${change.leader} takes over, ${change.reason}`));
    svg.append(line);
    const anchor = at > width - 130 ? "end" : "start";
    if (at - free < 60) continue; // the line says enough where there is no room
    svg.append(shape("text", { class: "label", x: at + (anchor === "end" ? -4 : 4), y: 14, "text-anchor": anchor }, `term ${change.term}: replica ${change.leader}`));
    free = at + 60;
  }
  runs.forEach((run, index) => drawRun(svg, run, { lane: cluster.replicas.length + index, events, start, now, x, middle, bar }));
  svg.setAttribute("aria-label", tell({ start, now, takeovers, runs, cluster }));
  box.replaceChildren(svg);
}

function drawRun(svg, run, { lane, events, start, now, x, middle, bar }) {
  const own = events.filter((event) => event.run_id === run.run_id);
  const isEnd = (event) => event.kind === "run-goes-on" || event.kind === "commit";
  for (const [from, to, why] of intervals(own, (e) => e.kind === "run-waits", isEnd, run.isOver ? 0 : now)) {
    if (to > from) bar("wait", lane, from, to, `waits: ${why}`, 5);
  }
  for (const commit of run.commits) {
    const at = Date.parse(commit.committed_at);
    if (at < start) continue;
    const dot = shape("circle", { class: "commit", cx: x(at), cy: middle(lane), r: run.commits.length > 100 ? 3.5 : 5.5 });
    dot.append(shape("title", {}, `${commit.server_round ? `round ${commit.server_round}` : "initial model"} committed in term ${commit.term} at ${clock(commit.committed_at)}`));
    svg.append(dot);
  }
}

function drawGrid(svg, { start, now, x, width, height }) {
  const wanted = Math.max(2, Math.floor((width - LEFT) / 110));
  const steps = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800].map((seconds) => seconds * 1000);
  const step = steps.find((each) => (now - start) / each <= wanted) ?? 3600000;
  for (let at = Math.ceil(start / step) * step; at <= now; at += step) {
    svg.append(shape("line", { class: "grid", x1: x(at), x2: x(at), y1: TOP, y2: height - BOTTOM }));
    if (x(at) < width - 36) svg.append(shape("text", { x: x(at), y: height - 6, "text-anchor": "middle" }, clock(at)));
  }
}

function tell({ start, now, takeovers, runs, cluster }) {
  const minutes = Math.max(1, Math.round((now - start) / 60000));
  const led = cluster.leader === null ? "no replica leads now" : `replica ${cluster.leader} leads now`;
  const rounds = runs.map((run) => `run ${run.run_id} committed ${run.commits.filter((commit) => commit.server_round).length} rounds`).join(", ");
  const changes = takeovers.map((change) => `replica ${change.leader} took over in term ${change.term} at ${clock(change.at)}`).join(", ");
  return `The last ${minutes} min: ${changes || "no takeover"}; ${led}; ${rounds || "no run"}`;
}
