// Gives every WGSL file of a folder to Tint, Chromium's compiler, by Dawn for Node: node tint.mjs FOLDER
// A pipeline is made too: what a compiler finds only there counts.
import { readdirSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const [folder, modules] = process.argv.slice(2);
const { create, globals } = createRequire(join(modules, 'x.js'))('webgpu');
Object.assign(globalThis, globals);
const gpu = create(['backend=null']);
const adapter = await gpu.requestAdapter();
const limits = Object.fromEntries(['maxComputeWorkgroupStorageSize', 'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX', 'maxStorageBuffersPerShaderStage'].map((name) => [name, adapter.limits[name]]));
const device = await adapter.requestDevice({ requiredFeatures: ['shader-f16'], requiredLimits: limits });
let failed = 0;
const files = readdirSync(folder).filter((name) => name.endsWith('.wgsl')).sort();
for (const name of files) {
  const code = readFileSync(join(folder, name), 'utf8');
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code });
  const { messages } = await module.getCompilationInfo();
  device.createComputePipeline({ layout: 'auto', compute: { module, entryPoint: 'main' } });
  const fault = await device.popErrorScope();
  const errors = messages.filter(({ type }) => type === 'error');
  // This adapter's own limits say nothing of the text.
  if (!errors.length && (!fault || /exceeds the maximum/.test(fault.message))) continue;
  failed++;
  console.log(`${code.split('\n')[0]}\n  ${errors.map((m) => `line ${m.lineNum}: ${m.message}`).join('\n  ') || fault.message.slice(0, 600)}`);
  if (errors[0]) console.log(`    ${code.split('\n')[errors[0].lineNum - 1]}`);
}
console.log(`${files.length} shaders, ${failed} refused by Tint`);
process.exit(failed || !files.length ? 1 : 0);
