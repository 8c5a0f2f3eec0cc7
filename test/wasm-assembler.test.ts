import fc from "fast-check";
import { describe, expect, it } from "vitest";
import {
  type Code,
  f32,
  f32x4,
  get,
  i16x8,
  i32,
  i32x4,
  moduleOf,
  repeat,
  set,
  v128,
  type WasmFunction,
  when,
} from "../actors/wasm-assembler.ts";

// What these tests use of the engine's WebAssembly; the compiler's library declares it for browsers only.
declare const WebAssembly: {
  Module: new (bytes: Uint8Array<ArrayBuffer>) => object;
  Instance: new (
    module: object,
    imports: object,
  ) => { exports: Record<string, (...numbers: number[]) => number> };
  Memory: new (size: { initial: number }) => { buffer: ArrayBuffer };
};

/** A function that only computes. */
function run(parameters: number, body: Code, ...numbers: number[]): number {
  const computes: WasmFunction = {
    name: "computes",
    parameters: new Array(parameters).fill("i32"),
    locals: [],
    result: "i32",
    body,
  };
  const { call } = loaded([computes]);
  return call("computes", ...numbers);
}

function loaded(functions: WasmFunction[]) {
  const memory = new WebAssembly.Memory({ initial: 1 });
  const module = new WebAssembly.Module(moduleOf(functions));
  const { exports } = new WebAssembly.Instance(module, { env: { memory } });
  const call = (name: string, ...numbers: number[]): number =>
    exports[name]?.(...numbers) ?? Number.NaN;
  return { call, memory: memory.buffer };
}

describe("the assembler", () => {
  it("encodes every constant so that the engine reads it back", () => {
    const constants = fc.oneof(
      fc.integer(),
      fc.constantFrom(0, -1, 63, 64, -64, -65, 127, 128, 8191, 8192, 2147483647, -2147483648),
    );
    fc.assert(
      fc.property(constants, (value) => {
        expect(run(0, i32.const(value))).toBe(value);
      }),
    );
  });

  it("numbers locals beyond 127, and takes modules of any size", () => {
    const wide: WasmFunction = {
      name: "wide",
      parameters: ["i32"],
      locals: new Array(300).fill("i32"),
      result: "i32",
      body: [
        ...Array.from({ length: 300 }, (_, at) =>
          set(at + 1, i32.add(get(at), i32.const(1))),
        ).flat(),
        ...get(300),
      ],
    };
    expect(loaded([wide]).call("wide", 5)).toBe(305);
  });

  it("computes with whole numbers as the operators are named", () => {
    const [a, b] = [get(0), get(1)];
    const operators: [Code, (a: number, b: number) => number][] = [
      [i32.add(a, b), (a, b) => (a + b) | 0],
      [i32.sub(a, b), (a, b) => (a - b) | 0],
      [i32.mul(a, b), Math.imul],
      [i32.and(a, b), (a, b) => a & b],
      [i32.or(a, b), (a, b) => a | b],
      [i32.shiftLeft(a, b), (a, b) => a << b],
      [i32.shiftRight(a, b), (a, b) => (a >>> b) | 0],
      [i32.lessThan(a, b), (a, b) => (a >>> 0 < b >>> 0 ? 1 : 0)],
      [i32.countTrailingZeros(a), (a) => (a === 0 ? 32 : 31 - Math.clz32(a & -a))],
    ];
    for (const [code, expected] of operators) {
      fc.assert(
        fc.property(fc.integer(), fc.integer(), (a, b) => {
          expect(run(2, code, a, b)).toBe(expected(a, b));
        }),
        { numRuns: 20 },
      );
    }
  });

  it("loops at least once, as long as the condition holds, and skips what is not wanted", () => {
    const sum: WasmFunction = {
      name: "sumOfOdd",
      parameters: ["i32"],
      locals: ["i32"],
      result: "i32",
      body: [
        ...repeat(
          [
            when(i32.and(get(0), i32.const(1)), [set(1, i32.add(get(1), get(0)))]),
            set(0, i32.sub(get(0), i32.const(1))),
          ],
          i32.lessThan(i32.const(0), get(0)),
        ),
        ...get(1),
      ],
    };
    const { call } = loaded([sum]);
    expect(call("sumOfOdd", 9)).toBe(25);
    expect(call("sumOfOdd", 1)).toBe(1);
  });

  it("loads, splats, widens, multiplies, compares and stores vectors", () => {
    const vectors: WasmFunction = {
      name: "vectors",
      parameters: ["f32"],
      locals: ["v128", "v128"],
      result: "i32",
      body: [
        // Bytes at 0 times the 16-bit pair at 16: rows 0 to 3 at 32, rows 4 to 7 at 48.
        ...set(1, v128.load32Splat(i32.const(16))),
        ...v128.store(
          i32.const(0),
          i32x4.dot(i16x8.extendLow(v128.load(i32.const(0))), get(1)),
          32,
        ),
        ...v128.store(
          i32.const(0),
          i32x4.dot(i16x8.extendHigh(v128.load(i32.const(0))), get(1)),
          48,
        ),
        ...set(
          2,
          f32x4.mul(
            f32x4.fromI32x4(i32x4.add(v128.load(i32.const(32)), v128.zero)),
            f32x4.splat(get(0)),
          ),
        ),
        ...f32.store(
          i32.const(64),
          f32.add(f32x4.lane(get(2), 0), f32x4.lane(f32x4.add(get(2), get(2)), 3)),
        ),
        ...i32.store(i32.const(68), i32.load(i32.const(30), 2)),
        ...i32.or(
          i32x4.bitmask(f32x4.atLeast(get(2), f32x4.splat(get(0)))),
          i32.shiftLeft(f32.atLeast(get(0), f32x4.lane(get(2), 1)), i32.const(8)),
        ),
      ],
    };
    const { call, memory } = loaded([vectors]);
    const bytes = new Int8Array(memory, 0, 16);
    bytes.set([1, 2, -3, 4, 5, -6, 127, -127, 10, 20, 30, 40, -50, -60, 70, -80]);
    new Int16Array(memory, 16, 2).set([3, -2]);
    const expected = Array.from({ length: 8 }, (_, row) => {
      return 3 * (bytes[row * 2] ?? 0) - 2 * (bytes[row * 2 + 1] ?? 0);
    });
    // Dots −1, −17, 27, 635; halved −0.5, −8.5, 13.5, 317.5: two are ≥ 0.5.
    expect(call("vectors", 0.5)).toBe(0b1100 | (1 << 8));
    expect([...new Int32Array(memory, 32, 8)]).toEqual(expected);
    expect(new Float32Array(memory, 64, 1)[0]).toBe(-0.5 + 2 * 317.5);
    expect(new Int32Array(memory, 68, 1)[0]).toBe(expected[0]);
  });
});
