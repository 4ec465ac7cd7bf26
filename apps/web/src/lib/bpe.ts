/** Byte-pair encoding of one word, as the tokenizers library does it: the pair of lowest rank first, leftmost first. */

import { FewstepError } from "./errors.js";

interface Model {
  type: string;
  vocab: { [token: string]: number };
  merges: (string | [string, string])[];
  unk_token: string | null;
  end_of_word_suffix: string | null;
  continuing_subword_prefix: string | null;
  dropout: number | null;
  byte_fallback?: boolean;
  fuse_unk?: boolean;
  ignore_merges?: boolean;
}

interface Merge {
  rank: number;
  id: number;
}

const NEVER: Merge = { rank: Infinity, id: -1 };
// Longer words than anyone writes are not worth remembering.
const REMEMBERED_LENGTH = 64;

export class BytePairs {
  private readonly vocab: Map<string, number>;
  private readonly merges = new Map<number, Map<number, Merge>>();
  private readonly suffix: string;
  private readonly unknown: number | null;
  private readonly known = new Map<string, number[]>();

  constructor(model: Model) {
    requireSupported(model);
    this.vocab = new Map(Object.entries(model.vocab));
    this.suffix = model.end_of_word_suffix ?? "";
    this.unknown = model.unk_token === null ? null : this.id(model.unk_token);
    model.merges.forEach((merge, rank) => {
      const [left, right] = typeof merge === "string" ? (merge.split(" ") as [string, string]) : merge;
      const from = this.id(left);
      const row = this.merges.get(from) ?? new Map<number, Merge>();
      row.set(this.id(right), { rank, id: this.id(left + right) });
      this.merges.set(from, row);
    });
  }

  /** Returns the ids of one piece of text. */
  encode(piece: string): number[] {
    const known = this.known.get(piece);
    if (known !== undefined) return known;
    const ids = this.merge(this.symbols(piece));
    if (piece.length <= REMEMBERED_LENGTH) this.known.set(piece, ids);
    return ids;
  }

  private id(token: string): number {
    const id = this.vocab.get(token);
    if (id === undefined) {
      throw new FewstepError("bundle", `tokenizer.json: ${token} is not in the vocabulary`, "build the bundle again");
    }
    return id;
  }

  /** Returns one id for each byte of the piece in UTF-8, the last with the suffix of a word's end. */
  private symbols(piece: string): number[] {
    const bytes = new TextEncoder().encode(piece);
    const ids: number[] = [];
    bytes.forEach((byte, i) => {
      const token = PRINTABLE[byte]! + (i === bytes.length - 1 ? this.suffix : "");
      const id = this.vocab.get(token) ?? this.unknown;
      if (id !== null) ids.push(id);
    });
    return ids;
  }

  private merge(ids: number[]): number[] {
    const merges = ids.map((id, i) => this.pair(id, ids[i + 1])); // of each symbol with the next
    for (;;) {
      let best = -1;
      let rank = Infinity;
      for (let i = 0; i + 1 < ids.length; i++) {
        if (merges[i]!.rank < rank) {
          rank = merges[i]!.rank;
          best = i;
        }
      }
      if (best < 0) return ids;
      ids.splice(best, 2, merges[best]!.id);
      merges.splice(best, 1);
      merges[best] = this.pair(ids[best]!, ids[best + 1]);
      if (best > 0) merges[best - 1] = this.pair(ids[best - 1]!, ids[best]);
    }
  }

  private pair(left: number, right: number | undefined): Merge {
    return (right === undefined ? undefined : this.merges.get(left)?.get(right)) ?? NEVER;
  }
}

function requireSupported(model: Model): void {
  const refuse = (what: string): never => {
    throw new FewstepError(
      "unsupported",
      `tokenizer.json has ${what}, which this app does not know`,
      "the app runs bundles with CLIP's kind of tokenizer; update it, or run the bundle from Python",
    );
  };
  if (model.type !== "BPE") refuse(`a model of type ${model.type}`);
  if (model.continuing_subword_prefix) refuse("a prefix for the inside of words");
  if (model.dropout) refuse("dropout of merges");
  if (model.byte_fallback) refuse("byte fallback");
  if (model.fuse_unk) refuse("fused unknown tokens");
  if (model.ignore_merges) refuse("words that ignore merges");
}

/** GPT-2's printable stand-ins for the bytes 0 to 255. */
const PRINTABLE: string[] = (() => {
  const printable = (b: number): boolean => (b > 32 && b < 127) || (b > 160 && b < 256 && b !== 173);
  let others = 0;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : 256 + others++));
})();
