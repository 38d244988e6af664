const $ = (id) => document.getElementById(id);
const EVERY = 2000;
const SHOWN = 12;
const SVG = "http://www.w3.org/2000/svg";

const epsilon = (value) => (value === null || value === undefined ? "∞" : value.toFixed(2));
const size = (bytes) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (bytes >= 1000 && step < units.length - 1) { bytes /= 1000; step += 1; }
  return `${bytes.toFixed(step ? 1 : 0)} ${units[step]}`;
};
const cell = (text, number = false) => {
  const made = document.createElement("td");
  made.textContent = text;
  if (number) made.className = "number";
  return made;
};
const row = (...cells) => { const made = document.createElement("tr"); made.append(...cells); return made; };
const shape = (name, attributes) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

function counts(id, found) {
  const rows = Object.entries(found).sort().map(([name, count]) => row(cell(name), cell(count, true)));
  $(id).replaceChildren(...(rows.length ? rows : [row(cell("none"))]));
}

function bars(rounds) {
  const most = Math.max(1, ...rounds.map((each) => each.cohort));
  const width = 600 / Math.max(1, rounds.length);
  $("accepted").replaceChildren(...rounds.flatMap((each, place) => [
    ["asked", each.cohort], ["", each.accepted],
  ].map(([kind, count]) => shape("rect", {
    class: kind, x: place * width + width * .1, width: width * .8,
    y: 120 - 115 * count / most, height: 115 * count / most,
  }))));
}

function line(rounds) {
  const told = rounds.filter((each) => each.train_loss !== null);
  if (told.length < 2) { $("loss").replaceChildren(); return; }
  const values = told.map((each) => each.train_loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const points = values.map((value, place) =>
    `${10 + 580 * place / (values.length - 1)},${110 - 100 * (value - low) / (high - low || 1)}`);
  $("loss").replaceChildren(shape("polyline", { points: points.join(" ") }));
}

function show(status) {
  const { rounds, budget } = status;
  const newest = Math.max(0, ...status.releases);
  $("state").textContent = `${status.state} · ${status.names.join(", ")}`;
  $("notice").hidden = status.trouble.length === 0;
  $("notice").textContent = status.trouble.join("\n");
  $("rounds").textContent = `${newest} of ${status.planned_rounds ?? "?"}`;
  $("online").textContent = status.online ?? "–";
  $("enrolled").textContent = `${status.enrolled} enrolled, ${status.needed ?? "?"} needed, ${status.tickets} tickets open`;
  $("up").textContent = `${size(status.bytes_up)} up`;
  $("down").textContent = `${size(status.bytes_down)} down`;
  if (budget) {
    $("rounds-left").textContent = `${budget.rounds_left} left`;
    $("epsilon").textContent = epsilon(budget.epsilon_now);
    $("epsilon-end").textContent =
      `${epsilon(budget.epsilon_end)} at the end, δ = ${budget.delta ?? "–"}, ${budget.mechanism}`;
    const share = budget.epsilon_end ? Math.min(100, 100 * budget.epsilon_now / budget.epsilon_end) : 0;
    $("meter").setAttribute("aria-valuenow", share.toFixed(0));
    $("meter").firstElementChild.style.width = `${share}%`;
  }
  $("no-rounds").hidden = rounds.length > 0;
  $("table").hidden = rounds.length === 0;
  $("table").tBodies[0].replaceChildren(...rounds.slice(-SHOWN).reverse().map((each) => row(
    cell(each.round, true), cell(each.cohort, true), cell(each.accepted, true),
    cell(each.seconds.toFixed(1), true),
    cell(each.train_loss === null ? "–" : each.train_loss.toFixed(3), true),
  )));
  bars(rounds);
  line(rounds);
  counts("dropped", status.dropped);
  counts("refused", status.refused);
  counts("door", status.door.refused ?? {});
  $("processes").replaceChildren(...Object.entries(status.processes).map(([name, each]) =>
    row(cell(name), cell(each.runs ? "runs" : "down"), cell(`started ${each.starts}×`))));
}

async function look() {
  try {
    const answer = await fetch("/status.json");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    $("state").textContent = "the server does not answer";
  }
  setTimeout(look, EVERY);
}

look();
