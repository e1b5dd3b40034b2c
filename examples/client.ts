// A small client of forge's API for web pages and Node 24: asks, listens, fetches. See docs/API.md.
//
//     FORGE_KEY=… node examples/client.ts http://127.0.0.1:8600 mei
//
// Nothing to install or build. Without FORGE_KEY it works with a `forge dev` on this machine.

const API = "/api/v1/comfyui";

// [types]
type Asset = { id: string; url: string; thumbnail_url: string; content_hash: string };
type Job = { id: string; status: string; assets: Asset[]; seq: number };
type Problem = { status: number; code: string; detail: string; limit?: { name: string; allowed: number; used: number } };
type Asked = { body?: unknown; once?: string; etag?: string; patience?: number };
type Message =
  | { t: "welcome"; epoch: string }
  | { t: "ev"; seq: number; type: string; key: string; at: string; data: unknown }
  | { t: "mark"; seq: number }
  | { t: "live"; key: string; data: unknown }
  | { t: "reset"; head: number }
  | { t: "bye"; code: number; retry_after_ms: number };
// [end]

const pause = (seconds: number) => new Promise((done) => setTimeout(done, 1000 * seconds));

// [errors]
class Refused extends Error {
  readonly problem: Problem;
  constructor(problem: Problem) {
    super(problem.detail);
    this.problem = problem;
  }
}

class Forge {
  readonly url: string;
  readonly headers: Record<string, string>;

  constructor(url: string, user: string, key?: string) {
    this.url = url;
    this.headers = { "X-Forge-User": user, ...(key && { Authorization: `Bearer ${key}` }) };
  }

  // Asks; and again after a lost connection, or when forge says when to come again, but not for ever.
  async ask(method: string, path: string, { body, once, etag, patience = 60 }: Asked = {}): Promise<Response> {
    const headers: Record<string, string> = { ...this.headers };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (once !== undefined) headers["Idempotency-Key"] = once;
    if (etag !== undefined) headers["If-None-Match"] = etag;
    const until = Date.now() + 1000 * patience;
    while (true) {
      let wait = 1;
      try {
        const answer = await fetch(this.url + path, { method, headers, body: JSON.stringify(body) });
        wait = Number(answer.headers.get("Retry-After") ?? Infinity); // of 429 and 503
        if (Date.now() + 1000 * wait > until) {
          if (answer.status >= 400) throw new Refused((await answer.json()) as Problem);
          return answer;
        }
      } catch (error) {
        if (error instanceof Refused || Date.now() + 1000 * wait > until) throw error;
        // Perhaps it was done: with its Idempotency-Key it is not done twice.
      }
      await pause(wait);
    }
  }
  // [end]

  // [events]
  // Every event after a sequence, once and in order, whatever happens to the connection.
  // A `reset` means that some are not at hand any more: read the lists again.
  async listen(after: number, heard: (message: Message) => void, until: AbortSignal): Promise<void> {
    let epoch: string | undefined;
    while (!until.aborted) {
      const { ticket } = (await (await this.ask("POST", `${API}/events/ticket`)).json()) as { ticket: string };
      const socket = new WebSocket(this.url.replace("http", "ws") + `${API}/events`, ["forge.v1", `ticket.${ticket}`]);
      until.addEventListener("abort", () => socket.close(), { once: true });
      let wait = 1;
      socket.onmessage = ({ data }) => {
        if (until.aborted) return;
        const message = JSON.parse(data) as Message;
        if (message.t === "welcome") {
          socket.send(JSON.stringify({ t: "sub", epoch: epoch ?? message.epoch, after }));
          epoch = message.epoch;
        }
        if (message.t === "ev" || message.t === "mark") after = message.seq;
        if (message.t === "reset") after = message.head;
        if (message.t === "bye") wait = message.retry_after_ms / 1000;
        heard(message);
      };
      await new Promise((closed) => {
        socket.onclose = closed;
        socket.onerror = closed;
      });
      if (!until.aborted) await pause(wait);
    }
  }
  // [end]
}

async function main(url: string, user: string): Promise<void> {
  const forge = new Forge(url, user, process.env.FORGE_KEY);

  // [submit]
  const wish = { job_type: "fate_card", params: { omen: "fortune", motif: "crane", width: 256, height: 384 } };
  const asked = await forge.ask("POST", `${API}/jobs`, { body: wish, once: `${user}-fate` });
  const job = (await asked.json()) as Job;
  // [end]
  console.log("job", job.id);

  // [listen]
  const end = new AbortController();
  let seq = job.seq - 1; // so that its own event is heard, too
  const heard = (message: Message) => {
    if (message.t === "reset") end.abort(); // what was missed shows in the job itself
    if (message.t !== "ev") return;
    console.log(message.seq, message.type);
    seq = message.seq;
    if (message.key === job.id && /^job\.(completed|failed|cancelled)$/.test(message.type)) end.abort();
  };
  await forge.listen(seq, heard, end.signal);
  const done = (await (await forge.ask("GET", `${API}/jobs/${job.id}?min_seq=${seq}`)).json()) as Job;
  // [end]

  // [file]
  const picture = await forge.ask("GET", done.assets[0].url);
  const same = await forge.ask("GET", done.assets[0].url, { etag: picture.headers.get("ETag") ?? undefined });
  // [end]
  console.log((await picture.arrayBuffer()).byteLength, "bytes, again:", same.status);

  // [limit]
  const tooMany = { jobs: Array(11).fill(wish) };
  await forge.ask("POST", `${API}/batch`, { body: tooMany, patience: 0 }).catch((refused: Refused) => {
    console.log("refused:", refused.problem.code, refused.problem.limit);
  });
  // [end]
}

await main(process.argv[2], process.argv[3]);
