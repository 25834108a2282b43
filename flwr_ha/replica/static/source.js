// Where the page gets its data: one replica at a time for the cluster, all of them for their own events.

const TIMEOUT_MS = 1500;
const POLL_MS = 1000;
const SLOWEST_POLL_MS = 4000;
const MAX_EVENTS = 3000;

/** Return the JSON of a GET; a replica that hangs counts as one that is gone. */
export async function read(api, path) {
  const response = await fetch(api + path, { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
  const body = await response.json();
  return { ok: response.ok, body };
}

/** Follow a cluster, and move to the next replica's API when the present one fails or has lost the coordinator. */
export class Source {
  constructor(origin) {
    this.apis = [origin];
    this.current = origin;
    this.events = new Map();
    this.followed = new Set();
    this.failures = 0;
  }

  /** Return the cluster from the first replica that is in touch with it; any that answers, if none is. */
  async cluster() {
    const order = [this.current, ...this.apis.filter((api) => api !== this.current)];
    let second = null;
    for (const api of order) {
      try {
        const [cluster, ready] = await Promise.all([read(api, "/cluster"), read(api, "/readiness")]);
        if (!cluster.ok) continue;
        if (!ready.ok && ready.body.reason.includes("coordinator")) {
          second ??= { api, cluster: cluster.body };
          continue;
        }
        return this.#take(api, cluster.body);
      } catch {
        continue; // gone, or not to be reached from here: the next one
      }
    }
    if (second !== null) return this.#take(second.api, second.cluster);
    throw new Error(`none of ${order.length} replicas answers`);
  }

  #take(api, cluster) {
    this.current = api;
    const scheme = new URL(api).protocol;
    for (const replica of cluster.replicas) {
      const known = `${scheme}//${replica.api}`;
      if (!this.apis.includes(known) && !this.#isSame(known, this.apis[0])) this.apis.push(known);
    }
    for (const each of this.apis) this.#follow(each);
    return cluster;
  }

  /** The page may have been opened as localhost:8010, and the settings say 127.0.0.1:8010. */
  #isSame(one, other) {
    const [a, b] = [new URL(one), new URL(other)];
    const isLoopback = (host) => ["127.0.0.1", "localhost", "[::1]"].includes(host);
    return a.port === b.port && isLoopback(a.hostname) && isLoopback(b.hostname);
  }

  /** Read one replica's events for ever, ever more slowly while it does not answer. */
  async #follow(api) {
    if (this.followed.has(api)) return;
    this.followed.add(api);
    let [last, pause] = [0, POLL_MS];
    for (;;) {
      try {
        const { body } = await read(api, `/events?after=${last}`);
        for (const event of body) {
          this.events.set(`${event.replica}:${event.number}`, event);
          last = Math.max(last, event.number);
        }
        pause = POLL_MS;
      } catch {
        pause = Math.min(pause * 2, SLOWEST_POLL_MS);
      }
      this.#forgetOldest();
      await new Promise((done) => setTimeout(done, pause));
    }
  }

  #forgetOldest() {
    if (this.events.size <= MAX_EVENTS) return;
    const sorted = [...this.events].sort(([, a], [, b]) => a.at.localeCompare(b.at));
    for (const [key] of sorted.slice(0, sorted.length - MAX_EVENTS)) this.events.delete(key);
  }

  /** Return what is known of all replicas' events, newest first. */
  newestEvents() {
    return [...this.events.values()].sort((a, b) => b.at.localeCompare(a.at) || b.number - a.number);
  }
}
