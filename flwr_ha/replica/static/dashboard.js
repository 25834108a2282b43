// The dashboard: asks once a second, and shows what has changed.

import { ago, byId, clock, make, setClass, setText } from "./dom.js";
import { RunCard, isOver } from "./runs.js";
import { Source, read } from "./source.js";
import { drawTimeline } from "./timeline.js";

const POLL_MS = 1000;
const SHOWN_ENDED = 2;
const SHOWN_EVENTS = 200;
const GROUPS = {
  leadership: ["role", "elected", "leading", "stand-down", "stop", "start", "pause", "resume"],
  training: ["commit", "run-waits", "run-goes-on", "reply-replayed", "serverapp-died", "repaired"],
  problems: ["reply-rejected", "not-committed", "copy-corrupt", "error", "coordinator", "serverapp-died"],
};
const EVENT_TONES = { commit: "good", leading: "busy", elected: "busy", error: "bad", "run-waits": "warn", "stand-down": "warn", pause: "warn" };

const source = new Source(location.origin);
const cards = new Map();
const commits = new Map();
const lastSeen = new Map(); // term: when its leader was last seen to lead
let [history, historyTerm, eventsShown] = [[], -1, ""];

async function update() {
  let cluster;
  try {
    cluster = await source.cluster();
  } catch (error) {
    showSource("lost", `${error.message}; trying again`);
    return;
  }
  showSource("live", `live from ${new URL(source.current).host}`);
  if (cluster.leader !== null) lastSeen.set(cluster.term, Date.now());
  const { shown, earlier } = chooseRuns(cluster);
  await Promise.allSettled([readHistory(cluster), ...shown.map(readCommits)]);
  const events = source.newestEvents();
  showSummary(cluster);
  showRuns(shown, earlier);
  showReplicas(cluster);
  showEvents(events);
  const runs = shown.map((run) => ({ ...run, commits: commits.get(run.run_id)?.log ?? [], isOver: isOver(run) }));
  drawTimeline(byId("timeline"), { cluster, history, events: events.toReversed(), runs: runs.slice(0, 3), lastSeen });
}

async function readHistory(cluster) {
  if (cluster.term === historyTerm && history.at(-1)?.term === cluster.term) return;
  const answer = await read(source.current, "/history");
  [history, historyTerm] = [answer.body, cluster.term];
  const rows = history.slice(-50).reverse().map((change) => row(change.term, `replica ${change.leader}`, time(change.at), change.reason));
  byId("history").replaceChildren(...rows);
}

async function readCommits(run) {
  if (run.checkpoint === null || commits.get(run.run_id)?.digest === run.checkpoint.digest) return;
  const answer = await read(source.current, `/runs/${run.run_id}/commits`);
  if (answer.ok) commits.set(run.run_id, { digest: run.checkpoint.digest, log: answer.body });
}

function showSource(state, text) {
  setClass(byId("source-dot"), "dot", state);
  setText(byId("source-text"), text);
}

function showSummary(cluster) {
  const { leader, replicas, runs } = cluster;
  setText(byId("cluster"), cluster.cluster);
  setText(byId("leader"), leader === null ? "No leader" : `Replica ${leader}`);
  setClass(byId("leader"), "big", leader === null ? "bad" : "");
  const last = history.at(-1);
  setText(byId("since"), leader === null ? "a standby takes over soon" : last ? `since ${clock(last.at)} (${ago(last.at)})` : "");
  setText(byId("term"), String(cluster.term));
  const takeovers = Math.max(0, cluster.term - 1);
  setText(byId("takeovers"), `${takeovers} takeover${takeovers === 1 ? "" : "s"}`);
  const running = replicas.filter((replica) => replica.state === "running").length;
  setText(byId("running"), `${running} / ${replicas.length}`);
  setClass(byId("running"), "big", running === replicas.length ? "" : 2 * running > replicas.length ? "warn" : "bad");
  const lag = Math.max(0, ...replicas.map((replica) => replica.lag_rounds ?? 0));
  const away = replicas.length - running;
  setText(byId("lag"), away ? `${away} not running` : lag ? `running, up to ${lag} rounds behind` : "running, up to date");
  const open = runs.filter((run) => !isOver(run));
  const online = Math.max(0, ...runs.map((run) => run.nodes_online));
  const needed = Math.max(0, ...open.map((run) => run.min_nodes));
  setText(byId("nodes"), runs.length ? String(online) : "–");
  setClass(byId("nodes"), "big", online < needed ? "warn" : "");
  setText(byId("needed"), needed ? `online, ${needed} needed` : "online");
  showBanner(cluster);
  const run = open[0] ?? runs.at(-1);
  const progress = run ? ` · round ${run.server_round}/${run.num_rounds}` : "";
  document.title = `${leader === null ? "No leader" : `Replica ${leader} leads`}${progress} · ${cluster.cluster}`;
}

function showBanner(cluster) {
  const banner = byId("banner");
  const text = cluster.leader === null && cluster.term > 0
    ? "No replica leads at the moment; training goes on by itself once one does."
    : cluster.paused ? "Automatic failover is paused: flwr-ha resume switches it on again." : "";
  banner.hidden = text === "";
  setText(banner, text);
  setClass(banner, "banner", cluster.leader === null ? "bad" : "");
}

/** Return the runs that are going on with the newest that have ended, and those that ended earlier. */
function chooseRuns(cluster) {
  const newestFirst = [...cluster.runs].sort((a, b) => (b.checkpoint?.committed_at ?? "~").localeCompare(a.checkpoint?.committed_at ?? "~"));
  const ended = newestFirst.filter(isOver);
  const shown = [...newestFirst.filter((run) => !isOver(run)), ...ended.slice(0, SHOWN_ENDED)];
  return { shown, earlier: ended.slice(SHOWN_ENDED) };
}

function showRuns(shown, earlier) {
  byId("no-runs").hidden = shown.length > 0;
  for (const [runId, card] of cards) {
    if (shown.some((run) => run.run_id === runId)) continue;
    card.box.remove();
    cards.delete(runId);
  }
  shown.forEach((run, index) => {
    if (!cards.has(run.run_id)) cards.set(run.run_id, new RunCard(run));
    const card = cards.get(run.run_id);
    if (byId("runs").children[index] !== card.box) byId("runs").insertBefore(card.box, byId("runs").children[index] ?? null);
    card.show(run, commits.get(run.run_id)?.log ?? []);
  });
  byId("earlier").hidden = earlier.length === 0;
  byId("earlier-rows").replaceChildren(...earlier.map((run) => row(run.run_id, run.app, run.state, `${run.server_round} of ${run.num_rounds}`)));
}

function showReplicas(cluster) {
  const rows = cluster.replicas.map((replica) => {
    const isHere = replica.state === "running" || replica.state === "starting";
    const role = isHere ? make("span", { class: replica.role === "leader" ? "chip busy" : "chip" }, replica.role) : "–";
    const state = make("span", { class: `chip ${{ running: "good", starting: "warn" }[replica.state] ?? "bad"}` }, replica.state);
    const lag = replica.lag_rounds === null ? "?" : replica.lag_rounds === 0 ? "none" : `${replica.lag_rounds} rounds`;
    const link = make("a", { href: `${location.protocol}//${replica.api}/` }, replica.api);
    return row(replica.id, role, state, lag, replica.address, link);
  });
  const body = byId("replicas");
  if (body.contains(document.activeElement)) return; // do not take the focus away
  body.replaceChildren(...rows);
}

function showEvents(events) {
  const kinds = GROUPS[byId("filter").value];
  const wanted = (kinds ? events.filter((event) => kinds.includes(event.kind)) : events).slice(0, SHOWN_EVENTS);
  const state = byId("filter").value + wanted.map((event) => `${event.replica}:${event.number}`).join();
  if (state === eventsShown) return;
  eventsShown = state;
  byId("events").replaceChildren(...wanted.map((event) => make("li", {},
    time(event.at), make("span", { class: "muted", title: `replica ${event.replica}` }, `R${event.replica}`),
    make("span", {}, make("span", { class: `chip ${EVENT_TONES[event.kind] ?? ""}` }, event.kind)),
    make("span", { class: "what" }, event.message))));
}

function row(...cells) {
  return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
}

function time(at) {
  return make("time", { datetime: at, title: at }, clock(at));
}

async function forEver() {
  for (;;) {
    const start = performance.now();
    await update().catch((error) => console.error(error));
    await new Promise((done) => setTimeout(done, Math.max(100, POLL_MS - (performance.now() - start))));
  }
}

byId("filter").addEventListener("change", () => showEvents(source.newestEvents()));
forEver();
