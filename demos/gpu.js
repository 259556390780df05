// What to do where a browser offers no WebGPU.

const WAYS = [
  ['Chrome, Edge, Opera 113 or later', 'On Windows, macOS, ChromeOS and Android it is on. On Linux open chrome://flags, enable "Unsafe WebGPU Support" and "Vulkan", and start again. See chrome://gpu.'],
  ['Firefox', 'On Windows from 141 and on macOS from 145 it is on. Elsewhere open about:config and set dom.webgpu.enabled to true.'],
  ['Safari', 'From Safari 26 (macOS, iOS and iPadOS 26) it is on. Before: Settings, Apps, Safari, Advanced, Feature Flags, WebGPU.'],
];
const REASONS = {
  insecure: 'This page came over plain http, where browsers give no WebGPU. Open it over https, or from localhost.',
  missing: 'This browser has no WebGPU, or it is switched off.',
  'no-adapter': 'This browser knows WebGPU but found no graphics adapter for it: a driver that is missing, blocked or switched off.',
};

/** A section that says why there is no WebGPU and how to turn it on. */
export function withoutGpu(reason) {
  const section = document.createElement('section');
  section.id = 'no-webgpu';
  const head = document.createElement('h2');
  head.textContent = 'No WebGPU here';
  const why = document.createElement('p');
  why.textContent = `${REASONS[reason] ?? REASONS.missing} The small model runs all the same, on the CPU as WebAssembly.`;
  const list = document.createElement('dl');
  list.className = 'small';
  for (const [browser, way] of WAYS) {
    list.append(Object.assign(document.createElement('dt'), { textContent: browser, style: 'font-weight:600' }),
      Object.assign(document.createElement('dd'), { textContent: way, style: 'margin:0 0 .5rem' }));
  }
  section.append(head, why, list);
  return section;
}
