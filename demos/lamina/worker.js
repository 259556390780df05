// The engine in a worker: one call a message, its callbacks as messages back.
import { Core, explain, start } from './core.js';

const core = new Core(), running = new Map();
const WITH_EVENTS = { bench: ['onProgress'], check: ['onProgress'], load: ['onProgress'], generate: ['onPiece', 'onDeviceLost'] };

addEventListener('message', async ({ data: { id, call, args, wasmUrl } }) => {
  if (call === 'abort') return running.get(id)?.abort();
  const stop = new AbortController();
  running.set(id, stop);
  try {
    await start(wasmUrl);
    if (WITH_EVENTS[call] || call === 'estimate') {
      const options = args[args.length - 1] ??= {};
      options.signal = stop.signal;
      for (const name of WITH_EVENTS[call] ?? []) options[name] = (...heard) => postMessage({ id, event: name, heard });
    }
    postMessage({ id, value: await core[call](...args) });
  } catch (error) {
    const { code, message } = explain(error);
    postMessage({ id, error: { code, message } });
  } finally {
    running.delete(id);
  }
});
