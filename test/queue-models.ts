/**
 * Textbook queues on the simulator's own engine: SimClock with its TimerQueue, and Random. What is known of them exactly
 * shows whether time, order and randomness are right, before anything complicated runs on them.
 *
 * Time is whole µs; one unit of service is `UNIT_US` on average.
 */
import { SimClock, type TimerHandle } from "../runtime/clock.ts";
import type { Random } from "../runtime/random.ts";
import { MinHeap } from "../sim/min-heap.ts";

/** Draws a number of mean 1. */
export type Law = (random: Random) => number;

export const UNIT_US = 1_000_000;

export const exponential: Law = (random) => -Math.log(1 - random.next());
export const constant: Law = () => 1;

/** Two exponential phases with balanced means; `cs2` > 1 is the squared coefficient of variation. */
export function hyperexponential(cs2: number): Law {
  const p = (1 + Math.sqrt((cs2 - 1) / (cs2 + 1))) / 2;
  return (random) => {
    const rate = random.next() < p ? 2 * p : 2 * (1 - p);
    return exponential(random) / rate;
  };
}

export type QueueOptions = {
  arrivals: Law;
  service: Law;
  /** Load of one server, 0..1 (in a loss system above 1, too). */
  load: number;
  jobs: number;
  random: Random;
  /** Default 1. */
  servers?: number;
  /** Places to wait; default: no bound. */
  placesMax?: number;
  /** Stations side by side, each with its servers and queue; a job goes to any of them. Default 1. */
  stations?: number;
  /** Every duration is a whole number of this many µs; default 1. */
  tickUs?: number;
};

export type QueueRun = {
  /** µs by job in order of arrival; -1: lost. */
  waits: Float64Array;
  sojourns: Float64Array;
  lost: number;
  /** ∫ jobs in the system dt, µs, until the last one left. */
  areaUs: number;
  endUs: number;
  /** Gaps before, and services of, the jobs in order of arrival. */
  gaps: Float64Array;
  services: Float64Array;
};

class Station {
  readonly #queue: number[] = [];
  #head = 0;
  busy = 0;

  get waiting(): number {
    return this.#queue.length - this.#head;
  }

  push(job: number): void {
    this.#queue.push(job);
  }

  shift(): number | undefined {
    const job = this.#queue[this.#head];
    if (job === undefined) return undefined;
    this.#head++;
    if (this.#head > 1024 && 2 * this.#head > this.#queue.length) {
      this.#queue.splice(0, this.#head);
      this.#head = 0;
    }
    return job;
  }
}

/** First come, first served; ends when the last job has left. */
export function runQueue(options: QueueOptions): QueueRun {
  const { arrivals, service, load, jobs, random } = options;
  const { servers = 1, placesMax = Number.POSITIVE_INFINITY, tickUs = 1 } = options;
  const { stations: count = 1 } = options;
  const clock = new SimClock();
  const streams = {
    arrivals: random.split("arrivals"),
    service: random.split("service"),
    route: random.split("route"),
  };
  const stations = Array.from({ length: count }, () => new Station());
  const whole = (units: number) => Math.round((units * UNIT_US) / tickUs) * tickUs;
  const run: QueueRun = {
    waits: new Float64Array(jobs).fill(-1),
    sojourns: new Float64Array(jobs).fill(-1),
    lost: 0,
    areaUs: 0,
    endUs: 0,
    gaps: new Float64Array(jobs),
    services: new Float64Array(jobs),
  };
  const arrivedUs = new Float64Array(jobs);
  let inSystem = 0;
  let changedUs = 0;
  const change = (by: number) => {
    run.areaUs += inSystem * (clock.nowUs() - changedUs);
    changedUs = clock.nowUs();
    inSystem += by;
  };
  const start = (job: number, station: Station) => {
    station.busy++;
    run.waits[job] = clock.nowUs() - (arrivedUs[job] ?? 0);
    clock.schedule(run.services[job] ?? 0, () => {
      station.busy--;
      change(-1);
      run.sojourns[job] = clock.nowUs() - (arrivedUs[job] ?? 0);
      const next = station.shift();
      if (next !== undefined) start(next, station);
    });
  };
  const arrive = (job: number) => {
    arrivedUs[job] = clock.nowUs();
    run.services[job] = whole(service(streams.service));
    const station = stations[count === 1 ? 0 : streams.route.int(count)];
    if (station === undefined) throw new Error("there is a station");
    if (station.busy < servers) {
      change(1);
      start(job, station);
    } else if (station.waiting < placesMax) {
      change(1);
      station.push(job);
    } else run.lost++;
    if (job + 1 < jobs) scheduleArrival(job + 1);
  };
  const meanGap = 1 / (load * servers * count);
  const scheduleArrival = (job: number) => {
    const gapUs = whole(arrivals(streams.arrivals) * meanGap);
    run.gaps[job] = gapUs;
    clock.schedule(gapUs, () => arrive(job));
  };
  scheduleArrival(0);
  while (clock.advanceToNext());
  change(0);
  run.endUs = clock.nowUs();
  return run;
}

type Shared = { job: number; doneAt: number };

/**
 * One server shared equally by all who are there. Service is measured on a clock of its own that runs at 1 ÷ jobs; a
 * job leaves when that clock has gone on by what it needs, so every arrival and every departure moves the timer.
 */
export function runProcessorSharing(
  options: Pick<QueueOptions, "service" | "load" | "jobs" | "random">,
): Float64Array {
  const { service, load, jobs, random } = options;
  const clock = new SimClock();
  const gaps = random.split("arrivals");
  const services = random.split("service");
  const here = new MinHeap<Shared>((a, b) => a.doneAt < b.doneAt);
  const arrivedUs = new Float64Array(jobs);
  const sojourns = new Float64Array(jobs);
  let shared = 0;
  let sharedSetUs = 0;
  let timer: TimerHandle | undefined;
  const catchUp = () => {
    if (here.size > 0) shared += (clock.nowUs() - sharedSetUs) / here.size;
    sharedSetUs = clock.nowUs();
  };
  const rearm = () => {
    if (timer !== undefined) clock.cancel(timer);
    timer = undefined;
    const first = here.peek();
    if (first === undefined) return;
    const leftUs = Math.max(0, Math.ceil((first.doneAt - shared) * here.size));
    timer = clock.schedule(leftUs, leave);
  };
  const leave = () => {
    catchUp();
    const gone = here.take();
    if (gone !== undefined) sojourns[gone.job] = clock.nowUs() - (arrivedUs[gone.job] ?? 0);
    timer = undefined;
    rearm();
  };
  const arrive = (job: number) => {
    catchUp();
    arrivedUs[job] = clock.nowUs();
    here.add({ job, doneAt: shared + service(services) * UNIT_US });
    rearm();
    if (job + 1 < jobs) scheduleArrival(job + 1);
  };
  const scheduleArrival = (job: number) => {
    clock.schedule(Math.round((exponential(gaps) * UNIT_US) / load), () => arrive(job));
  };
  scheduleArrival(0);
  while (clock.advanceToNext());
  return sojourns;
}

/** Waits by Lindley's recursion, from the same gaps and services: one server, no events. */
export function lindley({ gaps, services }: Pick<QueueRun, "gaps" | "services">): Float64Array {
  const waits = new Float64Array(gaps.length);
  for (let i = 1; i < waits.length; i++) {
    const left = (waits[i - 1] ?? 0) + (services[i - 1] ?? 0) - (gaps[i] ?? 0);
    waits[i] = Math.max(0, left);
  }
  return waits;
}

/** Share of arrivals lost with `servers` places and none to wait, at `offered` load. */
export function erlangB(offered: number, servers: number): number {
  let b = 1;
  for (let k = 1; k <= servers; k++) b = (offered * b) / (k + offered * b);
  return b;
}

/** Share of arrivals that must wait. */
export function erlangC(servers: number, load: number): number {
  const b = erlangB(servers * load, servers);
  return b / (1 - load * (1 - b));
}
