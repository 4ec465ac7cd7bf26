/** Registers the service worker, which makes the app work offline and isolates its page (for threads). */

export async function keepOffline(): Promise<void> {
  if (!("serviceWorker" in navigator) || import.meta.env.DEV) return;
  const registration = await navigator.serviceWorker.register("./sw.js", { updateViaCache: "none" });
  await navigator.serviceWorker.ready;
  document.documentElement.dataset.offline = registration.active?.state ?? "";
  // Not thrown away when the device runs short of space; browsers may decide otherwise.
  await navigator.storage?.persist?.();
}
