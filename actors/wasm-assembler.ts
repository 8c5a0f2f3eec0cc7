/**
 * A small assembler for WebAssembly: enough to write loops over SIMD vectors as readable TypeScript.
 *
 * Code is written as nested expressions, operands inside their operator: `f32x4.add(a, b)` is the bytes of `a`, then
 * those of `b`, then the instruction. `moduleOf` packs functions and one imported memory into a module's bytes. The
 * engine validates what comes out (types, stack depth, lane numbers), so a mistake here fails when the module is
 * compiled, not when it runs. Instructions are those that our kernels use; the codes are those of the WebAssembly
 * core specification, 2.0, chapter 5.4. An assembler of our own, because a tool that builds the module at install
 * time would be a dependency, and bytes kept in the repository could not be read or changed.
 */

/** Instructions as bytes. */
export type Code = readonly number[];

/** Types of parameters and locals, with their codes. */
export const wasmTypes = { i32: 0x7f, f32: 0x7d, v128: 0x7b } as const;
/** A value type of WebAssembly. */
export type WasmType = keyof typeof wasmTypes;

/** A function that the module exports; parameters and locals are numbered through, parameters first. */
export type WasmFunction = {
  name: string;
  parameters: readonly WasmType[];
  locals: readonly WasmType[];
  /** Absent: it returns nothing. */
  result?: WasmType;
  /** With a result: leaves exactly that on the stack. */
  body: Code;
};

const SIMD = 0xfd;
const VOID = 0x40;
const END = 0x0b;

/** LEB128 without sign; `value` is a whole number ≥ 0. */
function unsigned(value: number): number[] {
  const bytes: number[] = [];
  let rest = value;
  do {
    bytes.push((rest & 0x7f) | (rest > 0x7f ? 0x80 : 0));
    rest >>>= 7;
  } while (rest !== 0);
  return bytes;
}

/** LEB128 with sign, of 32 bits. */
function signed(value: number): number[] {
  const bytes: number[] = [];
  let rest = value | 0;
  for (;;) {
    const byte = rest & 0x7f;
    rest >>= 7;
    if ((rest === 0 && (byte & 0x40) === 0) || (rest === -1 && (byte & 0x40) !== 0)) {
      bytes.push(byte);
      return bytes;
    }
    bytes.push(byte | 0x80);
  }
}

/** An instruction without immediates, behind its operands. */
function plain(...instruction: number[]): (...operands: Code[]) => Code {
  return (...operands) => [...operands.flat(), ...instruction];
}

/** A vector instruction without immediates. */
function simd(code: number): (...operands: Code[]) => Code {
  return plain(SIMD, ...unsigned(code));
}

/** Alignment is a hint that engines ignore: 0 everywhere. `offset` in bytes, added to the address. */
function memory(...instruction: number[]): (operands: Code[], offset: number) => Code {
  return (operands, offset) => [...operands.flat(), ...instruction, 0, ...unsigned(offset)];
}

/** The value of a local. */
export const get = (local: number): Code => [0x20, ...unsigned(local)];
/** Sets a local. */
export const set = (local: number, value: Code): Code => [...value, 0x21, ...unsigned(local)];

/** Runs `body`, and again as long as `condition` is not 0: at least once. */
export const repeat = (body: Code[], condition: Code): Code => [
  ...[0x03, VOID, ...body.flat(), ...condition],
  ...[0x0d, 0, END],
];
/** Runs `body` if `condition` is not 0. */
export const when = (condition: Code, body: Code[]): Code => [
  ...[...condition, 0x04, VOID],
  ...[...body.flat(), END],
];

const i32Load = memory(0x28);
const i32Store = memory(0x36);
const f32Store = memory(0x38);

/** Whole numbers; addresses are some, too. */
export const i32 = {
  const: (value: number): Code => [0x41, ...signed(value)],
  load: (address: Code, offset = 0): Code => i32Load([address], offset),
  store: (address: Code, value: Code, offset = 0): Code => i32Store([address, value], offset),
  lessThan: plain(0x49), // Without sign.
  countTrailingZeros: plain(0x68),
  add: plain(0x6a),
  sub: plain(0x6b),
  mul: plain(0x6c),
  and: plain(0x71),
  or: plain(0x72),
  shiftLeft: plain(0x74),
  shiftRight: plain(0x76), // Without sign.
};

/** Single floats. */
export const f32 = {
  store: (address: Code, value: Code, offset = 0): Code => f32Store([address, value], offset),
  atLeast: plain(0x60),
  add: plain(0x92),
};

const v128Load = memory(SIMD, 0);
const v128LoadSplat = memory(SIMD, 9);
const v128Store = memory(SIMD, 11);

/** 16 bytes, whatever is in them. */
export const v128 = {
  zero: [SIMD, 12, ...new Array<number>(16).fill(0)] as Code,
  load: (address: Code, offset = 0): Code => v128Load([address], offset),
  /** The same 4 bytes in all four places. */
  load32Splat: (address: Code, offset = 0): Code => v128LoadSplat([address], offset),
  store: (address: Code, value: Code, offset = 0): Code => v128Store([address, value], offset),
};

/** Eight of 16 bits, made from bytes with sign. */
export const i16x8 = {
  extendLow: simd(0x87),
  extendHigh: simd(0x88),
};

/** Four of 32 bits. */
export const i32x4 = {
  add: simd(0xae),
  /** Of two times eight of 16 bits: products, added by pairs. */
  dot: simd(0xba),
  /** The signs of the four, as bits 0 to 3. */
  bitmask: simd(0xa4),
};

/** Four floats. */
export const f32x4 = {
  splat: simd(0x13),
  lane: (vector: Code, lane: number): Code => [...vector, SIMD, 0x1f, lane],
  /** All bits of a place are set where it holds. */
  atLeast: simd(0x46),
  add: simd(0xe4),
  mul: simd(0xe6),
  fromI32x4: simd(0xfa),
};

/** The module's bytes: `functions`, all exported, over the memory that is imported as `env.memory`. */
export function moduleOf(functions: readonly WasmFunction[]): Uint8Array<ArrayBuffer> {
  const text = (value: string): Code => [
    ...unsigned(value.length),
    ...[...value].map((character) => character.charCodeAt(0)),
  ];
  const list = (items: readonly Code[]): Code => [...unsigned(items.length), ...items.flat()];
  const section = (id: number, content: Code): Code => [
    id,
    ...unsigned(content.length),
    ...content,
  ];
  const signature = ({ parameters, result }: WasmFunction): Code => [
    0x60,
    ...list(parameters.map((type) => [wasmTypes[type]])),
    ...list(result === undefined ? [] : [[wasmTypes[result]]]),
  ];
  const bodyOf = ({ locals, body }: WasmFunction): Code => {
    const code = [...list(locals.map((type) => [1, wasmTypes[type]])), ...body, END];
    return [...unsigned(code.length), ...code];
  };
  return Uint8Array.from([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(1, list(functions.map(signature))),
    // A memory (kind 2) without a maximum (flags 0), of one page of 64 KiB at least.
    ...section(2, list([[...text("env"), ...text("memory"), 2, 0, 1]])),
    ...section(3, list(functions.map((_, index) => unsigned(index)))),
    ...section(7, list(functions.map(({ name }, index) => [...text(name), 0, ...unsigned(index)]))),
    ...section(10, list(functions.map(bodyOf))),
  ]);
}
