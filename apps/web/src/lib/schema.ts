/**
 * A validator for the part of JSON Schema that the manifest's schema uses.
 *
 * The usual validators generate code, which a strict Content-Security-Policy forbids. A keyword that is not known here
 * is an error and not skipped: it would be a check that does not happen.
 */

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
type Schema = { [keyword: string]: unknown };

const isObject = (value: unknown): value is { [key: string]: Json } =>
  typeof value === "object" && value !== null && !Array.isArray(value);

const TYPES: { [name: string]: (value: unknown) => boolean } = {
  null: (v) => v === null,
  boolean: (v) => typeof v === "boolean",
  number: (v) => Number.isFinite(v),
  integer: (v) => Number.isInteger(v),
  string: (v) => typeof v === "string",
  array: Array.isArray,
  object: isObject,
};

/** Where a value departs from the schema (`contract/guidance/kind`), and how. */
export interface SchemaError {
  path: string;
  message: string;
}

/** Returns the first departure of a value from a schema, null if there is none. */
export function firstSchemaError(schema: Schema, value: unknown, path = ""): SchemaError | null {
  for (const [keyword, wanted] of Object.entries(schema)) {
    const check = KEYWORDS[keyword];
    if (check === undefined) throw new Error(`the schema uses ${keyword}, which this validator does not know`);
    const error = check(wanted, value, path, schema);
    if (error !== null) return error;
  }
  return null;
}

type Check = (wanted: any, value: any, path: string, schema: Schema) => SchemaError | null;

const fails = (path: string, message: string): SchemaError => ({ path: path || "(top)", message });
const show = (value: unknown): string => {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
};
const inner = (path: string, key: string | number): string => (path === "" ? String(key) : `${path}/${key}`);
const has = (object: object, key: string): boolean => Object.prototype.hasOwnProperty.call(object, key);

/** Returns a check that applies to values of one type only, as JSON Schema's keywords do. */
const on =
  (applies: (value: unknown) => boolean, holds: (wanted: any, value: any) => boolean, text: string): Check =>
  (wanted, value, path) =>
    !applies(value) || holds(wanted, value) ? null : fails(path, `is ${show(value)}, expected ${text} ${show(wanted)}`);

const none: Check = () => null;

const KEYWORDS: { [keyword: string]: Check } = {
  $schema: none,
  title: none,
  description: none,
  type(wanted: string | string[], value, path) {
    const names = Array.isArray(wanted) ? wanted : [wanted];
    const fits = names.some((name) => {
      const test = TYPES[name];
      if (test === undefined) throw new Error(`the schema uses type ${name}, which this validator does not know`);
      return test(value);
    });
    return fits ? null : fails(path, `is ${show(value)}, expected ${names.join(" or ")}`);
  },
  const: on(() => true, (wanted, value) => value === wanted, "exactly"),
  enum: on(() => true, (wanted: unknown[], value) => wanted.includes(value), "one of"),
  minimum: on(TYPES.number!, (wanted, value) => value >= wanted, "at least"),
  maximum: on(TYPES.number!, (wanted, value) => value <= wanted, "at most"),
  exclusiveMinimum: on(TYPES.number!, (wanted, value) => value > wanted, "more than"),
  minLength: on(TYPES.string!, (wanted, value) => [...value].length >= wanted, "a text of length"),
  maxLength: on(TYPES.string!, (wanted, value) => value.length <= wanted || [...value].length <= wanted, "a text no longer than"),
  pattern: on(TYPES.string!, (wanted, value) => new RegExp(wanted, "u").test(value), "a text like"),
  minItems: on(Array.isArray, (wanted, value) => value.length >= wanted, "this many items or more:"),
  maxItems: on(Array.isArray, (wanted, value) => value.length <= wanted, "this many items or fewer:"),
  minProperties: on(isObject, (wanted, value) => Object.keys(value).length >= wanted, "this many entries or more:"),
  maxProperties: on(isObject, (wanted, value) => Object.keys(value).length <= wanted, "this many entries or fewer:"),
  required(wanted: string[], value, path) {
    const missing = isObject(value) ? wanted.find((key) => !has(value, key)) : undefined;
    return missing === undefined ? null : fails(path, `has no ${missing}`);
  },
  anyOf(wanted: Schema[], value, path) {
    const errors = wanted.map((schema) => firstSchemaError(schema, value, path));
    return errors.includes(null) ? null : errors[errors.length - 1]!;
  },
  items(wanted: Schema, value, path) {
    if (!Array.isArray(value)) return null;
    return first(value.keys(), (i) => firstSchemaError(wanted, value[i], inner(path, i)));
  },
  properties(wanted: { [key: string]: Schema }, value, path) {
    if (!isObject(value)) return null;
    const present = Object.keys(wanted).filter((key) => has(value, key));
    return first(present, (key) => firstSchemaError(wanted[key]!, value[key], inner(path, key)));
  },
  propertyNames(wanted: Schema, value, path) {
    if (!isObject(value)) return null;
    return first(Object.keys(value), (key) => firstSchemaError(wanted, key, inner(path, key)));
  },
  patternProperties(wanted: { [pattern: string]: Schema }, value, path) {
    if (!isObject(value)) return null;
    return first(Object.entries(wanted), ([pattern, schema]) =>
      first(
        Object.keys(value).filter((key) => new RegExp(pattern, "u").test(key)),
        (key) => firstSchemaError(schema, value[key], inner(path, key)),
      ),
    );
  },
  additionalProperties(wanted: Schema | boolean, value, path, schema) {
    if (!isObject(value) || wanted === true) return null;
    const named = Object.keys((schema.properties as object | undefined) ?? {});
    const patterns = Object.keys((schema.patternProperties as object | undefined) ?? {}).map((p) => new RegExp(p, "u"));
    const others = Object.keys(value).filter((key) => !named.includes(key) && !patterns.some((p) => p.test(key)));
    if (wanted === false) return others.length === 0 ? null : fails(path, `has an unknown entry ${others[0]}`);
    return first(others, (key) => firstSchemaError(wanted, value[key], inner(path, key)));
  },
};

function first<T>(items: Iterable<T>, check: (item: T) => SchemaError | null): SchemaError | null {
  for (const item of items) {
    const error = check(item);
    if (error !== null) return error;
  }
  return null;
}
