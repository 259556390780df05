// Pictures of the pages for the README: with Chromium on SwiftShader and Node 22,
// or 20 with --experimental-websocket: node tests/web/screens.mjs SITE FOLDER [webp|png [chat,check,bench]]
import { spawn } from 'node:child_process';
import { createServer } from 'node:http';
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const [site, folder, format = 'webp', pages = 'chat,check,bench'] = process.argv.slice(2);
const types = { html: 'text/html', js: 'text/javascript', css: 'text/css', wasm: 'application/wasm', json: 'application/json' };
const server = createServer((request, answer) => {
  let path = join(site, new URL(request.url, 'http://localhost').pathname);
  try {
    if (statSync(path).isDirectory()) path = join(path, 'index.html');
    answer.setHeader('content-type', types[path.split('.').pop()] ?? 'application/octet-stream');
    answer.end(readFileSync(path));
  } catch {
    answer.writeHead(404).end();
  }
}).listen(0, '127.0.0.1');
await new Promise((done) => server.once('listening', done));
const home = `http://127.0.0.1:${server.address().port}`;

const profile = mkdtempSync(join(tmpdir(), 'lamina-'));
const browser = spawn('chromium', ['--headless=new', '--no-sandbox', '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader',
  '--no-first-run', '--disable-dev-shm-usage', '--hide-scrollbars', '--remote-debugging-port=0', `--user-data-dir=${profile}`], { stdio: ['ignore', 'ignore', 'pipe'] });
const port = await new Promise((found) => browser.stderr.on('data', (text) => {
  const match = /127\.0\.0\.1:(\d+)\//.exec(text);
  if (match) found(match[1]);
}));

async function page(width, height, scale, dark, phone) {
  const { webSocketDebuggerUrl, id } = await (await fetch(`http://127.0.0.1:${port}/json/new?about:blank`, { method: 'PUT' })).json();
  const socket = new WebSocket(webSocketDebuggerUrl), calls = new Map();
  await new Promise((done) => socket.addEventListener('open', done));
  socket.addEventListener('message', ({ data }) => {
    const { id, result } = JSON.parse(data);
    calls.get(id)?.(result);
  });
  let next = 0;
  const call = (method, params = {}) => new Promise((done) => {
    calls.set(++next, done);
    socket.send(JSON.stringify({ id: next, method, params }));
  });
  await call('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: scale, mobile: phone });
  await call('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: dark ? 'dark' : 'light' }] });
  const evaluate = async (expression) => (await call('Runtime.evaluate', { expression, awaitPromise: true, returnByValue: true })).result?.value;
  return {
    call, evaluate,
    async until(expression, seconds = 600) {
      for (let i = 0; i < 2 * seconds; i++) {
        if (await evaluate(expression)) return;
        await new Promise((done) => setTimeout(done, 500));
      }
      throw new Error(`never: ${expression}`);
    },
    async save(name) {
      const { data } = await call('Page.captureScreenshot', { format, ...format === 'webp' ? { quality: 70 } : {} });
      writeFileSync(join(folder, `${name}.${format}`), Buffer.from(data, 'base64'));
    },
    async close() { await fetch(`http://127.0.0.1:${port}/json/close/${id}`); },
  };
}

const sizes = { desktop: [1100, 720, 1, false, false], phone: [390, 780, 1.5, true, true] };
const write = (text) => `document.getElementById('text').value = ${JSON.stringify(text)}; document.getElementById('form').requestSubmit()`;
try {
  for (const [name, size] of Object.entries(sizes)) {
    if (pages.includes('chat')) {
      const chat = await page(...size);
      await chat.call('Page.navigate', { url: `${home}/chat/?temperature=0.7&seed=3&maxTokens=48` });
      await chat.until('document.getElementById("send")?.disabled === false');
      for (const text of ['Once upon a time a fox found a key', 'The fox opened the door.']) {
        await chat.evaluate(write(text));
        await chat.until('!document.body.dataset.writing');
      }
      await chat.save(`chat-${name}`);
      await chat.close();
    }
    for (const [what, url] of [['check', 'check/?run&kernels=add,rms_norm,rope,mla_append,moe_route,swiglu'], ['bench', 'bench/?run&set=least']]) {
      if (!pages.includes(what)) continue;
      const other = await page(...size);
      await other.call('Page.navigate', { url: `${home}/${url}` });
      await other.until('document.body.dataset.done');
      // From the verdict or the ceilings on; the device stands above.
      await other.evaluate('document.getElementById("work").scrollIntoView()');
      await other.save(`${what}-${name}`);
      await other.close();
    }
  }
} finally {
  browser.kill();
  server.close();
  await new Promise((done) => setTimeout(done, 1000));
  rmSync(profile, { recursive: true, force: true });
}
process.exit(0);
