// The bench page: `lamina bench kernel` in this tab.
import { Lamina } from '../lamina/index.js';
import { withoutGpu } from '../gpu.js';
import { $, element, facts, fromLink, share } from '../page.js';

const query = new URLSearchParams(location.search);
const SETS = {
  least: { batch: [1], heads: [16], context: [256, 1024], repeat: 2, mib: 16 },
  quick: { batch: [1], heads: [16, 128], context: [1024, 4096], repeat: 3, mib: 64 },
  one: { batch: [1], heads: [16, 128], context: [1024, 4096, 16384, 131072], repeat: 20, mib: 256 },
  many: { batch: [4, 16], heads: [16, 64, 128], context: [1024, 4096, 16384], repeat: 20, mib: 256 },
};

let report = null, stop = null;

const digits = (value) => value === null ? '-' : value >= 100 ? Math.round(value).toLocaleString('en') : +value.toPrecision(3) + '';
/** Arithmetic in the unit that fits. */
const rate = (tflops) => tflops < 0.5 ? `${digits(1000 * tflops)} GFLOP/s` : `${digits(tflops)} TFLOP/s`;
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const context = ({ contexts, tokens }) => contexts.map((count) => count.toLocaleString('en')).join(' ') + (tokens > 1 ? `, ${tokens} new` : '');
const beside = ({ published, gain_over_f16: gain }) =>
  published && report.device.type !== 'cpu' ? `${digits(published.ratio)}x ${published.by}` : gain ? `${gain.toFixed(2)}x f16` : '';

function ceilings() {
  const { ceilings: c, clock } = report;
  return [
    ['reading', `${digits(c.read_gbs)} GB/s`], ['copying', `${digits(c.copy_gbs)} GB/s`],
    ['f32 multiply-adds', rate(c.f32_tflops)],
    ...c.f16_tflops === null ? [] : [['f16 multiply-adds', rate(c.f16_tflops)]],
    ['a dispatch that waits', `${digits(c.dispatch_us)} µs`], ['submission to result', `${digits(c.round_trip_us)} µs`],
    ['times are taken by', clock.by === 'timestamps' ? 'the GPU' : 'its queue'],
  ];
}

const COLUMNS = ['sequences', 'heads', 'context', 'dtype', 'µs', 'GB/s', 'arithmetic', 'of ceiling', 'kernel', 'beside'];
const NUMBERS = new Set([0, 1, 2, 4, 5, 6, 7]);
const cells = (one) => [one.batch, one.heads, context(one), one.dtype, digits(one.median_us), digits(one.gbs), rate(one.tflops),
  `${percent(one.share)} ${one.bound}`, one.variant, beside(one)];
const left = () => [['failed its check', report.failed], ['skipped', report.skipped]].flatMap(([what, all]) =>
  all.map((one) => `${what}: ${one.batch} sequences, ${one.heads} heads, ${context(one)} tokens, ${one.dtype}: ${one.why}`));

function show() {
  $('result').hidden = false;
  $('ceilings').replaceChildren(...ceilings().map(([name, value]) => {
    const pair = document.createElement('div');
    pair.append(element('dt', name), element('dd', value));
    return pair;
  }));
  $('rows').replaceChildren(...report.decode.map((one) => {
    const line = document.createElement('tr');
    line.append(...cells(one).map((text, i) => element('td', text, NUMBERS.has(i) ? { className: 'number' } : {})));
    return line;
  }));
  const bars = report.decode.flatMap((one) => {
    const track = element('span', '', { className: 'track' });
    track.append(element('i', '', { className: one.bound, style: `width:${Math.min(100, 100 * one.share)}%` }));
    return [element('span', `${one.batch} × ${context(one)}, ${one.heads} heads, ${one.dtype}`, { className: 'shape' }), track,
      element('span', percent(one.share), { className: 'share' })];
  });
  const key = element('div', '', { className: 'key' });
  for (const [name, text] of [['memory', 'bound by reading the cache'], ['compute', 'bound by multiply-adds']]) {
    const label = element('span', '');
    label.append(element('i', '', { className: name }), text);
    key.append(label);
  }
  $('plot').replaceChildren(...bars, key);
  $('left').textContent = left().join('\n');
  $('left').className = report.failed.length ? 'bad' : 'soft';
}

function markdown() {
  const line = (list) => `| ${list.join(' | ')} |`;
  return [`${report.device.adapter} (${report.device.backend}), ${report.driver}, lamina ${report.version}`, '',
    line(['ceiling', 'measured']), line(['---', '---']), ...ceilings().map(line), '',
    line(COLUMNS), line(COLUMNS.map((_, i) => NUMBERS.has(i) ? '---:' : '---')), ...report.decode.map(cells).map(line),
    ...left().flatMap((text) => ['', text]), ''].join('\n');
}

async function run() {
  stop = new AbortController();
  report = null;
  $('run').disabled = true;
  $('stop').hidden = $('bar').hidden = false;
  $('result').hidden = true;
  $('bar').removeAttribute('value');
  $('status').textContent = 'Measuring what this GPU can do at most';
  try {
    report = await Lamina.bench({
      ...SETS[$('set').value], device: 'gpu', signal: stop.signal,
      onProgress({ done, total }) {
        Object.assign($('bar'), { value: done, max: total });
        $('status').textContent = `Shape ${done + 1} of ${total}`;
      },
    });
    show();
    $('status').textContent = '';
  } catch (error) {
    $('status').textContent = error.code === 'abort' ? 'Stopped.' : `${error.message} (${error.code})`;
  } finally {
    $('run').disabled = false;
    $('stop').hidden = $('bar').hidden = true;
    document.body.dataset.done = report ? 'yes' : $('status').textContent;
  }
}

$('form').onsubmit = (event) => {
  event.preventDefault();
  run();
};
$('stop').onclick = () => stop?.abort();
share({
  name: 'lamina-bench', markdown, json: () => report,
  // Shader keys are long, and say nothing that the variant does not.
  small: () => ({ ...report, decode: report.decode.map((one) => ({ ...one, keys: [] })) }),
});

const support = await Lamina.support();
if (support.webgpu) {
  const { caps } = await Lamina.device({ device: 'gpu' });
  $('adapter').replaceChildren(element('h2', caps.name), element('div', caps.driver, { className: 'small soft' }), facts(caps));
  $('work').hidden = false;
  // On a processor the others take hours.
  if (caps.device_type === 'cpu') $('set').value = 'least';
} else {
  $('adapter').replaceChildren(withoutGpu(support.reason));
}
if (query.has('set')) $('set').value = query.get('set');
try {
  report = await fromLink();
  if (report) {
    show();
    $('what').textContent = `A result that was shared: ${report.device.adapter}, ${report.driver}.`;
  }
} catch {
  $('what').textContent = 'The link holds no result that can be read.';
}
document.body.dataset.ready = 'yes';
if (query.has('run') && support.webgpu) run();
