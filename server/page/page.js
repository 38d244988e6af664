const $ = (id) => document.getElementById(id);
const EVERY = 2000;
const SHOWN = 12;
const SVG = "http://www.w3.org/2000/svg";
const NEARLY = 90; // percent of the budget

const whole = new Intl.NumberFormat("en");
const epsilon = (value) => (value === null || value === undefined ? "∞" : value.toFixed(2));
const size = (bytes) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (bytes >= 1000 && step < units.length - 1) { bytes /= 1000; step += 1; }
  return `${bytes.toFixed(step ? 1 : 0)} ${units[step]}`;
};
const time = (seconds) => {
  if (seconds < 100) return `${seconds.toFixed(1)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
};
const moment = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ");
const day = (seconds) => moment(seconds).slice(0, 10);
const total = (counts) => Object.values(counts).reduce((sum, count) => sum + count, 0);
const cell = (text, kind = "") => {
  const made = document.createElement("td");
  made.textContent = text;
  made.className = kind;
  return made;
};
const row = (...cells) => { const made = document.createElement("tr"); made.append(...cells); return made; };
const shape = (name, attributes) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const large = (id, text, small = "") => {
  const made = document.createElement("small");
  made.textContent = small && ` ${small}`;
  $(id).replaceChildren(text, made);
};

function counts(id, found) {
  const rows = Object.entries(found).sort((one, other) => other[1] - one[1])
    .map(([name, count]) => row(cell(name), cell(whole.format(count), "number")));
  $(id).tBodies[0].replaceChildren(...(rows.length ? rows : [row(cell("none", "quiet"))]));
}

function meter(id, share) {
  const shown = Math.max(0, Math.min(100, share));
  $(id).setAttribute("aria-valuenow", shown.toFixed(0));
  $(id).firstElementChild.style.width = `${shown}%`;
}

function axis(svg, rounds, high, low) {
  const say = (name, text) => { svg.parentElement.querySelector(`.${name}`).textContent = text; };
  say("high", high);
  say("low", low);
  say("first", rounds.length ? `round ${rounds[0].round}` : "");
  say("last", rounds.length > 1 ? `round ${rounds[rounds.length - 1].round}` : "");
}

function bars(rounds) {
  const most = Math.max(1, ...rounds.map((each) => each.cohort));
  const width = 600 / Math.max(12, rounds.length);
  const gap = rounds.length > 150 ? 0 : width * .15;
  $("asked").replaceChildren(...rounds.flatMap((each, place) => {
    const refused = total(each.refused);
    const left = Math.max(0, each.cohort - each.accepted - refused);
    let floor = 120;
    return [["accepted", each.accepted], ["refused", refused], ["dropped", left]].map(([kind, count]) => {
      const height = 120 * count / most;
      floor -= height;
      return shape("rect", { class: kind, x: place * width + gap / 2, width: width - gap, y: floor, height });
    });
  }));
  axis($("asked"), rounds, whole.format(most), "0");
}

function line(rounds) {
  const told = rounds.filter((each) => each.train_loss !== null);
  $("loss-chart").hidden = told.length < 2;
  $("no-loss").hidden = told.length >= 2;
  if (told.length < 2) return;
  const values = told.map((each) => each.train_loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const points = values.map((value, place) =>
    `${600 * place / (values.length - 1)},${118 - 116 * (value - low) / (high - low || 1)}`);
  $("loss").replaceChildren(shape("polyline", { points: points.join(" ") }));
  axis($("loss"), told, high.toFixed(2), low.toFixed(2));
}

function releases(published) {
  $("releases-section").hidden = published.length === 0;
  $("releases").tBodies[0].replaceChildren(...published.slice(-SHOWN).reverse().map((each) => row(
    ...[whole.format(each.number), each.run, whole.format(each.round), epsilon(each.epsilon), moment(each.issued_at)]
      .map((text) => cell(text, "number")),
    cell(day(each.expires_at), 1000 * each.expires_at < Date.now() ? "number bad" : "number"),
  )));
}

function registry(told) {
  const { answered = {}, refused = {}, bytes_sent: sent = 0 } = told;
  counts("registry", refused);
  $("asked-for").textContent =
    `Since the registry started: asked for ${whole.format(answered.latest ?? 0)} times, ` +
    `downloaded ${whole.format(answered.download ?? 0)} times, ${size(sent)}`;
}

function mood(status) {
  const first = status.state.split(":")[0].split(" ")[0];
  if (first === "halted" || Object.values(status.processes).some((each) => !each.runs)) return "bad";
  if (status.state.startsWith("running:")) return "warn"; // for more devices
  if (first === "running" || first === "draining") return "good";
  return first === "waiting" || first === "starting" ? "warn" : "";
}

function privacy(budget) {
  if (!budget) { large("epsilon", "–"); $("epsilon-end").textContent = ""; meter("budget", 0); return; }
  const known = budget.epsilon_end !== null;
  large("epsilon", `ε = ${epsilon(known ? budget.epsilon_now : null)}`, known ? `of ${epsilon(budget.epsilon_end)}` : "");
  const share = known && budget.epsilon_end > 0 ? 100 * budget.epsilon_now / budget.epsilon_end : 0;
  meter("budget", share);
  $("budget").hidden = !known;
  $("budget").classList.toggle("full", share >= NEARLY);
  const [now, seeing] = [budget.epsilon_now, budget.epsilon_known_cohort_now].map(epsilon);
  const cohorts = now === seeing ? "" : `; ε = ${seeing} for who knows the cohorts`;
  $("epsilon-end").textContent = known
    ? `δ = ${budget.delta.toExponential()}, ${budget.mechanism}${cohorts}`
    : `${budget.mechanism}: nothing is promised`;
}

function show(status) {
  const { rounds, budget, burnt } = status;
  const released = status.releases.filter((round) => round > 0).length;
  const planned = status.planned_rounds;
  $("names").textContent = status.names.join(", ");
  $("state").textContent = status.state;
  $("state").className = `state ${mood(status)}`;
  document.title = `${planned ? `${released}/${planned} · ` : ""}homefire server`;
  $("notice").hidden = status.trouble.length === 0;
  $("notice").querySelector("ul").replaceChildren(...status.trouble.map((text) => {
    const made = document.createElement("li");
    made.textContent = text;
    return made;
  }));
  large("rounds", whole.format(released), planned ? `of ${whole.format(planned)}` : "");
  meter("progress", planned ? 100 * released / planned : 0);
  const run = status.run > 1 ? [`run ${whole.format(status.run)}`] : [];
  const spent = burnt > 0 ? [`${whole.format(burnt)} burnt`] : [];
  const left = budget ? [`${whole.format(budget.rounds_left)} left`] : [];
  $("rounds-left").textContent = [...run, ...spent, ...left].join("; ");
  privacy(budget);
  large("online", status.online === null ? "–" : whole.format(status.online), `of ${whole.format(status.enrolled)}`);
  const needed = status.needed === null ? "" : `the run takes ${whole.format(status.needed)}; `;
  $("enrolled").textContent = `${needed}${whole.format(status.tickets)} tickets open`;
  const last = rounds[rounds.length - 1];
  large("newest", last ? time(last.seconds) : "–");
  $("newest-more").textContent = last ? `${whole.format(last.accepted)} of ${whole.format(last.cohort)} in its sum` : "";
  large("up", size(status.bytes_up));
  $("down").textContent = `${size(status.bytes_down)} of releases sent`;
  $("no-rounds").hidden = rounds.length > 0;
  $("charts").hidden = $("rounds-section").hidden = rounds.length === 0;
  $("table").tBodies[0].replaceChildren(...rounds.slice(-SHOWN).reverse().map((each) => row(
    ...[each.round, each.cohort, each.accepted, total(each.refused), total(each.dropped)]
      .map((count) => cell(whole.format(count), "number")),
    cell(each.seconds.toFixed(1), "number"),
    cell(each.train_loss === null ? "–" : each.train_loss.toFixed(3), "number"),
  )));
  bars(rounds);
  line(rounds);
  releases(status.published);
  counts("dropped", status.dropped);
  counts("refused", status.refused);
  counts("door", status.door.refused ?? {});
  registry(status.registry);
  const processes = Object.entries(status.processes).map(([name, each]) => row(
    cell(name), cell(each.runs ? "runs" : "is down", each.runs ? "good" : "bad"),
    cell(each.starts > 1 ? `${each.starts} starts` : "", "number"),
  ));
  $("processes").tBodies[0].replaceChildren(...(processes.length ? processes : [row(cell("none", "quiet"))]));
}

let seen = null;

async function look() {
  try {
    const answer = await fetch("/status.json");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
    seen = new Date();
    document.querySelector("main").classList.remove("stale");
  } catch {
    $("state").textContent = seen ? `no answer since ${seen.toLocaleTimeString()}` : "no answer";
    $("state").className = "state bad";
    document.querySelector("main").classList.add("stale");
  }
  setTimeout(look, EVERY);
}

look();
