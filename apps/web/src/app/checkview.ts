/** The device check on the page: run it, show it, keep it, send it. */

import { FewstepError, type Check, type DeviceCheck } from "../lib/index";
import { Cancelled, type Client, type Ready } from "./client";
import { byId, bytesText, h, timeText } from "./dom";
import type { Memory } from "./messages";
import { deviceResult } from "./result";

const TOKEN_KEY = "fewstep-collect";
const ROUNDINGS =
  "These networks compute with whole numbers, where roundings that fall the other way add up. So medians are judged: they may " +
  "not be lower than what two right executions in PyTorch agree to, but for what so few samples leave unsure.";

/** Takes the collector's token out of the address, where a QR code puts it, and keeps it for this tab. */
export function takeToken(): void {
  const token = new URLSearchParams(location.hash.slice(1)).get("collect");
  if (token === null) return;
  sessionStorage.setItem(TOKEN_KEY, token);
  history.replaceState(null, "", location.pathname + location.search);
}

export class CheckView {
  private readonly run = byId<HTMLButtonElement>("run-check");
  private readonly send = byId<HTMLButtonElement>("send-result");
  private readonly saved = byId<HTMLAnchorElement>("save-result");
  private readonly bar = byId<HTMLProgressElement>("check-progress");
  private readonly status = byId("check-status");
  private readonly table = byId("check-result");
  private running: number | null = null;
  private result: object | null = null;

  constructor(
    private readonly engine: () => { client: Client; ready: Ready } | null,
    private readonly onBusy: (busy: boolean) => void,
    private readonly onError: (error: unknown) => void,
  ) {
    this.run.onclick = () => void this.toggle();
    this.send.onclick = () => void this.post();
  }

  enable(enabled: boolean): void {
    this.run.disabled = !enabled && this.running === null;
  }

  private async toggle(): Promise<void> {
    const engine = this.engine();
    if (engine === null) return;
    if (this.running !== null) return engine.client.cancel(this.running);
    this.bar.hidden = false;
    this.bar.value = 0;
    this.run.textContent = "Stop";
    this.saved.hidden = this.send.hidden = true;
    this.table.replaceChildren();
    const { id, result } = engine.client.check(({ done, total, what }) => {
      this.bar.value = done / total;
      this.status.textContent = what && `${done + 1} of ${total}: ${what}`;
    });
    this.running = id;
    this.onBusy(true);
    try {
      const { check, memory } = await result;
      this.show(engine.ready, check, memory);
    } catch (error) {
      this.status.textContent = error instanceof Cancelled ? "Stopped." : "";
      if (!(error instanceof Cancelled)) this.onError(error);
    } finally {
      this.running = null;
      this.bar.hidden = true;
      this.run.textContent = "Check this device";
      this.onBusy(false);
    }
  }

  private show(ready: Ready, check: DeviceCheck, memory: Memory): void {
    const failed = check.checks.filter((c) => !c.passed).length;
    this.status.textContent = "";
    const verdict = check.passed
      ? `Passed: all ${check.checks.length} comparisons`
      : `Failed: ${failed} of ${check.checks.length} comparisons`;
    this.table.replaceChildren(
      h("p", { class: `verdict ${check.passed ? "passed" : "failed"}`, role: "status" }, verdict),
      h(
        "p",
        {},
        `${timeText(check.picture_ms)} a picture, ${bytesText(memory.wasmBytes)} of memory at most, `,
        `${ready.engine.provider === "wasm" ? "WebAssembly" : "WebGPU"}, ${threadsText(ready.engine.threads)}`,
      ),
      ...(check.checks.some((c) => c.limit !== null && c.sample === null) ? [h("p", { class: "soft" }, ROUNDINGS)] : []),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Results" }, worstTable(check), timingTable(check)),
    );
    this.result = deviceResult(ready, check, memory);
    const blob = new Blob([JSON.stringify(this.result, null, 1)], { type: "application/json" });
    if (this.saved.href) URL.revokeObjectURL(this.saved.href);
    this.saved.href = URL.createObjectURL(blob);
    this.saved.hidden = false;
    this.send.hidden = sessionStorage.getItem(TOKEN_KEY) === null;
    this.send.disabled = false;
  }

  private async post(): Promise<void> {
    const token = sessionStorage.getItem(TOKEN_KEY);
    if (token === null || this.result === null) return;
    this.send.disabled = true;
    try {
      const response = await fetch("./collect", {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Fewstep-Token": token },
        body: JSON.stringify(this.result),
      });
      if (!response.ok) {
        const hint = "scan the code on the computer's screen again";
        throw new FewstepError("network", `the computer refused the result: ${(await response.text()).trim()}`, hint);
      }
      sessionStorage.removeItem(TOKEN_KEY);
      this.status.textContent = "Sent. Thank you.";
      this.send.hidden = true;
    } catch (error) {
      this.send.disabled = false;
      this.onError(error instanceof TypeError ? new FewstepError("network", "the computer cannot be reached", "is `fewstep app` still running?") : error);
    }
  }
}

export const threadsText = (threads: number): string => (threads === 1 ? "1 thread" : `${threads} threads`);

const LARGEST = "largest difference in levels, negated";
const plain = (check: Check): boolean => check.metric === "spread (std)" || check.metric === LARGEST;

const valueText = (check: Check): string =>
  plain(check) ? check.value.toPrecision(3) : `${Number.isFinite(check.value) ? check.value.toFixed(1) : check.value} dB`;

const spaced = (name: string): string => name.replaceAll("_", " ");

/** What a comparison is of, in the order in which the table shows it. */
function subject(check: Check): { order: number; text: string } {
  const step = check.step === null ? "" : `, step ${check.step + 1}`;
  if (check.metric === "spread (std)") return { order: 5, text: "picture’s spread" };
  if (check.metric === LARGEST) return { order: 3, text: "picture’s largest difference, in levels" };
  if (check.sample === null) return { order: 4, text: `${spaced(check.component)}, median` };
  if (check.level === "picture") return { order: 2, text: "picture" };
  if (check.level === "trajectory") return { order: 1 + check.step! / 1000, text: `latent${step}` };
  return { order: 0, text: `${spaced(check.component)}${step}` };
}

/** One row for each thing compared: its worst value. */
function worstTable(check: DeviceCheck): HTMLTableElement {
  const groups = new Map<string, Check[]>();
  for (const one of [...check.checks].sort((a, b) => subject(a).order - subject(b).order)) {
    const { text } = subject(one);
    groups.set(text, [...(groups.get(text) ?? []), one]);
  }
  const rows = [...groups].map(([what, all]) => {
    const worst = all.reduce((a, b) => (Number.isNaN(b.value) || (!b.passed && a.passed) || b.value < a.value ? b : a));
    const limit = worst.limit === null ? "–" : plain(worst) ? worst.limit.toPrecision(2) : `${Number(worst.limit.toFixed(1))} dB`;
    const passed = all.every((c) => c.passed);
    const verdict = !passed ? "✗" : worst.limit === null ? "" : "✓"; // what has no limit only informs
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, what),
      h("td", { class: "number times" }, worst.sample === null ? "" : String(all.length)),
      h("td", { class: "number" }, valueText(worst)),
      h("td", { class: "number" }, limit),
      h("td", { class: `number ${passed ? "passed" : "failed"}`, "aria-label": { "✓": "passed", "✗": "failed", "": "not judged alone" }[verdict] }, verdict),
    );
  });
  return table("The least agreement with PyTorch", ["compared", "times", "worst", "limit", "ok"], rows);
}

function timingTable(check: DeviceCheck): HTMLTableElement {
  const rows = check.timings.map(({ component, calls, median_ms }) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, spaced(component)),
      h("td", { class: "number" }, String(calls)),
      h("td", { class: "number" }, timeText(median_ms)),
    ),
  );
  return table("Time of one call", ["component", "calls", "median"], rows);
}

function table(caption: string, heads: string[], rows: HTMLTableRowElement[]): HTMLTableElement {
  const numeric = new Set(["times", "worst", "limit", "ok", "calls", "median"]);
  const cells = heads.map((head) => h("th", { scope: "col", class: `${numeric.has(head) ? "number" : ""} ${head === "times" ? "times" : ""}`.trim() }, head));
  return h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, ...cells)), h("tbody", {}, ...rows));
}
