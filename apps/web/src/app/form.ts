/** The form: prompt, suggestions, steps, seed and the rest, and what was chosen in it. */

import { byId, h } from "./dom";
import type { BundleInfo, EngineChoice, GenerateRequest, InputInfo } from "./messages";
import { randomSeed, readSeed, saveSettings, type Settings } from "./settings";

export class Form {
  readonly draw = byId<HTMLButtonElement>("draw");
  private readonly form = byId<HTMLFormElement>("form");
  private readonly prompt = byId<HTMLTextAreaElement>("prompt");
  private readonly seed = byId<HTMLInputElement>("seed");
  private readonly fresh = byId<HTMLInputElement>("fresh");
  private readonly previews = byId<HTMLInputElement>("previews");
  private readonly guidance = byId<HTMLInputElement>("guidance");
  private readonly negative = byId<HTMLInputElement>("negative");
  private readonly choice = byId<HTMLSelectElement>("choice");
  private readonly more = byId("extra-inputs");
  private inputs: InputInfo[] = [];

  constructor(
    private readonly settings: Settings,
    onDraw: () => void,
    onEngine: (engine: EngineChoice) => void,
  ) {
    this.prompt.value = settings.prompt;
    this.seed.value = settings.seed;
    this.fresh.checked = settings.fresh;
    this.previews.checked = settings.previews;
    this.negative.value = settings.negative;
    this.choice.value = settings.engine;
    this.form.onsubmit = (event) => {
      event.preventDefault();
      if (!this.draw.disabled && this.checkSeed()) onDraw();
    };
    this.prompt.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.form.requestSubmit();
      }
    };
    this.seed.oninput = () => {
      this.fresh.checked = false; // a seed that was typed is the one that is wanted
      this.checkSeed();
    };
    byId("dice").onclick = () => this.newSeed();
    this.choice.onchange = () => onEngine(this.choice.value as EngineChoice);
    this.guidance.oninput = () => this.showGuidance();
    this.form.onchange = () => this.keep();
    this.prompt.oninput = this.negative.oninput = () => this.keep();
  }

  /** Fills in what depends on the bundle. */
  fit(bundle: BundleInfo): void {
    this.inputs = bundle.inputs;
    const takesText = bundle.inputs.some((input) => input.kind === "text");
    byId("prompt-label").hidden = this.prompt.hidden = byId("suggestions").hidden = !takesText;
    const steps = this.settings.steps !== null && bundle.stepCounts.includes(this.settings.steps) ? this.settings.steps : bundle.defaultSteps;
    const choices = bundle.stepCounts.map((count) =>
      h("label", {}, h("input", { type: "radio", name: "steps", value: count, checked: count === steps }), String(count)),
    );
    byId("step-choices").replaceChildren(...choices);
    const suggest = (text: string): HTMLElement =>
      h("button", {
        type: "button",
        click: () => {
          this.prompt.value = text;
          this.keep();
          this.form.requestSubmit();
        },
      }, text);
    byId("suggestions").replaceChildren(...bundle.prompts.map(suggest));
    byId("negative-field").hidden = !bundle.takesNegative;
    byId("guidance-field").hidden = bundle.guidance === null;
    if (bundle.guidance !== null) {
      this.guidance.min = bundle.guidance < 1 ? "0" : "1"; // 0 where the bundle's own is none
      this.guidance.max = String(Math.max(8, 2 * bundle.guidance));
      this.guidance.value = String(this.settings.guidance ?? bundle.guidance);
      this.showGuidance();
    }
    this.more.replaceChildren(...bundle.inputs.filter((input) => input.kind !== "text").map(inputField));
    if (takesText && this.prompt.value === "") this.prompt.placeholder = bundle.prompts[0] ?? "";
  }

  /** Returns what to draw; a new seed first where every picture is to have one. */
  async request(): Promise<GenerateRequest> {
    if (this.prompt.value === "" && this.prompt.placeholder) this.prompt.value = this.prompt.placeholder;
    if (this.fresh.checked) this.newSeed();
    this.keep();
    const inputs: GenerateRequest["inputs"] = {};
    for (const input of this.inputs) if (input.kind !== "text") inputs[input.name] = await inputValue(input);
    return {
      prompt: this.prompt.value,
      seed: readSeed(this.seed.value)!,
      steps: this.steps(),
      guidance: byId("guidance-field").hidden ? null : Number(this.guidance.value),
      negative: this.negativePrompt(),
      inputs,
      previews: this.previews.checked,
      raw: false,
    };
  }

  /** Shows an earlier request again, its seed held. */
  restore(request: Pick<GenerateRequest, "prompt" | "seed" | "steps" | "guidance"> & { negative?: string | null }): void {
    this.prompt.value = request.prompt;
    this.seed.value = request.seed;
    this.fresh.checked = false;
    const steps = document.querySelector<HTMLInputElement>(`input[name=steps][value="${request.steps}"]`);
    if (steps !== null) steps.checked = true;
    if (request.guidance !== null) this.guidance.value = String(request.guidance);
    this.negative.value = request.negative ?? "";
    this.showGuidance();
    this.checkSeed();
    this.keep();
  }

  newSeed(): void {
    this.seed.value = randomSeed();
    this.checkSeed();
    this.keep();
  }

  keep(): void {
    Object.assign(this.settings, {
      prompt: this.prompt.value,
      seed: readSeed(this.seed.value) ?? this.settings.seed,
      fresh: this.fresh.checked,
      steps: this.steps(),
      guidance: byId("guidance-field").hidden ? this.settings.guidance : Number(this.guidance.value),
      negative: this.negative.value,
      previews: this.previews.checked,
      engine: this.choice.value as EngineChoice,
    });
    saveSettings(this.settings);
  }

  private steps(): number {
    return Number(document.querySelector<HTMLInputElement>("input[name=steps]:checked")?.value ?? this.settings.steps);
  }

  /** Returns the negative prompt; a field that is empty gives none. */
  private negativePrompt(): string | null {
    return byId("negative-field").hidden || this.negative.value === "" ? null : this.negative.value;
  }

  private showGuidance(): void {
    byId("guidance-value").textContent = Number(this.guidance.value).toFixed(1);
  }

  private checkSeed(): boolean {
    const valid = readSeed(this.seed.value) !== null;
    byId("seed-error").hidden = valid;
    this.seed.setAttribute("aria-invalid", String(!valid));
    return valid;
  }
}

function inputField({ name, kind, count }: InputInfo): HTMLElement {
  const id = `input-${name}`;
  const range = kind === "class" && count !== null ? ` (0 to ${count - 1})` : "";
  const field =
    kind === "class"
      ? h("input", { id, type: "number", min: 0, max: count === null ? null : count - 1, value: 0 })
      : h("input", { id, type: "file", accept: "image/*" });
  return h("div", { class: "field" }, h("label", { for: id }, `${name.replaceAll("_", " ")}${range}`), field);
}

async function inputValue({ name, kind, shape }: InputInfo): Promise<GenerateRequest["inputs"][string]> {
  const field = byId<HTMLInputElement>(`input-${name}`);
  if (kind === "class") return Number(field.value);
  const [, channels, height, width] = shape as [number, number, number, number];
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d")!;
  const file = field.files?.[0];
  if (file !== undefined) {
    context.imageSmoothingQuality = "high";
    context.drawImage(await createImageBitmap(file), 0, 0, width, height);
  }
  const { data: rgba } = context.getImageData(0, 0, width, height);
  const area = width * height;
  const data = new Float32Array(channels * area);
  for (let c = 0; c < channels; c++) for (let i = 0; i < area; i++) data[c * area + i] = rgba[4 * i + c]! / 255;
  return { shape, data };
}
