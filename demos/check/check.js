// The check page: the cases of `lamina check` in this tab.
import { Lamina } from '../lamina/index.js';
import { withoutGpu } from '../gpu.js';
import { $, element, facts, fromLink, share } from '../page.js';

const query = new URLSearchParams(location.search);

let device, report, stop;

/** One row a kernel and variant: what the table, the markdown and the link show. */
function summary({ results }) {
  const rows = new Map();
  for (const one of results) {
    const key = `${one.kernel} ${one.variant}`;
    const row = rows.get(key) ?? { kernel: one.kernel, variant: one.variant, passed: 0, failed: 0, share: 0, error: 0 };
    one.passed ? row.passed++ : row.failed++;
    // JSON has no NaN: null stands for it, and is the worst there is.
    const share = one.nmse === null ? Infinity : one.nmse === 0 ? 0 : one.nmse / one.tolerance;
    row.share = Math.max(row.share, share);
    row.error = Math.max(row.error, one.max_error ?? Infinity);
    rows.set(key, row);
  }
  return [...rows.values()];
}

const shared = () => ({
  adapter: report.adapter, backend: report.backend, device_type: report.device_type, cases: report.cases,
  failed: report.failed, rows: report.rows ?? summary(report), agent: report.agent ?? navigator.userAgent,
});
const headline = ({ cases, failed }) => `${cases} cases: ${cases - failed} passed, ${failed} failed`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;

function show() {
  const all = shared();
  $('verdict').hidden = false;
  $('headline').textContent = headline(all);
  $('headline').className = all.failed ? 'bad' : 'good';
  $('rows').replaceChildren(...all.rows.map((row) => {
    const line = document.createElement('tr');
    line.append(element('td', row.kernel), element('td', row.variant), element('td', row.passed, { className: 'number' }),
      element('td', row.failed, { className: row.failed ? 'number bad' : 'number' }),
      element('td', percent(row.share), { className: 'number' }), element('td', row.error.toExponential(1), { className: 'number' }));
    return line;
  }));
  const failures = report.failures ?? [];
  $('failures').textContent = failures.map((one) =>
    `${one.kernel} ${one.variant}, ${one.case}: NMSE ${one.nmse}, tolerance ${one.tolerance}, largest error ${one.max_error}\n  ${one.place ?? ''}`).join('\n');
  $('json').hidden = !report.results;
}

function markdown() {
  const all = shared();
  const rows = all.rows.map((r) => `| ${r.kernel} | ${r.variant} | ${r.passed} | ${r.failed} | ${percent(r.share)} | ${r.error.toExponential(1)} |`);
  return [`${all.adapter} (${all.backend}), ${all.agent}`, '', headline(all), '',
    '| kernel | variant | passed | failed | worst, of its tolerance | largest error |', '| --- | --- | --- | --- | --- | --- |',
    ...rows, ''].join('\n');
}

async function run() {
  stop = new AbortController();
  $('run').disabled = true;
  $('stop').hidden = $('bar').hidden = false;
  $('verdict').hidden = true;
  const results = [];
  try {
    report = await Lamina.check({
      device: $('twins').checked ? 'cpu' : 'gpu', kernels: query.get('kernels')?.split(',') ?? [], every: Number(query.get('every') ?? 1), signal: stop.signal,
      onProgress({ done, total, kernel, outcomes }) {
        results.push(...outcomes);
        Object.assign($('bar'), { value: done, max: total });
        const failed = results.filter((one) => !one.passed).length;
        $('status').textContent = `${done} of ${total} cases, ${kernel}${failed ? `; ${failed} failed` : ''}`;
      },
    });
    report.failures = results.filter((one) => !one.passed);
    show();
    const longest = report.results.filter((one) => one.seconds).sort((a, b) => b.seconds - a.seconds).slice(0, 5)
      .map((one) => [one.seconds, `${one.kernel} ${one.variant}, ${one.case}`]);
    $('status').textContent = `The slowest case took ${report.slowest_case_s.toFixed(1)} s.${longest.length
      ? ` The longest submission took ${longest[0][0].toFixed(2)} s: ${longest[0][1]}.` : ''}`;
    document.body.dataset.longest = JSON.stringify(longest);
  } catch (error) {
    $('status').textContent = error.code === 'abort' ? 'Stopped.' : `${error.message} (${error.code})`;
  } finally {
    $('run').disabled = false;
    $('stop').hidden = $('bar').hidden = true;
    document.body.dataset.seconds = JSON.stringify(report?.kernel_s ?? {});
    document.body.dataset.done = report ? `${report.cases} ${report.failed}` : 'failed';
  }
}

$('run').onclick = run;
$('stop').onclick = () => stop?.abort();
share({ name: 'lamina-check', markdown, small: shared, json: () => ({ ...report, failures: undefined }) });

const support = await Lamina.support();
device = await Lamina.device({ device: support.webgpu ? 'gpu' : 'cpu' });
const { caps } = device;
const paths = element('details', '', { className: 'small' });
paths.append(element('summary', 'Which path each kernel takes here, and why', { className: 'soft' }));
const table = element('table', '');
for (const { kernel, variant, why } of device.paths) {
  const line = document.createElement('tr');
  line.append(element('td', kernel), element('td', variant), element('td', why));
  table.append(line);
}
const scroll = element('div', '', { className: 'scroll' });
scroll.append(table);
paths.append(scroll);
$('adapter').replaceChildren(element('h2', caps.name), element('div', caps.driver, { className: 'small soft' }), facts(caps), paths);
if (!support.webgpu) {
  $('adapter').prepend(withoutGpu(support.reason));
  $('twins').checked = $('twins').disabled = true;
}
$('work').hidden = false;
try {
  const told = await fromLink();
  if (told) {
    report = told;
    show();
    $('what').textContent = `A result that was shared: ${report.adapter}, ${report.agent}.`;
  }
} catch {
  $('what').textContent = 'The link holds no result that can be read.';
}
document.body.dataset.ready = 'yes';
if (query.has('run')) run();
