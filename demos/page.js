// What the pages of measurements share: the device's facts, and ways to pass a result on.

export const $ = (id) => document.getElementById(id);
export const element = (tag, text, properties = {}) => Object.assign(document.createElement(tag), { textContent: text }, properties);

const mib = (bytes) => bytes >= 1 << 30 ? `${+(bytes / 2 ** 30).toFixed(2)} GiB` : `${+(bytes / 2 ** 20).toFixed(2)} MiB`;

/** The list of a device's limits. */
export function facts(caps) {
  const list = element('dl', '', { className: 'facts' });
  const pairs = [
    ['f16 in shaders', caps.f16 ? 'yes' : 'no'], ['workgroup memory', `${caps.workgroup_bytes >> 10} KiB`],
    ['invocations', caps.invocations], ['storage buffers', caps.storage_buffers],
    ['largest binding', mib(caps.binding_bytes)], ['largest buffer', mib(caps.buffer_bytes)],
    ['timestamps', caps.timestamps ? 'yes' : 'no'],
  ];
  for (const [name, value] of pairs) {
    const pair = document.createElement('div');
    pair.append(element('dt', name), element('dd', value));
    list.append(pair);
  }
  return list;
}

async function packed(bytes, stream) {
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());
}

/** This page's address with a result in its fragment, which no server sees. */
async function linkTo(result) {
  const bytes = await packed(new TextEncoder().encode(JSON.stringify(result)), new CompressionStream('deflate-raw'));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(''));
  return `${location.origin}${location.pathname}#result=${text.replaceAll('+', '-').replaceAll('/', '_').replace(/=+$/, '')}`;
}

/** The result that the address carries: null where there is none; throws where it cannot be read. */
export async function fromLink() {
  const text = /^#result=(.+)$/.exec(location.hash)?.[1];
  if (!text) return null;
  const bytes = Uint8Array.from(atob(text.replaceAll('-', '+').replaceAll('_', '/')), (c) => c.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(await packed(bytes, new DecompressionStream('deflate-raw'))));
}

/** Buttons that pass a result on: `markdown()` its text, `small()` what a link carries, `json()` all of it. */
export function share({ name, markdown, small, json }) {
  const say = (text) => { $('said').textContent = text; };
  $('markdown').onclick = () => navigator.clipboard.writeText(markdown()).then(() => say('Copied.'), () => {
    $('text').hidden = false;
    $('text').textContent = markdown();
  });
  $('link').onclick = async () => {
    const url = await linkTo(small());
    history.replaceState(null, '', url);
    navigator.clipboard.writeText(url).then(() => say('Copied.'), () => say('It is in the address bar.'));
  };
  $('json').onclick = () => {
    const url = URL.createObjectURL(new Blob([JSON.stringify(json(), null, 2)], { type: 'application/json' }));
    Object.assign(document.createElement('a'), { href: url, download: `${name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  };
}
