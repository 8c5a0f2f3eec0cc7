/**
 * What does it cost to look a vector up, and what is lost by looking in fewer places?
 *
 * One shard: the exact index at three sizes, on vectors of question text (lexical embedder) and on vectors made to be
 * hard, against usearch's graph and a plain loop in JavaScript over the same vectors and queries; insertion, the
 * longest single call, memory. Then the same text over 4 and 8 owners, by centroids.
 *
 * Times are wall-clock times of one call each. The machine is shared, so a call counts with its best: a search with the
 * best of its passes, which lie apart, an insertion or a slice of training with the best of several builds of the same
 * index. Percentiles are over queries, longest calls over what is left. Recall of hits: of queries with a vector at or
 * above the threshold, the share for which one is found.
 */
import { type Centroids, CentroidTraining, PROBING_Z } from "../../actors/centroids.ts";
import { LexicalEmbedder } from "../../actors/lexical-embedder.ts";
import { hashOf, rendezvousHash } from "../../actors/node-score.ts";
import { ExactIndex, type VectorIndex } from "../../actors/vector-index.ts";
import { Random } from "../../runtime/random.ts";
import { ApproximateIndex, loadUsearch } from "../../transport/approximate-index.ts";
import { generatedQuestions, hasRealQuestions, realQuestions } from "../question-texts.ts";
import { clusteredVectors, near } from "../vector-oracle.ts";
import type { Row } from "./report.ts";

export type VectorPace = {
  sizes: readonly number[];
  queries: number;
  passes: number;
  /** The same index is built so many times. */
  builds: number;
  /** Queries that the plain loop, and with it recall, is measured on at most: 100,000 rows take it 0.1 s. */
  plainMax: number;
  /** Hard vectors in the graph of usearch at most: building it takes 1 to 4 ms each. */
  hardGraphMax: number;
  /** Times that the texts are divided into stored and asked, and centroids trained, for many owners. */
  draws: number;
};

export const vectorPaces: Readonly<Record<"full" | "smoke", VectorPace>> = {
  full: {
    sizes: [1000, 10_000, 100_000],
    queries: 1000,
    passes: 15,
    builds: 3,
    plainMax: 400,
    hardGraphMax: 10_000,
    draws: 4,
  },
  smoke: {
    sizes: [1000, 10_000],
    queries: 200,
    passes: 3,
    builds: 2,
    plainMax: 200,
    hardGraphMax: 1000,
    draws: 1,
  },
};

const DIMENSION = 384;
const THRESHOLD = 0.92;
const COUNT = 8;
/** Of one search over real text, ms: the bars of issue and design, by size. */
const P99_MS_MAX: Readonly<Record<number, number>> = { 10000: 0.6, 100000: 1.5 };
const RECALL_MIN = 0.995;
const ASKED_OF_4_MAX = 2.2;

type Corpus = { name: string; source: string; vectors: Float32Array[]; queries: Float32Array[] };
type Timed = {
  p50Ms: number;
  p99Ms: number;
  /** The best id of each query, where one reaches the threshold. */
  found: (number | undefined)[];
};
type Measured = Timed & {
  /** Of the best pass as a whole: whatever interrupted it is in. */
  passP99Ms: number;
  /** CPU time of the process in one more pass, the collector's included, what neighbours took not. */
  cpuP99Ms: number;
};

export function benchVectors(pace: VectorPace): Row[] {
  const text = questionCorpus(pace);
  const hard = hardCorpus(pace);
  const rows: Row[] = [];
  for (const size of pace.sizes) {
    for (const corpus of [text, hard]) rows.push(...oneShard(corpus, size, pace));
  }
  rows.push(...manyOwners(pace));
  return rows;
}

// ---- what is stored and asked -------------------------------------------------------------------------------

/**
 * Questions in the order of a seeded shuffle; asked are other questions, of which some have a neighbour. Beyond the
 * texts there are, pairs of texts are joined to longer ones, as users join questions.
 */
function questionCorpus(pace: VectorPace): Corpus {
  const sizeMax = Math.max(...pace.sizes);
  const questions = hasRealQuestions ? realQuestions() : generatedQuestions(sizeMax);
  const random = new Random("corpus");
  const pairs = questions.pairs
    .map((pair) => ({ pair, rank: random.next() }))
    .sort((a, b) => a.rank - b.rank)
    .map(({ pair }) => pair);
  const embedder = new LexicalEmbedder(DIMENSION);
  // Of pairs of the same meaning, or hardly one would have a neighbour.
  const asked = pairs
    .filter(({ sameMeaning }) => sameMeaning)
    .slice(0, pace.queries)
    .map(({ b }) => b);
  const isAsked = new Set(asked);
  // First one side of all pairs, in the order in which the other is asked: every size has hits.
  const texts = new Set([...pairs.map(({ a }) => a), ...pairs.map(({ b }) => b)]);
  const stored = [...texts].filter((each) => !isAsked.has(each));
  const joined = Math.max(0, sizeMax - stored.length);
  for (let made = 0; made < joined; made++) {
    stored.push(`${stored[random.int(texts.size >> 1)]} ${stored[random.int(texts.size >> 1)]}`);
  }
  const isVector = (vector: Float32Array) => vector.some((value) => value !== 0);
  return {
    name: "question text",
    source:
      joined === 0
        ? questions.source
        : `${questions.source} (${sizeMax - joined}; above that joined in twos)`,
    vectors: stored
      .slice(0, sizeMax)
      .map((each) => embedder.embed(each))
      .filter(isVector),
    queries: asked.map((each) => embedder.embed(each)).filter(isVector),
  };
}

/** Clusters of a hundred; half the queries have a neighbour at 0.9 to 1, the others are of a cluster, too. */
function hardCorpus(pace: VectorPace): Corpus {
  const random = new Random("hard");
  const sizeMax = Math.max(...pace.sizes);
  const vectors = clusteredVectors(random, sizeMax + pace.queries, DIMENSION, sizeMax / 100);
  const others = vectors.splice(sizeMax);
  const first = Math.min(...pace.sizes);
  const queries = others.map((other, index) =>
    index % 2 === 0
      ? near(random, vectors[random.int(first)] ?? other, 0.9 + 0.1 * random.next())
      : other,
  );
  return { name: "hard vectors", source: "clusters of 100 around a common mean", vectors, queries };
}

// ---- one shard ----------------------------------------------------------------------------------------------

function oneShard(corpus: Corpus, size: number, pace: VectorPace): Row[] {
  const vectors = corpus.vectors.slice(0, size);
  const built = builds(vectors, pace.builds);
  const { index } = built;
  const queries = corpus.queries.slice(0, pace.queries);
  // The scan may ask for a wider basis once it has seen searches.
  for (const query of queries) index.search(query, THRESHOLD, COUNT);
  while (index.maintain());
  const before = index.pruning;
  const exact = measured(index, queries, pace.passes);
  const after = index.pruning;
  const plain = plainLoop(vectors, queries.slice(0, pace.plainMax));
  const recall = recallOf(exact, plain);
  const survivors = (after.survivors - before.survivors) / (after.searches - before.searches || 1);
  const isText = corpus.name === "question text";
  const bar = isText ? P99_MS_MAX[size] : undefined;
  const at = `${size.toLocaleString("en")} of ${corpus.name}`;
  const rows: Row[] = [
    {
      name: "lookup",
      question: `Lookup p99, exact index, ${at}`,
      figure: `${exact.p99Ms.toFixed(3)} ms`,
      value: exact.p99Ms,
      ...(bar === undefined ? {} : { bar: { atMost: bar } }),
      detail:
        `p50 ${exact.p50Ms.toFixed(3)} ms; best pass p99 ${exact.passP99Ms.toFixed(3)}, CPU p99 ${exact.cpuP99Ms.toFixed(3)} ms; ` +
        `${survivors.toFixed(1)} rows survive the scan, basis of ${index.basis.rows}` +
        `${index.basis.trained ? ", trained" : ""}; plain loop p50 ${plain.p50Ms.toFixed(2)}, p99 ` +
        `${plain.p99Ms.toFixed(2)} ms; ${corpus.source}`,
    },
    {
      name: "recall",
      question: `Recall of hits, exact index, ${at}`,
      figure: recall.toFixed(4),
      value: recall,
      bar: { atLeast: 1 },
      detail: `${plain.found.filter((id) => id !== undefined).length} of ${plain.found.length} queries have a hit`,
    },
    {
      name: "insert",
      question: `Insertions per second, ${at}`,
      figure: `${Math.round(built.perSecond).toLocaleString("en")}/s`,
      value: built.perSecond,
      detail:
        `longest call: insertion ${built.longestInsertMs.toFixed(1)} ms, slice of training ` +
        `${built.longestSliceMs.toFixed(1)} ms (${built.slices} slices, ${built.trainingMs.toFixed(0)} ms in all); ` +
        `${(index.bytes / index.size).toFixed(0)} bytes per entry`,
    },
  ];
  const hasGraph = isText || size <= pace.hardGraphMax;
  return hasGraph ? [...rows, ...graphRow(queries, vectors, exact, at, pace)] : rows;
}

/** The same index several times, for the best time of each call; the last one, trained, is kept. */
function builds(vectors: readonly Float32Array[], times: number) {
  const insertMs = new Float64Array(vectors.length).fill(Number.POSITIVE_INFINITY);
  let sliceMs: number[] = [];
  let index = new ExactIndex({ dimension: DIMENSION, random: () => 0 });
  for (let build = 0; build < times; build++) {
    const random = new Random("index"); // The same each time: the same calls do the same work.
    index = new ExactIndex({ dimension: DIMENSION, random: () => random.next() });
    for (const [id, vector] of vectors.entries()) {
      const ms = timed(() => index.insert(id, vector));
      insertMs[id] = Math.min(insertMs[id] ?? ms, ms);
    }
    const slices: number[] = [];
    for (let more = true; more; ) {
      const ms = timed(() => {
        more = index.maintain();
      });
      slices.push(Math.min(ms, sliceMs[slices.length] ?? ms));
    }
    sliceMs = slices;
  }
  const sum = (values: Iterable<number>) => [...values].reduce((total, value) => total + value, 0);
  return {
    index,
    perSecond: (vectors.length * 1000) / sum(insertMs),
    longestInsertMs: insertMs.reduce((a, b) => Math.max(a, b)),
    longestSliceMs: Math.max(...sliceMs),
    slices: sliceMs.length,
    trainingMs: sum(sliceMs),
  };
}

/** usearch over the same; whatever the size, the graph answers. */
function graphRow(
  queries: readonly Float32Array[],
  vectors: readonly Float32Array[],
  exact: Measured,
  at: string,
  pace: VectorPace,
): Row[] {
  const usearch = loadUsearch();
  if (usearch === undefined) return [];
  const random = new Random("index");
  const index = new ApproximateIndex({
    usearch,
    dimension: DIMENSION,
    random: () => random.next(),
    from: 1,
  });
  for (const [id, vector] of vectors.entries()) index.insert(id, vector);
  const building = timed(() => {
    while (index.maintain());
  });
  const graph = measured(index, queries, pace.passes);
  const recall = recallOf(graph, exact);
  const hits = exact.found.filter((id) => id !== undefined).length;
  return [
    {
      name: "usearch",
      question: `Lookup p99, usearch, ${at}`,
      figure: `${graph.p99Ms.toFixed(3)} ms`,
      value: graph.p99Ms,
      detail:
        `p50 ${graph.p50Ms.toFixed(3)} ms; best pass p99 ${graph.passP99Ms.toFixed(3)}, CPU p99 ${graph.cpuP99Ms.toFixed(3)} ms; recall of hits ${recall.toFixed(4)} of ${hits}; ` +
        `built at ${Math.round((vectors.length * 1000) / building)}/s`,
    },
  ];
}

/** Each query in each pass; the best time counts. */
function measured(index: VectorIndex, queries: readonly Float32Array[], passes: number): Measured {
  const best = new Float64Array(queries.length).fill(Number.POSITIVE_INFINITY);
  const found: (number | undefined)[] = [];
  let passP99Ms = Number.POSITIVE_INFINITY;
  const times = new Float64Array(queries.length);
  for (let pass = 0; pass < passes; pass++) {
    for (const [at, query] of queries.entries()) {
      const startMs = performance.now();
      const [first] = index.search(query, THRESHOLD, COUNT);
      times[at] = performance.now() - startMs;
      best[at] = Math.min(best[at] ?? 0, times[at]);
      found[at] = first?.id;
    }
    passP99Ms = Math.min(passP99Ms, percentiles(times).p99Ms);
  }
  for (const [at, query] of queries.entries()) {
    const before = process.cpuUsage();
    index.search(query, THRESHOLD, COUNT);
    const { user, system } = process.cpuUsage(before);
    times[at] = (user + system) / 1000;
  }
  return { ...percentiles(best), passP99Ms, cpuP99Ms: percentiles(times).p99Ms, found };
}

/** The way without any index: a loop over floats. Also the truth that recall is measured against. */
function plainLoop(vectors: readonly Float32Array[], queries: readonly Float32Array[]): Timed {
  const flat = new Float32Array(vectors.length * DIMENSION);
  for (const [row, vector] of vectors.entries()) {
    const norm = Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
    for (const [at, value] of vector.entries()) flat[row * DIMENSION + at] = value / norm;
  }
  const times = new Float64Array(queries.length);
  const found = queries.map((query, at) => {
    const startMs = performance.now();
    const norm = Math.sqrt(query.reduce((sum, value) => sum + value * value, 0));
    let [best, row] = [THRESHOLD * norm - 1e-6, -1];
    for (let start = 0; start < flat.length; start += DIMENSION) {
      const product = dotAt(flat, start, query);
      if (product < best) continue;
      best = product;
      row = start / DIMENSION;
    }
    times[at] = performance.now() - startMs;
    return row < 0 ? undefined : row;
  });
  const { p50Ms, p99Ms } = percentiles(times);
  return { p50Ms, p99Ms, found };
}

/** Four sums at a time: the fastest that plain JavaScript does. */
function dotAt(flat: Float32Array, start: number, query: Float32Array): number {
  let [a, b, c, d] = [0, 0, 0, 0];
  for (let at = 0; at < DIMENSION; at += 4) {
    a += (flat[start + at] as number) * (query[at] as number);
    b += (flat[start + at + 1] as number) * (query[at + 1] as number);
    c += (flat[start + at + 2] as number) * (query[at + 2] as number);
    d += (flat[start + at + 3] as number) * (query[at + 3] as number);
  }
  return a + b + c + d;
}

function recallOf(measuredHere: Timed, truth: Timed): number {
  let [hits, kept] = [0, 0];
  for (const [at, id] of truth.found.entries()) {
    if (id === undefined) continue;
    hits++;
    if (measuredHere.found[at] !== undefined) kept++;
  }
  return hits === 0 ? 1 : kept / hits;
}

// ---- many owners --------------------------------------------------------------------------------------------

/** Over all draws. */
type Tally = { asked: number; queries: number; hits: number; kept: number };

const PLACEMENTS = ["placed by direction", "placed by rendezvous"] as const;
const OWNERS = [4, 8];
const MARGINS = [PROBING_Z, 4, 6, 8, 10];

function manyOwners(pace: VectorPace): Row[] {
  const questions = hasRealQuestions ? realQuestions() : generatedQuestions(30_000);
  const embedder = new LexicalEmbedder(DIMENSION);
  const texts = questions.texts.filter((_, at) => pace.draws > 1 || at % 40 < 20);
  const vectors = texts.map((each) => embedder.embed(each));
  const tallies = new Map<string, Tally>();
  let [stored, trainingMs] = [0, 0];
  let [longestMs, routingUs] = [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY];
  for (let draw = 0; draw < pace.draws; draw++) {
    const one = oneDraw(vectors, draw, tallies);
    stored = one.stored;
    trainingMs = one.trainingMs;
    longestMs = Math.min(longestMs, one.longestMs);
    routingUs = Math.min(routingUs, one.routingUs);
  }
  const made =
    `${stored.toLocaleString("en")} stored, ${pace.draws} draws; centroids trained in ${trainingMs.toFixed(0)} ms, slice at ` +
    `most ${longestMs.toFixed(1)} ms; routing ${routingUs.toFixed(0)} µs; ${questions.source}`;
  return OWNERS.flatMap((owners) =>
    PLACEMENTS.flatMap((how) => ownerRows(tallies, owners, how, made)),
  );
}

/** No text is both stored and asked: an exact cache answers repeats before anyone looks here. */
function oneDraw(all: readonly Float32Array[], draw: number, tallies: Map<string, Tally>) {
  const random = new Random(`draw ${draw}`);
  const index = new ExactIndex({ dimension: DIMENSION, random: () => random.next() });
  const queries: Float32Array[] = [];
  for (const vector of all) {
    if (random.next() < 0.15) queries.push(vector);
    else index.insert(index.size, vector);
  }
  while (index.maintain());
  const empty = new Float32Array(DIMENSION);
  const vectors = Array.from({ length: index.size }, (_, id) => index.vectorOf(id) ?? empty);
  let longestMs = 0;
  let centroids: Centroids | undefined;
  const trainingMs = timed(() => {
    const sample = vectors.filter((_, at) => at % 2 === 0);
    const training = new CentroidTraining({ vectors: sample, random: () => random.next() });
    for (; training.centroids === undefined; )
      longestMs = Math.max(
        longestMs,
        timed(() => training.step()),
      );
    centroids = training.centroids;
  });
  if (centroids === undefined) throw new Error("training ended without centroids");
  const cells: Centroids = centroids;
  const bucketOf = vectors.map((vector) => cells.bucketOf(vector) ?? 0);
  const sizes = new Int32Array(cells.count);
  for (const bucket of bucketOf) sizes[bucket] = (sizes[bucket] ?? 0) + 1;
  const hits = queries.map((query) =>
    index.search(query, THRESHOLD, 64).map(({ id }) => bucketOf[id] ?? 0),
  );
  const routingMs = timed(() => {
    for (const query of queries) cells.probed(query, THRESHOLD, PROBING_Z);
  });
  for (const owners of OWNERS) {
    const ownersOf = {
      "placed by direction": cells.placement(sizes, owners),
      "placed by rendezvous": rendezvous(cells.count, owners),
    };
    for (const how of PLACEMENTS) {
      for (const z of MARGINS) {
        const key = `${owners} ${how} ${z}`;
        const tally = tallies.get(key) ?? { asked: 0, queries: 0, hits: 0, kept: 0 };
        tallies.set(key, tally);
        addTo(tally, cells, queries, hits, ownersOf[how], z);
      }
    }
  }
  return {
    stored: index.size,
    trainingMs,
    longestMs,
    routingUs: (routingMs * 1000) / queries.length,
  };
}

function addTo(
  tally: Tally,
  centroids: Centroids,
  queries: readonly Float32Array[],
  hits: readonly (readonly number[])[],
  ownerOf: ArrayLike<number>,
  z: number,
): void {
  for (const [at, query] of queries.entries()) {
    const contacted = centroids.owners(query, THRESHOLD, z, (bucket) => ownerOf[bucket]);
    tally.queries++;
    tally.asked += contacted.length;
    const buckets = hits[at] ?? [];
    if (buckets.length === 0) continue;
    tally.hits++;
    // An owner that is asked looks through all that it holds.
    if (buckets.some((bucket) => contacted.includes(ownerOf[bucket]))) tally.kept++;
  }
}

function ownerRows(
  tallies: ReadonlyMap<string, Tally>,
  owners: number,
  how: (typeof PLACEMENTS)[number],
  made: string,
): Row[] {
  const at = (z: number) => {
    const { asked, queries, hits, kept } = tallies.get(`${owners} ${how} ${z}`) ?? {
      ...{ asked: 0, queries: 1, hits: 1, kept: 0 },
    };
    return { asked: asked / queries, recall: kept / hits, hits, queries };
  };
  const now = at(PROBING_Z);
  const others = MARGINS.slice(1)
    .map((z) => ({ z, ...at(z) }))
    .map(({ z, recall, asked }) => `z ${z}: ${recall.toFixed(4)} at ${asked.toFixed(2)}`)
    .join(", ");
  const hasBar = owners === 4 && how === "placed by direction";
  return [
    {
      name: "sharded recall",
      question: `Recall of hits over ${owners} owners ${how}, z = ${PROBING_Z}`,
      figure: now.recall.toFixed(4),
      value: now.recall,
      ...(hasBar ? { bar: { atLeast: RECALL_MIN } } : {}),
      detail: `${now.hits} of ${now.queries} queries have a hit; ${others}`,
    },
    {
      name: "owners asked",
      question: `Owners asked of ${owners} ${how}, z = ${PROBING_Z}`,
      figure: now.asked.toFixed(2),
      value: now.asked,
      ...(hasBar ? { bar: { atMost: ASKED_OF_4_MAX } } : {}),
      detail: made,
    },
  ];
}

/** The greatest rank of a bucket among the owners' names. */
function rendezvous(buckets: number, owners: number): number[] {
  const names = Array.from({ length: owners }, (_, owner) => hashOf(`owner-${owner}`));
  return Array.from({ length: buckets }, (_, bucket) => {
    const ranks = names.map((name) => rendezvousHash(hashOf(`bucket-${bucket}`), name));
    return ranks.indexOf(Math.max(...ranks));
  });
}

// ---- timing -------------------------------------------------------------------------------------------------

function timed(run: () => void): number {
  const startMs = performance.now();
  run();
  return performance.now() - startMs;
}

function percentiles(times: Float64Array): { p50Ms: number; p99Ms: number } {
  const sorted = times.toSorted();
  const at = (share: number) =>
    sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return { p50Ms: at(0.5) ?? Number.NaN, p99Ms: at(0.99) ?? Number.NaN };
}
