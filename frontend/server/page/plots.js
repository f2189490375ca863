// The engine, live: asks /stats once a second while somebody looks, and draws the last two minutes.

const SECONDS = 120;
const $ = (id) => document.getElementById(id);
const series = { running: [], waiting: [], speed: [], cache: [] };
let before = null; // {at, tokens}

async function look() {
  try {
    const response = await fetch("/stats", { signal: AbortSignal.timeout(5000) });
    if (!response.ok) throw new Error(`${response.status}`);
    note(await response.json());
    state(false, "");
  } catch (error) {
    state(true, `no answer from the engine (${error.message})`);
  }
}

function note({ model, max_model_len, engine, clients }) {
  $("model").textContent = `${model}, ${max_model_len} tokens`;
  const now = performance.now() / 1000;
  const tokens = engine.generation_tokens;
  const speed = before && tokens >= before.tokens ? (tokens - before.tokens) / (now - before.at) : 0;
  before = { at: now, tokens };
  const cache = engine.num_blocks ? 1 - engine.num_free_blocks / engine.num_blocks : 0;
  const values = { running: engine.num_running, waiting: engine.num_waiting, speed, cache };
  for (const [name, value] of Object.entries(values)) {
    const points = series[name];
    points.push({ at: now, value });
    while (points[0].at < now - SECONDS) points.shift();
    draw($(`plot-${name}`), points, now, name === "cache" ? 1 : 0);
  }
  $("running").textContent = engine.num_running;
  $("waiting").textContent = engine.num_waiting;
  $("speed").textContent = speed >= 100 ? speed.toFixed(0) : speed.toFixed(1);
  $("cache").textContent = `${(100 * cache).toFixed(1)} % of ${engine.num_blocks} blocks`;
  $("clients").replaceChildren(...clients.map(row));
}

function row(client) {
  const line = document.createElement("tr");
  for (const text of [client.name, client.num_running, client.num_waiting, client.generation_tokens]) {
    line.insertCell().textContent = text;
  }
  return line;
}

function draw(canvas, points, now, most) {
  const scale = window.devicePixelRatio || 1;
  const width = (canvas.width = canvas.clientWidth * scale);
  const height = (canvas.height = canvas.clientHeight * scale);
  const top = most || Math.max(1, ...points.map(({ value }) => value)) * 1.1;
  const context = canvas.getContext("2d");
  const x = ({ at }) => width * (1 - (now - at) / SECONDS);
  const y = ({ value }) => height - scale - (height - 2 * scale) * (value / top);
  context.strokeStyle = context.fillStyle = getComputedStyle(canvas).color;
  context.lineWidth = 1.5 * scale;
  context.beginPath();
  points.forEach((point, i) => (i ? context.lineTo(x(point), y(point)) : context.moveTo(x(point), y(point))));
  context.stroke();
  context.lineTo(x(points[points.length - 1]), height);
  context.lineTo(x(points[0]), height);
  context.globalAlpha = 0.15;
  context.fill();
}

function state(bad, text) {
  $("state").classList.toggle("bad", bad);
  $("state").textContent = text;
}

async function forever() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}
forever();
