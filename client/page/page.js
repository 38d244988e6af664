"use strict";

// The token stands behind the # of the address, which browsers send to nobody.
const KEY = "homefire-token";
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem(KEY, given);
  history.replaceState(null, "", "#chat");
}
const token = sessionStorage.getItem(KEY) || "";
const $ = (id) => document.getElementById(id);
const talk = [];
let underWay = null;
let oldest = null;

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function call(path, { method = "GET", body, signal } = {}) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (answer.ok) return answer;
  let message = answer.statusText;
  try {
    message = (await answer.json()).error.message;
  } catch { /* no JSON: the status must do */ }
  if (answer.status === 401) message = "Open the address that homefire device serve printed.";
  throw new Error(message);
}

const ask = async (path, options) => (await call(path, options)).json();

function guarded(work) {
  return async (event) => {
    if (event && event.preventDefault) event.preventDefault();
    notice("");
    try {
      await work(event);
    } catch (error) {
      if (error.name !== "AbortError") notice(error.message);
    }
  };
}

function element(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function pairs(list, entries) {
  list.replaceChildren();
  for (const [name, value] of entries) list.append(element("dt", name), element("dd", value));
}

// Chat

async function* pieces(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The reply was cut off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found.choices[0]?.delta.content ?? "";
    }
  }
}

async function send() {
  const question = $("question").value.trim();
  if (!question || underWay) return;
  $("question").value = "";
  $("empty-talk").hidden = true;
  talk.push({ role: "user", content: question });
  $("talk").append(element("li", question, "person"));
  const shown = element("li", "…", "model");
  $("talk").append(shown);
  shown.scrollIntoView({ block: "end" });
  underWay = new AbortController();
  $("stop").hidden = false;
  $("send").disabled = true;
  let text = "";
  try {
    const body = { model: $("recipe").value, messages: talk, stream: true };
    const answer = await call("/v1/chat/completions", { method: "POST", body, signal: underWay.signal });
    for await (const piece of pieces(answer)) {
      text += piece;
      shown.textContent = text || "…";
    }
  } finally {
    underWay = null;
    $("stop").hidden = true;
    $("send").disabled = false;
    shown.textContent = text || "(no reply)";
    if (text) talk.push({ role: "assistant", content: text });
    else talk.pop();
  }
}

// The first one stands in the page: whoever asks before these are here gets what works best.
async function showRecipes() {
  const names = {
    "homefire/plain": "the base model alone",
    "homefire/shared": "the shared adapter", "homefire/private": "your private adapter",
    "homefire/retrieval": "what you wrote", "homefire/both": "adapter and what you wrote",
  };
  const { data } = await ask("/v1/models");
  for (const { id } of data) {
    if (!(id in names)) continue;
    const option = element("option", names[id]);
    option.value = id;
    $("recipe").append(option);
  }
}

// What is stored

function recordItem(record) {
  const item = element("li");
  if (record.prompt) item.append(element("p", record.prompt, "quiet about"));
  const text = element("p", record.text, "text");
  const about = element("p", [record.created_at?.slice(0, 10), record.source].filter(Boolean).join(" · "), "quiet about");
  const edit = element("button", "Edit");
  const forget = element("button", "Forget", "danger");
  const row = element("div", undefined, "row");
  row.append(about, element("span", undefined, "grow"), edit, forget);
  item.append(text, row);
  edit.addEventListener("click", () => editRecord(record, item, text, edit));
  forget.addEventListener("click", guarded(async () => {
    if (!confirm("Forget this, and the private adapters that have seen it?")) return;
    await forgetRecords({ ids: [record.id] });
  }));
  return item;
}

function editRecord(record, item, text, edit) {
  const area = element("textarea");
  area.value = record.text;
  area.setAttribute("aria-label", "Text of the record");
  const save = element("button", "Save", "main");
  text.replaceWith(area);
  edit.replaceWith(save);
  area.focus();
  save.addEventListener("click", guarded(async () => {
    if (area.value === record.text) {
      item.replaceWith(recordItem(record));
      return;
    }
    if (!confirm("Forget the old text, and the private adapters that have seen it?")) return;
    const { id } = await ask(`/api/records?id=${record.id}`, { method: "PATCH", body: { text: area.value } });
    item.replaceWith(recordItem({ ...record, id, text: area.value }));
    await showForgotten();
    await showAbout();
  }));
}

async function forgetRecords(what) {
  const gone = await ask("/api/forget", { method: "POST", body: what });
  await showMemory();
  await showAbout();
  let said = `${gone.records} forgotten.`;
  if (gone.adapters.length) said += " Your private adapter had seen it and is deleted: learn again under Vault.";
  if (gone.shared) said += ` ${gone.shared} rounds were taken part in before; what they contributed stays in the shared adapter, within its budget.`;
  $("count").textContent = said;
}

async function showMemory(append = false) {
  const words = $("words").value.trim();
  const query = new URLSearchParams(words ? { q: words } : append ? { before: oldest } : {});
  const { records, next } = await ask(`/api/records?${query}`);
  if (!append) $("records").replaceChildren();
  $("records").append(...records.map(recordItem));
  oldest = next;
  $("more").hidden = next === null;
  const all = await showForgotten();
  $("count").textContent = words ? `${records.length} that fit` : `${all} records`;
}

async function showForgotten() {
  const status = await ask("/api/status");
  $("forgotten").textContent = `Forgotten or changed so far: ${forgotten(status)}.`;
  return status.records;
}

function forgotten({ forgotten: gone, forgotten_adapters: adapters }) {
  if (!gone) return "nothing";
  return `${gone} records, and ${adapters} private adapters that had seen them`;
}

async function showAbout() {
  const profile = await ask("/api/profile");
  pairs($("facts"), Object.entries(profile.facts));
  $("shown").textContent = profile.records
    ? `Your newest ${profile.records} records show: ${Math.round(profile.mean_words)} words on average; often: ${profile.words.map(([w]) => w).join(", ")}.`
    : "";
}

// What was shared

const number = (value) => (value === null ? "∞" : value.toFixed(2));

async function showShared() {
  const status = await ask("/api/status");
  const share = status.epsilon === null ? 1 : status.epsilon / status.lifetime_epsilon;
  $("meter").firstElementChild.style.width = `${Math.min(100, 100 * share)}%`;
  $("meter").setAttribute("aria-valuenow", number(status.epsilon));
  $("meter").setAttribute("aria-valuemax", status.lifetime_epsilon);
  $("spent").textContent = `ε = ${number(status.epsilon)} of ${status.lifetime_epsilon} allowed for a lifetime (δ = ${status.delta}).`;
  const { participations } = await ask("/api/shared");
  $("participations").replaceChildren(...participations.map((entry) => {
    const row = element("tr");
    const charge = element("td", entry.charge === null ? "no noise: unbounded" : entry.charge.toPrecision(3), "number");
    row.append(element("td", entry.run.slice(0, 8)), element("td", entry.round), element("td", entry.rule), charge);
    return row;
  }));
  $("never").hidden = participations.length > 0;
}

// Vault

async function showVault() {
  const status = await ask("/api/status");
  const worn = status.private.find((version) => version.worn);
  pairs($("about"), [
    ["Folder", status.folder], ["Size", `${(status.bytes / 1e6).toFixed(1)} MB`],
    ["Opened by", { both: "passphrase and keystore" }[status.protection] || status.protection],
    ["Base model", status.base_model], ["Records", status.records],
    ["Forgotten", forgotten(status)],
    ["Shared adapter", status.shared ? `round ${status.shared.about.round}` : "none"],
  ]);
  $("adapter").textContent = worn
    ? `Version ${worn.version}, of ${worn.created_at.slice(0, 10)}: loss on your newest records ${worn.about.validation_before.toFixed(3)} without it, ${worn.about.validation_after.toFixed(3)} with it.`
    : "None is in use.";
}

async function personalize() {
  $("personalize").disabled = true;
  $("learning").textContent = "Learning; this takes minutes …";
  try {
    const found = await ask("/api/personalize", { method: "POST", body: {} });
    $("learning").textContent = found.kept ? "Done: the new one is in use." : "Done: the new one is not better, and not used.";
    await showVault();
  } catch (error) {
    $("learning").textContent = "";
    throw error;
  } finally {
    $("personalize").disabled = false;
  }
}

async function erase() {
  const receipt = await ask("/api/erase", { method: "POST", body: { word: $("word").value } });
  document.querySelector("main").replaceChildren(element("p", receipt.statement), element("p", `Vault ${receipt.vault}, ${receipt.erased_at}.`, "quiet"));
  document.querySelector("nav").remove();
}

// Views

const VIEWS = {
  chat: async () => $("question").focus(),
  memory: async () => {
    await showMemory();
    await showAbout();
  },
  shared: showShared,
  vault: showVault,
};

const show = guarded(async () => {
  const wanted = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat";
  for (const name of Object.keys(VIEWS)) {
    if (!$(name)) return;
    $(name).hidden = name !== wanted;
    const link = document.querySelector(`nav a[data-view=${name}]`);
    if (name === wanted) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  await VIEWS[wanted]();
});

$("ask").addEventListener("submit", guarded(send));
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) guarded(send)(event);
});
$("stop").addEventListener("click", () => underWay?.abort());
$("search").addEventListener("submit", guarded(() => showMemory()));
$("more").addEventListener("click", guarded(() => showMemory(true)));
$("remember").addEventListener("submit", guarded(async () => {
  await ask("/api/records", { method: "POST", body: { text: $("new-text").value } });
  $("new-text").value = "";
  await showMemory();
}));
$("forget-before").addEventListener("submit", guarded(async () => {
  if (!confirm(`Forget everything before ${$("date").value}?`)) return;
  await forgetRecords({ before: $("date").value });
}));
$("fact").addEventListener("submit", guarded(async () => {
  await ask("/api/profile", { method: "POST", body: { name: $("fact-name").value, value: $("fact-value").value } });
  $("fact").reset();
  await showAbout();
}));
$("personalize").addEventListener("click", guarded(personalize));
$("erase").addEventListener("submit", guarded(erase));
window.addEventListener("hashchange", show);
guarded(async () => {
  const status = await ask("/api/status");
  $("where").textContent = `${status.folder} · ${status.base_model}`;
  await showRecipes();
})();
show();
