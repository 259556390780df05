// Tests of the package and the pages, in a browser: tests/browser opens this page and hears what it finds. The server
// has switches for what networks do: /switch?refuse=1 answers nothing under /model/, cut=N ends a file after N
// bytes, corrupt=1 changes one.
import { Lamina, LaminaError } from '../lamina/index.js';

const query = new URLSearchParams(location.search);
const tell = (what) => fetch('/heard', { method: 'POST', body: JSON.stringify(what) });
const MODEL = '../model/';
const FILES = ['config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'model.safetensors'];
const gpu = { device: 'gpu', files: FILES };
const golden = await (await fetch('golden.json')).json();
const numbers = {};
/** Seconds that a submission of a parity case may take on a software driver. */
const LONGEST = 2;

const network = async (switches) => (await fetch(`/switch?${new URLSearchParams(switches)}`)).json();
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
function ok(truth, sentence) { if (!truth) throw new Error(sentence); }
const same = (found, expected, what) =>
  ok(JSON.stringify(found) === JSON.stringify(expected), `${what}: expected ${JSON.stringify(expected)}, found ${JSON.stringify(found)}`);
async function refused(promise, code, parts = []) {
  const error = await promise.then(() => null, (e) => e);
  ok(error instanceof LaminaError, `expected a LaminaError ${code}, found ${error}`);
  same(error.code, code, error.message);
  for (const part of parts) ok(error.message.includes(part), `'${error.message}' does not hold '${part}'`);
  return error;
}

/** A page in a frame, once it says that it is ready. */
async function page(url) {
  const frame = document.createElement('iframe');
  frame.src = url;
  document.body.append(frame);
  const start = performance.now();
  while (!frame.contentDocument?.body?.dataset.ready) {
    ok(performance.now() - start < 60000, `${url} was not ready after a minute`);
    await wait(50);
  }
  return { frame, document: frame.contentDocument, window: frame.contentWindow };
}
async function until(what, sentence, seconds = 60) {
  const start = performance.now();
  while (!what()) {
    ok(performance.now() - start < seconds * 1000, sentence());
    await wait(50);
  }
}

let model;
const loaded = async () => model ??= await Lamina.load(MODEL, gpu);
/** How many tokens a test asks for: fewer on a driver that is slow here. */
let few = 64;
const greedy = () => ({ temperature: 0, maxTokens: few });
/** The answer is the golden one, as far as it was asked for. */
const right = (answer, { ids }, what = 'the tokens') => {
  ok(answer.tokens.length >= Math.min(few, ids.length), `${what}: ${answer.tokens.length} tokens came`);
  same(answer.tokens, ids.slice(0, answer.tokens.length), what);
};

const tests = {
  async 'the memory is told before anything is downloaded'() {
    const { asked } = await network({});
    const estimate = await Lamina.estimate(MODEL);
    const after = await network({});
    ok(after.bytes - asked * 0 < 2 << 20, `${after.bytes} bytes were sent for an estimate`);
    ok(estimate.total > 20e6 && estimate.token_bytes.mla < estimate.token_bytes.gqa, JSON.stringify(estimate));
    numbers.estimate = estimate.total;
  },
  async 'a corrupt download is refused, deleted, and comes whole the next time'() {
    await Lamina.remove(MODEL);
    await network({ corrupt: 1 });
    await refused(Lamina.load(MODEL, gpu), 'corrupt', ['model.safetensors', 'expected SHA-256']);
    same((await Lamina.stored()).filter((one) => one.complete), [], 'the store');
    await network({});
  },
  async 'a download that broke off goes on where it stopped'() {
    await network({ cut: 9_000_000 });
    await refused(Lamina.load(MODEL, gpu), 'network', ['model.safetensors', '9000000']);
    await network({});
    const starts = [];
    const loaded = performance.now();
    model = await Lamina.load(MODEL, {
      ...gpu, onProgress: ({ stage, file, done }) => { if (stage === 'download' && file === FILES[4]) starts.push(done); },
    });
    numbers.load_s = (performance.now() - loaded) / 1000;
    same(starts[0], 9_000_000, 'the first byte of the second download');
    same((await Lamina.stored()).map((one) => one.complete), [true], 'the store');
    numbers.adapter = model.info.caps.name;
    numbers.f16 = model.info.caps.f16;
  },
  async 'the estimate is the allocation, within a tenth'() {
    await loaded();
    const { allocated } = model.info;
    numbers.allocated = allocated;
    ok(Math.abs(numbers.estimate / allocated - 1) < 0.1, `estimated ${numbers.estimate}, allocated ${allocated}`);
  },
  async 'the golden continuations, token for token'() {
    await loaded();
    const rates = [], start = performance.now();
    for (const one of golden.greedy) {
      const stop = new AbortController();
      const onToken = ({ tokens }) => {
        // Two minutes in all on a slow driver, but some of every text.
        if (tokens >= 6 && performance.now() - start > 120000) stop.abort();
        if (tokens % 16 === 0 || performance.now() - start > 20000) tell({ note: `${tokens} tokens` });
      };
      const stream = model.generate(one.prompt, { ...greedy(), onToken, signal: stop.signal });
      let shown = '';
      for await (const piece of stream) shown += piece;
      const answer = await stream.result;
      few = Math.min(few, answer.tokens.length);
      right(answer, one, one.prompt);
      same(answer.prompt_tokens, one.prompt_ids.length, 'tokens of the prompt');
      same(shown, one.text.slice(0, shown.length), 'the pieces');
      ok(shown.length > 2 * answer.tokens.length, `${shown.length} characters were shown`);
      rates.push(answer.decode_tokens_per_s);
      numbers.first_token_s = answer.time_to_first_token_s;
    }
    numbers.golden_tokens = few;
    numbers.tokens_per_s = Math.max(...rates);
    few = Math.min(few, numbers.tokens_per_s < 10 ? 24 : 64);
  },
  async 'a text that goes on computes only what is new'() {
    await loaded();
    const first = await model.generate(golden.greedy[0].prompt, { ...greedy(), maxTokens: 6 }).result;
    const longer = golden.greedy[0].prompt_ids.concat(first.tokens, [13]);
    const second = await model.generate(longer, { ...greedy(), maxTokens: 2 }).result;
    same(second.cached_tokens, longer.length - 2, 'tokens that the cache held');
    same(model.cacheBytes(second.context_tokens).mla, second.context_tokens * 10 * (64 + 16) * 2, 'bytes of the cache');
  },
  async 'stop ends an answer, and the next one is right'() {
    await loaded();
    const stop = new AbortController(), start = performance.now();
    const stream = model.generate('Once upon a time', { ...greedy(), maxTokens: 900, signal: stop.signal });
    let pieces = 0;
    for await (const _ of stream) if (++pieces === 5) stop.abort();
    const answer = await stream.result;
    same(answer.finish_reason, 'abort', 'why it ended');
    ok(answer.tokens.length < 40, `${answer.tokens.length} tokens came after a stop at 5`);
    numbers.stop_s = (performance.now() - start) / 1000;
    const again = await model.generate(golden.greedy[1].prompt, greedy()).result;
    right(again, golden.greedy[1], 'the text after a stop');
    await refused(model.generate('x', { signal: AbortSignal.abort() }).result, 'abort');
  },
  async 'a lost device: the answer goes on with another, from the store'() {
    await loaded();
    await network({ refuse: 1 });
    let lost = 0;
    model.addEventListener('devicelost', () => lost++);
    const stream = model.generate(golden.greedy[0].prompt, greedy());
    let pieces = 0;
    for await (const _ of stream) if (++pieces === 5) model.loseDevice();
    const answer = await stream.result;
    same([lost, answer.recovered], [1, 1], 'losses');
    right(answer, golden.greedy[0]);
    same(answer.text, golden.greedy[0].text.slice(0, answer.text.length), 'the text');
    await network({});
  },
  async 'errors have codes, and chat.completions has OpenAI\'s shapes'() {
    await loaded();
    await refused(model.generate([1, 2, 99999], greedy()).result, 'usage', ['99999']);
    await refused(model.generate('x', { temperature: -1 }).result, 'usage', ['temperature']);
    await refused(model.generate('x', { nonsense: 1 }).result, 'usage', ['nonsense']);
    await refused(model.generate([{ role: 'user', content: 'hi' }]).result, 'invalid', ['chat_template']);
    await refused(Lamina.load('../nowhere/', gpu), 'network', ['404']);
    await refused(model.chat.completions.create({ messages: [{ role: 'user', content: 'hi' }] }), 'invalid');
    const draw = async (seed) => (await model.generate('Once', { temperature: 1, topP: 1, seed, maxTokens: 6 }).result).text;
    const [a, b, ...others] = [await draw(1), await draw(1), await draw(2), await draw(3)];
    same(b, a, 'the text of the same seed');
    ok(others.some((text) => text !== a), 'another seed gives another text');
  },
  async 'from the store with the network off, and from files without a store'() {
    (await loaded()).unload();
    model = null;
    await network({ refuse: 1 });
    const start = performance.now();
    const again = await Lamina.load(MODEL, gpu);
    numbers.reload_s = (performance.now() - start) / 1000;
    ok(again.info.from_store, 'it came from the store');
    right(await again.generate(golden.greedy[2].prompt, greedy()).result, golden.greedy[2]);
    again.unload();
    await network({});
    const files = await Promise.all(FILES.map(async (name) =>
      new File([await (await fetch(MODEL + name)).blob()], name)));
    const picked = await Lamina.load(files, { ...gpu, bindingBytes: 1 << 20 });
    right(await picked.generate(golden.greedy[0].prompt, greedy()).result, golden.greedy[0], 'in small bindings');
    picked.unload();
    const cut = files.with(4, new File([files[4].slice(0, 1000)], FILES[4]));
    await refused(Lamina.load(cut, gpu), 'invalid', ['model.safetensors', 'truncated']);
  },
  async 'the twins as WebAssembly, for browsers without a GPU'() {
    const twins = await Lamina.load(MODEL, { device: 'cpu', files: FILES });
    const answer = await twins.generate(golden.greedy[0].prompt, { ...greedy(), maxTokens: 12 }).result;
    same(answer.tokens, golden.greedy[0].ids.slice(0, 12), 'the tokens');
    numbers.twins_tokens_per_s = answer.decode_tokens_per_s;
    twins.unload();
  },
  async 'the check page: every case passed'() {
    const start = performance.now();
    const { document, frame } = await page(`../check/?run&${query}`);
    let last = '';
    const beat = setInterval(() => {
      const now = document.getElementById('status').textContent;
      if (now !== last) tell({ note: now });
      last = now;
    }, 5000);
    await until(() => document.body.dataset.done, () => `not done: ${document.getElementById('status').textContent}`, 1800);
    clearInterval(beat);
    numbers.check_s = (performance.now() - start) / 1000;
    numbers.check = document.getElementById('headline').textContent;
    const [cases, failed] = document.body.dataset.done.split(' ').map(Number);
    ok(cases > 0 && failed === 0, `${numbers.check}\n${document.getElementById('failures').textContent.slice(0, 2000)}`);
    numbers.check_kernels_s = Object.fromEntries(Object.entries(JSON.parse(document.body.dataset.seconds))
      .map(([kernel, seconds]) => [kernel, +seconds.toFixed(1)]));
    numbers.slowest = document.getElementById('status').textContent;
    numbers.longest = JSON.parse(document.body.dataset.longest);
    ok(numbers.longest.length && numbers.longest[0][0] <= LONGEST, `at most ${LONGEST} s each: ${JSON.stringify(numbers.longest)}`);
    frame.remove();
  },
  async 'the bench page measures, and a link carries its result'() {
    const { document, window, frame } = await page('../bench/?run&set=least');
    await until(() => document.body.dataset.done, () => `not done: ${document.getElementById('status').textContent}`, 240);
    same(document.body.dataset.done, 'yes', 'the outcome');
    const rows = (of) => [...of.querySelectorAll('#rows tr')].map((row) => row.textContent);
    const found = rows(document);
    same(found.length, 4, `shapes; ${document.getElementById('left').textContent}`);
    document.getElementById('link').click();
    await until(() => window.location.hash.startsWith('#result='), () => 'no link');
    const shared = await page(window.location.href.replace('?run&set=least', ''));
    same(rows(shared.document), found, 'what the link carries');
    numbers.ceilings = document.getElementById('ceilings').innerText.replaceAll('\n', ' ');
    frame.remove();
    shared.frame.remove();
  },
  async 'the chat page writes a story, stops, and shows what the cache takes'() {
    const { document, frame } = await page(`../chat/?seed=1&temperature=0&maxTokens=${few}`);
    const $ = (id) => document.getElementById(id);
    const send = (text) => { $('text').value = text; $('form').requestSubmit(); };
    await until(() => !$('send').disabled, () => `no model: ${$('status').textContent}`);
    send('Once upon a time');
    await until(() => document.querySelectorAll('.answer').length === 1 && !document.body.dataset.writing,
      () => 'no answer', 100);
    const shown = document.querySelector('.answer').textContent;
    ok(shown.startsWith(golden.greedy[0].text.slice(0, 20).trim()), `the page shows: ${shown.slice(0, 200)}`);
    ok(/KiB|MiB/.test($('meter').textContent), $('meter').textContent);
    send('The dragon came back.');
    await until(() => document.body.dataset.writing && document.querySelectorAll('.answer').length === 2, () => 'no second answer');
    $('stop').click();
    await until(() => !document.body.dataset.writing, () => 'it did not stop', 20);
    $('again').click();
    await until(() => document.body.dataset.writing, () => 'it did not begin again');
    $('stop').click();
    await until(() => !document.body.dataset.writing, () => 'it did not stop', 20);
    same(document.querySelectorAll('.answer').length, 2, 'answers after a regeneration');
    frame.remove();
  },
};

/** With ?speed: what tests/browser holds against native speed. */
const speed = {
  async 'load, first token and text'() {
    const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    const took = async (work) => {
      const start = performance.now();
      await work();
      return (performance.now() - start) / 1000;
    };
    await Lamina.remove(MODEL);
    numbers.module_s = await took(() => Lamina.stored());
    numbers.device_s = await took(() => Lamina.device({ device: 'gpu' }));
    numbers.load_s = await took(loaded);
    model.unload();
    model = null;
    numbers.reload_s = await took(loaded);
    // The prompt has as many tokens as tests/browser asks of native ones; the first turn compiles, as theirs does.
    const answers = [], { prompt, prompt_ids } = golden.greedy[0];
    for (let turn = 0; turn <= 3; turn++) {
      await model.forget();
      const answer = await model.generate(prompt, { ...greedy(), maxTokens: 24 }).result;
      same(answer.prompt_tokens, prompt_ids.length, 'tokens of the prompt');
      if (turn) answers.push(answer);
      tell({ note: `${answer.decode_tokens_per_s} tokens a second` });
    }
    numbers.prompt_tokens = prompt_ids.length;
    numbers.first_token_s = median(answers.map((answer) => answer.time_to_first_token_s));
    numbers.tokens_per_s = median(answers.map((answer) => answer.decode_tokens_per_s));
    Object.assign(numbers, { adapter: model.info.caps.name, agent: navigator.userAgent });
  },
};

const only = query.get('only');
let failed = 0;
for (const [name, test] of Object.entries(query.has('speed') ? speed : tests)) {
  if (only && !name.includes(only)) continue;
  const start = performance.now();
  let fault = null;
  try {
    await test();
  } catch (error) {
    fault = `${error.message}\n${error.stack ?? ''}`;
    failed++;
    await network({});
  }
  await tell({ name, fault, seconds: (performance.now() - start) / 1000 });
}
await tell({ done: true, failed, numbers });
