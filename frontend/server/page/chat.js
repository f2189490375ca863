// The conversation: sends it, shows the answer as it comes, stops it on demand.

import { answer } from "./stream.js";

const $ = (id) => document.getElementById(id);
const conversation = []; // {role, content}
let running = null; // the AbortController of the answer under way

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  $("input").value = "";
  say(text);
});
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  $("messages").replaceChildren();
  $("input").focus();
});

async function say(text) {
  conversation.push({ role: "user", content: text });
  show("user").text.textContent = text;
  const shown = show("assistant");
  const told = { role: "assistant", content: "" };
  const clock = { start: performance.now(), first: 0, tokens: 0 };
  running = new AbortController();
  busy(true);
  let failed = false;
  try {
    for await (const part of answer(...request(text), running.signal)) {
      if (part.usage) clock.tokens = part.usage.completion_tokens;
      const choice = part.choices[0];
      if (!choice) continue;
      const delta = choice.delta?.content ?? choice.text ?? "";
      const thought = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
      if (!clock.first && (delta || thought)) clock.first = performance.now();
      told.content += delta;
      follow(() => add(shown.text, thought + delta, choice));
      follow(() => figures(shown.figures, clock));
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      failed = true;
      shown.box.classList.add("error");
      shown.text.append(shown.text.textContent ? `\n${error.message}` : error.message);
    }
  } finally {
    running = null;
    busy(false);
    figures(shown.figures, clock);
  }
  if (failed) conversation.pop();
  else conversation.push(told);
}

// The path and the body of the request.
function request(text) {
  const body = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) {
    const value = $(name).value;
    if (value !== "") body[name] = Number(value);
  }
  if ($("form-of-prompt").value === "completion") {
    if ($("colour").checked) body.logprobs = 5;
    return ["/v1/completions", { max_tokens: 256, ...body, prompt: text }];
  }
  if ($("colour").checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  const system = $("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  return ["/v1/chat/completions", { ...body, messages: [...opening, ...conversation] }];
}

function show(role) {
  const box = document.createElement("article");
  box.className = `message ${role}`;
  box.setAttribute("aria-label", role === "user" ? "You" : "The model");
  const text = document.createElement("div");
  text.className = "text";
  box.append(text);
  const figures = document.createElement("div");
  figures.className = "figures";
  if (role !== "user") box.append(figures);
  $("messages").append(box);
  box.scrollIntoView({ block: "end" });
  return { box, text, figures };
}

function add(place, delta, { logprobs, finish_reason }) {
  const tokens = alternatives(logprobs);
  // The token that ended the answer has a probability, but no text in it.
  if (finish_reason === "stop" && tokens.length && !delta.endsWith(tokens.at(-1).token)) tokens.pop();
  if (!tokens.length) {
    place.append(delta);
    return;
  }
  for (const { token, logprob, top } of tokens) {
    const span = document.createElement("span");
    span.textContent = token;
    span.className = `token p${level(logprob)}`;
    span.tabIndex = 0;
    span.title = [`${percent(logprob)} ${JSON.stringify(token)}`, "", ...top].join("\n");
    span.setAttribute("aria-label", `${token}, ${percent(logprob)}`);
    place.append(span);
  }
}

// Chat and completion answers write logprobs in different ways.
function alternatives(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs }) => ({
      token,
      logprob,
      top: top_logprobs.map((other) => `${percent(other.logprob)} ${JSON.stringify(other.token)}`),
    }));
  }
  return (logprobs?.tokens ?? []).map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i] ?? 0,
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([t, p]) => `${percent(p)} ${JSON.stringify(t)}`),
  }));
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
const level = (logprob) => (logprob > -0.36 ? 0 : logprob > -1.2 ? 1 : logprob > -2.5 ? 2 : 3);

function figures(place, { start, first, tokens }) {
  if (!first) return;
  const seconds = (performance.now() - first) / 1000;
  const parts = [`first token after ${((first - start) / 1000).toFixed(2)} s`];
  if (tokens) parts.unshift(`${tokens} tokens`);
  if (tokens > 1 && running) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  else if (tokens > 1) parts.push(place.dataset.speed ?? "");
  place.dataset.speed = parts[2] ?? "";
  place.textContent = parts.filter(Boolean).join(", ");
}

// Change something and stay at the end, unless the reader has scrolled away from it.
function follow(change) {
  const log = $("messages");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
  $("messages").setAttribute("aria-busy", String(is));
}
