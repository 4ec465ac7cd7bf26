/** The page's side of the worker: starts it, notices when it dies, and turns its reports into promises. */

import workerUrl from "./worker?worker&url";
import { FewstepError, type CheckProgress, type DeviceCheck } from "../lib/index";
import type { BundleInfo, Command, EngineChoice, EngineInfo, GenerateRequest, Memory, PictureInfo, Pixels, Report } from "./messages";

export interface Ready {
  bundle: BundleInfo;
  engine: EngineInfo;
}

export interface Picture {
  picture: Pixels;
  info: PictureInfo;
}

type OnStep = (done: number, steps: number, preview: Pixels | null) => void;
type OnLoading = (what: string, received: number, total: number) => void;

interface Task {
  onReport: (report: Report) => void;
  fail: (error: Error) => void;
}

/** Thrown where a task was cancelled. */
export class Cancelled extends Error {}

export class Client {
  private readonly worker: Worker;
  private readonly name = `fewstep-worker-${Date.now()}-${Math.random()}`;
  private readonly tasks = new Map<number | null, Task>();
  private next = 1;
  private dead = false;
  private keep = (): void => {};
  /** Ends when all that the bundle needs offline is on the device; never where it cannot be kept. */
  readonly kept = new Promise<void>((resolve) => (this.keep = resolve));

  constructor(private readonly onDeath: (error: FewstepError) => void) {
    this.worker = new Worker(workerUrl, { type: "module", name: this.name });
    this.worker.onmessage = ({ data }: MessageEvent<Report>) => this.receive(data);
    this.worker.onerror = (event) => {
      event.preventDefault();
      this.die(event.message || "its script could not be loaded");
    };
    this.worker.onmessageerror = () => this.die("a message could not be read");
  }

  open(bundle: string, engine: EngineChoice, onLoading: OnLoading): Promise<Ready> {
    return this.task<Ready>(null, { type: "open", bundle, engine }, (report, done) => {
      if (report.type === "loading") onLoading(report.what, report.received, report.total);
      if (report.type === "ready") {
        this.watch();
        done(report);
      }
    });
  }

  generate(request: GenerateRequest, onStep: OnStep): { id: number; picture: Promise<Picture> } {
    const id = this.next++;
    const picture = this.task<Picture>(id, { type: "generate", id, request }, (report, done) => {
      if (report.type === "step") onStep(report.done, report.steps, report.preview);
      if (report.type === "picture") done(report);
    });
    return { id, picture };
  }

  check(onProgress: (progress: CheckProgress) => void): { id: number; result: Promise<{ check: DeviceCheck; memory: Memory }> } {
    const id = this.next++;
    const result = this.task<{ check: DeviceCheck; memory: Memory }>(id, { type: "check", id }, (report, done) => {
      if (report.type === "checking") onProgress(report.progress);
      if (report.type === "checked") done(report);
    });
    return { id, result };
  }

  cancel(id: number): void {
    this.post({ type: "cancel", id });
  }

  stop(): void {
    this.dead = true;
    this.worker.terminate();
  }

  private post(command: Command): void {
    this.worker.postMessage(command);
  }

  private task<T>(id: number | null, command: Command, onReport: (report: Report, done: (value: T) => void) => void): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      const done = (value: T): void => {
        this.tasks.delete(id);
        resolve(value);
      };
      this.tasks.set(id, { onReport: (report) => onReport(report, done), fail: reject });
      this.post(command);
    });
  }

  private receive(report: Report): void {
    if (report.type === "kept") return this.keep();
    const id = "id" in report ? report.id : null;
    const task = this.tasks.get(id);
    if (report.type === "error" || report.type === "cancelled") {
      this.tasks.delete(id);
      const error = report.type === "error" ? new FewstepError(report.kind, report.message, report.hint) : new Cancelled();
      task?.fail(error);
    } else {
      task?.onReport(report);
    }
  }

  /** Waits for the lock that the worker holds while it lives (browsers have locks on secure pages only). */
  private watch(): void {
    void navigator.locks?.request(this.name, () => this.die("it ended"));
  }

  private die(why: string): void {
    if (this.dead) return;
    this.stop();
    const error = new FewstepError("engine", `the engine stopped: ${why}`, "start it again; your pictures are kept");
    for (const task of this.tasks.values()) task.fail(error);
    this.tasks.clear();
    this.onDeath(error);
  }
}
