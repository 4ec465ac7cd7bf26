/** Registers the service worker, which makes the app work offline and isolates its page (for threads). */

export async function keepOffline(bundleKept: Promise<void>): Promise<void> {
  if (!("serviceWorker" in navigator) || import.meta.env.DEV) return;
  await navigator.serviceWorker.register("./sw.js", { updateViaCache: "none" });
  await Promise.all([navigator.serviceWorker.ready, bundleKept]);
  document.documentElement.dataset.offline = "ready";
  // Not thrown away when the device runs short of space; browsers may decide otherwise.
  await navigator.storage?.persist?.();
}
