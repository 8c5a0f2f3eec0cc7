import { describe, expect, it } from "vitest";
import { ProbingAudit } from "../actors/probing-audit.ts";
import { Random } from "../runtime/random.ts";

/**
 * Traffic of which `hitShare` has an answer somewhere; of those answers, probing at z loses `lossAt(z)`.
 */
function drive(
  audit: ProbingAudit,
  random: Random,
  lookups: number,
  lossAt: (z: number) => number,
  hitShare = 0.5,
): void {
  for (let lookup = 0; lookup < lookups; lookup++) {
    const hasAnswer = random.next() < hitShare;
    const isLost = hasAnswer && random.next() < lossAt(audit.z);
    if (hasAnswer && !isLost) audit.record("hit");
    else if (!audit.wantsAudit(random.next())) audit.record("miss");
    else audit.record(isLost ? "lost" : "confirmed");
  }
}

function auditWith(auditShare: number, z = 6): ProbingAudit {
  return new ProbingAudit({ z, zMin: 3, zMax: 10, auditShare });
}

describe("the audit of probing", () => {
  it("estimates recall with an interval that holds the truth about nine times in ten", () => {
    let held = 0;
    const runs = 400;
    for (let run = 0; run < runs; run++) {
      // Bounds of z that leave it where it is: only the estimate is tested.
      const audit = new ProbingAudit({ z: 6, zMin: 6, zMax: 6, auditShare: 0.2 });
      drive(audit, new Random(run), 4000, () => 0.03);
      const { recall, low, high } = audit.estimate();
      expect(low).toBeLessThanOrEqual(recall);
      expect(recall).toBeLessThanOrEqual(high);
      if (low <= 0.97 && 0.97 <= high) held++;
    }
    expect(held / runs).toBeGreaterThan(0.85);
    expect(held / runs).toBeLessThan(0.96);
  });

  it("claims nothing before it has looked", () => {
    const audit = auditWith(0);
    drive(audit, new Random(1), 5000, () => 0.5);
    expect(audit.estimate()).toMatchObject({ audits: 0, low: 0, high: 1 });
    expect(audit.z).toBe(6);
    expect(audit.lost).toBe(0);
  });

  it("widens until no more is lost than allowed, and settles there", () => {
    const audit = auditWith(0.5);
    const lossAt = (z: number) => (z < 8 ? 0.02 : 0.001);
    const random = new Random(2);
    drive(audit, random, 40_000, lossAt);
    expect(audit.z).toBeGreaterThanOrEqual(8);
    drive(audit, random, 200_000, lossAt);
    expect(audit.z).toBeGreaterThanOrEqual(8 - 0.5);
    expect(audit.z).toBeLessThanOrEqual(8.5);
    expect(audit.lost).toBeGreaterThan(0);
  });

  it("stops at its widest, whatever is lost", () => {
    const audit = auditWith(1);
    drive(audit, new Random(3), 20_000, () => 0.3);
    expect(audit.z).toBe(10);
  });

  it("narrows when next to nothing is lost, down to its narrowest", () => {
    const audit = auditWith(0.5);
    drive(audit, new Random(4), 60_000, () => 0);
    expect(audit.z).toBe(3);
  });

  it("does not go back to where it lost too much", () => {
    const audit = auditWith(1);
    const random = new Random(5);
    const lossAt = (z: number) => (z < 6.2 ? 0.05 : 0);
    while (audit.z === 6) drive(audit, random, 1, lossAt);
    const seen = new Set<number>();
    for (let lookup = 0; lookup < 60_000; lookup++) {
      drive(audit, random, 1, lossAt);
      seen.add(audit.z);
    }
    expect([...seen].every((z) => z > 6)).toBe(true);
  });

  it("forgets: after a change of the traffic its figure is of now", () => {
    const audit = new ProbingAudit({ z: 6, zMin: 6, zMax: 6, auditShare: 1 });
    const random = new Random(6);
    drive(audit, random, 40_000, () => 0.05);
    expect(audit.estimate().recall).toBeLessThan(0.96);
    drive(audit, random, 300_000, () => 0);
    expect(audit.estimate().recall).toBeGreaterThan(0.998);
    expect(audit.estimate().audits).toBeLessThanOrEqual(20_001);
  });

  it("moves on chance alone in few of many runs at the allowed loss", () => {
    let moved = 0;
    for (let run = 0; run < 100; run++) {
      const audit = auditWith(0.5);
      drive(audit, new Random(`chance ${run}`), 5000, () => 0.004);
      if (audit.z !== 6) moved++;
    }
    expect(moved).toBeLessThan(50);
  });
});
