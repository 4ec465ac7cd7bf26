/** The little help that the page needs with its elements. */

type Child = Node | string | null;
type Properties = { [name: string]: string | number | boolean | null | ((event: Event) => void) };

/** Returns a new element: properties that are functions listen to events of their name. */
export function h<K extends keyof HTMLElementTagNameMap>(tag: K, properties: Properties = {}, ...children: Child[]): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Returns the element of an id, which index.html has. */
export function byId<T extends HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`index.html has no element #${id}`);
  return element as T;
}

const UNITS = [
  [1e9, "GB"],
  [1e6, "MB"],
  [1e3, "kB"],
] as const;

export function bytesText(bytes: number): string {
  const [size, unit] = UNITS.find(([size]) => bytes >= size) ?? [1, "bytes"];
  const value = bytes / size;
  return `${value.toFixed(value < 10 && size > 1 ? 1 : 0)} ${unit}`;
}

export const timeText = (ms: number): string =>
  ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
