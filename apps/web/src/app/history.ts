/** The pictures that were drawn here, kept in this browser and nowhere else. */

export interface Entry {
  id?: number;
  prompt: string;
  seed: string;
  steps: number;
  guidance: number | null;
  negative?: string | null;
  ms: number;
  png: Blob;
}

const DATABASE = "fewstep";
const STORE = "pictures";
const KEPT = 60;

export class History {
  private constructor(private readonly database: IDBDatabase | null) {}

  /** Returns the history of one bundle; an empty one that keeps nothing where the browser has no database (private windows). */
  static async open(bundle: string): Promise<History> {
    if (!("indexedDB" in self)) return new History(null);
    const request = indexedDB.open(`${DATABASE}-${bundle}`, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    return new History(await settled(request).catch(() => null));
  }

  /** Returns the entries, newest first. */
  async all(): Promise<Entry[]> {
    if (this.database === null) return [];
    const entries = await settled(this.store("readonly").getAll() as IDBRequest<Entry[]>);
    return entries.reverse();
  }

  async add(entry: Entry): Promise<void> {
    if (this.database === null) return;
    await settled(this.store("readwrite").add(entry));
    const keys = (await settled(this.store("readonly").getAllKeys())) as number[];
    for (const key of keys.slice(0, Math.max(0, keys.length - KEPT))) await settled(this.store("readwrite").delete(key));
  }

  async clear(): Promise<void> {
    if (this.database !== null) await settled(this.store("readwrite").clear());
  }

  private store(mode: IDBTransactionMode): IDBObjectStore {
    return this.database!.transaction(STORE, mode).objectStore(STORE);
  }
}

function settled<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
