/** Why something failed. */
export type ErrorCode =
  | 'abort' // asked for by the signal
  | 'usage' // an option or argument that cannot be meant
  | 'network' // a download broke off or was refused; asked again it goes on there
  | 'corrupt' // a file's hash is another; it was deleted
  | 'storage' // the store took no more
  | 'busy' // another tab is downloading it
  | 'invalid' | 'unsupported' | 'io' // a checkpoint's file, field or tensor
  | 'capacity' // the context is full
  | 'out-of-memory' | 'device-lost' | 'driver' | 'shader' | 'not-finite' // the device
  | 'internal'; // a fault of lamina: load again

export class LaminaError extends Error {
  readonly name: 'LaminaError';
  readonly code: ErrorCode;
}

export interface Message { role: 'system' | 'user' | 'assistant' | string; content: string }

/** A checkpoint in Hugging Face layout: a folder's URL, Files of a picker, a directory, or bytes by name. */
export type Source = string | Iterable<File> | FileSystemDirectoryHandle | Map<string, Blob | Uint8Array>;

export interface Progress { stage: 'download' | 'upload' | 'compile'; file?: string; done: number; total: number | null }

export interface EngineOptions {
  /** `gpu`, the CPU twins as WebAssembly (`cpu`), or the twins only where there is no adapter (`best`, the default). */
  device?: 'best' | 'gpu' | 'cpu';
  /** No storage binding larger than this, bytes. */
  bindingBytes?: number;
  /** False runs the engine on this thread, without the store. */
  worker?: boolean;
  /** Where worker.js lies, for bundlers that move it. */
  workerUrl?: string | URL;
  /** Where lamina_bg.wasm lies. */
  wasmUrl?: string | URL;
  signal?: AbortSignal;
}

export interface ModelOptions {
  /** Tokens of the context, prompt and answers together; 4096 or the model's own unless given. */
  context?: number;
  /** How the latent cache is stored; f16 unless given. */
  cache?: 'f16' | 'f32' | 'fp8';
  /** Bytes that there are: what takes more is refused before it is loaded. */
  memory?: number;
}

export interface LoadOptions extends EngineOptions, ModelOptions {
  onProgress?(progress: Progress): void;
  /** The files of a URL's folder; found by their usual names unless given. */
  files?: string[];
  /** False keeps nothing in the origin private file system. */
  store?: boolean;
  /** False: a lost device ends the answer with an error. Else the model is loaded again, and the answer goes on. */
  recover?: boolean;
}

/** Bytes that a token leaves in the cache of all layers. `gqa` is that of `groups` key and value heads. */
export interface TokenBytes { mla: number; gqa: number; mha: number; groups: number }

export interface Estimate {
  architecture: string; parameters: number; layers: number; longest_context: number; context: number;
  weights: number; cache: number; scratch: number; total: number; token_bytes: TokenBytes;
}

/** As `lamina info --json` has them. */
export interface Caps {
  name: string; backend: 'webgpu' | 'cpu'; device_type: string; driver: string; binding_bytes: number;
  buffer_bytes: number; workgroup_bytes: number; invocations: number; storage_buffers: number; f16: boolean;
  subgroups: [number, number] | null; timestamps: boolean; [more: string]: unknown;
}

export interface Info {
  architecture: string; chat: boolean; context: number; layers: number; vocabulary: number; parameters: number;
  /** Bytes of the weights, and of all that was allocated. */
  weights: number; allocated: number;
  token_bytes: TokenBytes; load_s: number; caps: Caps; from_store: boolean;
  recommended: { temperature: number; top_k: number; top_p: number; min_p: number; repetition_penalty: number };
}

/** How tokens are drawn; unless given as the model's makers recommend. The engine's own names are taken too. */
export interface GenerateOptions {
  maxTokens?: number; temperature?: number; topK?: number; topP?: number; minP?: number; repetitionPenalty?: number;
  seed?: number; stop?: string | string[]; ignoreEos?: boolean; signal?: AbortSignal;
  onToken?(event: { piece: string; tokens: number; contextTokens: number }): void;
  onDeviceLost?(message: string): void;
}

export interface Answer {
  text: string; tokens: number[]; finish_reason: 'stop' | 'length' | 'abort'; prompt_tokens: number;
  cached_tokens: number; time_to_first_token_s: number; decode_s: number; decode_tokens_per_s: number;
  context_tokens: number;
  /** How often the device was lost on the way. */
  recovered: number;
}

export interface TextStream extends AsyncIterable<string> {
  readonly result: Promise<Answer>;
  abort(): void;
}

export interface Model extends EventTarget {
  readonly info: Info;
  /** A text to continue, messages to answer, or token ids. */
  generate(input: string | Message[] | number[], options?: GenerateOptions): TextStream;
  readonly chat: { completions: { create(request: object, options?: { signal?: AbortSignal }): Promise<any> } };
  cacheBytes(tokens: number): TokenBytes & { tokens: number };
  forget(): Promise<void>;
  loseDevice(): Promise<void>;
  unload(): void;
  addEventListener(type: 'devicelost', listener: (event: Event & { message: string }) => void): void;
}

export interface Outcome {
  kernel: string; variant: string; case: string; passed: boolean; nmse: number; max_error: number; tolerance: number;
  /** Of all its dispatches, by the GPU's clock where it has one. */
  seconds: number | null;
  /** Of a failed case: where, with what was expected and found. */
  place?: string;
}

/** The fields of `lamina check --json`. */
export interface Report {
  adapter: string; backend: string; device_type: string; cases: number; failed: number; results: Outcome[];
  slowest_case_s: number;
  /** Seconds that each kernel's cases took, with their twins and compiling. */
  kernel_s: Record<string, number>;
}

/** Every combination of the lists is a shape. */
export interface BenchOptions {
  batch?: number[]; heads?: number[]; context?: number[]; dtype?: ('f16' | 'f32' | 'fp8')[];
  /** Timed runs of a shape, at least. */
  repeat?: number;
  /** Megabytes that the bandwidth is measured with. */
  mib?: number;
}

/** The fields of `lamina bench kernel --json`; docs/cli.md has them all. */
export interface Bench {
  version: string; commit: string | null; command: string; driver: string;
  device: { adapter: string; backend: string; type: string };
  clock: { by: 'timestamps' | 'queue'; overhead_us: number };
  ceilings: {
    bytes: number; read_gbs: number; copy_gbs: number; f32_tflops: number; f16_tflops: number | null;
    matrix_tflops: number | null; dispatch_us: number; round_trip_us: number;
  };
  decode: Figure[]; skipped: Left[]; failed: Left[];
}
export interface Shape { batch: number; heads: number; contexts: number[]; tokens: number; dtype: string }
export interface Left extends Shape { why: string }
export interface Figure extends Shape {
  variant: string; keys: string[]; splits: number; median_us: number; p10_us: number; p90_us: number; runs: number;
  bytes: number; gbs: number; tflops: number; share: number; bound: 'memory' | 'compute'; checked: number; error: number;
  published: { by: string; us: number; ratio: number } | null; gain_over_f16: number | null;
}

export const Lamina: {
  support(): Promise<{ webgpu: boolean; f16?: boolean; reason?: 'insecure' | 'missing' | 'no-adapter' }>;
  load(source: Source, options?: LoadOptions): Promise<Model>;
  estimate(source: Source, options?: EngineOptions & ModelOptions): Promise<Estimate>;
  device(options?: EngineOptions): Promise<{ caps: Caps; paths: { kernel: string; spec: string; variant: string; why: string }[] }>;
  check(options?: EngineOptions & {
    kernels?: string[];
    /** One case in so many. */
    every?: number;
    onProgress?(progress: { done: number; total: number; kernel: string; outcomes: Outcome[] }): void;
  }): Promise<Report>;
  bench(options?: EngineOptions & BenchOptions & { onProgress?(progress: { done: number; total: number }): void }): Promise<Bench>;
  stored(options?: EngineOptions): Promise<{ url: string; bytes: number; complete: boolean }[]>;
  remove(url: string, options?: EngineOptions): Promise<void>;
};
export default Lamina;
