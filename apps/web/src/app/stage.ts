/** The picture, the steps towards it, and what can be done with it. */

import { byId, bytesText, h, timeText } from "./dom";
import type { GenerateRequest, PictureInfo, Pixels } from "./messages";

export class Stage {
  private readonly canvas = byId<HTMLCanvasElement>("canvas");
  private readonly veil = byId("veil");
  private readonly loading = byId<HTMLProgressElement>("loading");
  private readonly marks = byId("steps-done");
  private readonly save = byId<HTMLAnchorElement>("save");
  private readonly share = byId<HTMLButtonElement>("share");
  private png: File | null = null;

  constructor() {
    this.share.onclick = () => {
      if (this.png === null) return;
      // Ends with an AbortError where the person changes their mind.
      navigator.share({ files: [this.png], title: this.png.name }).catch(() => {});
    };
  }

  showLoading(text: string, received: number, total: number): void {
    this.veil.hidden = false;
    byId("veil-text").textContent = total > 0 ? `${text} ${bytesText(received)} of ${bytesText(total)}` : text;
    if (total > 0) this.loading.value = received / total;
    this.loading.hidden = total === 0;
  }

  /** Shows an empty stage, ready to be drawn on. */
  showEmpty(text: string): void {
    this.veil.hidden = false;
    this.loading.hidden = true;
    byId("veil-text").textContent = text;
  }

  begin(request: GenerateRequest): void {
    byId("actions").hidden = true;
    byId("caption").textContent = request.prompt || `Seed ${request.seed}`;
    byId("figures").textContent = `step 1 of ${request.steps}`;
    this.mark(0, request.steps);
    this.say(`Drawing ${request.prompt}`);
  }

  step(done: number, steps: number, preview: Pixels | null): void {
    this.mark(done, steps);
    byId("figures").textContent = done < steps ? `step ${done + 1} of ${steps}` : "decoding";
    if (preview !== null) this.paint(preview);
  }

  /** Shows a finished picture, and returns it as a PNG file. */
  async finish(picture: Pixels, request: GenerateRequest, info: PictureInfo): Promise<File> {
    this.paint(picture);
    const blob = await new Promise<Blob | null>((resolve) => this.canvas.toBlob(resolve, "image/png"));
    if (blob === null) throw new Error("the browser cannot write a PNG file");
    this.show(blob, request, info.ms, info.memory.wasmBytes);
    this.say(`Done in ${timeText(info.ms)}: ${request.prompt}`);
    return this.png!;
  }

  /** Shows a picture that was kept. */
  async showKept(png: Blob, request: Pick<GenerateRequest, "prompt" | "seed" | "steps">, ms: number): Promise<void> {
    const bitmap = await createImageBitmap(png);
    this.size(bitmap.width, bitmap.height);
    this.canvas.getContext("2d")!.drawImage(bitmap, 0, 0);
    this.veil.hidden = true;
    this.mark(request.steps, request.steps);
    this.show(png, request, ms, null);
  }

  /** Takes the marks of a drawing that did not end away. */
  abandon(): void {
    this.marks.replaceChildren();
    byId("figures").textContent = "";
  }

  private show(png: Blob, request: Pick<GenerateRequest, "prompt" | "seed" | "steps">, ms: number, bytes: number | null): void {
    const name = `${(request.prompt || "picture").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}-${request.seed}.png`;
    this.png = new File([png], name, { type: "image/png" });
    if (this.save.href) URL.revokeObjectURL(this.save.href);
    this.save.href = URL.createObjectURL(this.png);
    this.save.download = name;
    this.share.hidden = navigator.canShare?.({ files: [this.png] }) !== true;
    byId("actions").hidden = false;
    byId("caption").textContent = request.prompt || `Seed ${request.seed}`;
    byId("figures").textContent = [timeText(ms), ...(bytes === null ? [] : [bytesText(bytes)])].join(" · ");
    this.canvas.setAttribute("aria-label", `Picture of ${request.prompt}, seed ${request.seed}`);
  }

  private paint({ width, height, rgba }: Pixels): void {
    this.size(width, height);
    this.canvas.getContext("2d")!.putImageData(new ImageData(rgba, width, height), 0, 0);
    this.veil.hidden = true;
  }

  private size(width: number, height: number): void {
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    byId("stage").style.aspectRatio = `${width} / ${height}`;
  }

  private mark(done: number, steps: number): void {
    if (this.marks.childElementCount !== steps) this.marks.replaceChildren(...Array.from({ length: steps }, () => h("i")));
    [...this.marks.children].forEach((mark, i) => mark.classList.toggle("done", i < done));
  }

  private say(text: string): void {
    byId("status").textContent = text;
  }
}
