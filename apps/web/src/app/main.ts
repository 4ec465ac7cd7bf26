/** The page: puts form, stage, history and check together around one worker. */

import { FewstepError } from "../lib/index";
import { CheckView, takeToken, threadsText } from "./checkview";
import { Cancelled, Client, type Ready } from "./client";
import { byId, bytesText, h } from "./dom";
import { Form } from "./form";
import { History, type Entry } from "./history";
import type { EngineChoice, GenerateRequest } from "./messages";
import { keepOffline } from "./offline";
import { loadSettings, saveSettings } from "./settings";
import { Stage } from "./stage";

const BUNDLE = new URL("./bundle/", location.href.replace(/[?#].*$/, "")).href;

takeToken();
const settings = loadSettings();
const asked = new URLSearchParams(location.search).get("engine");
if (asked === "wasm" || asked === "webgpu") settings.engine = asked;
const interrupted = settings.drawing;

const stage = new Stage();
const form = new Form(settings, () => void draw(), (engine) => void start(engine));
const check = new CheckView(() => running, busy, showError);
let running: { client: Client; ready: Ready } | null = null;
let pictures: History | null = null;
let drawing: number | null = null;

byId("alert-action").onclick = () => void start(settings.engine);
byId("again").onclick = () => {
  form.newSeed();
  void draw();
};
byId("forget").onclick = () => void pictures?.clear().then(showHistory);

async function start(engine: EngineChoice): Promise<void> {
  running?.client.stop();
  running = null;
  byId("alert").hidden = true;
  busy(true);
  stage.showLoading("Getting ready", 0, 0);
  const client = new Client(stopped);
  try {
    const ready = await client.open(BUNDLE, engine, (_, received, total) => stage.showLoading("Loading", received, total));
    running = { client, ready };
    await welcome(ready);
    busy(false);
    await keepOffline(client.kept);
  } catch (error) {
    client.stop();
    stage.showEmpty("Not loaded");
    showError(error);
  }
}

async function welcome({ bundle, engine }: Ready): Promise<void> {
  document.title = byId("title").textContent = bundle.name;
  form.fit(bundle);
  const name = engine.provider === "wasm" ? "WebAssembly" : "WebGPU";
  const pill = byId("engine");
  pill.textContent = `${name} · ${threadsText(engine.threads)}`;
  pill.hidden = false;
  const facts: [string, string][] = [
    ["Computes with", `${name}, ${threadsText(engine.threads)} (ONNX Runtime Web ${engine.version})`],
    ...(engine.reasons.length > 0 ? [["Because", engine.reasons.join("; ")] satisfies [string, string]] : []),
    ["Networks", `${bundle.precision}, ${bytesText(bundle.bytes)}`],
    ["Bundle", bundle.contentId.slice(0, 16)],
    ...Object.entries(bundle.licences),
    ...bundle.caveats.map((caveat): [string, string] => ["Note", caveat]),
  ];
  byId("facts").replaceChildren(...facts.flatMap(([term, text]) => [h("dt", {}, term), h("dd", {}, text)]));
  pictures = await History.open(bundle.name);
  await showHistory();
  const [latest] = await pictures.all();
  if (latest === undefined) stage.showEmpty("Say what to draw, or choose a suggestion.");
  else await stage.showKept(latest.png, latest, latest.ms);
  if (interrupted && settings.drawing) {
    setDrawing(false);
    byId("status").textContent = "The last picture was interrupted.";
    stage.showEmpty("The last picture was interrupted: press Draw to start it again.");
  }
}

async function draw(): Promise<void> {
  if (running === null || drawing !== null) return;
  const { client } = running;
  byId("alert").hidden = true;
  const request = await form.request();
  setDrawing(true);
  busy(true);
  form.draw.textContent = "Stop";
  form.draw.disabled = false;
  stage.begin(request);
  const { id, picture } = client.generate(request, (done, steps, preview) => stage.step(done, steps, preview));
  drawing = id;
  form.draw.onclick = (event) => {
    event.preventDefault();
    client.cancel(id);
  };
  try {
    const { picture: pixels, info } = await picture;
    const png = await stage.finish(pixels, request, info);
    await remember({ ...kept(request), ms: info.ms, png });
  } catch (error) {
    stage.abandon();
    if (!(error instanceof Cancelled)) showError(error);
  } finally {
    drawing = null;
    setDrawing(false);
    form.draw.onclick = null;
    form.draw.textContent = "Draw";
    busy(running === null);
  }
}

const kept = ({ prompt, seed, steps, guidance, negative }: GenerateRequest): Omit<Entry, "ms" | "png"> => ({
  prompt,
  seed,
  steps,
  guidance,
  negative,
});

async function remember(entry: Entry): Promise<void> {
  await pictures?.add(entry);
  await showHistory();
}

async function showHistory(): Promise<void> {
  const entries = (await pictures?.all()) ?? [];
  byId("history-section").hidden = entries.length === 0;
  const list = byId("history");
  list.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
  list.replaceChildren(
    ...entries.map((entry) => {
      const image = h("img", { src: URL.createObjectURL(entry.png), alt: `${entry.prompt}, seed ${entry.seed}`, loading: "lazy" });
      return h("li", {}, h("button", { type: "button", title: entry.prompt, click: () => void recall(entry) }, image));
    }),
  );
}

async function recall(entry: Entry): Promise<void> {
  if (drawing !== null) return;
  form.restore(entry);
  await stage.showKept(entry.png, entry, entry.ms);
  byId("stage").scrollIntoView({ block: "nearest" });
}

/** While something is computed nothing else can be started. */
function busy(is: boolean): void {
  form.draw.disabled = is;
  byId<HTMLButtonElement>("again").disabled = is;
  check.enable(!is);
}

function setDrawing(is: boolean): void {
  settings.drawing = is;
  saveSettings(settings);
}

function stopped(error: FewstepError): void {
  running = null;
  showError(error);
  busy(true);
}

function showError(error: unknown): void {
  const [message, hint] =
    error instanceof FewstepError
      ? [error.message, error.hint]
      : [`something went wrong: ${error instanceof Error ? error.message : error}`, "reload the page"];
  byId("alert-message").textContent = capitalized(message);
  byId("alert-hint").textContent = capitalized(hint);
  byId("alert-action").hidden = running !== null;
  byId("alert").hidden = false;
  byId("alert").scrollIntoView({ block: "nearest" });
}

const capitalized = (text: string): string => `${text.slice(0, 1).toUpperCase()}${text.slice(1)}${/[.…]$/.test(text) ? "" : "."}`;

await start(settings.engine);
