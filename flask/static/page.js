// A drawing or a picture goes to /mnist_infer as soon as it changes, and the page shows the answer.

const find = (id) => document.getElementById(id);
const pad = find("pad");
const pen = pad.getContext("2d");
const page = document.body.classList;
const endpoint = new URL("mnist_infer?details=1", document.baseURI);
const greeting = find("status").textContent;
const PAUSE = 60; // Milliseconds between an answer and the next question while the pen moves.
const PATIENCE = 30_000; // Milliseconds after which a server that does not answer counts as away.
const LONGEST_WAIT = 15; // Seconds between two attempts to reach a server that is away.

// What was done, oldest first: {points} is a stroke, {name, file, image} a picture, {} an empty sheet. Undo drops one.
const marks = [];

function sheet() {
  const start = marks.findLastIndex((mark) => !mark.points);
  const strokes = marks.slice(start + 1);
  const picture = !strokes.length && marks[start]?.file ? marks[start] : null; // Strokes begin a sheet.
  return { strokes, picture, empty: !strokes.length && !picture };
}

function paint() {
  const { strokes, picture } = sheet();
  pad.classList.toggle("picture", Boolean(picture));
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, pad.width, pad.height);
  if (picture?.image.complete) {
    // The server reads more formats than a browser shows, such as HEIC: then what the model saw is shown.
    const image = picture.image.naturalWidth ? picture.image : find("seen");
    const { naturalWidth: width, naturalHeight: height } = image;
    const scale = pad.width / Math.max(width, height);
    const box = [(pad.width - scale * width) / 2, (pad.height - scale * height) / 2, scale * width, scale * height];
    if (width) pen.drawImage(image, ...box);
  }
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = pad.width / 14; // A digit fills most of the pad; MNIST's strokes are 1/10 to 1/5 of its height.
  for (const { points } of strokes) {
    pen.beginPath();
    for (const [x, y] of points) pen.lineTo(x, y);
    pen.lineTo(...points.at(-1)); // A single point is a dot.
    pen.stroke();
  }
}

// Asking: one request at a time; what changed meanwhile is asked about next, and a new sheet does not wait.

let request = null; // The AbortController of the request under way.
let changed = false;
let retry; // The timer of the next attempt, and the seconds until then.
let wait = 1;

async function ask({ newSheet = false } = {}) {
  changed = true;
  if (newSheet) request?.abort();
  if (request) return;
  while (changed) {
    changed = false;
    clearTimeout(retry);
    request = new AbortController();
    page.add("waiting");
    await askOnce(request.signal);
    page.remove("waiting");
    await new Promise((done) => setTimeout(done, PAUSE));
  }
  request = null;
}

async function askOnce(aborted) {
  const { picture, empty } = sheet();
  if (empty) return show({}, greeting);
  const base64 = picture ? "" : pad.toDataURL().split(",")[1];
  let response, answer;
  try {
    const form = new FormData();
    form.append("image", picture ? await picture.file() : new Blob([bytes(base64)]), "digit");
    const signal = AbortSignal.any([aborted, AbortSignal.timeout(PATIENCE)]);
    response = await fetch(endpoint, { method: "POST", body: form, signal });
    answer = await response.json().catch(() => ({ Error: `the server answered with status ${response.status}` }));
  } catch {
    if (!aborted.aborted) tryAgain("the server does not answer");
    return;
  }
  if (aborted.aborted) return;
  if (response.status >= 500) return tryAgain(answer.Error, Number(response.headers.get("Retry-After")));
  wait = 1;
  show(response.ok ? answer : {}, response.ok ? inWords(answer) : answer.Error);
  // A picture is taken to lie in the shell's folder; curl reads a comma or semicolon as its own, but not in quotes.
  const file = picture && quoted(`image=@"${picture.name.replaceAll(/["\\]/g, "\\$&")}"`);
  const command = picture ? `curl -F ${file}` : `echo ${base64} | base64 -d | curl -F image=@-`;
  find("curl").textContent = `${command} ${quoted(endpoint)}`;
  find("copy").textContent = "Copy";
}

const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

function tryAgain(sentence, seconds) {
  show({}, `${sentence}. Your picture is kept, and asked about again.`);
  retry = setTimeout(ask, 1000 * Math.max(seconds || 0, wait));
  wait = Math.min(2 * wait, LONGEST_WAIT);
}

// Showing.

const percent = (probability) => `${(Math.floor(1000 * probability) / 10).toFixed(1)} %`; // 100 only for certainty.

function inWords({ Prediction, Confidence, Probabilities }) {
  if (Confidence >= 0.6) return `${Prediction}, ${percent(Confidence)} sure.`;
  const [best, second] = [...Probabilities.keys()].sort((a, b) => Probabilities[b] - Probabilities[a]);
  return `Perhaps ${best}, perhaps ${second}.`;
}

function show({ Prediction, Probabilities, ModelVersion, Engine, Milliseconds, Input }, sentence) {
  find("digit").textContent = Prediction ?? "";
  find("engine").textContent = Engine ?? "–";
  find("version").textContent = ModelVersion ?? "–";
  find("time").textContent = Engine ? `${Milliseconds.toFixed(2)} ms` : "–";
  find("seen").hidden = !Input;
  find("seen").src = Input ?? "data:,";
  [...find("bars").rows].forEach((row, digit) => {
    const probability = Probabilities?.[digit];
    row.className = String(digit) === Prediction ? "best" : "";
    row.cells[1].style.setProperty("--probability", probability ?? 0);
    row.cells[2].textContent = Probabilities ? percent(probability) : "–";
  });
  // A screen reader reads out each change: none before the pen is up and its last stroke answered.
  say(stroke || changed ? "" : sentence);
}

function say(sentence) {
  if (find("status").textContent !== sentence) find("status").textContent = sentence;
}

// Drawing, with one pointer at a time.

let stroke = null;

function extend(events) {
  const { left, top, width } = pad.getBoundingClientRect();
  const scale = pad.width / width;
  for (const { clientX, clientY } of events) stroke.points.push([scale * (clientX - left), scale * (clientY - top)]);
  paint();
}

pad.addEventListener("pointerdown", (event) => {
  if (stroke || event.button !== 0) return;
  pad.setPointerCapture(event.pointerId);
  stroke = { points: [], pointer: event.pointerId };
  marks.push(stroke);
  extend([event]);
});

pad.addEventListener("pointermove", (event) => {
  if (stroke?.pointer !== event.pointerId) return;
  const between = event.getCoalescedEvents?.() ?? [];
  extend(between.length ? between : [event]);
  if (wait === 1) ask(); // A server that is away is asked at the end of a stroke only.
});

pad.addEventListener("lostpointercapture", () => {
  stroke = null;
  ask();
});

// Pictures, from wherever they come.

function startSheet(mark) {
  marks.push(mark);
  paint();
  ask({ newSheet: true });
}

function take(file) {
  if (!file) return say("There is no picture in it: drop or paste a picture itself.");
  const image = new Image();
  image.src = URL.createObjectURL(file);
  image.onload = image.onerror = paint;
  startSheet({ name: file.name, file: () => file, image });
}

for (const input of document.querySelectorAll("input")) {
  input.previousElementSibling.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files.length) take(input.files[0]);
    input.value = ""; // So that the same file can be chosen again.
  });
}

for (const image of document.querySelectorAll(".samples img")) {
  const file = async () => (await fetch(image.src)).blob();
  const name = `flask/${image.getAttribute("src")}`;
  image.parentElement.addEventListener("click", () => startSheet({ name, file, image }));
}

addEventListener("paste", (event) => take(event.clipboardData.files[0]));

addEventListener("dragover", (event) => {
  event.preventDefault();
  page.add("target");
});
addEventListener("dragleave", () => page.remove("target"));
addEventListener("drop", (event) => {
  event.preventDefault();
  page.remove("target");
  take(event.dataTransfer.files[0]);
});

// The buttons.

function undo() {
  marks.pop();
  paint();
  ask({ newSheet: true });
}

find("undo").addEventListener("click", undo);
find("seen").addEventListener("load", paint);
find("clear").addEventListener("click", () => startSheet({}));
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
});

find("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren(find("curl"));
  // Browsers keep the clipboard from a page that came over plain HTTP from another machine.
  const copied = await navigator.clipboard?.writeText(find("curl").textContent).then(() => true, () => false);
  find("copy").textContent = copied ? "Copied" : "Press Ctrl+C";
});

paint();
