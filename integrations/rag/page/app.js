"use strict";

// The text of documents and answers is inserted as text only, never as HTML.
const at = (id) => document.getElementById(id);
const made = (tag, text = "", name = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  if (name) node.className = name;
  return node;
};

// The page of a server with a token is opened as /#token=...; browsers never send the part after #.
const token = () => {
  const given = /^#token=(.*)$/s.exec(location.hash);
  try {
    return given && decodeURIComponent(given[1]);
  } catch {
    return given[1]; // a lone % is part of the token
  }
};
const asked = async (path, options = {}) => {
  const headers = { ...(options.headers || {}), ...(token() ? { Authorization: `Bearer ${token()}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    const payload = await answer.json().catch(() => ({}));
    throw new Error(payload.detail || `${answer.status} ${answer.statusText}`);
  }
  return answer;
};

const problem = (error) => {
  at("problem").hidden = !error;
  at("problem").textContent = error ? error.message : "";
};

const NAMES = {
  drafter_accepted_tokens: "draft tokens accepted",
  drafter_drafted_tokens: "draft tokens verified",
  drafter_proposals: "drafts",
  kv_freed_blocks: "KV blocks freed",
  pruner_dropped_tokens: "visual tokens dropped",
  prefix_cache_hits: "prompt tokens in the prefix cache",
};

async function status() {
  try {
    const payload = await (await asked("/status")).json();
    const plugins = payload.plugins.length ? `plugins: ${payload.plugins.join(", ")}` : "no plugins";
    at("status").textContent = `${payload.documents} passages (${payload.kind}) · ${payload.model || "unknown model"} · ${plugins}`;
    at("add").hidden = !payload.uploads;
    at("files").accept = payload.endings.join(",");
  } catch (error) {
    problem(error);
  }
}

async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    rest += value;
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

let last = "";

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question) return;
  last = question;
  problem(null);
  at("send").disabled = true;
  at("result").hidden = false;
  at("answer").setAttribute("aria-busy", "true");
  for (const id of ["answer", "passages", "figures", "grounds"]) at(id).replaceChildren();
  try {
    const where = at("where").value.trim();
    const body = JSON.stringify(where ? { question, where } : { question });
    const answer = await asked("/ask", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    for await (const payload of lines(answer)) {
      if (payload.error) throw new Error(payload.error);
      if (payload.passages) passages(payload.passages);
      if (payload.text) at("answer").append(payload.text);
      if (payload.done) finish(payload.done);
    }
  } catch (error) {
    problem(error);
  } finally {
    at("answer").setAttribute("aria-busy", "false");
    at("send").disabled = false;
    status();
  }
});

function passages(found) {
  for (const passage of found) {
    const item = made("li");
    item.id = `passage-${passage.number}`;
    const open = made("button", passage.id);
    open.type = "button";
    open.addEventListener("click", () => show(passage.id));
    item.append(open, made("div", passage.snippet, "note"));
    at("passages").append(item);
  }
}

function finish(done) {
  // Citations become buttons; the rest of the answer stays text.
  const known = new Map([...at("passages").children].map((item) => [item.id.replace("passage-", ""), item]));
  const parts = [];
  const text = Array.from(done.text); // offsets count code points, as in Python, not UTF-16 units
  let reached = 0;
  for (const { begin, end, numbers } of done.citations) {
    parts.push(text.slice(reached, begin).join(""));
    for (const number of numbers) {
      const cite = made("button", `[${number}]`, "cite");
      cite.type = "button";
      cite.setAttribute("aria-label", `Passage ${number}`);
      cite.addEventListener("click", () => known.get(String(number)).querySelector("button").click());
      parts.push(cite);
    }
    reached = end;
  }
  at("answer").replaceChildren(...parts, text.slice(reached).join(""));
  for (const number of [...done.cited, ...done.attributed]) known.get(String(number)).classList.add("cited");
  if (done.cited.length) at("grounds").textContent = `The answer cites ${done.cited.map((n) => `[${n}]`).join(" ")}.`;
  else if (done.attributed.length)
    at("grounds").textContent = `The answer cites no passage; its words are those of ${done.attributed.map((n) => `[${n}]`).join(" ")}.`;
  else if (done.known) at("grounds").textContent = "The answer cites no passage, and no passage contains its words: do not rely on it.";
  if (done.ended === "length") at("grounds").append(" It is cut off at the maximum length.");
  else if (!done.text) at("grounds").textContent = `The answer is empty; finish reason of the server: ${done.ended || "none"}.`;
  const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
  const took = done.milliseconds;
  const figures = [["search", `${took.retrieval.toFixed(0)} ms`]];
  if (took.first_token) figures.push(["time to first token", seconds(took.first_token)]);
  figures.push(["total time", seconds(took.total)]);
  if (done.tokens.answer) figures.push(["tokens", `${done.tokens.prompt} of the prompt, ${done.tokens.answer} of the answer`]);
  for (const [name, value] of Object.entries(done.saved)) figures.push([NAMES[name] || name.replaceAll("_", " "), value]);
  for (const [name, value] of figures) at("figures").append(made("dt", name), made("dd", String(value)));
}

async function show(id) {
  try {
    const payload = await (await asked(`/passage?${new URLSearchParams({ id, question: last })}`)).json();
    at("passage-id").textContent = payload.id;
    const parts = [];
    let reached = 0;
    const text = Array.from(payload.text); // as in `finish`
    for (const mark of payload.marks) {
      if (mark.begin < reached) continue;
      parts.push(text.slice(reached, mark.begin).join(""));
      const strength = mark.weight > 0.8 ? "strong" : mark.weight > 0.65 ? "middle" : "faint";
      const node = made("mark", text.slice(mark.begin, mark.end).join(""), strength);
      node.title = `matches “${mark.query}”, ${mark.weight.toFixed(2)}`;
      parts.push(node);
      reached = mark.end;
    }
    parts.push(text.slice(reached).join(""));
    at("passage-text").replaceChildren(...parts);
    at("passage-words").replaceChildren(
      ...(payload.words.length ? [made("h2", "Shared terms")] : []),
      ...payload.words.map(([word, weight]) => made("span", `${word} ${weight.toFixed(2)}`, "word")),
    );
    at("passage-metadata").replaceChildren(
      ...Object.entries(payload.metadata).flatMap(([k, v]) => [made("dt", k), made("dd", typeof v === "string" ? v : JSON.stringify(v))]),
    );
    at("passage").showModal();
    at("passage").scrollTop = 0;
  } catch (error) {
    problem(error);
  }
}

at("close").addEventListener("click", () => at("passage").close());

let uploaded = Promise.resolve();

at("files").addEventListener("change", () => {
  // The list is copied and the field cleared, so that more files can be selected during the uploads.
  for (const file of [...at("files").files]) {
    const item = made("li", `${file.name} …`);
    at("uploads").append(item);
    uploaded = uploaded.then(() => upload(file, item));
  }
  at("files").value = "";
  uploaded = uploaded.then(status);
});

async function upload(file, item) {
  try {
    const answer = await asked(`/documents?${new URLSearchParams({ name: file.name })}`, { method: "POST", body: file });
    const payload = await answer.json();
    item.textContent = `${file.name}: ${payload.added} ${payload.added === 1 ? "passage" : "passages"} added`;
  } catch (error) {
    item.textContent = `${file.name}: ${error.message}`;
    item.className = "bad";
  }
}

addEventListener("hashchange", () => {
  problem(null);
  status();
});
status();
