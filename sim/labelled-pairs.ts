/**
 * Pairs of texts labelled as the same question (1) or not (0), read chunk by chunk: TSV (text, text, label) and JSON
 * (objects of text_a, text_b, label, in an array or one after another).
 *
 * Pure: whoever opens the file pushes its text in. A line that cannot be read is a problem that names it; nothing is
 * skipped in silence, and a file with problems gives no pairs to measure with.
 */

/** Two texts, and whether they ask the same. */
export type LabelledPair = { readonly a: string; readonly b: string; readonly isSame: boolean };

/** Pairs that cannot be read; the message names file and lines, and says what is accepted. */
export class PairError extends Error {
  override readonly name = "PairError";
}

/** Told of one file before it is given up. */
const PROBLEMS_MAX = 5;
/** Of a line or of an object, in UTF-16 units. */
const RECORD_CHARS_MAX = 1 << 20;

/** Reads one file of pairs. */
export class PairReader {
  readonly #file: string;
  readonly #pairs: LabelledPair[] = [];
  readonly #problems: string[] = [];
  readonly #isJson: boolean;
  /** Line of the first character of `#rest`. */
  #line = 1;
  #isFirst = true;
  /** TSV: the line begun. JSON: the object begun. */
  #rest = "";
  #depth = 0;
  #isInString = false;
  #isEscaped = false;
  /** Line that the object begun starts on. */
  #startLine = 1;

  /** `file` is the name used in messages; its ending says what it holds: .json, .jsonl, .ndjson, else TSV. */
  constructor(file: string) {
    this.#file = file;
    this.#isJson = /\.(json|jsonl|ndjson)$/i.test(file);
  }

  /** Takes the next part of the file. Throws PairError when there are too many problems to go on. */
  push(chunk: string): void {
    const text = this.#isFirst ? chunk.replace(/^\ufeff/, "") : chunk;
    if (chunk !== "") this.#isFirst = false;
    if (this.#isJson) this.#pushJson(text);
    else this.#pushTsv(text);
    if (this.#problems.length >= PROBLEMS_MAX) this.#giveUp();
  }

  /** Pairs read so far. */
  get size(): number {
    return this.#pairs.length;
  }

  /** Ends the file: its pairs, in order. Throws PairError when a line could not be read, or there is none. */
  end(): readonly LabelledPair[] {
    if (this.#isJson && this.#depth > 0) {
      this.#problem(this.#startLine, "an object begins and does not end");
    }
    if (!this.#isJson && this.#rest !== "") this.#readLine(this.#rest);
    if (this.#problems.length > 0) this.#giveUp();
    if (this.#pairs.length === 0)
      throw new PairError(`${this.#file} holds no pair; ${this.#accepted()}`);
    return this.#pairs;
  }

  #accepted(): string {
    return this.#isJson
      ? 'accepted are objects like {"text_a": "…", "text_b": "…", "label": 0 or 1}'
      : "accepted are lines of text, text and label (0 or 1), separated by tabs";
  }

  #problem(line: number, says: string): void {
    this.#problems.push(`${this.#file}:${line}: ${says}`);
  }

  #giveUp(): never {
    throw new PairError(`${this.#problems.join("\n")}\n${this.#accepted()}`);
  }

  // ---- TSV ------------------------------------------------------------------------------------------

  #pushTsv(text: string): void {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop() ?? "";
    for (const line of lines) {
      this.#readLine(line);
      if (this.#problems.length >= PROBLEMS_MAX) return;
    }
    if (this.#rest.length > RECORD_CHARS_MAX) {
      this.#problem(this.#line, "a line of more than 1 MB");
      this.#giveUp();
    }
  }

  #readLine(text: string): void {
    const line = this.#line++;
    const fields = text.replace(/\r$/, "").split("\t");
    if (fields.length === 1 && fields[0]?.trim() === "") return;
    const [a = "", b = "", label = ""] = fields;
    if (fields.length !== 3) {
      this.#problem(line, `${fields.length} field${fields.length === 1 ? "" : "s"} instead of 3`);
    } else if (line === 1 && /^(label|is_duplicate)$/i.test(label.trim())) {
      return; // Names of the columns.
    } else this.#add(line, a, b, label.trim());
  }

  #add(line: number, a: unknown, b: unknown, label: unknown): void {
    if (typeof a !== "string" || typeof b !== "string") {
      this.#problem(line, `text_${typeof a === "string" ? "b" : "a"} is no text`);
    } else if (a.trim() === "" || b.trim() === "") {
      this.#problem(line, `the ${a.trim() === "" ? "first" : "second"} text is empty`);
    } else if (label !== 0 && label !== 1 && label !== "0" && label !== "1") {
      this.#problem(line, `label ${JSON.stringify(label)?.slice(0, 40) ?? "missing"}, not 0 or 1`);
    } else this.#pairs.push({ a, b, isSame: Number(label) === 1 });
  }

  // ---- JSON -----------------------------------------------------------------------------------------

  #pushJson(text: string): void {
    let from = 0;
    for (let at = 0; at < text.length; at++) {
      const char = text[at] ?? "";
      if (char === "\n") this.#line++;
      if (this.#depth === 0) {
        if (char === "{") {
          this.#depth = 1;
          this.#startLine = this.#line;
          this.#rest = "";
          from = at;
        } else if (!/[\s[\],]/.test(char)) {
          // Whatever follows would be wrong for the same reason: one message says it.
          this.#problem(this.#line, `${JSON.stringify(char)} between objects`);
          this.#giveUp();
        }
        continue;
      }
      if (this.#isEscaped) this.#isEscaped = false;
      else if (this.#isInString) {
        if (char === "\\") this.#isEscaped = true;
        else if (char === '"') this.#isInString = false;
      } else if (char === '"') this.#isInString = true;
      else if (char === "{") this.#depth++;
      else if (char === "}") {
        this.#depth--;
        if (this.#depth === 0) this.#readObject(this.#rest + text.slice(from, at + 1));
        if (this.#problems.length >= PROBLEMS_MAX) return;
      }
    }
    if (this.#depth === 0) return;
    this.#rest += text.slice(from);
    if (this.#rest.length > RECORD_CHARS_MAX) {
      this.#problem(this.#startLine, "an object of more than 1 MB");
      this.#giveUp();
    }
  }

  #readObject(text: string): void {
    this.#rest = "";
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (error) {
      this.#problem(this.#startLine, error instanceof Error ? error.message : String(error));
      return;
    }
    const { text_a: a, text_b: b, label } = value as Record<string, unknown>;
    if (a === undefined || b === undefined || label === undefined) {
      const missing = a === undefined ? "text_a" : b === undefined ? "text_b" : "label";
      this.#problem(this.#startLine, `${missing} is missing`);
    } else this.#add(this.#startLine, a, b, label);
  }
}
