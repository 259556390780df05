// The engine on this thread: WebAssembly, a device, a model. index.js runs it in a worker, or here where it must.
import init, * as wasm from './pkg/lamina.js';
import { LaminaError, aborted, fromFiles, fromUrl, heads, remove, stored } from './store.js';

let starting;

/** Loads the WebAssembly module, once. */
export function start(url) {
  starting ??= init({ module_or_path: url ?? new URL('./pkg/lamina_bg.wasm', import.meta.url) });
  return starting;
}

/** Any exception as a LaminaError. A panic leaves the module unusable: the worker must go. */
export function explain(error) {
  if (error instanceof LaminaError) return error;
  if (error instanceof WebAssembly.RuntimeError) {
    const text = globalThis.lamina_panic ?? error.message;
    return new LaminaError('internal', `lamina failed and must be loaded again: ${text}`, { cause: error });
  }
  if (error?.code && error?.name === 'LaminaError') return new LaminaError(error.code, error.message);
  return new LaminaError('internal', String(error?.message ?? error), { cause: error });
}

const turn = () => new Promise((done) => setTimeout(done));

/** Puts files where the module finds them: in a worker they are read when they are needed, else held in memory. */
async function put(folder, files) {
  wasm.remove_files(folder);
  for (const [name, blob] of files) {
    if (typeof FileReaderSync !== 'undefined') {
      const reader = new FileReaderSync();
      wasm.put_file(`${folder}/${name}`, blob.size, (offset, size) =>
        new Uint8Array(reader.readAsArrayBuffer(blob.slice(offset, offset + size))));
    } else {
      const bytes = new Uint8Array(await blob.arrayBuffer());
      wasm.put_file(`${folder}/${name}`, bytes.length, (offset, size) => bytes.subarray(offset, offset + size));
    }
  }
}

/** The engine's options, of those that callers give to all. */
const loading = ({ context, cache, memory }) => JSON.stringify({ context, cache, memory });

export class Core {
  #device = null;
  #model = null;
  #source = null;
  #options = {};
  #fromStore = false;

  /** Opens a device, or gives the one there is. */
  async #open(kind = 'best', bindingBytes) {
    this.#device ??= await wasm.WebDevice.open(kind, JSON.stringify({ binding_bytes: bindingBytes }));
    return this.#device;
  }

  /** What the device offers, and which path each kernel takes on it. */
  async device({ device, bindingBytes } = {}) {
    const opened = await this.#open(device, bindingBytes);
    return { caps: JSON.parse(opened.caps()), paths: JSON.parse(opened.paths()) };
  }

  /** Every kernel against its twin. */
  async check({ device, bindingBytes, kernels = [], every = 1, onProgress = () => {}, signal }) {
    const opened = await this.#open(device, bindingBytes);
    let last = performance.now(), slowest = 0;
    const seconds = {};
    const report = await opened.check(kernels, every, async (done, total, kernel, heard) => {
      const now = performance.now();
      slowest = Math.max(slowest, now - last);
      seconds[kernel] = (seconds[kernel] ?? 0) + (now - last) / 1000;
      const [outcomes, places] = JSON.parse(heard);
      outcomes.forEach((outcome, i) => { if (!outcome.passed) outcome.place = places[i]; });
      onProgress({ done, total, kernel, outcomes });
      await turn();
      last = performance.now();
      return signal?.aborted;
    });
    if (signal?.aborted) throw aborted();
    return { ...JSON.parse(report), slowest_case_s: slowest / 1000, kernel_s: seconds };
  }

  /** Ceilings, and decode attention of every combination of the lists. */
  async bench({ device, bindingBytes, onProgress = () => {}, signal, command, ...asked }) {
    const opened = await this.#open(device, bindingBytes);
    return JSON.parse(await opened.bench(JSON.stringify(asked), command, (done, total) => onProgress({ done, total })));
  }

  async #files(source, options) {
    const { signal, onProgress, files, store } = options;
    if (typeof source === 'string') return fromUrl(source, { signal, onProgress, files, store, Sha256: wasm.Sha256 });
    return fromFiles(source);
  }

  /** The memory that a model takes, before it is downloaded. */
  async estimate(source, { signal, ...options } = {}) {
    const folder = '/estimate';
    wasm.remove_files(folder);
    if (typeof source === 'string') {
      for (const [name, { size, head }] of await heads(source, { signal })) {
        wasm.put_file(`${folder}/${name}`, size, (offset, length) => head.subarray(offset, offset + length));
      }
    } else {
      await put(folder, (await fromFiles(source)).files);
    }
    try {
      return JSON.parse(wasm.estimate(folder, loading(options)));
    } finally {
      wasm.remove_files(folder);
    }
  }

  /** Loads a model; the one there was goes. */
  async load(source, options = {}) {
    this.unload();
    this.#source = source;
    this.#options = options;
    return this.#load(options.signal);
  }

  async #load(signal) {
    const options = this.#options, onProgress = options.onProgress ?? (() => {});
    const { files, fromStore } = await this.#files(this.#source, { ...options, signal, onProgress });
    this.#fromStore = fromStore;
    if (signal?.aborted) throw aborted();
    const device = await this.#open(options.device, options.bindingBytes);
    const folder = '/model';
    await put(folder, files);
    try {
      onProgress({ stage: 'upload', done: 0, total: null });
      this.#model = await wasm.WebModel.load(device, folder, loading(options), (done, total) =>
        onProgress({ stage: done < total ? 'upload' : 'compile', done, total }));
    } finally {
      wasm.remove_files(folder);
    }
    if (signal?.aborted) {
      this.unload();
      throw aborted();
    }
    return this.info();
  }

  info() {
    return { ...JSON.parse(this.#model.info()), caps: JSON.parse(this.#device.caps()), from_store: this.#fromStore };
  }

  /** The device was lost: another one, and the model again, from the store or the same files. */
  async #recover() {
    this.unload();
    try {
      await this.#load();
    } catch (cause) {
      throw new LaminaError('device-lost', `the device was lost, and the model did not load again: ${cause.message}`,
        { cause });
    }
  }

  /**
   * Continues a text or answers messages. `onPiece(piece, tokens, contextTokens)` hears the text as it comes. Where
   * the device is lost meanwhile, the answer goes on with a new one, behind the tokens that were there.
   */
  async generate(asked, { onPiece = () => {}, onDeviceLost = () => {}, signal } = {}) {
    if (!this.#model) throw new LaminaError('usage', 'generate: expected a loaded model, found none');
    const slow = JSON.parse(this.#device.caps()).backend === 'cpu';
    const tokens = [];
    let text = '', request = asked, before = 0;
    for (let tries = 0; ; tries++) {
      try {
        const prompt = [...this.#model.encode(JSON.stringify(request))];
        request = { ...request, prompt: undefined, messages: undefined, tokens: prompt };
        const each = (piece, token, count, context) => {
          if (tokens.length < before + count) tokens.push(token);
          text += piece;
          onPiece(piece, before + count, context);
          // Twins never wait: nothing else would run, not even a stop.
          return slow ? turn().then(() => signal?.aborted) : signal?.aborted;
        };
        const answer = JSON.parse(await this.#model.generate(JSON.stringify(request), each));
        answer.prompt_tokens -= before;
        return { ...answer, text, tokens, recovered: tries };
      } catch (error) {
        const told = explain(error);
        if (told.code !== 'device-lost' || this.#options.recover === false || tries >= 2) throw told;
        onDeviceLost(told.message);
        await this.#recover();
        request = { ...request, tokens: [...request.tokens, ...tokens.slice(before)] };
        request.max_tokens = (request.max_tokens ?? 256) - (tokens.length - before);
        before = tokens.length;
        if (request.max_tokens <= 0) return { text, tokens, finish_reason: 'length', recovered: tries + 1 };
      }
    }
  }

  /** Forgets the conversation in the cache. */
  forget() { this.#model?.forget(); }

  /** Loses the device, as a driver may: for tests of what follows. */
  loseDevice() { this.#device?.destroy(); }

  /** Gives back what the model and its device hold. */
  unload() {
    this.#model?.free();
    this.#device?.free();
    this.#model = this.#device = null;
  }

  stored() { return stored(); }
  remove(url) { return remove(url); }
  version() { return wasm.version(); }
}
