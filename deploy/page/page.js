"use strict";

const $ = (id) => document.getElementById(id);

let model = "mambamic";
let image = null;
// A token lives as long as the page: it is kept nowhere.
let token = "";
// What is under way for an image that has been replaced is not shown.
let turn = 0;

const percent = (share) => `${(100 * share).toFixed(share < 0.9995 ? 1 : 0)} %`;

class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, accept) {
  const form = new FormData();
  // Under a name of our own: what a file is called may say whose it is.
  form.append("image", image, "image");
  const headers = { Accept: accept };
  if (token) {
    headers.Authorization = `Bearer ${token}`;
  }
  let reply;
  try {
    reply = await fetch(path, { method: "POST", body: form, headers });
  } catch {
    throw new Failure("The server cannot be reached. See whether it runs, then choose the image again.", 0);
  }
  const body = await reply.json().catch(() => null);
  if (reply.ok && body) {
    return body;
  }
  throw new Failure(words(reply, body), reply.status);
}

function words(reply, body) {
  const said = (body && body.error && body.error.message) || (body && body.message) || "";
  const wait = reply.headers.get("Retry-After");
  switch (reply.status) {
    case 401:
      return token ? "The access token is not known to this server." : "Enter an access token to go on.";
    case 413:
      return `The image is too large: ${said}.`;
    case 429:
    case 503:
      return `The server is busy. Try again in ${wait || "a few"} ${wait === "1" ? "second" : "seconds"}.`;
    case 504:
      return "The server took too long. Try again, or send a smaller image.";
    case 502:
      return "The server lost this request. Try again.";
    default:
      return said ? `The image was not classified: ${said}.` : `The server answered with status ${reply.status}.`;
  }
}

function fail(error) {
  $("failure").textContent = error.message;
  $("failure").hidden = false;
  if (error.status === 401) {
    $("access").hidden = false;
    $("token").focus();
  }
}

function clear() {
  $("failure").hidden = true;
  $("answer").hidden = true;
  $("explanation").hidden = true;
}

async function classify() {
  const mine = ++turn;
  clear();
  $("status").textContent = "Classifying …";
  try {
    const prediction = await ask(`/predictions/${model}`, "application/json");
    if (mine === turn) {
      show(prediction);
    }
  } catch (error) {
    if (mine === turn) {
      $("status").textContent = "";
      fail(error);
    }
  }
}

function show(prediction) {
  const classes = Object.entries(prediction.probabilities).sort((one, other) => other[1] - one[1]);
  $("label").textContent = prediction.label;
  $("probability").textContent = percent(prediction.probability);
  $("unfamiliar").hidden = prediction.in_distribution !== false;
  $("model").textContent = `Model ${prediction.model}, version ${prediction.version}`;
  $("classes").replaceChildren(...classes.map(([name, share], place) => row(name, share, place === 0)));
  $("status").textContent = "";
  $("answer").hidden = false;
  $("explain").disabled = false;
  $("more").hidden = false;
  if ($("access").contains(document.activeElement)) {
    $("explain").focus();
  }
  $("access").hidden = true;
}

function row(name, share, first) {
  const line = document.createElement("tr");
  line.className = first ? "first" : "";
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  const middle = document.createElement("td");
  const track = document.createElement("div");
  track.className = "track";
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.width = `${100 * share}%`;
  track.append(bar);
  middle.append(track);
  const last = document.createElement("td");
  last.textContent = percent(share);
  line.append(head, middle, last);
  return line;
}

async function explain() {
  const mine = turn;
  $("explain").disabled = true;
  $("failure").hidden = true;
  $("status").textContent = "Explaining …";
  try {
    const told = await ask(`/explanations/${model}`, "application/json");
    if (mine !== turn) {
      return;
    }
    $("overlay").src = `data:image/png;base64,${told.overlay_png}`;
    $("overlay").alt = `Heat map over the image: what speaks for ${told.explained}`;
    $("overlay-caption").textContent =
      `What speaks for “${told.explained}”, by ${told.method.replaceAll("-", " ")}.`;
    $("explanation").hidden = false;
    $("more").hidden = true;
    $("status").textContent = "";
  } catch (error) {
    if (mine === turn) {
      $("status").textContent = "";
      $("explain").disabled = false;
      fail(error);
    }
  }
}

function choose(file) {
  if (!file) {
    return;
  }
  image = file;
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(file);
  classify();
}

function start() {
  for (const place of document.querySelectorAll(".origin")) {
    place.textContent = location.origin;
  }
  fetch("/settings.json")
    .then((reply) => reply.json())
    .then((settings) => { model = settings.model; })
    .catch(() => {})
    .finally(() => {
      for (const place of document.querySelectorAll(".model-name")) {
        place.textContent = model;
      }
    });
  // Browsers show neither TIFF nor JPEG 2000: then the invitation stays.
  $("preview").addEventListener("load", () => { $("preview").hidden = false; $("invitation").hidden = true; });
  $("preview").addEventListener("error", () => { $("preview").hidden = true; $("invitation").hidden = false; });
  $("file").addEventListener("change", (event) => { choose(event.target.files[0]); event.target.value = ""; });
  $("explain").addEventListener("click", explain);
  $("access").addEventListener("submit", (event) => {
    event.preventDefault();
    token = $("token").value.trim();
    if (image) {
      classify();
    }
  });
  const drop = $("drop");
  // Anywhere on the page: a browser would leave it to show a file that misses the frame.
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) {
      drop.classList.remove("over");
    }
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    choose(event.dataTransfer.files[0]);
  });
}

start();
