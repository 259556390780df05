// lamina in a page: models of Multi-head Latent Attention on WebGPU. See index.d.ts for the types.
import { LaminaError } from './store.js';

export { LaminaError };

/** Calls of the engine, in a worker of their own. */
class Remote {
  #worker;
  #calls = new Map();
  #next = 0;
  #wasmUrl;
  #dead = null;

  constructor({ workerUrl, wasmUrl } = {}) {
    this.#wasmUrl = wasmUrl && String(wasmUrl);
    this.#worker = workerUrl ? new Worker(workerUrl, { type: 'module' })
      : new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
    this.#worker.onmessage = ({ data: { id, event, heard, error, value } }) => {
      const call = this.#calls.get(id);
      if (!call) return;
      if (event) return call.events[event]?.(...heard);
      this.#calls.delete(id);
      if (!error) return call.resolve(value);
      const told = new LaminaError(error.code, error.message);
      call.reject(told);
      // After a panic nothing in the module can be trusted.
      if (error.code === 'internal') this.#end(told);
    };
    this.#worker.onerror = (event) => {
      event.preventDefault?.();
      this.#end(new LaminaError('internal', `the worker failed: ${event.message ?? 'it could not be loaded'}`));
    };
  }

  #end(error) {
    this.#dead = error;
    for (const { reject } of this.#calls.values()) reject(error);
    this.#calls.clear();
    this.#worker.terminate();
  }

  call(call, args, { signal, ...events } = {}) {
    if (this.#dead) return Promise.reject(this.#dead);
    if (signal?.aborted) return Promise.reject(new LaminaError('abort', 'it was aborted'));
    const id = this.#next++;
    return new Promise((resolve, reject) => {
      const abort = () => this.#worker.postMessage({ id, call: 'abort' });
      signal?.addEventListener('abort', abort);
      const done = (then) => (value) => { signal?.removeEventListener('abort', abort); then(value); };
      this.#calls.set(id, { resolve: done(resolve), reject: done(reject), events });
      this.#worker.postMessage({ id, call, args, wasmUrl: this.#wasmUrl });
    });
  }

  close(why = new LaminaError('usage', 'the model was unloaded')) { this.#end(why); }
}

/** The same calls on this thread, for pages that may have no worker. The store needs one. */
class Local {
  #core;
  constructor({ wasmUrl } = {}) {
    this.#core = import('./core.js').then(async (module) => {
      await module.start(wasmUrl);
      return Object.assign(module, { core: new module.Core() });
    });
  }
  async call(call, args, options = {}) {
    const { core, explain } = await this.#core;
    try {
      return await core[call](...args.slice(0, -1), { ...args[args.length - 1], ...options });
    } catch (error) {
      throw explain(error);
    }
  }
  close() { this.#core.then(({ core }) => core.unload()); }
}

const remote = (options = {}) => options.worker === false ? new Local(options) : new Remote(options);

/** Runs one call in a worker that then goes. */
async function once(call, args, options, events) {
  const engine = remote(options);
  try {
    return await engine.call(call, args, events);
  } finally {
    engine.close();
  }
}

/** Options that are data, without functions, signals and what the page itself takes. */
function plain({ onProgress, onDeviceLost, onToken, signal, worker, workerUrl, wasmUrl, ...rest } = {}) {
  return rest;
}

/** Names as the engine has them. */
const RENAMED = { maxTokens: 'max_tokens', topK: 'top_k', topP: 'top_p', minP: 'min_p',
  repetitionPenalty: 'repetition_penalty', ignoreEos: 'ignore_eos' };

function asked(input, options) {
  const request = typeof input === 'string' ? { prompt: input }
    : typeof input?.[0] === 'number' || ArrayBuffer.isView(input) ? { tokens: [...input] }
    : { messages: input.map(({ role, content }) => ({ role, content })) };
  for (const [name, value] of Object.entries(plain(options))) {
    if (value === undefined || value === null) continue;
    request[RENAMED[name] ?? name] = name === 'stop' && typeof value === 'string' ? [value] : value;
  }
  return request;
}

/** Text piece by piece: `for await (const piece of stream)`; `stream.result` is all of it at the end. */
class TextStream {
  #queue = [];
  #wake = null;
  #ended = false;
  #stop = new AbortController();

  constructor(engine, input, options = {}) {
    const { signal, onToken = () => {}, onDeviceLost } = options;
    const forward = () => this.#stop.abort();
    if (signal?.aborted) forward();
    signal?.addEventListener('abort', forward);
    const onPiece = (piece, tokens, contextTokens) => {
      onToken({ piece, tokens, contextTokens });
      if (piece) this.#push(piece);
    };
    const events = { signal: this.#stop.signal, onPiece, onDeviceLost };
    const answer = this.#stop.signal.aborted ? Promise.reject(new LaminaError('abort', 'it was aborted'))
      : engine.call('generate', [asked(input, options), {}], events);
    /** The whole answer. */
    this.result = answer.finally(() => {
      signal?.removeEventListener('abort', forward);
      this.#ended = true;
      this.#wake?.();
    });
    // Who iterates hears of it there.
    this.result.catch(() => {});
  }

  #push(piece) {
    this.#queue.push(piece);
    this.#wake?.();
  }

  /** Ends the text; what was said so far is kept. */
  abort() { this.#stop.abort(); }

  async *[Symbol.asyncIterator]() {
    try {
      for (;;) {
        while (this.#queue.length) yield this.#queue.shift();
        if (this.#ended) break;
        await new Promise((wake) => { this.#wake = wake; });
        this.#wake = null;
      }
      return await this.result;
    } finally {
      this.abort();
    }
  }
}

/** `chat.completions` as OpenAI's and WebLLM's clients have it. */
class Completions {
  #model;
  constructor(model) { this.#model = model; }

  create({ messages, stream = false, stream_options, model, n, ...rest }, { signal } = {}) {
    const { max_completion_tokens, ...options } = rest;
    if (max_completion_tokens !== undefined) options.max_tokens ??= max_completion_tokens;
    if (n !== undefined && n !== 1) throw new LaminaError('usage', `n: expected 1, found ${n}`);
    const known = ['max_tokens', 'temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'seed', 'stop'];
    const unknown = Object.keys(options).find((name) => !known.includes(name));
    if (unknown) throw new LaminaError('usage', `${unknown}: not supported; there are ${known.join(', ')}`);
    const text = this.#model.generate(messages, { ...options, signal });
    const head = { id: `chatcmpl-${crypto.randomUUID()}`, created: Math.floor(Date.now() / 1000),
      model: model ?? this.#model.info.architecture };
    const usage = (r) => ({ prompt_tokens: r.prompt_tokens, completion_tokens: r.tokens.length,
      total_tokens: r.prompt_tokens + r.tokens.length });
    const reason = (r) => r.finish_reason === 'abort' ? 'stop' : r.finish_reason;
    if (!stream) {
      return text.result.then((r) => ({ ...head, object: 'chat.completion', usage: usage(r),
        choices: [{ index: 0, message: { role: 'assistant', content: r.text }, finish_reason: reason(r) }] }));
    }
    const chunk = (delta, finish_reason = null, more = {}) =>
      ({ ...head, object: 'chat.completion.chunk', choices: [{ index: 0, delta, finish_reason }], ...more });
    return Promise.resolve((async function* () {
      yield chunk({ role: 'assistant', content: '' });
      for await (const content of text) yield chunk({ content });
      const r = await text.result;
      yield chunk({}, reason(r), stream_options?.include_usage ? { usage: usage(r) } : {});
    })());
  }
}

/** A loaded model, with one conversation in its cache. */
export class Model extends EventTarget {
  #engine;
  #last = Promise.resolve();

  constructor(engine, info) {
    super();
    this.#engine = engine;
    /** What it is, and on which device. */
    this.info = info;
    this.chat = { completions: new Completions(this) };
  }

  /** Continues a text, or answers messages. Answers come one after the other. */
  generate(input, options = {}) {
    const lost = (message) => {
      options.onDeviceLost?.(message);
      this.dispatchEvent(Object.assign(new Event('devicelost'), { message }));
    };
    const before = this.#last;
    const engine = { call: async (...call) => { await before; return this.#engine.call(...call); } };
    const stream = new TextStream(engine, input, { ...options, onDeviceLost: lost });
    this.#last = stream.result.catch(() => {});
    return stream;
  }

  /** Bytes that so many tokens take in the cache, beside what MHA and GQA would. */
  cacheBytes(tokens) {
    const { mla, gqa, mha, groups } = this.info.token_bytes;
    return { tokens, mla: mla * tokens, gqa: gqa * tokens, mha: mha * tokens, groups };
  }

  /** Forgets the conversation. */
  async forget() { await this.#last; return this.#engine.call('forget', []); }

  /** Loses the device, to try what follows. */
  loseDevice() { return this.#engine.call('loseDevice', []); }

  /** Gives back all memory. */
  unload() { this.#engine.close(); }
}

export const Lamina = {
  /** Whether this browser offers WebGPU at all, and why not. */
  async support() {
    if (!globalThis.isSecureContext) return { webgpu: false, reason: 'insecure' };
    if (!navigator.gpu) return { webgpu: false, reason: 'missing' };
    const adapter = await navigator.gpu.requestAdapter().catch(() => null);
    return adapter ? { webgpu: true, f16: adapter.features.has('shader-f16') } : { webgpu: false, reason: 'no-adapter' };
  },

  /** Loads a checkpoint: the URL of its folder, Files, a directory handle, or a Map of names and bytes. */
  async load(source, options = {}) {
    const engine = remote(options), { signal, onProgress } = options;
    try {
      return new Model(engine, await engine.call('load', [source, plain(options)], { signal, onProgress }));
    } catch (error) {
      engine.close();
      throw error;
    }
  },

  /** The memory that it would take; a URL's weights are not downloaded. */
  estimate(source, options = {}) {
    return once('estimate', [source, plain(options)], options, { signal: options.signal });
  },

  /** The device's name and limits, and the path of each kernel. */
  device(options = {}) { return once('device', [plain(options)], options); },

  /** Every kernel on this device against its twin on the CPU. */
  check(options = {}) {
    return once('check', [plain(options)], options, { signal: options.signal, onProgress: options.onProgress });
  },

  /** The device's ceilings, and decode attention on it, as `lamina bench kernel` has them. */
  async bench({ batch = [1], heads = [16, 128], context = [1024, 4096], dtype = ['f16', 'fp8'], repeat = 3, mib = 64,
    signal, ...options } = {}) {
    const lists = { batch, heads, context, dtype, repeat, mib };
    const command = `lamina bench kernel ${Object.entries(lists).map(([name, value]) => `--${name} ${value}`).join(' ')}`;
    const engine = remote(options);
    // A measurement takes no break: its worker goes.
    const abort = () => engine.close(new LaminaError('abort', 'it was aborted'));
    signal?.addEventListener('abort', abort);
    try {
      return await engine.call('bench', [{ ...lists, ...plain(options), command }], { signal, onProgress: options.onProgress });
    } finally {
      signal?.removeEventListener('abort', abort);
      engine.close();
    }
  },

  /** The checkpoints in this site's store. */
  stored(options = {}) { return once('stored', [], options); },

  /** Deletes one of them. */
  remove(url, options = {}) {
    return once('remove', [new URL(url.endsWith('/') ? url : `${url}/`, location.href).href], options);
  },
};

export default Lamina;
