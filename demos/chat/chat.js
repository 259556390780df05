// The chat page: a model in this tab, its text as it comes, and what its cache takes beside other attentions.
import { Lamina } from '../lamina/index.js';
import { withoutGpu } from '../gpu.js';

const $ = (id) => document.getElementById(id);
const STORY = { source: new URL('../model/', location.href).href, name: 'the story model',
  files: ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'model.safetensors'] };
const query = new URLSearchParams(location.search);
const size = (bytes) => {
  const unit = bytes >= 1 << 30 ? ['GiB', 30] : bytes >= 1 << 20 ? ['MiB', 20] : ['KiB', 10];
  const count = bytes / 2 ** unit[1];
  return `${count >= 100 ? count.toFixed(0) : count.toFixed(1)} ${unit[0]}`;
};

let model = null, chosen = STORY, stop = null, loadingStop = null, tokens = 0;
/** The conversation: what was asked and what was said, in turn. */
let messages = [];

// ---- settings ----

const fields = [...$('settings').elements].filter((field) => field.name);
const saved = JSON.parse(localStorage.getItem('lamina-chat') ?? '{}');
for (const field of fields) field.value = query.get(field.name) ?? saved[field.name] ?? field.value;
const setting = (name) => $('settings').elements[name].value;
const number = (name) => setting(name) === '' ? undefined : Number(setting(name));
$('settings').oninput = () =>
  localStorage.setItem('lamina-chat', JSON.stringify(Object.fromEntries(fields.map(({ name, value }) => [name, value]))));
$('settings').onsubmit = (event) => event.preventDefault();
$('settings').elements.device.onchange = () => load(chosen);
$('open').onclick = () => {
  $('settings').hidden = !$('settings').hidden;
  $('open').setAttribute('aria-expanded', String(!$('settings').hidden));
};

// ---- loading ----

const STAGES = { download: 'Downloading', upload: 'Loading onto the device', compile: 'Compiling kernels' };

function notice(text, ...buttons) {
  $('notice').hidden = !text;
  $('notice').replaceChildren(text ?? '', ...buttons);
}
function button(text, onclick) {
  return Object.assign(document.createElement('button'), { textContent: text, onclick, style: 'margin-left:.8rem' });
}

async function load(which) {
  loadingStop?.abort();
  stop?.abort();
  loadingStop = new AbortController();
  const { signal } = loadingStop;
  chosen = which;
  model?.unload();
  model = null;
  forget();
  ready(false);
  notice(null);
  $('loading').hidden = false;
  $('choice').hidden = true;
  $('bar').removeAttribute('value');
  $('stage').textContent = 'Looking at the model';
  $('amount').textContent = '';
  try {
    const estimate = await Lamina.estimate(which.source, { signal });
    $('estimate').textContent = `${(estimate.parameters / 1e6).toFixed(1)} million parameters. Needs ${size(estimate.total)} of memory: `
      + `${size(estimate.weights)} of weights, ${size(estimate.cache)} of cache for ${estimate.context} tokens, ${size(estimate.scratch)} to compute with.`;
    if (which !== STORY && estimate.total > 1 << 30 && !await asked()) return load(STORY);
    const loaded = await Lamina.load(which.source, {
      files: which.files, device: setting('device'), signal,
      onProgress({ stage, file, done, total }) {
        $('stage').textContent = STAGES[stage];
        $('amount').textContent = total ? `${file ? `${file}, ` : ''}${size(done)} of ${size(total)}` : file ?? '';
        if (total && stage !== 'compile') Object.assign($('bar'), { value: done, max: total });
        else $('bar').removeAttribute('value');
      },
    });
    if (signal.aborted) return loaded.unload();
    model = loaded;
    model.addEventListener('devicelost', () => status('The device was lost. Loading the model again; the text goes on.'));
    const { caps, load_s, recommended } = model.info;
    $('model').textContent = `${which.name} · ${caps.name}${caps.backend === 'cpu' ? '' : caps.f16 ? ', f16' : ''}`;
    $('systemLabel').hidden = !model.info.chat;
    const names = { temperature: recommended.temperature, topP: recommended.top_p, topK: recommended.top_k,
      minP: recommended.min_p, repetitionPenalty: recommended.repetition_penalty, maxTokens: 256 };
    for (const [name, value] of Object.entries(names)) $('settings').elements[name].placeholder = +value.toFixed(3);
    $('loading').hidden = true;
    status(`Loaded in ${load_s.toFixed(1)} s${model.info.from_store ? ' from the store' : ''}.`);
    meter(0);
    ready(true);
    $('text').focus({ preventScroll: true });
  } catch (error) {
    if (error.code === 'abort') return;
    $('loading').hidden = true;
    const retry = error.code === 'network' || error.code === 'corrupt' || error.code === 'storage';
    notice(`${error.message} (${error.code})`, button(retry ? 'Try again' : 'Load the story model', () => load(retry ? which : STORY)));
    $('notice').classList.add('bad');
  }
}

/** Whether a large model is to be loaded. */
function asked() {
  $('choice').hidden = false;
  return new Promise((answer) => {
    $('load').onclick = () => answer(true);
    $('cancel').onclick = () => answer(false);
  }).finally(() => { $('choice').hidden = true; });
}

const open = (source, name) => load({ source, name, files: undefined });
$('files').onchange = () => $('files').files.length && open([...$('files').files], 'your model');
$('shipped').onclick = () => load(STORY);
if (globalThis.showDirectoryPicker) {
  $('folder').hidden = false;
  $('folder').onclick = async () => {
    const folder = await showDirectoryPicker().catch(() => null);
    if (folder) open(folder, folder.name);
  };
}
addEventListener('dragover', (event) => { event.preventDefault(); document.body.classList.add('dropping'); });
addEventListener('dragleave', (event) => { if (!event.relatedTarget) document.body.classList.remove('dropping'); });
addEventListener('drop', async (event) => {
  event.preventDefault();
  document.body.classList.remove('dropping');
  const item = event.dataTransfer.items?.[0], files = [...event.dataTransfer.files];
  const handle = await item?.getAsFileSystemHandle?.().catch(() => null);
  if (handle?.kind === 'directory') open(handle, handle.name);
  else if (files.length) open(files, 'your model');
});

// ---- the conversation ----

const status = (text) => { $('status').textContent = text; };

function ready(yes) {
  const writing = !!document.body.dataset.writing;
  $('send').disabled = !yes;
  $('send').hidden = writing;
  $('stop').hidden = !writing;
  $('again').disabled = !yes || writing || !messages.length;
  $('fresh').disabled = !messages.length || writing;
  $('text').placeholder = model?.info.chat ? 'Write a message' : messages.length ? 'Tell how it goes on' : 'Once upon a time';
}

/** Bytes of the cache, beside what other attentions would need for the same tokens. */
function meter(count) {
  tokens = count;
  const bytes = model.cacheBytes(count), full = Math.max(bytes.mha, 1);
  const { mla, mha } = model.info.token_bytes;
  const head = Object.assign(document.createElement('div'), { className: 'head',
    textContent: `Cache of ${count} of ${model.info.context} tokens. MLA keeps ${mla} bytes a token, ${(mha / mla).toFixed(1)} times less than MHA.` });
  const row = (name, value, colour) => {
    const label = Object.assign(document.createElement('span'), { textContent: name });
    const track = Object.assign(document.createElement('span'), { className: 'track' });
    track.append(Object.assign(document.createElement('i'), { style: `width:${100 * value / full}%;background:var(--${colour})` }));
    return [label, track, Object.assign(document.createElement('span'), { className: 'bytes', textContent: size(value) })];
  };
  $('meter').replaceChildren(head, ...row('MLA', bytes.mla, 'mla'), ...row(`GQA, ${bytes.groups} heads`, bytes.gqa, 'gqa'),
    ...row('MHA', bytes.mha, 'mha'));
}

function bubble(kind, text) {
  const part = Object.assign(document.createElement('div'), { className: kind, textContent: text });
  $('talk').append(part);
  return part;
}

/** What the model continues: messages where it has a chat template, else the story so far. */
function prompt() {
  if (!model.info.chat) {
    return messages.map(({ role, content }, i) => (i && role === 'user' ? '\n\n' : '') + content).join('');
  }
  const system = setting('system').trim();
  return system ? [{ role: 'system', content: system }, ...messages] : messages;
}

async function answer() {
  const shown = bubble('answer writing', '');
  stop = new AbortController();
  document.body.dataset.writing = 'yes';
  ready(true);
  let text = '', first = 0, drawn = false;
  const started = performance.now(), main = document.querySelector('main');
  // Once a frame: a fast model writes several tokens between two.
  const draw = () => {
    drawn = false;
    const below = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    shown.textContent = text.trimStart();
    meter(tokens);
    if (below) main.scrollTop = main.scrollHeight;
  };
  const seed = number('seed') ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const names = ['temperature', 'topP', 'topK', 'minP', 'repetitionPenalty', 'maxTokens'];
  const options = Object.fromEntries(names.map((name) => [name, number(name)]));
  const stream = model.generate(prompt(), {
    ...options, seed, signal: stop.signal,
    onToken({ tokens: count, contextTokens }) {
      tokens = contextTokens;
      first ||= performance.now() - started;
      const spent = (performance.now() - started - first) / 1000;
      if (count > 1) status(`${count} tokens, ${((count - 1) / spent).toFixed(1)} a second`);
    },
  });
  try {
    for await (const piece of stream) {
      text += piece;
      if (!drawn) requestAnimationFrame(draw);
      drawn = true;
    }
    const result = await stream.result;
    text = result.text;
    const why = { stop: '', length: ' · the most tokens', abort: ' · stopped' }[result.finish_reason];
    tokens = result.context_tokens ?? tokens;
    bubble('figures', `${result.tokens.length} tokens · first after ${(result.time_to_first_token_s ?? 0).toFixed(2)} s · `
      + `${(result.decode_tokens_per_s ?? 0).toFixed(1)} tokens/s${result.cached_tokens ? ` · ${result.cached_tokens} of ${result.prompt_tokens} from the cache` : ''}${why}`);
  } catch (error) {
    if (error.code !== 'abort') {
      const full = error.code === 'capacity';
      notice(full ? 'The context is full.' : `${error.message} (${error.code})`,
        full ? button('Begin a new one', fresh) : button('Load again', () => load(chosen)));
      $('notice').classList.toggle('bad', !full);
    }
  } finally {
    messages.push({ role: 'assistant', content: text });
    shown.classList.remove('writing');
    delete document.body.dataset.writing;
    if (model) {
      draw();
      ready(true);
    }
  }
}

function forget() {
  messages = [];
  tokens = 0;
  $('talk').replaceChildren();
}

function fresh() {
  forget();
  notice(null);
  model?.forget();
  if (model) meter(0);
  ready(!!model);
  $('text').focus();
}

$('form').onsubmit = (event) => {
  event.preventDefault();
  const text = model?.info.chat ? $('text').value.trim() : $('text').value.trim() || (messages.length ? '' : $('text').placeholder);
  if (!model || document.body.dataset.writing || !text) return;
  $('text').value = '';
  messages.push({ role: 'user', content: text });
  bubble('asked', text);
  document.querySelector('main').scrollTop = 1e9;
  answer();
};
$('stop').onclick = () => stop?.abort();
$('again').onclick = () => {
  if (messages.at(-1)?.role !== 'assistant') return;
  messages.pop();
  while ($('talk').lastChild && !$('talk').lastChild.classList.contains('answer')) $('talk').lastChild.remove();
  $('talk').lastChild?.remove();
  answer();
};
$('fresh').onclick = fresh;
$('text').onkeydown = (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $('form').requestSubmit();
};
addEventListener('keydown', (event) => { if (event.key === 'Escape') stop?.abort(); });

const support = await Lamina.support();
if (!support.webgpu) notice(withoutGpu(support.reason));
document.body.dataset.ready = 'yes';
await load(STORY);
if (!support.webgpu) notice(withoutGpu(support.reason));
