/**
 * The supervision tree, as data, and the addresses of the actors in it. The same function builds it for
 * production and for the simulator: they differ in the edges, the clock, the seed and the network.
 *
 *   headrace
 *   ├── edges      front, upstream, scraper, store: whose inside is I/O, or a model
 *   ├── nodes      one GpuNodeActor per inference node
 *   ├── cache      CacheActors, sharded by key
 *   ├── limiter    RateLimiterActor
 *   ├── router     RouterActor
 *   └── requests   RequestActor
 *
 * Children start in this order and stop in reverse, so that whoever is told something at a start is there.
 */
import type { Actor, ActorRef, ChildSpec, SupervisorSpec } from "../runtime/actor.ts";
import { CacheActor, type CacheMessage, type CacheOptions } from "./cache.ts";
import type { FrontCommand, ScraperCommand, StoreCommand, UpstreamCommand } from "./edges.ts";
import { GpuNodeActor, type GpuNodeMessage, type GpuNodeOptions } from "./gpu-node.ts";
import type { NodeId, NodeSnapshot } from "./protocol.ts";
import { RateLimiterActor, type RateLimiterMessage, type RateLimiterOptions } from "./rate-limiter.ts";
import { RequestActor, type RequestMessage, type RequestOptions } from "./request.ts";
import { RouterActor, type RouterMessage, type RouterOptions } from "./router.ts";
