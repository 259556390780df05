// A checkpoint's files: fetched in parts into the origin private file system (OPFS), resumed, held against their
// hashes, and found there again without a network. Writing needs a worker; elsewhere files are kept in memory.

/** An error with a `code`; see index.d.ts. */
export class LaminaError extends Error {
  constructor(code, message, options) {
    super(message, options);
    this.name = 'LaminaError';
    this.code = code;
  }
}

export const aborted = () => new LaminaError('abort', 'it was aborted');

/** What a folder of a checkpoint may hold beside its weights; only the first is needed. */
const SMALL = ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json',
  'chat_template.jinja', 'chat_template.json'];
const WHOLE = 'model.safetensors', INDEX = 'model.safetensors.index.json', SUMS = 'SHA256SUMS';

const folderUrl = (url) => new URL(url.endsWith('/') ? url : `${url}/`, globalThis.location?.href).href;

async function digest(text) {
  const bytes = await crypto.subtle.digest('SHA-256', new TextEncoder().encode(text));
  return [...new Uint8Array(bytes)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

async function get(url, { signal, headers, missing = false } = {}) {
  let answer;
  try {
    answer = await fetch(url, { signal, headers });
  } catch (cause) {
    if (signal?.aborted) throw aborted();
    throw new LaminaError('network', `${url}: ${cause.message}`, { cause });
  }
  if (answer.status === 404 && missing) return null;
  if (!answer.ok) throw new LaminaError('network', `${url}: the server answered ${answer.status}`);
  return answer;
}

/** The shards that an index names. */
function shards(index) {
  const map = JSON.parse(index).weight_map ?? {};
  return [...new Set(Object.values(map))].sort();
}

/** `name -> hash` of a SHA256SUMS file. */
function sums(text) {
  const line = /^([0-9a-f]{64})\s+\*?(.+)$/;
  return Object.fromEntries(text.split('\n').map((l) => line.exec(l)).filter(Boolean).map((m) => [m[2], m[1]]));
}

// ---- the file system ----

async function root() {
  if (!globalThis.navigator?.storage?.getDirectory || typeof FileReaderSync === 'undefined') return null;
  try {
    const all = await navigator.storage.getDirectory();
    return await all.getDirectoryHandle('lamina', { create: true });
  } catch {
    return null; // Private windows have none.
  }
}

async function readState(folder) {
  try {
    return JSON.parse(await (await (await folder.getFileHandle('state.json')).getFile()).text());
  } catch {
    return null;
  }
}

async function writeState(folder, state) {
  const handle = await (await folder.getFileHandle('state.json', { create: true })).createSyncAccessHandle();
  const bytes = new TextEncoder().encode(JSON.stringify(state));
  handle.truncate(0);
  handle.write(bytes, { at: 0 });
  handle.close();
}

/** The checkpoints in the store: `{url, bytes, complete}`. */
export async function stored() {
  const list = [], all = await root();
  if (!all) return list;
  for await (const [, folder] of all.entries()) {
    const state = folder.kind === 'directory' ? await readState(folder) : null;
    if (!state) continue;
    let bytes = 0;
    for await (const [, file] of folder.entries()) if (file.kind === 'file') bytes += (await file.getFile()).size;
    list.push({ url: state.url, bytes, complete: !!state.complete });
  }
  return list;
}

/** Deletes a checkpoint from the store. */
export async function remove(url) {
  const all = await root();
  await all?.removeEntry((await digest(folderUrl(url))).slice(0, 32), { recursive: true }).catch(() => {});
}

// ---- downloads ----

/** Writes parts to a file of the store, from `size` on. */
class Disk {
  static async open(folder, name) {
    const file = await folder.getFileHandle(name, { create: true });
    try {
      return Object.assign(new Disk(), { file, handle: await file.createSyncAccessHandle() });
    } catch (cause) {
      throw new LaminaError('busy', `${name} is being downloaded in another tab`, { cause });
    }
  }
  get size() { return this.handle.getSize(); }
  read(at, length) {
    const bytes = new Uint8Array(length);
    return bytes.subarray(0, this.handle.read(bytes, { at }));
  }
  write(bytes, at) {
    try {
      if (this.handle.write(bytes, { at }) !== bytes.length) throw new Error('the disk is full');
    } catch (cause) {
      throw new LaminaError('storage', `the store took no more: ${cause.message}`, { cause });
    }
  }
  truncate() { this.handle.truncate(0); }
  close() { this.handle.flush(); this.handle.close(); }
  blob() { return this.file.getFile(); }
}

/** The same in memory. */
class Memory {
  parts = [];
  size = 0;
  read(at, length) {
    // Only ever from the start, in order: to hash what is there.
    const bytes = new Uint8Array(Math.min(length, this.size - at));
    let from = 0;
    for (const part of this.parts) {
      const start = Math.max(at, from), end = Math.min(at + bytes.length, from + part.length);
      if (start < end) bytes.set(part.subarray(start - from, end - from), start - at);
      from += part.length;
    }
    return bytes;
  }
  write(bytes) { this.parts.push(bytes.slice()); this.size += bytes.length; }
  truncate() { this.parts = []; this.size = 0; }
  close() {}
  blob() { return new Blob(this.parts); }
}

/**
 * Fetches a file behind what `target` holds of it, and gives `{size, sha256, etag}`.
 * A server that knows ranges goes on where it stopped, as long as the file is the same (If-Range).
 */
async function download(url, name, target, { etag, expected, signal, onBytes, Sha256, missing }) {
  let sha = new Sha256(), at = target.size;
  const headers = at > 0 && etag ? { Range: `bytes=${at}-`, 'If-Range': etag } : {};
  if (!headers.Range) at = 0;
  let answer;
  try {
    answer = await get(url, { signal, headers, missing });
  } catch (error) {
    // The file is whole, or the server wants none of it.
    if (!headers.Range || error.code !== 'network' || signal?.aborted) throw error;
    at = 0;
    answer = await get(url, { signal, missing });
  }
  if (!answer) return null;
  if (answer.status !== 206) at = 0;
  if (at === 0) target.truncate();
  for (let done = 0; done < at;) {
    const bytes = target.read(done, Math.min(1 << 22, at - done));
    sha.update(bytes);
    done += bytes.length;
  }
  const length = answer.headers.get('content-length'), encoded = answer.headers.get('content-encoding');
  const size = length && !encoded ? at + Number(length) : null;
  onBytes(at, size);
  const tag = answer.headers.get('etag');
  const reader = answer.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (signal?.aborted) throw aborted();
      target.write(value, at);
      sha.update(value);
      at += value.length;
      onBytes(at, size);
    }
  } catch (cause) {
    if (cause instanceof LaminaError) throw cause;
    if (signal?.aborted) throw aborted();
    throw new LaminaError('network', `${url}: ${cause.message}; it goes on from ${at} bytes when asked again`, { cause });
  } finally {
    reader.cancel().catch(() => {});
  }
  if (size !== null && at < size) {
    throw new LaminaError('network', `${url}: ${at} of ${size} bytes came; it goes on there when asked again`);
  }
  const found = sha.hex();
  sha.free();
  if (expected && found !== expected) {
    target.truncate();
    throw new LaminaError('corrupt', `${name}: expected SHA-256 ${expected}, found ${found}; it was deleted`);
  }
  return { size: at, sha256: found, etag: tag };
}

/**
 * A checkpoint of a URL: `Map` of names and Blobs. From the store where it is there whole (no network then), else
 * downloaded, each file in turn.
 */
export async function fromUrl(url, { files, signal, onProgress = () => {}, store = true, Sha256 }) {
  url = folderUrl(url);
  const all = store ? await root() : null;
  const folder = all && await all.getDirectoryHandle((await digest(url)).slice(0, 32), { create: true });
  let state = folder && await readState(folder);
  if (state?.complete) {
    const found = new Map();
    for (const [name, { size }] of Object.entries(state.files)) {
      const file = await folder.getFileHandle(name).then((handle) => handle.getFile()).catch(() => null);
      if (file?.size === size) found.set(name, file);
    }
    if (found.size === Object.keys(state.files).length) return { files: found, fromStore: true };
  }
  if (!state || state.complete) state = { url, files: {}, parts: {} };
  const found = new Map();
  const fetched = async (name, missing, hash) => {
    const known = state.files[name];
    if (known && folder && (!hash || known.sha256 === hash)) {
      const file = await folder.getFileHandle(name).then((handle) => handle.getFile()).catch(() => null);
      if (file?.size === known.size) return found.set(name, file).get(name);
    }
    const target = folder ? await Disk.open(folder, name) : new Memory();
    const onBytes = (done, total) => onProgress({ stage: 'download', file: name, done, total });
    try {
      if (folder && !state.parts[name]) {
        const head = await get(url + name, { signal, missing, headers: { Range: 'bytes=0-0' } });
        if (!head) return null;
        state.parts[name] = { etag: head.headers.get('etag') };
        await head.body?.cancel();
        target.truncate();
        await writeState(folder, state);
      }
      const options = { etag: state.parts[name]?.etag, expected: hash, signal, onBytes, Sha256, missing };
      const got = await download(url + name, name, target, options);
      if (!got) return null;
      state.files[name] = got;
    } finally {
      const empty = target.size === 0;
      target.close();
      if (folder && !state.files[name] && empty) await folder.removeEntry(name).catch(() => {});
    }
    delete state.parts[name];
    if (folder) await writeState(folder, state);
    return found.set(name, await target.blob()).get(name);
  };
  const hashes = await get(url + SUMS, { signal, missing: true }).then((answer) => answer?.text() ?? '').then(sums);
  if (files) {
    for (const name of files) await fetched(name, false, hashes[name]);
  } else {
    for (const name of SMALL) await fetched(name, name !== SMALL[0], hashes[name]);
    if (!await fetched(WHOLE, true, hashes[WHOLE])) {
      const index = await fetched(INDEX, false, hashes[INDEX]);
      for (const name of shards(await index.text())) await fetched(name, false, hashes[name]);
    }
  }
  if (folder) {
    state.complete = true;
    await writeState(folder, state);
  }
  return { files: found, fromStore: false };
}

/** A checkpoint of Files, a directory handle, or names and bytes: `Map` of names and Blobs. */
export async function fromFiles(source) {
  const found = new Map();
  if (source instanceof Map) {
    for (const [name, bytes] of source) found.set(name, bytes instanceof Blob ? bytes : new Blob([bytes]));
  } else if (source.kind === 'directory') {
    for await (const [name, handle] of source.entries()) {
      if (handle.kind === 'file') found.set(name, await handle.getFile());
    }
  } else {
    for (const file of source) found.set(file.name, file);
  }
  return { files: found, fromStore: false };
}

/** What an estimate needs of a URL, without its weights: `Map` of names and `{size, head}`. */
export async function heads(url, { signal } = {}) {
  url = folderUrl(url);
  const found = new Map();
  const small = async (name, missing) => {
    const answer = await get(url + name, { signal, missing });
    if (!answer) return null;
    const head = new Uint8Array(await answer.arrayBuffer());
    found.set(name, { size: head.length, head });
    return new TextDecoder().decode(head);
  };
  const header = async (name) => {
    const part = async (end) => {
      const answer = await get(url + name, { signal, missing: true, headers: { Range: `bytes=0-${end}` } });
      if (answer?.status !== 206) return answer?.body?.cancel().then(() => null) ?? null;
      const size = Number(/\/(\d+)$/.exec(answer.headers.get('content-range') ?? '')?.[1]);
      return size ? { size, head: new Uint8Array(await answer.arrayBuffer()) } : null;
    };
    let got = await part((1 << 18) - 1);
    if (!got) return false;
    const needed = 8 + Number(new DataView(got.head.buffer).getBigUint64(0, true));
    if (needed > got.head.length && needed <= got.size) got = await part(needed - 1);
    if (got) found.set(name, got);
    return !!got;
  };
  await small('config.json', false);
  if (!await header(WHOLE)) {
    const index = await small(INDEX, true);
    const names = index ? shards(index) : [];
    const whole = await Promise.all(names.map(header));
    // All or none: half of the headers tell less than the configuration.
    if (!whole.every(Boolean)) [INDEX, ...names].forEach((name) => found.delete(name));
  }
  return found;
}
